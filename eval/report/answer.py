"""What a report says first: a verdict, four numbers, and what is not shown with what would show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rsd_trt.eval.report.cost import Price
from rsd_trt.eval.report.runs import Against, Run, condition
from rsd_trt.eval.statistics import counted
from rsd_trt.eval.table import Column, Measured, Table, interval, number


@dataclass(frozen=True)
class Figure:
    """A number, and below it what it has to be read with."""

    name: str
    value: str
    below: str


@dataclass(frozen=True)
class Answer:
    """The first screen. style: a class of the page's style sheet."""

    verdict: str
    style: Literal["good", "bad", "open"]
    said: str
    figures: tuple[Figure, ...]
    not_shown: Table


def best_of(runs: Sequence[Run]) -> Run:
    """The run that stands for others: of mode rsd, compared, perturbed, and with most successes, in this order. The
    best open loop is chosen by its successes, too."""

    def worth(run: Run) -> tuple[bool, bool, bool, float]:
        settings = run.results.settings
        best = run.rival("open loop of no higher cost")
        return settings.mode == "rsd", best is not None, settings.perturb is not None, run.reached or 0.0

    return max(runs, key=worth)


def by_condition(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each condition."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(condition(run.results.settings.perturb), []).append(run)
    return found


def answer(runs: Sequence[Run], price: Price) -> Answer:
    """Of the run that stands for all."""
    run = best_of(runs)
    best = run.rival("open loop of no higher cost")
    verdict, style = _verdict(run, runs, best, price)
    said = f"{run.label}, {condition(run.results.settings.perturb)}"
    if best is not None:
        said += f", beside {best.label}: p = {best.p:.2g} by episode, {best.by_task_p:.2g} by task (Holm's adjustment)."
        said += " A difference is shown where both are below 0.05."
    rows = tuple(
        (
            *(name, f"{one.label}, beside {against.label}"),
            Measured(against.versus.points, against.versus.points_interval),
            str(against.needed or "no difference was measured"),
        )
        for name, group in by_condition(runs).items()
        for one in [best_of(group)]
        for against in one.against
        if against.verdict == "not shown" and against.rival != "random acceptance"
    )
    columns = (
        *(Column("condition"), Column("difference not shown"), Column("percentage points (95%)", "points")),
        Column("would be shown by"),
    )
    return Answer(verdict, style, said, _figures(run, best, price), Table("", columns, rows, grouped=True))


def _verdict(
    run: Run, runs: Sequence[Run], best: Against | None, price: Price
) -> tuple[str, Literal["good", "bad", "open"]]:
    if run.results.settings.mode != "rsd":
        return "Nothing is claimed: no run is of mode rsd.", "open"
    if run.alone is not None:
        return f"Not compared: {run.alone}.", "open"
    if best is None:
        loops = [other for other in by_condition(runs)[condition(run.results.settings.perturb)] if other.open_loop]
        least = min(loops, key=lambda loop: loop.cost or 0.0)
        if (least.cost or 0.0) <= (run.cost or 0.0):
            return "Not compared: that with a run of open loop of no higher cost was not declared.", "open"
        costs = f"{number(run.cost, 'ratio')} {price.unit} an action, beside {number(least.cost, 'ratio')}"
        add = "To compare successes, add one with more steps a query."
        return f"No run of open loop costs as little as RSD: {costs} of {least.label}. {add}", "open"
    if best.verdict == "above":
        return "RSD succeeds more often than the best open loop that costs no more.", "good"
    if best.verdict == "below":
        return "RSD succeeds less often than the best open loop that costs no more.", "bad"
    needs = f" About {best.needed} would show a difference as large as the measured one." if best.needed else ""
    return f"RSD is not shown to be better or worse than the best open loop that costs no more.{needs}", "open"


def _figures(run: Run, best: Against | None, price: Price) -> tuple[Figure, ...]:
    found = run.results
    single = run.rival("open loop, n = 1")
    within, bounds = f"success within {run.endpoint.within} steps", interval(run.reached_interval, "%")
    figures = [Figure(within, number(run.reached, "%"), f"{bounds}; {counted(found.total_episodes, 'episode')}")]
    if best is None:
        bounds = interval(found.final_success_interval, "%")
        figures.append(Figure("success", number(found.final_success_rate, "%"), bounds))
    else:
        versus = best.versus
        beside = f"{interval(versus.points_interval, 'points')}; {best.label}: {versus.reached[0]:.1%}"
        figures.append(Figure("points beside the best open loop", number(versus.points, "points"), beside))
    less = single.versus.speedup if single is not None else None
    cheaper = f"{number(less.value, 'x')} cheaper than n = 1 ({interval(less.interval, 'x')})" if less else price.told
    unit = "cost per action, ms" if price.unit == "ms" else "full queries per action"
    figures.append(Figure(unit, number(run.cost, "ms"), cheaper))
    each = [
        number(count / found.steps if found.steps else None, "ratio") for count in (found.checks, found.full_queries)
    ]
    below = f"{each[0]} checks and {each[1]} full queries per action"
    figures.append(Figure("checks accepted", number(found.rsd_stats.draft_acceptance_rate, "%"), below))
    return tuple(figures)
