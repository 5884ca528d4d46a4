"""The draft's training: cross-entropy against what the main head's chunk leaves for each coarse layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from rsd_trt.models.codec import Codec
from rsd_trt.models.components import ActionTransform
from rsd_trt.models.vision_draft import VisionDraft
from rsd_trt.training.batches import Batches
from rsd_trt.training.loop import Loop, LoopSettings, read_trained
from rsd_trt.training.measure import measure
from rsd_trt.training.targets import corrected_targets, layer_losses, total_loss

log = logging.getLogger(__name__)

NAME = "draft"
CHECKPOINT = f"{NAME}.pt"


@dataclass(frozen=True)
class Fitted:
    """How a training went."""

    step: int
    elapsed: float  # s
    samples_per_second: float | None  # the median of what was logged in this process


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def draft_logits(draft: VisionDraft, images: Tensor, state: Tensor | None, words: Tensor) -> Tensor:
    """What the draft says [B, C, T*D, K] of images that are rotated and resized already, the normalised state and the
    instructions' rows; the classifiers in float32: the targets depend on an exact argmax."""
    with autocast(images.device):
        readout = draft.see(images, state, words)[0]
    return draft.classify(readout.float())


def fit(
    draft: VisionDraft,
    codec: Codec,
    transform: ActionTransform,
    batches: Batches,
    folder: Path,
    limits: LoopSettings,
    batch: int,
    measure_every: float,
    measured: int,
    ahead: int,
    on_record: Callable[[float, Mapping[str, object]], None],
) -> Fitted:
    """Trains until the limit, from the last checkpoint in `folder` on. Measures the averaged weights every
    `measure_every` s and at the end, over `measured` held-out frames at the most. ahead: steps that checks look at."""
    rates: list[float] = []

    def told(line: Mapping[str, object]) -> None:
        if isinstance(rate := line.get("samples_per_s"), int):
            rates.append(rate)
        on_record(loop.progress, line)

    loop = Loop(NAME, folder, draft, limits, told)
    table, steps = codec.rfsq.table(), draft.dims.T
    if batches.device.type == "cuda" and find_spec("triton") is not None:
        for block in draft.blocks:
            block.compile(dynamic=False)
    coming = batches.batches(loop.step, batch)
    at = loop.elapsed

    def held_out() -> None:
        assert isinstance(loop.average, VisionDraft)
        found = measure(loop.average, codec, transform, batches, ahead, measured)
        agreement, blind = found.shown
        loop.record(kind="held_out", agreement=agreement, blind=blind, accuracy=list(found.accuracy))

    for _ in loop.steps(batch):
        seen = next(coming)
        logits = draft_logits(draft, seen.images, seen.state, seen.words)
        losses = layer_losses(logits, corrected_targets(seen.z, logits, table), steps)
        loss = total_loss(losses)
        loop.update(loss, {"loss": loss, **{f"ce{i}": value for i, value in enumerate(losses)}})
        if loop.elapsed - at > measure_every:
            held_out()
            at = loop.elapsed
    held_out()
    rate = sorted(rates)[len(rates) // 2] if rates else None
    return Fitted(loop.step, loop.elapsed, rate)


def read_draft(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of the last checkpoint."""
    return read_trained(folder, NAME).average
