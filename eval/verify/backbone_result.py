"""What is said of a backbone beside its reference: the errors, the limits, and what exceeds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rsd_trt.manifest import Batch

Arithmetic = Literal["float32", "bfloat16", "fp8"]


@dataclass(frozen=True)
class Limit:
    """What passes: the largest error of the final hidden state, and the smallest cosine of any state."""

    max_abs: float
    cosine: float

    def exceeded(self, max_abs: float, *cosines: float) -> tuple[str, ...]:
        """What does not pass, with both values. NaN passes nothing."""
        large = [] if max_abs <= self.max_abs else [f"max abs {max_abs:.2g} > {self.max_abs:g}"]
        small = [f"cosine {cosine:.6f} < {self.cosine:g}" for cosine in cosines if not cosine >= self.cosine]
        return (*large, *small)


LIMITS: dict[Arithmetic, Limit] = {
    "float32": Limit(1e-3, 0.999999),
    "bfloat16": Limit(float("inf"), 0.9999),
    "fp8": Limit(float("inf"), 0.999),
}
NO_LIMIT = Limit(float("inf"), -1)


@dataclass(frozen=True)
class BackboneParity:
    """One way of running the backbone, or a part of it, beside a reference. Errors are the worst of all inputs.

    `early`: after block k, before the draft; without it: after block N and the final norm. Of `preprocessing`, max_abs
    is in levels of 8 bits.
    """

    component: str  # backbone, language, towers.0, towers.1 or preprocessing
    backend: str
    precision: Arithmetic
    batch: Batch
    reference: str
    rows: int
    max_abs: float
    cosine: float
    early_max_abs: float | None = None
    early_cosine: float | None = None
    draft_flips: tuple[float, ...] | None = None  # share of different tokens, for each coarse layer
    flips: tuple[float, ...] | None = None  # the same of the main head's, for each layer
    action_max_abs: float | None = None  # of the plans, in environment units
    action_mean_abs: float | None = None
    steps_apart: float | None = None  # share of the plans' steps that differ by more than the bundle's tolerance
    exceeded: tuple[str, ...] = ()  # which limits, with both values; empty: passed


def worst(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The largest error, and the smallest cosine of two rows [n, width]; NaN if any value is none."""
    errors, cosines = [], []
    for found, expected in pairs:
        x, y = found.double(), expected.double()
        errors.append((x - y).abs().max())
        cosines.append(cosine_similarity(x, y, dim=-1).min())
    return float(torch.stack(errors).max()), float(torch.stack(cosines).min())
