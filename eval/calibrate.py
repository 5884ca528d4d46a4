"""The acceptance tolerance from data, with a bound on how often a query is accepted wrongly.

In shadow mode every query runs the main head too. The recorded gaps say, for each step of the live plan that a query
could commit, how far the draft and how far the main head's new plan are from it. A step is *right* while the new
plan moves it by at most `limit` and keeps its gripper. A query is accepted wrongly when it commits a step that is
not right; the false-accept rate is the share of wrongly accepted queries among those that have such a step.

The tolerance is `scale * spread`. `spread` is the draft's own error by dimension: a quantile of its gap at steps
that are right. A query's *score* is the smallest scale at which it would be accepted wrongly, and `scale` stays below
the k-th smallest of the n scores, k = floor(alpha (n + 1)): a new query that is exchangeable with them scores less
with a probability of at most alpha (split conformal prediction: Vovk, Gammerman and Shafer 2005). Queries of one
episode resemble each other, so the rate is also measured on episodes that were held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS
from rsd_trt.errors import UserError
from rsd_trt.eval.results import Episode, Results
from rsd_trt.eval.statistics import wilson

SPREAD_QUANTILE = 0.9
FINEST = 1e-4  # environment units: gaps are recorded, and tolerances written, to this
WIDEST = 2.0  # environment units: the whole range of an action
CURVE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # alphas that are shown beside the one that was asked for


@dataclass(frozen=True)
class Judged:
    """A query that tested a live plan. Gaps [n, A] over the steps that it could commit, n >= 1."""

    draft: NDArray[np.float64]
    right: int  # leading steps that the main head's new plan confirms

    @property
    def can_be_wrong(self) -> bool:
        return self.right < len(self.draft)

    def score(self, spread: NDArray[np.float64]) -> float:
        """The smallest scale at which a step that is not right would be committed; infinite if none ever is."""
        if not self.can_be_wrong:
            return math.inf
        steps = self.draft[: self.right + 1]
        if steps[:, ARM_DIMS].any():  # the draft's own gripper ends the prefix before
            return math.inf
        return float((steps[:, :ARM_DIMS] / spread).max())

    def committed(self, tolerance: NDArray[np.float64]) -> int:
        """Steps that `rsd` would commit."""
        passes = (self.draft[:, :ARM_DIMS] <= tolerance).all(axis=1) & (self.draft[:, ARM_DIMS] == 0)
        return int(passes.cumprod().sum())


@dataclass(frozen=True)
class Acceptance:
    """What a tolerance does to queries, as shares with 95% Wilson intervals."""

    alpha: float | None  # that it was chosen for
    tolerance: tuple[float, ...]  # by arm dimension, environment units
    acceptance: float  # of the queries that tested a plan
    acceptance_interval: tuple[float, float] | None
    false_accepts: float | None  # of those that can be accepted wrongly
    false_accepts_interval: tuple[float, float] | None
    wrong_among_accepted: float | None


@dataclass(frozen=True)
class Calibration:
    """A tolerance and what it does on the held-out episodes, beside the bundle's own and other alphas'."""

    chosen: Acceptance
    before: Acceptance
    curve: tuple[Acceptance, ...]
    limit: tuple[float, ...]  # by arm dimension, environment units
    episodes: int  # calibrated on
    queries: int  # calibrated on
    held_out_episodes: int
    held_out_queries: int


def calibrate(bundle: Bundle, shadow: Results, alpha: float, limit: float | None = None, seed: int = 0) -> Calibration:
    """Chooses the tolerance on one half of a shadow run's episodes and measures it on the other.

    limit: how far the main head may move a step, in environment units, and the plan still counts as right;
    None: the run's own tolerance, by dimension.

    Raises:
        UserError: not a shadow run of this bundle, or too few queries for `alpha`.
    """
    settings = shadow.settings
    if settings.mode != "shadow":
        raise UserError(f"the results are of mode {settings.mode}; calibrate needs: rsd-trt eval --mode shadow")
    if settings.bundle_sha256 != bundle.fingerprint:
        raise UserError(
            f"the results are of bundle {settings.bundle_sha256[:12]}, {bundle.path} is {bundle.fingerprint[:12]}. "
            "Evaluate it: rsd-trt eval --mode shadow"
        )
    if bundle.config.rsd.rule != "actions":
        raise UserError(f"rsd.rule is {bundle.config.rsd.rule}; only the rule actions has a tolerance to calibrate")
    limits = np.array(settings.rsd.tolerance if limit is None else (limit,) * ARM_DIMS)
    episodes = [episode for episode in shadow.episodes if episode.error is None]
    order = np.random.default_rng(seed).permutation(len(episodes))
    half = (len(episodes) + 1) // 2
    chosen_on = [episodes[i] for i in order[:half]]
    held_out = judged([episodes[i] for i in order[half:]], limits)
    queries = judged(chosen_on, limits)
    if not held_out:
        raise UserError(f"{len(episodes)} episodes are too few to hold some out: evaluate more")
    return Calibration(
        chosen=measure(choose_tolerance(queries, alpha), held_out, alpha),
        before=measure(np.array(bundle.config.rsd.tolerance), held_out, None),
        curve=tuple(
            measure(choose_tolerance(queries, other), held_out, other)
            for other in CURVE
            if math.floor(other * (sum(query.can_be_wrong for query in queries) + 1)) >= 1
        ),
        limit=tuple(map(float, limits)),
        episodes=len(chosen_on),
        queries=len(queries),
        held_out_episodes=len(episodes) - half,
        held_out_queries=len(held_out),
    )


def judged(episodes: Sequence[Episode], limit: NDArray[np.float64]) -> list[Judged]:
    """The queries that tested a live plan, judged by `limit` [arm dimensions]."""
    found = []
    for episode in episodes:
        for query in episode.queries:
            if query.draft_gap and query.main_gap:
                main = np.array(query.main_gap)
                right = (main[:, :ARM_DIMS] <= limit).all(axis=1) & (main[:, ARM_DIMS] == 0)
                found.append(Judged(np.array(query.draft_gap), int(right.cumprod().sum())))
    return found


def choose_tolerance(queries: Sequence[Judged], alpha: float) -> NDArray[np.float64]:
    """[arm dimensions], the widest tolerance whose false-accept rate is bounded by `alpha`.

    Raises:
        UserError: too few queries to bound it, or none whose plan was right.
    """
    right = [query.draft[0, :ARM_DIMS] for query in queries if query.right]
    if not right:
        raise UserError("in no query did the main head confirm the plan: there is nothing to accept")
    spread = np.maximum(np.quantile(right, SPREAD_QUANTILE, axis=0), FINEST)
    scores = sorted(query.score(spread) for query in queries if query.can_be_wrong)
    k = math.floor(alpha * (len(scores) + 1))
    if k < 1:
        raise UserError(
            f"alpha {alpha:g} needs {math.ceil(1 / alpha) - 1} queries that can be accepted wrongly, there are "
            f"{len(scores)}: evaluate more episodes, or take a larger --alpha"
        )
    widest = np.full(ARM_DIMS, WIDEST)
    if scores[k - 1] == math.inf:
        return widest
    below = (np.ceil(scores[k - 1] * spread / FINEST - 1e-6) - 1) * FINEST  # strictly below the k-th score
    return np.clip(below, 0.0, widest).round(4)


def measure(tolerance: NDArray[np.float64], queries: Sequence[Judged], alpha: float | None) -> Acceptance:
    """What a tolerance [arm dimensions] does to queries."""
    committed = [query.committed(tolerance) for query in queries]
    accepted = sum(count > 0 for count in committed)
    wrong = sum(count > query.right for query, count in zip(queries, committed, strict=True))
    possible = sum(query.can_be_wrong for query in queries)
    return Acceptance(
        alpha=alpha,
        tolerance=tuple(map(float, tolerance)),
        acceptance=accepted / len(queries),
        acceptance_interval=wilson(accepted, len(queries)),
        false_accepts=wrong / possible if possible else None,
        false_accepts_interval=wilson(wrong, possible),
        wrong_among_accepted=wrong / accepted if accepted else None,
    )
