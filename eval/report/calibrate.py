"""The acceptance tolerance from data, with a bound on how often a query is accepted wrongly.

In shadow mode every query runs the main head too. The recorded gaps say, for each step of the chunk that a query could
commit, how far the draft and how far the main head's new chunk are from it. A step is *right* while the new chunk moves
it by at most `limit` and keeps its gripper. A query is accepted wrongly when it commits a step that is not right. An
episode's false-accept rate is the share of wrongly accepted queries among those that have such a step.

The tolerance is `scale * spread`. `spread` is the draft's own error by dimension: a quantile of its gap at steps
that are right, in the first part of the episodes. `scale` is the largest for which the n episodes of the second part
have (sum of their rates + 1) / (n + 1) <= alpha: the expected rate of a new episode that is exchangeable with them is
then at most alpha (conformal risk control: Angelopoulos, Bates, Fisch, Lei and Schuster 2022). Episodes are the unit,
since queries of one episode resemble each other. That is a mean over choices of episodes, so one choice is
measured on the third part, which was held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, MAX_TOLERANCE
from rsd_trt.errors import UserError
from rsd_trt.eval.results import Episode, Results
from rsd_trt.eval.statistics import Interval, bootstrap_share

PARTS = 5  # of the episodes: one for the spread, two for the scale, two held out
SPREAD_QUANTILE = 0.9
FINEST = 1e-4  # environment units: gaps are recorded, and tolerances written, to this
CURVE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # alphas that are shown beside the one that was asked for


@dataclass(frozen=True)
class Judged:
    """A query that tested a chunk. Gaps [n, A] over the steps that it could commit, n >= 1."""

    draft: NDArray[np.float64]
    right: int  # leading steps that the main head's new chunk confirms

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
class Effect:
    """What a tolerance does to held-out episodes. Intervals are 95%, bootstrapped over episodes; None for few."""

    alpha: float | None  # that it was chosen for
    tolerance: tuple[float, ...]  # by arm dimension, environment units
    acceptance: float  # share of the queries that tested a chunk
    acceptance_interval: Interval | None
    false_accepts: float  # mean of the episodes' false-accept rates
    false_accepts_interval: Interval | None


@dataclass(frozen=True)
class Calibration:
    """A tolerance and what it does on the held-out episodes, beside the bundle's own and other alphas'."""

    chosen: Effect
    before: Effect
    curve: tuple[Effect, ...]
    limit: tuple[float, ...]  # by arm dimension, environment units
    episodes: tuple[int, int, int]  # for the spread, for the scale, held out


def calibrate(bundle: Bundle, shadow: Results, alpha: float, limit: float | None = None, seed: int = 0) -> Calibration:
    """Chooses the tolerance on three fifths of a shadow run's episodes and measures it on the others.

    limit: how far the main head may move a step, in environment units, and the chunk still counts as right;
    None: the run's own tolerance, by dimension. seed: of which episodes are in which part.

    Raises:
        UserError: not a shadow run of this bundle, or too few episodes for `alpha`.
    """
    settings = shadow.settings
    if settings.mode != "shadow":
        raise UserError(f"the results are of mode {settings.label}; calibrate needs: rsd-trt eval --mode shadow")
    if settings.policy_sha256 != bundle.fingerprint:
        raise UserError(
            f"the results are of bundle {settings.policy_sha256[:12]}, {bundle.path} is {bundle.fingerprint[:12]}. "
            "Evaluate it: rsd-trt eval --mode shadow"
        )
    if bundle.config.rsd.rule != "actions":
        raise UserError(f"rsd.rule is {bundle.config.rsd.rule}; only the rule actions has a tolerance to calibrate")
    limits = np.array(settings.of_bundle.rsd.tolerance if limit is None else (limit,) * ARM_DIMS)
    episodes = [queries for e in shadow.episodes if e.error is None and (queries := judged(e, limits))]
    order = np.random.default_rng(seed).permutation(len(episodes))
    parts = [[episodes[i] for i in part] for part in np.array_split(order, PARTS)]
    for_spread, for_scale, held_out = parts[0], parts[1] + parts[2], parts[3] + parts[4]
    if not held_out:
        raise UserError(f"{len(episodes)} episodes that tested a chunk are too few to hold some out: evaluate more")
    spread = draft_spread(for_spread)
    return Calibration(
        chosen=effect(choose_tolerance(for_scale, spread, alpha), held_out, alpha),
        before=effect(np.array(bundle.config.rsd.tolerance), held_out, None),
        curve=tuple(
            effect(choose_tolerance(for_scale, spread, other), held_out, other)
            for other in CURVE
            if other >= least_alpha(len(for_scale))
        ),
        limit=tuple(map(float, limits)),
        episodes=(len(for_spread), len(for_scale), len(held_out)),
    )


def judged(episode: Episode, limit: NDArray[np.float64]) -> list[Judged]:
    """The episode's queries that tested a chunk, judged by `limit` [arm dimensions]."""
    found = []
    for query in episode.queries:
        if query.draft_gap and query.main_gap:
            main = np.array(query.main_gap)
            right = (main[:, :ARM_DIMS] <= limit).all(axis=1) & (main[:, ARM_DIMS] == 0)
            found.append(Judged(np.array(query.draft_gap), int(right.cumprod().sum())))
    return found


