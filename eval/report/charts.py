"""The report's charts: success against cost, open loop as a line; and acceptance over the episode.

They are small, so that a phone shows them without shrinking the text, and in colours that colour-blind people can tell
apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rsd_trt.eval.plots import COLOURS
from rsd_trt.eval.report.breakdown import PHASES
from rsd_trt.eval.report.cost import Price
from rsd_trt.eval.report.runs import Run, condition
from rsd_trt.eval.report.svg import INK, Chart, draw_chart, draw_png, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = COLOURS
OTHERS = (VERMILION, GREEN, PINK, ORANGE)
PANEL, PANEL_WIDTH, MARGIN = 3.1, 4.4, 0.7  # inches: of a panel, and for legend and labels
MARKERS = "sDv^pP"  # of the runs that check, in turn
TICKS = tuple(x * 10.0**e for e in range(-3, 4) for x in (1, 2, 5))


def frontier_chart(runs: Sequence[Run], price: Price) -> Chart | None:
    """Success within the endpoint's steps against cost per action, a panel below the other for each condition; None
    where no cost is known."""
    if not (found := panels(runs)):
        return None
    caption = (
        f"Success within {found[0][1][0].endpoint.within} steps against cost per action. Line: open loop, with its n. "
        f"Bars: 95%, Wilson's score. Cost: {price.told}."
    )
    height = MARGIN + PANEL * len(found)
    return draw_chart("frontier", lambda figure: _frontier(figure, found, price, len(found), 1), height, caption)


def frontier_png(runs: Sequence[Run], price: Price) -> bytes | None:
    """The same as a PNG on white, its panels side by side."""
    if not (found := panels(runs)):
        return None
    width = PANEL_WIDTH * len(found)
    return draw_png("frontier", lambda figure: _frontier(figure, found, price, 1, len(found)), width, MARGIN + PANEL)


def panels(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """(condition, its runs whose cost and success are known), unperturbed first."""
    known = [run for run in runs if run.cost is not None and run.reached_interval is not None]
    conditions = dict.fromkeys(sorted((run.results.settings.perturb for run in known), key=lambda p: p or ""))
    return [(condition(c), [run for run in known if run.results.settings.perturb == c]) for c in conditions]


def _frontier(figure: Figure, found: Sequence[tuple[str, list[Run]]], price: Price, rows: int, columns: int) -> None:
    costs = [run.cost for _, runs in found for run in runs if run.cost]
    kinds = dict.fromkeys(run.label for _, runs in found for run in runs if not run.open_loop)
    looks = {kind: (OTHERS[i % len(OTHERS)], MARKERS[i % len(MARKERS)]) for i, kind in enumerate(kinds)}
    first: Axes | None = None
    for i, (title, runs) in enumerate(found, start=1):
        axes = figure.add_subplot(rows, columns, i, sharex=first, sharey=first)
        first = first or axes
        loops = sorted((run for run in runs if run.open_loop), key=lambda run: run.cost or 0.0)
        costs_of_loops = [run.cost or 0.0 for run in loops]
        axes.plot(costs_of_loops, [_percent(r) for r in loops], "o-", color=BLUE, markersize=5, label="open loop")
        for run in loops:
            n = str(run.results.settings.n_action_steps)
            axes.annotate(
                n, (run.cost or 0.0, _percent(run)), (0, 5), textcoords="offset points", color=INK, ha="center"
            )
        for run in runs:
            colour, marker = (BLUE, "o") if run.open_loop else looks[run.label]
            low, high = run.reached_interval or (math.nan, math.nan)
            axes.plot((run.cost, run.cost), (low * 100, high * 100), color=colour, linewidth=1, alpha=0.5)  # type: ignore[arg-type]
            if not run.open_loop:
                axes.plot(
                    run.cost or 0.0, _percent(run), marker, color=colour, markersize=7, label=run.label, linestyle=""
                )
        axes.set_title(title, fontsize=10)
        if i > (rows - 1) * columns:
            axes.set_xlabel(f"{price.unit} per action")
        if (i - 1) % columns == 0:
            axes.set_ylabel(f"success within {runs[0].endpoint.within} steps, %")
    assert first is not None
    low, high = min(costs) / 1.2, max(costs) * 1.2
    ticks = [tick for tick in TICKS if low <= tick <= high]
    first.set_xscale("log")
    first.set_xlim(low, high)
    first.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    first.set_xticks([], minor=True)
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    shown = {label: handle for handle, label in pairs}
    figure.legend(
        list(shown.values()), list(shown), loc="outside upper center", ncols=2 * columns, frameon=False, fontsize=8
    )


def _percent(run: Run) -> float:
    return 100 * (run.reached or 0.0)


def phase_chart(run: Run) -> Chart | None:
    """Acceptance over the episode; None without a check."""
    found = run.breakdown.phases
    if not any(phase.tested for phase in found):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places, bottom = np.arange(PHASES), np.zeros(PHASES)
        tested = np.asarray([max(1, phase.tested) for phase in found])
        for kind, colour in (("accepted", BLUE), ("partial", SKY), ("rejected", VERMILION)):
            share = np.asarray([getattr(phase, kind) for phase in found]) / tested * 100
            axes.bar(places, share, 0.86, bottom, color=colour, label=kind)
            bottom += share
        axes.set_xticks(places, [f"{(i + 1) * 100 // PHASES}" for i in range(PHASES)])
        axes.set_xlabel("up to this % of the episode's steps")
        axes.set_ylabel("checks, %")
        axes.set_ylim(0, 100)
        axes.grid(visible=False)
        legend(axes, 3)

    total = sum(phase.tested for phase in found)
    return draw_chart(
        f"phase {run.name}", draw, 2.9, f"{run.name}: how {total:,} checks went, by decile of the episode."
    )
