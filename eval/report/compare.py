"""Two runs side by side, if they may be compared at all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from rsd_trt.config import Mode
from rsd_trt.errors import UserError
from rsd_trt.eval.results import Episode, Results, Settings
from rsd_trt.eval.statistics import (
    CONFIDENCE,
    Interval,
    McNemar,
    bootstrap_speedup,
    mcnemar_exact,
    smallest_provable_loss,
)
from rsd_trt.records import to_json

Difference = Literal["higher", "lower", "not shown"]

SHOWN = 3  # settings in which runs differ that a message names
# What must be equal. The mode is what differs; `timing` and `hardware` may, and then no speed-up is given.
SAME = (
    *("policy_sha256", "suite", "suite_sha256", "tasks", "trials", "perturb", "device", "protocol", "max_steps"),
    *("n_action_steps", "seed", "control", "versions"),
    *("backend", "precision", "backbone", "backbone_precision", "exports_sha256"),  # of the bundle's
)


def figures(run: Results) -> dict[str, float | None]:
    """The figures of a run by name, for programs."""
    times = run.query_ms or {}
    return {
        "success_rate": run.final_success_rate,
        "episodes": run.total_episodes,
        "errors": run.errors,
        "ms_per_action": run.avg_inference_time_ms,
        "query_ms_p50": times.get("p50"),
        "query_ms_p95": times.get("p95"),
        "target_moved": moved(run),
        "queries": run.queries,
        "full_queries": run.full_queries,
        "actions_per_query": run.actions_per_query,
        "steps_per_second": run.steps_per_second,
        "accepted": run.rsd_stats.draft_acceptance_rate,
        "partially_accepted": run.rsd_stats.partial_acceptance_rate,
        "rejected": run.rsd_stats.full_rejection_rate,
    }


def moved(run: Results) -> int | None:
    """The episodes whose target was moved, of those without an error; None where none was to be."""
    if run.settings.perturb is None:
        return None
    return sum(episode.displacement is not None for episode in run.episodes if episode.error is None)


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
    difference: Annotated[Difference, "of the second run's success, by McNemar's exact test at 5%"]
    provable_loss: Annotated[int | None, "fewest episodes lost, none gained, that would show; null: none would"]
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
        more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise UserError(f"these runs cannot be compared: {'; '.join(different[:SHOWN])}{more}")
    pairs = list(_pairs(a, b))
    if not pairs:
        raise UserError("these runs cannot be compared: no episode ended without an error in both")
    success = (sum(x.success for x, _ in pairs) / len(pairs), sum(y.success for _, y in pairs) / len(pairs))
    cost, reason = _cost(a.settings, b.settings, pairs)
    modes = a.settings.of_bundle.mode, b.settings.of_bundle.mode
    test = mcnemar_exact(
        gained=sum(y.success and not x.success for x, y in pairs),
        lost=sum(x.success and not y.success for x, y in pairs),
    )
    return Comparison(
        modes=modes,
        pairs=len(pairs),
        left_out=len(a.settings.tasks) * a.settings.trials - len(pairs),
        success=success,
        success_points=(success[1] - success[0]) * 100,
        mcnemar=test,
        difference=_difference(test),
        provable_loss=smallest_provable_loss(len(pairs)),
        ms_per_action=cost,
        speedup=SpeedUp(cost[0] / cost[1], bootstrap_speedup(*_time_and_steps(pairs))) if cost else None,
        no_speedup=reason,
        other_hardware=tuple(_differences("hardware", a.settings.hardware, b.settings.hardware)),
        figures={modes[0]: figures(a), modes[1]: figures(b)},
        settings={name: value for name, value in _comparable(a.settings).items() if name not in free},
        trained=a.settings.of_bundle.trained,
    )


def _difference(test: McNemar) -> Difference:
    if test.p >= 1 - CONFIDENCE:
        return "not shown"
    return "higher" if test.gained > test.lost else "lower"


def differences(a: Settings, b: Settings, free: Collection[str] = ()) -> list[str]:
    """Why two runs may not be compared: each setting that differs and is not `free`, with both values; empty if they
    may be."""
    left, right = _comparable(a), _comparable(b)
    different = [line for name in SAME if name not in free for line in _differences(name, left[name], right[name])]
    return [*different, f"both are of mode {a.label!r}"] if a.mode == b.mode else different


def _comparable(settings: Settings) -> dict[str, object]:
    """The settings that must be equal, by the names in `SAME`."""
    told = to_json(settings) | (to_json(settings.bundle) if settings.bundle is not None else {})
    return {name: told.get(name) for name in SAME}


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
        return None, "other hardware"
    if "batched" in (a.timing, b.timing):
        return None, "batched timing"
    if "shadow" in (a.mode, b.mode):
        return None, "shadow mode computes all that rsd would save"
    (a_ms, a_steps), (b_ms, b_steps) = (tuple(map(sum, zip(*run, strict=True))) for run in _time_and_steps(pairs))
    if not (a_ms and a_steps and b_ms and b_steps):
        return None, "no action was executed"
    return (a_ms / a_steps, b_ms / b_steps), None


def _time_and_steps(pairs: list[tuple[Episode, Episode]]) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """(policy time in ms, steps) of every episode of both runs."""
    return [(x.policy_ms, x.steps) for x, _ in pairs], [(y.policy_ms, y.steps) for _, y in pairs]
