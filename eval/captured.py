"""The stages of the fused backbone, each as a CUDA graph of its own."""

from __future__ import annotations

from torch import nn

from rsd_trt.config import BundleConfig
from rsd_trt.eval.clock import Run
from rsd_trt.eval.work import Stage
from rsd_trt.models.backbone import BackboneInputs
from rsd_trt.models.fused_backbone import FusedBackbone
from rsd_trt.runtime.graph_forward import Inputs
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.session import capture


def captured_calls(
    backbone: nn.Module,
    preprocess: Preprocessor,
    inputs: BackboneInputs,
    observation: Observation,
    config: BundleConfig,
) -> dict[Stage, Run]:
    """What replays each of the backbone's stages, cut as `GraphForward` cuts them. To be called in inference mode."""
    assert isinstance(backbone, FusedBackbone)
    k, blocks = config.rsd.draft_block, config.backbone.language.blocks
    written = Inputs(preprocess, 1, inputs.tokens.shape[1])
    written.write([observation])
    written.upload()
    embedded = backbone.embed(inputs.pixels, inputs.tokens, inputs.proprio).clone()
    last = inputs.lengths + (embedded.shape[1] - inputs.tokens.shape[1] - 1)
    early = backbone.blocks(embedded, 0, min(k, blocks - 1)).clone()

    def preprocessed() -> object:
        written.upload()
        return preprocess.pixels(written.images.device)

    def until_k() -> object:
        stream = backbone.blocks(embedded, 0, min(k, blocks - 1))
        return backbone.finish(stream, last) if k == blocks else backbone.read(stream, last)

    runs: dict[Stage, Run] = {
        "preprocess": preprocessed,
        "vision": lambda: backbone.embed(inputs.pixels, inputs.tokens, inputs.proprio),
        "blocks <= k": until_k,
        "blocks > k": lambda: backbone.finish(backbone.blocks(early, min(k, blocks - 1), blocks - 1), last),
    }
    return {stage: _replayed(run, preprocess) for stage, run in runs.items()}


def _replayed(run: Run, preprocess: Preprocessor) -> Run:
    """Replays a graph of `run`, and keeps what it reads."""

    def launch() -> None:
        run()

    graph = capture(launch, preprocess.device)

    def replay(kept: Run = run) -> None:
        graph.replay()

    return replay
