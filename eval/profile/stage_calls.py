"""What computes each stage of a query alone: eager calls, or CUDA graphs cut as `GraphForward` cuts them."""

from __future__ import annotations

import torch
from torch import Tensor

from rsd_trt.config import BundleConfig
from rsd_trt.eval.profile.clock import Call
from rsd_trt.eval.profile.inputs import QueryInputs
from rsd_trt.eval.profile.roofline import Stage
from rsd_trt.eval.verify.oracle import Oracle
from rsd_trt.models.backbone import Backbone, BackboneInputs, BackboneState
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.graph_forward import Inputs
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.session import capture


def preprocessor(given: QueryInputs, backbone: Backbone | FusedBackbone, device: torch.device) -> Preprocessor:
    """For pixels in the backbone's precision."""
    config = given.bundle.config
    dtype: torch.dtype = backbone.projector.fc1.weight.dtype
    return Preprocessor(config.control, config.backbone, given.bundle.tokenizer(), device, dtype)


@torch.inference_mode()
def stage_calls(backbone: Backbone | FusedBackbone, launcher: Launcher, given: QueryInputs) -> dict[Stage, Call]:
    """A call for each stage, on inputs that are on the device, but for the image."""
    config, device, observation = given.bundle.config, launcher.device, given.observations[0]
    preprocess = preprocessor(given, backbone, device)
    inputs = preprocess([observation])
    if isinstance(backbone, Backbone):
        calls = _eager(backbone, preprocess, inputs, observation, config)
    else:
        calls = _captured(backbone, preprocess, inputs, observation, config)
    dims = config.dims
    propose, predict = launcher.open("propose", "1"), launcher.open("predict", "1")
    hidden = torch.randn(1, config.hidden, device=device)
    head_inputs = {
        "hidden": hidden.clone(),
        "coarse_actions": torch.zeros(1, dims.T, dims.A, device=device),
        "tolerance": torch.tensor(config.rsd.tolerance, device=device),
    }
    if config.head.kind == "conditioned":
        head_inputs["condition"] = torch.zeros(1, dims.T, dims.D, dims.C, dtype=torch.int64, device=device)
    calls |= {"propose": lambda: propose.run({"hidden": hidden}), "predict": lambda: predict.run(head_inputs)}
    if config.rsd.draft_block == config.backbone.language.blocks:
        del calls["blocks > k"]
    return calls


def _eager(
    backbone: Backbone, preprocess: Preprocessor, inputs: BackboneInputs, observation: Observation, config: BundleConfig
) -> dict[Stage, Call]:
    k, blocks = config.rsd.draft_block, config.backbone.language.blocks
    embedded = backbone.embed(inputs)
    early = backbone.resume(embedded, k)
    return {
        "preprocess": lambda: preprocess([observation]),
        "vision": lambda: backbone.embed(inputs),
        "blocks <= k": lambda: backbone.hidden(backbone.resume(embedded, k)).float(),
        "blocks > k": lambda: backbone.hidden(backbone.resume(early, blocks)).float(),
    }


def _captured(
    backbone: FusedBackbone,
    preprocess: Preprocessor,
    inputs: BackboneInputs,
    observation: Observation,
    config: BundleConfig,
) -> dict[Stage, Call]:
    blocks = config.backbone.language.blocks
    k = min(config.rsd.draft_block, blocks - 1)
    textbook = config.rsd.draft_block == blocks
    written = Inputs(preprocess, 1, inputs.tokens.shape[1])
    written.write([observation])
    embedded = backbone.embed(inputs.pixels, inputs.tokens, inputs.proprio).clone()
    last = inputs.lengths + (embedded.shape[1] - inputs.tokens.shape[1] - 1)
    early = backbone.blocks(embedded, 0, k).clone()

    def preprocessed() -> object:
        written.upload()
        return preprocess.pixels(written.images.device)

    def until_k() -> object:
        stream = backbone.blocks(embedded, 0, k)
        return backbone.finish(stream, last) if textbook else backbone.read(stream, last)

    calls: dict[Stage, Call] = {
        "preprocess": preprocessed,
        "vision": lambda: backbone.embed(inputs.pixels, inputs.tokens, inputs.proprio),
        "blocks <= k": until_k,
        "blocks > k": lambda: backbone.finish(backbone.blocks(early, k, blocks - 1), last),
    }
    return {stage: _replayed(call, preprocess.device) for stage, call in calls.items()}


def _replayed(call: Call, device: torch.device) -> Call:
    """Replays a graph of `call`, and keeps what it reads."""

    def launch() -> None:
        call()

    graph = capture(launch, device)

    def replay(kept: Call = call) -> None:
        graph.replay()

    return replay


class OracleBackbone:
    """The oracle in a backbone's place, for queries that run all of it."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle

    def run(self, inputs: BackboneInputs, until: int) -> BackboneState:
        hidden = self.oracle.hidden(inputs)  # [B, H]
        return BackboneState(hidden[:, None], torch.zeros_like(inputs.lengths), until)

    def resume(self, state: BackboneState, until: int) -> BackboneState:
        return state

    def hidden(self, state: BackboneState) -> Tensor:
        return state.stream[:, 0]
