"""What computes each stage of a query alone: eager calls, or CUDA graphs of its own."""

from __future__ import annotations

import torch

from rsd_trt.eval.profile.clock import Call
from rsd_trt.eval.profile.inputs import QueryInputs
from rsd_trt.eval.profile.roofline import Stage
from rsd_trt.models.backbone import Backbone, BackboneInputs, positions_read
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.graph_backbone import Inputs
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
        calls = _eager(backbone, preprocess, inputs, observation)
    else:
        calls = _captured(backbone, preprocess, inputs, observation)
    dims, predict = config.dims, launcher.open("predict", "1")
    head_inputs = {"hidden": torch.randn(1, *config.backbone.hidden_shape, device=device)}
    if config.head.kind == "conditioned":
        head_inputs["condition"] = torch.zeros(1, dims.T, dims.D, dims.C, dtype=torch.int64, device=device)
    return calls | {"predict": lambda: predict.run(head_inputs)}


def _eager(
    backbone: Backbone, preprocess: Preprocessor, inputs: BackboneInputs, observation: Observation
) -> dict[Stage, Call]:
    stream, last = backbone.embed(inputs)
    return {
        "preprocess": lambda: preprocess([observation]),
        "vision": lambda: backbone.embed(inputs),
        "blocks": lambda: backbone.language(stream, last).float(),
    }


def _captured(
    backbone: FusedBackbone, preprocess: Preprocessor, inputs: BackboneInputs, observation: Observation
) -> dict[Stage, Call]:
    written = Inputs(preprocess, 1, inputs.tokens.shape[1])
    written.write([observation])
    embedded = backbone.embed(inputs.pixels, inputs.tokens, inputs.proprio).clone()
    read = positions_read(backbone.config, inputs.lengths + (embedded.shape[1] - inputs.tokens.shape[1]))

    def preprocessed() -> object:
        written.upload()
        return preprocess.seen(written.images.device)

    calls: dict[Stage, Call] = {
        "preprocess": preprocessed,
        "vision": lambda: backbone.embed(inputs.pixels, inputs.tokens, inputs.proprio),
        "blocks": lambda: backbone.language(embedded, read),
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
