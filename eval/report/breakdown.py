"""How a run splits up: by phase of the episode, by route, by dimension, by step ahead; and what main would have said.

Shadow mode records, for each check, how far the draft and how far the main head's new chunk are from what was left of
the old one. A decision is judged by the latter: an accepted check is right where main confirms every step that it
commits, a rejected one where main would not have let the wanted steps pass either.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ACTION_NAMES, ARM_DIMS, Quantiles
from rsd_trt.eval.results import HISTOGRAM_BINS, Episode, QueryRecord, Results
from rsd_trt.eval.statistics import Interval
from rsd_trt.runtime.chunk import Gap
from rsd_trt.runtime.speculate import Checks, Route

PHASES = 10  # deciles of an episode's steps
PERCENTILES = (5, 25, 50, 75, 95, 99)
Group = Literal["accepted", "partial", "rejected", "full query"]
PREFIX_RULES = ("actions", "tokens")  # they accept as many steps as pass; the others all or none
GROUPS: tuple[Group, ...] = ("accepted", "partial", "rejected", "full query")

OUTSIDE = 0.05  # share of actions outside the training data's 1% to 99% quantiles, of which the data itself has 0.02
NARROW = 0.5  # of the training range: less is hardly moving
BIASED = 0.25  # of the training range, between its middle and the mean action
LOSSY = 0.01  # root mean square error of the codec, environment units: 0.5 mm under LIBERO's OSC_POSE
FEWEST_SWITCHES, MOST_SWITCHES = 1.0, 10.0  # of the gripper in an episode: grasping is one, letting go another
UNINFORMED = 0.05  # above the chance line: less is as good as chance

RangeVerdict = Literal["ok", "odd: outside", "odd: narrow", "odd: biased", "not measured"]
RANGES = (
    f"outside: more than {OUTSIDE:.0%} of the steps lie outside the training data's 1% to 99%; narrow: the range is "
    f"less than {NARROW:.0%} of the training data's; biased: the mean is {BIASED:.0%} of that range off its middle"
)
GripperVerdict = Literal["ok", "odd: hardly ever closes", "odd: chatters", "not measured"]


@dataclass(frozen=True)
class RouteTime:
    """What the queries of one kind of route took."""

    group: Group
    queries: int
    ms: Annotated[dict[str, float], f"{', '.join(f'p{p}' for p in PERCENTILES)}"]
    share: Annotated[float, "of all policy time"]


@dataclass(frozen=True)
class Agreement:
    """How often a new chunk is within the tolerance of what is left of the old one. An entry for each dimension, or
    for each step ahead."""

    draft: Annotated[tuple[float, ...], "share of the draft's"]
    main: Annotated[tuple[float, ...], "share of the main head's new chunk: what the draft can be expected to reach"]
    gap: Annotated[tuple[float, ...], "median |draft - chunk|, environment units; by step: of the worst arm dimension"]
    n: Annotated[tuple[int, ...], "steps, or queries, that each entry rests on"]


@dataclass(frozen=True)
class Decisions:
    """Checks of a shadow run, by what the rule said and whether main's new chunk confirms it."""

    true_accept: int = 0
    false_accept: int = 0
    true_reject: int = 0
    false_reject: int = 0


@dataclass(frozen=True)
class ActionRange:
    """The executed actions of one dimension, in environment units."""

    dimension: str
    minimum: float
    mean: float
    maximum: float
    histogram: Annotated[tuple[int, ...], f"counts in {HISTOGRAM_BINS} equal bins over [-1, 1]"]
    training: Annotated[Interval | None, "the training data's 1% and 99% quantiles"]
    outside: Annotated[float | None, "share of the steps outside them; a lower bound"]
    verdict: Annotated[RangeVerdict, RANGES]


@dataclass(frozen=True)
class Layer:
    """Tokens of one coarse layer."""

    equal: Annotated[float, "share of the draft's tokens that the main head gave too"]
    chance: Annotated[float, "share that is equal by chance"]
    verdict: Annotated[Literal["ok", "odd: chance"], f"chance: less than {UNINFORMED:.0%} above it"]


@dataclass(frozen=True)
class Gripper:
    """Mean number of gripper switches of the episodes that succeeded and failed."""

    succeeded: float | None
    failed: float | None
    verdict: Annotated[GripperVerdict, f"of the failed: between {FEWEST_SWITCHES:g} and {MOST_SWITCHES:g} is ok"]


