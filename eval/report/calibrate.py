"""The threshold of a rule from data: as strict as it may be without rejecting checks that main would have let pass.

Shadow mode runs the main head at every check too. A check is *quiet* where main's new chunk confirms the steps of the
old one that an accepted check would commit: each within `limit`, with the same gripper. Rejecting it is a false reject,
which costs a full query and gains nothing. Each check has a *deviation*, which the rule compares with its threshold:

    first, actions   the largest |draft - chunk| / tolerance of the next step's arm dimensions; infinite where the
                     grippers differ
    path             the recorded score: the same of the motion summed over the steps ahead; infinite where a gripper
                     of theirs differs
    likelihood       minus the recorded score: the chunk's own tokens are unlikely

Every check of shadow mode is of a chunk of the same age, the steps that a full query commits: of older chunks it says
nothing, and `by_age` stays as it is.

The threshold is the smallest deviation at which the n episodes of one half have (sum of their false-reject rates + 1)
/ (n + 1) <= alpha: the expected rate of a new episode that is exchangeable with them is then at most alpha (conformal
risk control: Angelopoulos, Bates, Fisch, Lei and Schuster 2022). Episodes are the unit, since checks of one resemble
each other; those that begin in one initial state, with several seeds of a perturbation, count as one, and are in one
half. The other half, held out, shows what the threshold does: what it rejects wrongly, and what it accepts wrongly, of
which nothing is promised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, MAX_TOLERANCE, RsdConfig, state_and_seed
from rsd_trt.errors import UserError
from rsd_trt.eval.report.breakdown import PREFIX_RULES, confirmed
from rsd_trt.eval.results import Episode, QueryRecord, Results
from rsd_trt.eval.statistics import Interval, bootstrap_share
from rsd_trt.runtime.speculate import factor

FINEST = 1e-4  # environment units: gaps are recorded, and tolerances written, to this
CURVE = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # alphas that are shown beside the one that was asked for
LEAST_LIKELY = -1e6  # mean log-probability: below what any draft gives


@dataclass(frozen=True)
class Check:
    """A check, judged by main's new chunk."""

    deviation: float
    quiet: bool

    def passes(self, threshold: float) -> bool:
        """Whether it is accepted; what deviates infinitely passes no threshold."""
        return self.deviation <= threshold and self.deviation < math.inf


Checks = Sequence[Check]  # of one episode


@dataclass(frozen=True)
class Effect:
    """What a threshold does to held-out episodes. Intervals are 95%, bootstrapped over episodes; None for few."""

    alpha: float | None  # that it was chosen for
    rsd: RsdConfig
    acceptance: float  # share of the checks
    acceptance_interval: Interval | None
    false_rejects: float  # mean of the episodes' shares of quiet checks that are rejected
    false_rejects_interval: Interval | None
    false_accepts: float  # the same of the other checks that are accepted
    false_accepts_interval: Interval | None


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it does on the held-out episodes, beside the bundle's own and other alphas'."""

    chosen: Effect
    before: Effect
    curve: tuple[Effect, ...]
    limit: tuple[float, ...]  # by arm dimension, environment units
    unit: str  # "episodes", or "initial states" where a perturbation has several seeds
    episodes: tuple[int, int]  # of the unit: chosen on, held out
    auc: float | None  # of the deviation, over all episodes; None where all checks are quiet, or none is


def calibrate(bundle: Bundle, shadow: Results, alpha: float, limit: float | None = None, seed: int = 0) -> Calibration:
    """Chooses the threshold on one half of a shadow run's episodes and measures it on the other.

    limit: how far main may move a step, in environment units, and still confirm it; None: the run's own tolerance, by
    dimension. seed: of which episodes are in which half.

    The rule and the numbers of steps are those of the run.

    Raises:
        UserError: not a shadow run of this bundle, a rule without such a threshold, or too few episodes.
    """
    settings = shadow.settings
    if settings.mode != "shadow":
        raise UserError(f"the results are of mode {settings.label}; calibrate needs: rsd-trt eval --mode shadow")
    if settings.policy_sha256 != bundle.fingerprint:
        raise UserError(
            f"the results are of bundle {settings.policy_sha256[:12]}, {bundle.path} is {bundle.fingerprint[:12]}. "
            "Evaluate it: rsd-trt eval --mode shadow"
        )
    rsd = settings.of_bundle.rsd
    if rsd.rule == "tokens":
        raise UserError("rsd.rule is tokens, whose share of equal tokens is not calibrated", "Choose another rule")
    limits = np.array((*(rsd.tolerance if limit is None else (limit,) * ARM_DIMS), 0.0))
    begun: dict[tuple[int, int], list[Check]] = {}  # by task and initial state
    for e in shadow.episodes:
        if e.error is None:
            state, _ = state_and_seed(e.trial, settings.seeds)
            begun.setdefault((e.task_id, state), []).extend(judge_checks(e, rsd, limits))
    episodes = [checks for checks in begun.values() if checks]
    unit = "episodes" if settings.seeds == 1 else "initial states"
    order = np.random.default_rng(seed).permutation(len(episodes))
    ours, held_out = ([episodes[i] for i in half] for half in np.array_split(order, 2))
    if not held_out:
        raise UserError(f"{len(episodes)} {unit} with a check are too few to hold some out: evaluate more")
    least = 1 / (len(ours) + 1)
    if alpha < least:
        needed = 2 * (math.ceil(1 / alpha) - 1)
        raise UserError(
            f"alpha {alpha:g} needs {needed} {unit} with a check, there are {len(episodes)}: evaluate more, or take "
            "a larger --alpha"
        )
    own = math.inf if rsd.threshold is None else -rsd.threshold
    return Calibration(
        chosen=_effect(rsd, choose(ours, alpha), held_out, alpha),
        before=_measured(rsd, own if rsd.rule == "likelihood" else 1.0, held_out, None),
        curve=tuple(_effect(rsd, choose(ours, other), held_out, other) for other in CURVE if other >= least),
        limit=tuple(map(float, limits[:ARM_DIMS])),
        unit=unit,
        episodes=(len(ours), len(held_out)),
        auc=auc([check for checks in episodes for check in checks]),
    )


def judge_checks(episode: Episode, rsd: RsdConfig, limits: NDArray[np.float64]) -> list[Check]:
    """The episode's checks. limits [A]: how far main may move a step that it confirms, 0 for the gripper."""
    found = []
    for query in episode.queries:
        if query.checked and query.draft_gap and query.main_gap:
            wanted = 1 if rsd.rule in PREFIX_RULES else min(rsd.check_steps or rsd.n_action_steps, len(query.main_gap))
            quiet = confirmed(np.asarray(query.main_gap), limits) >= wanted
            found.append(Check(deviation(query, rsd), quiet))
    return found


