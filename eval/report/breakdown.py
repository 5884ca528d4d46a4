"""How a run splits up: by phase of the episode, by route, by action dimension, by step of the plan. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Literal

import numpy as np

from rsd_trt.config import ARM_DIMS
from rsd_trt.eval.results import HISTOGRAM_BINS, Episode, QueryRecord, Results
from rsd_trt.runtime.plan import Gap

PHASES = 10  # deciles of an episode's steps
Group = Literal["accepted", "partial", "rejected", "full query"]
GROUPS: tuple[Group, ...] = ("accepted", "partial", "rejected", "full query")


def group(query: QueryRecord) -> Group:
    """The kind of route that a query took: those that tested no live plan are one kind."""
    if query.route in ("accepted", "partial", "rejected"):
        return query.route
    return "full query"


@dataclass(frozen=True)
class Phase:
    """The queries of one decile of the episodes' steps that tested a live plan."""

    accepted: int = 0
    partial: int = 0
    rejected: int = 0

    @property
    def tested(self) -> int:
        return self.accepted + self.partial + self.rejected


def phases(results: Results) -> tuple[Phase, ...]:
    """Acceptance over the episode: a query at step s of an episode of n steps is of decile floor(10 s / n)."""
    counts: list[dict[str, int]] = [defaultdict(int) for _ in range(PHASES)]
    for episode, query in _queries(results):
        if (kind := group(query)) != "full query":
            counts[min(PHASES - 1, PHASES * query.step // max(1, episode.steps))][kind] += 1
    return tuple(Phase(**count) for count in counts)


@dataclass(frozen=True)
class RouteTime:
    """What the queries of one kind of route took."""

    group: Group
    ms: tuple[float, ...]
    share: float  # of all policy time


def route_times(results: Results) -> tuple[RouteTime, ...]:
    """Policy time by kind of route, those without a query left out."""
    times: dict[Group, list[float]] = defaultdict(list)
    for _, query in _queries(results):
        times[group(query)].append(query.ms)
    total = sum(map(sum, times.values()))
    return tuple(
        RouteTime(kind, tuple(times[kind]), sum(times[kind]) / total if total else 0.0)
        for kind in GROUPS
        if kind in times
    )


def full_query_share(results: Results) -> float | None:
    """Share of the queries that ran the whole backbone."""
    return results.full_queries / results.queries if results.queries else None


@dataclass(frozen=True)
class Agreement:
    """How often a new chunk is within the tolerance of the live plan."""

    draft: tuple[float, ...]  # share of the draft's
    main: tuple[float, ...]  # share of the main head's own new plan: what the draft can be expected to reach
    gap: tuple[float, ...]  # median |draft - plan|, environment units (gripper: share of equal signs is 1 - mean)
    n: tuple[int, ...]  # steps that each entry rests on


def agreement_by_dimension(results: Results) -> Agreement | None:
    """Shares of the steps, by action dimension; None without shadow-mode data."""
    pairs = list(_gaps(results))
    draft = [step for gap, _ in pairs for step in gap]
    main = [step for _, gap in pairs for step in gap]
    if not draft or not main:
        return None
    limits = np.asarray((*results.settings.rsd.tolerance, 0.0))
    rows, others = np.asarray(draft), np.asarray(main)
    return Agreement(
        draft=_floats((rows <= limits).mean(0)),
        main=_floats((others <= limits).mean(0)),
        gap=_floats(np.median(rows, axis=0)),
        n=(len(rows),) * rows.shape[1],
    )


def agreement_by_step(results: Results) -> Agreement | None:
    """Shares of the queries in which every dimension agrees, by step ahead; None without shadow-mode data."""
    limits = np.asarray((*results.settings.rsd.tolerance, 0.0))
    passed: dict[int, list[tuple[bool, bool, float]]] = defaultdict(list)
    for draft, main in _gaps(results):
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


@dataclass(frozen=True)
class Executed:
    """The executed actions of episodes, by dimension, in environment units."""

    steps: int
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    mean: tuple[float, ...]
    histogram: tuple[tuple[int, ...], ...]  # of HISTOGRAM_BINS equal bins over [-1, 1]


def executed(results: Results) -> Executed | None:
    """All executed actions of the run; None without any."""
    known = [(e.actions, e.steps) for e in _done(results) if e.actions is not None and e.steps]
    if not known:
        return None
    steps = np.asarray([n for _, n in known], np.float64)
    return Executed(
        steps=int(steps.sum()),
        minimum=_floats(np.min([a.minimum for a, _ in known], axis=0)),
        maximum=_floats(np.max([a.maximum for a, _ in known], axis=0)),
        mean=_floats(np.average([a.mean for a, _ in known], axis=0, weights=steps)),
        histogram=tuple(tuple(map(int, row)) for row in np.sum([a.histogram for a, _ in known], axis=0)),
    )


def share_outside(histogram: Sequence[int], low: float, high: float) -> float:
    """Share of a histogram's counts in bins that lie wholly outside [low, high]; a lower bound of the true share."""
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    counts = np.asarray(histogram)
    outside = (edges[1:] <= low) | (edges[:-1] >= high)
    return float(counts[outside].sum() / counts.sum()) if counts.sum() else 0.0


def gripper_switches(results: Results, success: bool) -> float | None:
    """Mean number of gripper switches of the episodes with this outcome; None without one."""
    known = [e.actions.gripper_switches for e in _done(results) if e.actions is not None and e.success == success]
    return mean(known) if known else None


def _done(results: Results) -> list[Episode]:
    return [episode for episode in results.episodes if episode.error is None]


def _queries(results: Results) -> Iterable[tuple[Episode, QueryRecord]]:
    return ((episode, query) for episode in _done(results) for query in episode.queries)


def _gaps(results: Results) -> Iterable[tuple[Gap, Gap]]:
    """(draft's, main head's) gap of every query that has both."""
    for _, query in _queries(results):
        if query.draft_gap is not None and query.main_gap is not None:
            yield query.draft_gap, query.main_gap


def _floats(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