@dataclass(frozen=True)
class Breakdown:
    """All that is told of a run beside its figures. Empty: nothing of the kind was recorded."""

    phases: Annotated[tuple[Checks, ...], "by decile of the episodes' steps"]
    routes: tuple[RouteTime, ...]
    by_dimension: Annotated[Agreement | None, "shadow mode: shares of the steps"]
    by_step: Annotated[Agreement | None, "shadow mode: shares of the queries in which every dimension agrees"]
    decisions: Annotated[Decisions | None, "shadow mode"]
    layers: tuple[Layer, ...]
    actions: tuple[ActionRange, ...]
    action_steps: Annotated[int, "that were executed"]
    gripper: Gripper
    codec_rms: Annotated[float | None, "root mean square error of the codec's round trip, environment units"]
    codec_verdict: Annotated[Literal["ok", "odd: lossy", "not measured"], f"lossy: above {LOSSY:g}"]


def breakdown(results: Results) -> Breakdown:
    """Computes it all, once."""
    done = [episode for episode in results.episodes if episode.error is None]
    queries = [query for episode in done for query in episode.queries]
    gaps = [(q.draft_gap, q.main_gap) for q in queries if q.draft_gap is not None and q.main_gap is not None]
    limits = np.asarray((*results.settings.of_bundle.rsd.tolerance, 0.0))
    rsd = results.settings.of_bundle.rsd
    steps = rsd.check_steps or results.settings.n_action_steps
    mse = results.codec_round_trip_mse
    rms = None if mse is None else math.sqrt(mse)
    return Breakdown(
        phases=phases(done),
        routes=route_times(queries),
        by_dimension=agreement_by_dimension(gaps, limits),
        by_step=agreement_by_step(gaps, limits),
        decisions=decisions(queries, limits, 1 if rsd.rule in PREFIX_RULES else steps, steps),
        layers=token_layers(results.token_agreement, results.token_agreement_chance),
        actions=action_ranges(done, results.settings.of_bundle.training_actions),
        action_steps=sum(e.steps for e in done if e.actions is not None),
        gripper=gripper(done),
        codec_rms=rms,
        codec_verdict="not measured" if rms is None else "odd: lossy" if rms > LOSSY else "ok",
    )


def group(query: QueryRecord) -> Group:
    """The kind of route that a query took: those that tested no chunk are one kind."""
    if query.route in ("accepted", "partial", "rejected"):
        return query.route
    return "full query"