def deviation(query: QueryRecord, rsd: RsdConfig) -> float:
    """What the rule compares with its threshold: less is nearer; a tolerance is passed up to 1."""
    assert query.draft_gap
    by_age = factor(rsd.by_age, rsd.n_action_steps)
    if rsd.rule == "likelihood":
        return math.inf if query.score is None else -query.score / max(by_age, FINEST)
    ahead = (rsd.check_steps or rsd.n_action_steps) if rsd.rule == "path" else 1
    gap = np.asarray(query.draft_gap[:ahead])
    if gap[:, ARM_DIMS].any():
        return math.inf
    if rsd.rule == "path":
        return math.inf if query.score is None else query.score
    return float((gap[0, :ARM_DIMS] / np.maximum(np.asarray(rsd.tolerance) * by_age, FINEST)).max())


def auc(checks: Checks) -> float | None:
    """How likely a check that is not quiet deviates more than one that is; a tie counts half (the area under the
    receiver operating characteristic, Hanley and McNeil 1982). None where there is none of either."""
    quiet, others = (np.sort([c.deviation for c in checks if c.quiet == kind]) for kind in (True, False))
    if not (len(quiet) and len(others)):
        return None
    below, up_to = (np.searchsorted(quiet, others, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(quiet))


def choose(episodes: Sequence[Checks], alpha: float) -> float:
    """The smallest threshold of the deviation that keeps the false-reject rate bounded by `alpha`."""
    quiet = [[check.deviation for check in checks if check.quiet] for checks in episodes]
    falls = [
        (one, 1 / len(of)) for of in quiet for one in of
    ]  # (deviation, what rejecting it adds to the sum of rates)
    budget = alpha * (len(episodes) + 1) - 1
    for one, weight in sorted(falls, reverse=True):
        budget -= weight
        if budget < -1e-9:
            return one  # this one has to be accepted
    return min((one for one, _ in falls), default=math.inf)


def with_threshold(rsd: RsdConfig, threshold: float) -> RsdConfig:
    """`rsd` with a threshold of the deviation: for the rules with a tolerance that many times its own, rounded up."""
    if rsd.rule == "likelihood":
        chosen = max(-threshold, LEAST_LIKELY)
        return structs.replace(rsd, threshold=chosen, sure=None if rsd.sure is None else max(rsd.sure, chosen))
    widest = (MAX_TOLERANCE,) * ARM_DIMS
    if threshold == math.inf:
        return structs.replace(rsd, tolerance=widest)
    wider = np.ceil(threshold * np.maximum(rsd.tolerance, FINEST) / FINEST - 1e-6) * FINEST
    return structs.replace(rsd, tolerance=tuple(float(x) for x in wider.clip(0, MAX_TOLERANCE).round(4)))


def _effect(rsd: RsdConfig, threshold: float, episodes: Sequence[Checks], alpha: float) -> Effect:
    return _measured(with_threshold(rsd, threshold), threshold, episodes, alpha)


def _measured(rsd: RsdConfig, threshold: float, episodes: Sequence[Checks], alpha: float | None) -> Effect:
    """What a threshold of the deviation does to episodes."""
    accepted = [sum(check.passes(threshold) for check in checks) for checks in episodes]
    rejects = _rates(episodes, quiet=True, accepted=False, threshold=threshold)
    accepts = _rates(episodes, quiet=False, accepted=True, threshold=threshold)
    return Effect(
        alpha=alpha,
        rsd=rsd,
        acceptance=sum(accepted) / sum(map(len, episodes)),
        acceptance_interval=bootstrap_share(accepted, [len(checks) for checks in episodes]),
        false_rejects=float(np.mean(rejects)),
        false_rejects_interval=bootstrap_share(rejects, [1] * len(rejects)),
        false_accepts=float(np.mean(accepts)),
        false_accepts_interval=bootstrap_share(accepts, [1] * len(accepts)),
    )


def _rates(episodes: Sequence[Checks], quiet: bool, accepted: bool, threshold: float) -> list[float]:
    """By episode, the share of its checks that are (not) quiet which are (not) accepted; 0 where it has none."""
    of = [[check.passes(threshold) for check in checks if check.quiet == quiet] for checks in episodes]
    return [sum(passed == accepted for passed in one) / max(1, len(one)) for one in of]
