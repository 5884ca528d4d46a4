"""The report's charts: success against cost, success by task, acceptance over the episode, and latency.

They are small, so that a phone shows them without shrinking the text, and in colours that colour-blind people can tell
apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from rsd_trt.eval.plots import COLOURS
from rsd_trt.eval.report.answer import best_of, by_condition
from rsd_trt.eval.report.breakdown import GROUPS, PHASES, Group, group
from rsd_trt.eval.report.compare import differences
from rsd_trt.eval.report.cost import Price
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.svg import INK, Chart, draw_chart, draw_png, shared_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = COLOURS
OTHERS = (VERMILION, GREEN, PINK, ORANGE)
HEIGHT, PANEL_WIDTH = 3.4, 4.4  # inches, of a chart and of a panel of the PNG
MARKERS = "sDv^pP"  # of the runs that check, in turn
TICKS = tuple(x * 10.0**e for e in range(-3, 4) for x in (1, 2, 3, 5, 7))
NOTEWORTHY = 1.2  # times less cost at the same success: an arrow says so
MOST_TASKS, MOST_TIMED = 20, 4  # in a chart
CONTROL_HZ = (10, 20, 50)
ROUTES = dict(zip(GROUPS, (GREEN, ORANGE, VERMILION, BLUE), strict=True))


def frontier_charts(runs: Sequence[Run], price: Price) -> tuple[Chart, ...]:
    """For each condition, success within the endpoint's steps against cost per action."""
    known = _known(runs)
    found = []
    for name, mine in known.items():
        caption = (
            f"{name}: success within {mine[0].endpoint.within} steps against cost. Line: open loop, with its n. Bars: "
            "95%. Dotted arrow: the cost of open loop, on its line, at the success of the other run."
        )

        def draw(figure: Figure, mine: list[Run] = mine) -> None:
            axes = figure.add_subplot()
            _frontier(axes, mine, known, price)
            shared_legend(figure, 2)

        found.append(draw_chart(f"frontier {name}", draw, HEIGHT, caption))
    return tuple(found)


def frontier_png(runs: Sequence[Run], price: Price) -> bytes | None:
    """The same as a PNG on white, its panels side by side; None where no cost is known."""
    if not (known := _known(runs)):
        return None

    def draw(figure: Figure) -> None:
        for i, (name, mine) in enumerate(known.items(), start=1):
            axes = figure.add_subplot(1, len(known), i)
            _frontier(axes, mine, known, price)
            axes.set_title(name, fontsize=10)
        shared_legend(figure, 2 * len(known))

    return draw_png("frontier", draw, PANEL_WIDTH * len(known), HEIGHT + 0.4)


