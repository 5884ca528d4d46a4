"""What a draft is worth on held-out episodes: how often it says what the main head says, and what its eyes add."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd_trt.config import ARM_DIMS
from rsd_trt.models.codec import Codec
from rsd_trt.models.components import ActionTransform, agreeing_steps
from rsd_trt.models.vision_draft import VisionDraft
from rsd_trt.training.batches import Batch, Batches, other_episodes
from rsd_trt.training.targets import corrected_targets, decode_z

TOLERANCES = (0.1, 0.2, 0.4)  # environment units
SHOWN = 0.2  # the one that steps, tasks and progress are told at
BATCH = 256
REJECTED = 0.2  # share of the main head's own chunks that a threshold of likelihoods may reject


@dataclass(frozen=True)
class HeldOut:
    """Shares of frames. A frame agrees where the first step of the draft's chunk lies within the tolerance of the main
    head's in every arm dimension and has the same gripper sign.

    agreement, blind: by `TOLERANCES`; blind: with the images of other episodes, so that what lies between the two is
    what the eyes contribute. by_step: of each step of the chunk, at `SHOWN`. by_task: by instruction, at `SHOWN`.
    accuracy: of the training's targets, by coarse layer. likelihood: the threshold with which the rule `likelihood`
    rejects a share of `REJECTED` of the main head's fresh chunks, by their first `ahead` steps.
    """

    frames: int
    episodes: int
    agreement: tuple[float, ...]
    blind: tuple[float, ...]
    by_step: tuple[float, ...]
    by_task: dict[str, float]
    accuracy: tuple[float, ...]
    likelihood: float

    @property
    def shown(self) -> tuple[float, float]:
        """Agreement and blind agreement at `SHOWN`."""
        place = TOLERANCES.index(SHOWN)
        return self.agreement[place], self.blind[place]


@torch.inference_mode()
def measure(
    draft: VisionDraft, codec: Codec, transform: ActionTransform, batches: Batches, ahead: int, most: int | None = None
) -> HeldOut:
    """In float32, over at most `most` held-out frames. ahead: steps that a check looks at."""
    index = batches.held_out
    if most is not None:
        index = index[np.linspace(0, len(index) - 1, min(most, len(index))).astype(np.int64)]
    strangers = other_episodes(batches.start, batches.instruction, index)
    table, dims = codec.rfsq.table(), (draft.dims.T, draft.dims.D)

    def said(frames: NDArray[np.int64], images_of: NDArray[np.int64] | None) -> tuple[Tensor, Tensor, Batch]:
        """Logits, the chunk that they decode to, and what the main head says."""
        batch = batches.plain(frames, images_of)
        logits = draft.classify(draft.see(batch.images, batch.state, batch.words)[0])
        return logits, transform(codec.decoder(decode_z(logits.argmax(-1), table, dims))), batch

    found: dict[str, list[Tensor]] = {}
    for first in range(0, len(index), BATCH):
        frames, others = index[first : first + BATCH], strangers[first : first + BATCH]
        main = batches.chunk(frames)
        logits, guess, batch = said(frames, None)
        unseen = said(frames, others)[1]
        right = logits.argmax(-1) == corrected_targets(batch.z, logits, table)
        some = {"accuracy": right.float().mean(2), "likelihood": _likelihood(logits, batch, table, ahead)}
        for tolerance in TOLERANCES:
            some[f"agreement {tolerance}"] = _agree(guess, main, tolerance)
            some[f"blind {tolerance}"] = _agree(unseen, main, tolerance)
        for name, value in some.items():
            found.setdefault(name, []).append(value.float().cpu())
    shares = {name: torch.cat(values) for name, values in found.items()}
    first_step = shares[f"agreement {SHOWN}"][:, 0].numpy()
    task = batches.instruction[index]
    names = batches.store.instructions
    return HeldOut(
        frames=len(index),
        episodes=len(np.unique(batches.episode[index])),
        agreement=tuple(_share(shares[f"agreement {t}"][:, 0]) for t in TOLERANCES),
        blind=tuple(_share(shares[f"blind {t}"][:, 0]) for t in TOLERANCES),
        by_step=tuple(map(_share, shares[f"agreement {SHOWN}"].T)),
        by_task={names[t]: round(float(first_step[task == t].mean()), 4) for t in np.unique(task)},
        accuracy=tuple(map(_share, shares["accuracy"].T)),
        likelihood=round(float(shares["likelihood"].quantile(REJECTED)), 4),
    )


def _likelihood(logits: Tensor, batch: Batch, table: Tensor, ahead: int) -> Tensor:
    """The mean log-probability [B] of the main head's L0 tokens of the next steps, as the rule `likelihood` has it. A
    head's own tokens need not be the levels nearest to z."""
    if batch.tokens is not None:
        tokens = batch.tokens[:, :ahead, :, 0].flatten(1)  # [B, ahead*D]
    else:
        tokens = (batch.z[:, :ahead].flatten(1)[..., None] - table[0]).abs().argmin(-1)
    own = logits[:, 0, : tokens.shape[1]].log_softmax(-1).gather(-1, tokens[..., None])
    return own[..., 0].mean(1)


def _agree(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    return agreeing_steps(a, b, torch.full((ARM_DIMS,), tolerance, device=a.device))


def _share(values: Tensor) -> float:
    return round(float(values.mean()), 4)