def draft_spread(episodes: Sequence[Sequence[Judged]]) -> NDArray[np.float64]:
    """[arm dimensions], the draft's error where the chunk was right.

    Raises:
        UserError: it never was.
    """
    right = [query.draft[0, :ARM_DIMS] for queries in episodes for query in queries if query.right]
    if not right:
        raise UserError("in no query did the main head confirm the chunk: there is nothing to accept")
    return np.maximum(np.quantile(right, SPREAD_QUANTILE, axis=0), FINEST)


def least_alpha(episodes: int) -> float:
    """The smallest alpha that so many episodes can bound."""
    return 1 / (episodes + 1)


def choose_tolerance(
    episodes: Sequence[Sequence[Judged]], spread: NDArray[np.float64], alpha: float
) -> NDArray[np.float64]:
    """[arm dimensions], the widest multiple of `spread` whose false-accept rate is bounded by `alpha`.

    Raises:
        UserError: too few episodes to bound it.
    """
    if alpha < least_alpha(len(episodes)):
        needed = math.ceil(1 / alpha) - 1
        raise UserError(
            f"alpha {alpha:g} needs {needed} episodes to choose the scale on, there are {len(episodes)}: "
            f"evaluate {math.ceil(needed * PARTS / 2)} or more, or take a larger --alpha"
        )
    scores = []  # (score, what it adds to the sum of the rates when the scale passes it)
    for queries in episodes:
        wrong = [query for query in queries if query.can_be_wrong]
        scores += [(query.score(spread), 1 / len(wrong)) for query in wrong]
    budget, scale = alpha * (len(episodes) + 1) - 1, math.inf
    for score, weight in sorted(scores):
        budget -= weight
        if budget < -1e-9:
            scale = score
            break
    widest = np.full(ARM_DIMS, MAX_TOLERANCE)
    if scale == math.inf:
        return widest
    below = (np.ceil(scale * spread / FINEST - 1e-6) - 1) * FINEST  # strictly below that score
    return np.clip(below, 0.0, widest).round(4)


def effect(tolerance: NDArray[np.float64], episodes: Sequence[Sequence[Judged]], alpha: float | None) -> Effect:
    """What a tolerance [arm dimensions] does to episodes."""
    accepted, tested, rates = [], [], []
    for queries in episodes:
        committed = [query.committed(tolerance) for query in queries]
        wrong = sum(count > query.right for query, count in zip(queries, committed, strict=True))
        accepted.append(sum(count > 0 for count in committed))
        tested.append(len(queries))
        rates.append(wrong / max(sum(query.can_be_wrong for query in queries), 1))
    return Effect(
        alpha=alpha,
        tolerance=tuple(map(float, tolerance)),
        acceptance=sum(accepted) / sum(tested),
        acceptance_interval=bootstrap_share(accepted, tested),
        false_accepts=float(np.mean(rates)),
        false_accepts_interval=bootstrap_share(rates, [1] * len(rates)),
    )