def _known(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """By condition, the runs whose cost and success are known."""
    return _several(by_condition([run for run in runs if run.cost is not None and run.reached_interval is not None]))


def _several(found: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Without conditions of a single run, unless there are no others."""
    return {name: mine for name, mine in found.items() if len(mine) > 1} or found


def _frontier(axes: Axes, runs: Sequence[Run], known: dict[str, list[Run]], price: Price) -> None:
    """One condition; the scales and the looks of runs are those of all."""
    everyone = [run for mine in known.values() for run in mine]
    kinds = list(dict.fromkeys(run.label for run in everyone if not run.open_loop))
    for run in runs:
        kind = 0 if run.open_loop else kinds.index(run.label)
        colour, marker = (BLUE, "o") if run.open_loop else (OTHERS[kind % len(OTHERS)], MARKERS[kind % len(MARKERS)])
        cost, rate, (low, high) = run.cost or 0.0, _percent(run), run.reached_interval or (math.nan, math.nan)
        axes.plot((cost, cost), (low * 100, high * 100), color=colour, linewidth=1, alpha=0.5)
        if not run.open_loop:
            axes.plot(cost, rate, marker, color=colour, markersize=7, label=run.label, linestyle="")
            if (same := cost_at(rate, open_loop(runs, run))) is not None and same >= NOTEWORTHY * cost:
                arrow = {"arrowstyle": "->", "color": colour, "linestyle": ":", "shrinkA": 0, "shrinkB": 5}
                axes.annotate("", (cost, rate), (same, rate), arrowprops=arrow)
                less, middle = f"{same / cost:.1f}x less", (math.sqrt(cost * same), rate)
                axes.annotate(less, middle, (0, 3), textcoords="offset points", color=INK, fontsize=8, ha="center")
            continue
        told = f"n = {run.results.settings.n_action_steps}"
        axes.annotate(told, (cost, rate), (5, -10), textcoords="offset points", color=INK, fontsize=8)
    if line := open_loop(runs):
        axes.plot(*zip(*line, strict=True), "o-", color=BLUE, markersize=5, label="open loop")
    arrow = {"arrowstyle": "->", "color": INK}
    axes.annotate(
        *("better", (0.02, 0.98), (0.12, 0.88)), xycoords="axes fraction", color=INK, arrowprops=arrow, va="center"
    )
    axes.set_xscale("log")
    low, high = min(run.cost or 1.0 for run in everyone) / 1.5, max(run.cost or 1.0 for run in everyone) * 1.3
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    bounds = [bound * 100 for run in everyone for bound in run.reached_interval or ()]
    axes.set_ylim(min(bounds) - 2, max(bounds) + 6)
    axes.set_yticks([tick for tick in axes.get_yticks() if min(bounds) - 2 <= tick <= 100])
    axes.set_xlabel(f"{price.unit} per action")
    axes.set_ylabel(f"success within {runs[0].endpoint.within} steps, %")


def open_loop(runs: Sequence[Run], beside: Run | None = None) -> list[tuple[float, float]]:
    """(cost, success in %) of the runs of open loop, cheapest first; of those that a run can be compared with."""
    loops = [run for run in runs if run.open_loop]
    if beside is not None:
        loops = [loop for loop in loops if not differences(loop.results.settings, beside.results.settings)]
    return sorted((loop.cost or 0.0, _percent(loop)) for loop in loops)


def cost_at(rate: float, line: Sequence[tuple[float, float]]) -> float | None:
    """The cost at which a line through points (cost, rate), cheapest first, comes up to a rate; None where it does not.
    It is straight over the logarithm of the cost, as in the chart."""
    if not line or line[0][1] > rate:
        return None
    for (near, low), (far, high) in pairwise(line):
        if low <= rate <= high and low < high:
            return float(near * (far / near) ** ((rate - low) / (high - low)))
    return None


def _percent(run: Run) -> float:
    return 100 * (run.reached or 0.0)


def task_charts(runs: Sequence[Run]) -> tuple[Chart, ...]:
    """For each condition, success by task of the run that stands for it and of its rivals."""
    found = []
    for name, mine in _several(by_condition(runs)).items():
        run = best_of(mine)
        rivals = [against.versus.names[0] for against in run.against]
        loops = [other for other in mine if other.open_loop and other is not run]
        shown = [run, *([loop for loop in loops if loop.name in rivals] or loops[:1])]
        count = len(run.results.task_results)
        if 1 < count <= MOST_TASKS:

            def draw(figure: Figure, shown: list[Run] = shown, count: int = count) -> None:
                axes = figure.add_subplot()
                width = 0.84 / len(shown)
                for i, (one, colour) in enumerate(zip(shown, (VERMILION, BLUE, SKY, GREEN), strict=False)):
                    tasks = one.results.task_results
                    rates = np.asarray([task.success_rate or 0.0 for task in tasks]) * 100
                    bounds = np.asarray([task.success_interval or (0.0, 0.0) for task in tasks]).T * 100
                    places = np.arange(count) + (i - (len(shown) - 1) / 2) * width
                    axes.bar(places, rates, width * 0.9, color=colour, label=one.label)
                    error = np.abs(bounds - rates)
                    axes.errorbar(places, rates, error, fmt="none", ecolor=INK, elinewidth=1.2)
                axes.set_xticks(np.arange(count), [str(task.task_id) for task in shown[0].results.task_results])
                axes.set_xlabel("task")
                axes.set_ylabel("success, %")
                axes.set_ylim(0, 100)
                axes.grid(visible=False, axis="x")
                shared_legend(figure, 1)

            caption = f"{name}: success by task. Lines: 95%."
            found.append(draw_chart(f"tasks {name}", draw, HEIGHT, caption))
    return tuple(found)


def phase_chart(runs: Sequence[Run]) -> Chart | None:
    """Accepted checks over the episode, a line for each run; None without a check."""
    known = [run for run in runs if any(phase.tested for phase in run.breakdown.phases)]
    if not known:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, run in enumerate(known):
            shares = [100 * p.accepted / p.tested if p.tested else math.nan for p in run.breakdown.phases]
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(
                range(PHASES), shares, f"{MARKERS[i % len(MARKERS)]}-", color=colour, markersize=4, label=run.name
            )
        axes.set_xticks(range(PHASES), [f"{(i + 1) * 100 // PHASES}" for i in range(PHASES)])
        axes.set_xlabel("up to this % of the episode's steps")
        axes.set_ylabel("checks accepted, %")
        axes.set_ylim(0, 100)
        shared_legend(figure, 1)

    return draw_chart("phases", draw, 2.9 + 0.2 * len(known), "Checks that were accepted, by decile of the episode.")


def latency_chart(timed: Sequence[Run]) -> Chart | None:
    """Latency of a query by kind of route, a panel for each run, with the periods of control rates. timed: runs whose
    queries were answered alone; None without any."""
    if not (timed := timed[:MOST_TIMED]):
        return None

    def draw(figure: Figure) -> None:
        times: list[dict[Group, list[float]]] = []
        for run in timed:
            queries = [query for episode in run.results.episodes if episode.error is None for query in episode.queries]
            times.append({kind: [query.ms for query in queries if group(query) == kind] for kind in GROUPS})
        every = [ms for one in times for kind in one.values() for ms in kind if ms > 0]
        low, high = min([*every, 1000 / max(CONTROL_HZ)]) / 1.2, max([*every, 1000 / min(CONTROL_HZ)]) * 1.2
        bins = np.geomspace(low, high, 60).tolist()
        first: Axes | None = None
        for i, (run, one) in enumerate(zip(timed, times, strict=True), start=1):
            axes = figure.add_subplot(len(timed), 1, i, sharex=first)
            first = first or axes
            for kind, ms in one.items():
                if ms:
                    axes.hist(ms, bins, histtype="stepfilled", color=ROUTES[kind], alpha=0.7, label=kind)
            for hz in CONTROL_HZ:
                axes.axvline(1000 / hz, color=INK, linestyle=":", linewidth=1)
                place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                axes.annotate(f"{hz} Hz", (1000 / hz, 1), (2, -10), fontsize=8, color=INK, **place)  # type: ignore[arg-type]
            axes.set_xscale("log")
            axes.set_title(run.name, fontsize=9)
            axes.set_ylabel("queries")
        assert first is not None
        ticks = [tick for tick in TICKS if low <= tick <= high]
        first.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        first.set_xticks([], minor=True)
        figure.axes[-1].set_xlabel("ms")
        shared_legend(figure, 4)

    caption = "Latency of a query by route. Dotted: the period of a control rate."
    return draw_chart("latency", draw, 0.6 + 1.9 * len(timed), caption)