def phases(episodes: Sequence[Episode]) -> tuple[Checks, ...]:
    """Acceptance over the episode: a query at step s of an episode of n steps is of decile floor(10 s / n)."""
    routes: list[list[Route]] = [[] for _ in range(PHASES)]
    for episode in episodes:
        for query in episode.queries:
            routes[min(PHASES - 1, PHASES * query.step // max(1, episode.steps))].append(query.route)
    return tuple(map(Checks.of, routes))


def route_times(queries: Sequence[QueryRecord]) -> tuple[RouteTime, ...]:
    """Policy time by kind of route, those without a query left out."""
    times: dict[Group, list[float]] = defaultdict(list)
    for query in queries:
        times[group(query)].append(query.ms)
    total = sum(map(sum, times.values()))
    return tuple(
        RouteTime(
            kind,
            len(times[kind]),
            {f"p{p}": float(ms) for p, ms in zip(PERCENTILES, np.percentile(times[kind], PERCENTILES), strict=True)},
            sum(times[kind]) / total if total else 0.0,
        )
        for kind in GROUPS
        if kind in times
    )


def agreement_by_dimension(gaps: Sequence[tuple[Gap, Gap]], limits: NDArray[np.float64]) -> Agreement | None:
    """gaps: (draft's, main head's) of each query. limits [A]: the tolerance, 0 for the gripper."""
    draft = [step for gap, _ in gaps for step in gap]
    main = [step for _, gap in gaps for step in gap]
    if not draft or not main:
        return None
    rows, others = np.asarray(draft), np.asarray(main)
    return Agreement(
        draft=_floats((rows <= limits).mean(0)),
        main=_floats((others <= limits).mean(0)),
        gap=_floats(np.median(rows, axis=0)),
        n=(len(rows),) * rows.shape[1],
    )


def agreement_by_step(gaps: Sequence[tuple[Gap, Gap]], limits: NDArray[np.float64]) -> Agreement | None:
    """As `agreement_by_dimension`; a step agrees if every dimension of it does."""
    passed: dict[int, list[tuple[bool, bool, float]]] = defaultdict(list)
    for draft, main in gaps:
        for i, (by_draft, by_main) in enumerate(zip(np.asarray(draft), np.asarray(main), strict=True)):
            worst = float(by_draft[:ARM_DIMS].max())
            passed[i].append((bool((by_draft <= limits).all()), bool((by_main <= limits).all()), worst))
    if not passed:
        return None
    columns = [tuple(zip(*passed[i], strict=True)) for i in sorted(passed)]
    return Agreement(
        draft=tuple(mean(map(float, draft)) for draft, _, _ in columns),
        main=tuple(mean(map(float, main)) for _, main, _ in columns),
        gap=tuple(median(worst) for _, _, worst in columns),
        n=tuple(len(draft) for draft, _, _ in columns),
    )


def confirmed(gap: NDArray[np.float64], limits: NDArray[np.float64]) -> int:
    """Leading steps of a gap [t, A] that lie within the limits [A]."""
    return int((gap <= limits).all(axis=1).cumprod().sum())


def decisions(
    queries: Sequence[QueryRecord], limits: NDArray[np.float64], wanted: int, check_steps: int
) -> Decisions | None:
    """wanted: steps that main has to confirm for a rejected check to be wrong; None without a check that was judged."""
    counts: dict[str, int] = defaultdict(int)
    for query in queries:
        if not query.main_gap or query.route not in ("accepted", "partial", "rejected"):
            continue
        gap = np.asarray(query.main_gap)
        by_main = confirmed(gap, limits)
        if query.route == "rejected":
            counts["false_reject" if by_main >= min(wanted, len(gap)) else "true_reject"] += 1
        else:
            committed = min(query.prefix or 0, check_steps)
            counts["true_accept" if by_main >= committed else "false_accept"] += 1
    return Decisions(**counts) if counts else None


def token_layers(equal: Sequence[float] | None, chance: float | None) -> tuple[Layer, ...]:
    """The layers beside the chance line; empty without a draft."""
    if equal is None or chance is None:
        return ()
    return tuple(Layer(share, chance, "ok" if share >= chance + UNINFORMED else "odd: chance") for share in equal)


def action_ranges(episodes: Sequence[Episode], training: Quantiles | None) -> tuple[ActionRange, ...]:
    """All executed actions, by dimension; empty without any."""
    known = [(e.actions, e.steps) for e in episodes if e.actions is not None and e.steps]
    if not known:
        return ()
    steps = [n for _, n in known]
    lows = np.min([a.minimum for a, _ in known], axis=0)
    highs = np.max([a.maximum for a, _ in known], axis=0)
    means = np.average([a.mean for a, _ in known], axis=0, weights=steps)
    histograms = np.sum([a.histogram for a, _ in known], axis=0)
    found = []
    for i, name in enumerate(ACTION_NAMES):
        extent = (float(lows[i]), float(means[i]), float(highs[i]))
        counts = tuple(map(int, histograms[i]))
        if training is None:
            found.append(ActionRange(name, *extent, counts, None, None, "not measured"))
            continue
        bounds = (training.q01[i], training.q99[i])
        outside = share_outside(counts, *bounds)
        said = _judge_range(extent, bounds, outside) if i < ARM_DIMS else "ok"
        found.append(ActionRange(name, *extent, counts, bounds, outside, said))
    return tuple(found)


def _judge_range(extent: tuple[float, float, float], training: Interval, outside: float) -> RangeVerdict:
    low, average, high = extent
    width = training[1] - training[0]
    if outside > OUTSIDE:
        return "odd: outside"
    if high - low < NARROW * width:
        return "odd: narrow"
    return "odd: biased" if abs(average - sum(training) / 2) > BIASED * width else "ok"


def share_outside(histogram: Sequence[int], low: float, high: float) -> float:
    """Share of a histogram's counts in bins that lie wholly outside [low, high]; a lower bound of the true share."""
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    counts = np.asarray(histogram)
    outside = (edges[1:] <= low) | (edges[:-1] >= high)
    return float(counts[outside].sum() / counts.sum()) if counts.sum() else 0.0


def gripper(episodes: Sequence[Episode]) -> Gripper:
    """How often the gripper switches."""
    switches = {
        outcome: [e.actions.gripper_switches for e in episodes if e.actions is not None and e.success == outcome]
        for outcome in (True, False)
    }
    won, lost = (mean(found) if found else None for found in switches.values())
    said: GripperVerdict = "not measured"
    if lost is not None:
        low = lost < FEWEST_SWITCHES
        said = "odd: hardly ever closes" if low else "odd: chatters" if lost > MOST_SWITCHES else "ok"
    return Gripper(won, lost, said)


def _floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
