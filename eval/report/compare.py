"""Two runs side by side, if they may be compared at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from rsd_trt.config import Mode
from rsd_trt.errors import UserError
from rsd_trt.eval.results import Episode, Results, Settings
from rsd_trt.eval.statistics import Interval, McNemar, bootstrap_speedup, mcnemar_exact
from rsd_trt.jsonio import to_json

Unit = Literal["%", "ms", ""]

# What must be equal. The mode is what differs; `timing` and `hardware` may, and then no speed-up is given.
SAME = (
    *("policy", "suite", "tasks", "trials", "perturb", "backend", "precision", "backbone", "device", "protocol"),
    "backbone_precision",
    *("max_steps", "n_action_steps", "seed", "bundle_sha256", "exports_sha256", "control", "versions"),
)


@dataclass(frozen=True)
class Figure:
    """A number of a run that is worth a line."""

    label: str
    unit: Unit
    of: Callable[[Results], float | None]


FIGURES = {
    "success_rate": Figure("success rate", "%", lambda run: run.final_success_rate),
    "episodes": Figure("episodes", "", lambda run: run.total_episodes),
    "errors": Figure("errors", "", lambda run: run.errors),
    "ms_per_action": Figure("policy time per action", "ms", lambda run: run.avg_inference_time_ms),
    "query_ms_p50": Figure("query p50", "ms", lambda run: (run.query_ms or {}).get("p50")),
    "query_ms_p95": Figure("query p95", "ms", lambda run: (run.query_ms or {}).get("p95")),
    "displaced": Figure("episodes with a displaced target", "", lambda run: displaced(run)),
    "queries": Figure("queries", "", lambda run: run.queries),
    "full_queries": Figure("full queries", "", lambda run: run.full_queries),
    "actions_per_query": Figure("actions per query", "", lambda run: run.actions_per_query),
    "steps_per_second": Figure("steps per second, simulation included", "", lambda run: run.steps_per_second),
    "accepted": Figure("accepted", "%", lambda run: run.rsd_stats.draft_acceptance_rate),
    "partially_accepted": Figure("partially accepted", "%", lambda run: run.rsd_stats.partial_acceptance_rate),
    "rejected": Figure("rejected", "%", lambda run: run.rsd_stats.full_rejection_rate),
}


def displaced(run: Results) -> int | None:
    """The episodes whose target was displaced, of those without an error; None where none was to be."""
    if run.settings.perturb is None:
        return None
    return sum(episode.displacement is not None for episode in run.episodes if episode.error is None)


def figures(run: Results) -> dict[str, float | None]:
    """The figures of a run, by the keys of `FIGURES`."""
    return {key: figure.of(run) for key, figure in FIGURES.items()}


@dataclass(frozen=True)
class SpeedUp:
    """How many times less policy time an executed action takes."""

    value: float
    interval: Annotated[Interval | None, "95%, bootstrap over episodes; null for too few of them"]
    replayed: Annotated[bool, "by a replay's times of a query; else by the runs' own"] = False


@dataclass(frozen=True)
class Comparison:
    """The second run against the first, on the episodes that ended without an error in both."""

    modes: tuple[Mode, Mode]
    pairs: Annotated[int, "episodes that both runs ended without an error"]
    left_out: Annotated[int, "episodes asked for that are not among the pairs"]
    success: Annotated[tuple[float, float], "success rates over the pairs"]
    success_points: Annotated[float, "the second success rate less the first, in percentage points"]
    mcnemar: McNemar
    ms_per_action: Annotated[tuple[float, float] | None, "over the pairs; null where there is no speed-up"]
    speedup: SpeedUp | None
    no_speedup: Annotated[str | None, "why there is no speed-up"]
    other_hardware: Annotated[tuple[str, ...], "in what the machines differ, with both values; empty: in nothing"]
    figures: Annotated[dict[str, dict[str, float | None]], "of each run as a whole, by mode"]
    settings: Annotated[dict[str, object], "what the runs share"]
    trained: bool


def compare(a: Results, b: Results, free: Collection[str] = ()) -> Comparison:
    """Two runs of the same episodes. free: settings that may differ all the same.

    Raises:
        UserError: the runs differ in something that makes their figures incomparable, or share no episode.
    """
    if different := differences(a.settings, b.settings, free):
        raise UserError(f"these runs cannot be compared: {'; '.join(different)}")
    pairs = list(_pairs(a, b))
    if not pairs:
        raise UserError("these runs cannot be compared: no episode ended without an error in both")
    success = (sum(x.success for x, _ in pairs) / len(pairs), sum(y.success for _, y in pairs) / len(pairs))
    cost, reason = _cost(a.settings, b.settings, pairs)
    shared = to_json(a.settings)
    return Comparison(
        modes=(a.settings.mode, b.settings.mode),
        pairs=len(pairs),
        left_out=len(a.settings.tasks) * a.settings.trials - len(pairs),
        success=success,
        success_points=(success[1] - success[0]) * 100,
        mcnemar=mcnemar_exact(
            gained=sum(y.success and not x.success for x, y in pairs),
            lost=sum(x.success and not y.success for x, y in pairs),
        ),
        ms_per_action=cost,
        speedup=SpeedUp(cost[0] / cost[1], bootstrap_speedup(*_time_and_steps(pairs))) if cost else None,
        no_speedup=reason,
        other_hardware=tuple(_differences("hardware", a.settings.hardware, b.settings.hardware)),
        figures={a.settings.mode: figures(a), b.settings.mode: figures(b)},
        settings={name: shared[name] for name in SAME if name not in free},
        trained=a.settings.trained,
    )


def differences(a: Settings, b: Settings, free: Collection[str] = ()) -> list[str]:
    """Why two runs may not be compared: each setting that differs and is not `free`, with both values; empty if they
    may be."""
    left, right = to_json(a), to_json(b)
    different = [line for name in SAME if name not in free for line in _differences(name, left[name], right[name])]
    return [*different, f"both are of mode {a.mode!r}"] if a.mode == b.mode else different


def _differences(name: str, left: object, right: object) -> Iterator[str]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in {**left, **right}:
            yield from _differences(f"{name}.{key}", left.get(key), right.get(key))
    elif left != right:
        yield f"{name} is {left!r} and {right!r}"


def _pairs(a: Results, b: Results) -> Iterator[tuple[Episode, Episode]]:
    """The episodes that ended without an error in both runs."""
    others = {episode.key: episode for episode in b.episodes if episode.error is None}
    for episode in a.episodes:
        if episode.error is None and episode.key in others:
            yield episode, others[episode.key]


def _cost(
    a: Settings, b: Settings, pairs: list[tuple[Episode, Episode]]
) -> tuple[tuple[float, float] | None, str | None]:
    """ms of policy time per action in both runs, or why these may not be set against each other."""
    if a.hardware != b.hardware:
        return None, "not measured: other hardware"
    if "batched" in (a.timing, b.timing):
        return None, "not measured: batched timing"
    if "shadow" in (a.mode, b.mode):
        return None, "not measured: shadow mode computes all that rsd would save"
    (a_ms, a_steps), (b_ms, b_steps) = (tuple(map(sum, zip(*run, strict=True))) for run in _time_and_steps(pairs))
    if not (a_ms and a_steps and b_ms and b_steps):
        return None, "not measured: no action was executed"
    return (a_ms / a_steps, b_ms / b_steps), None


def _time_and_steps(pairs: list[tuple[Episode, Episode]]) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """(policy time in ms, steps) of every episode of both runs."""
    return [(x.policy_ms, x.steps) for x, _ in pairs], [(y.policy_ms, y.steps) for _, y in pairs]
