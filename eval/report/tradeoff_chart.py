"""The chart of success against policy time per action: a panel per condition, a curve per variant of a mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rsd_trt.config import Mode
from rsd_trt.eval.plots import COLOURS
from rsd_trt.eval.report.runs import condition
from rsd_trt.eval.report.svg import INK, Chart, draw_chart, draw_png
from rsd_trt.eval.report.tradeoff import Point, Tradeoff

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, _, GREEN, PINK, _, VERMILION = COLOURS
MARGIN = 0.08  # of the success axis, above and below the intervals: for the labels
WIDER = 1.25  # the cost axis ends at that many times the largest cost
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # ms
LEGEND_COLUMNS = 2  # for each panel in a row
HOLLOW = ("s", "v", "D", "^", "p")  # the variants' markers
SPACING = {"fontsize": 9, "columnspacing": 1.0, "handletextpad": 0.1}  # of the legend: it has the width of a phone


@dataclass(frozen=True)
class Style:
    """How a mode's points look; labels stand beyond the ends of intervals, two curves' at different ends."""

    label: str
    colour: str
    marker: str
    line: str
    side: Literal["above", "below", "right"]  # where a point's label is


STYLES: dict[Mode, Style] = {
    "baseline": Style("baseline, open loop", BLUE, "o", "-", "below"),
    "rsd": Style("rsd", VERMILION, "s", "-", "above"),
    "random": Style("random", GREEN, "D", ":", "right"),
    "shadow": Style("shadow", PINK, "^", ":", "right"),
}


@dataclass(frozen=True)
class Panel:
    title: str
    points: tuple[Point, ...]


def panels(found: Tradeoff) -> tuple[Panel, ...]:
    """The points by condition: unperturbed ones first."""
    conditions = sorted({(p.suite, p.bundle, p.perturb) for p in found.points}, key=lambda c: (*c[:2], c[2] or ""))
    several = len({c[:2] for c in conditions}) > 1
    return tuple(
        Panel(
            f"{suite}, {bundle}: {condition(perturb)}" if several else condition(perturb),
            tuple(p for p in found.points if (p.suite, p.bundle, p.perturb) == (suite, bundle, perturb)),
        )
        for suite, bundle, perturb in conditions
    )


def has_curve(found: Tradeoff) -> bool:
    """Whether some mode was run with two n_action_steps under one condition."""
    return any(
        len({p.n_action_steps for p in panel.points if p.mode == mode}) > 1
        for panel in panels(found)
        for mode in STYLES
    )


def tradeoff_chart(found: Tradeoff) -> Chart:
    """The chart for a page, its panels below each other."""
    count = len(panels(found))
    return draw_chart(
        "tradeoff",
        lambda figure: _draw(figure, found, count, 1),
        _legend_height(found, 1) + 2.9 * count,
        caption(found),
    )


def tradeoff_png(found: Tradeoff) -> bytes:
    """The chart as a PNG on white, its panels side by side."""
    count = len(panels(found))
    return draw_png(
        "tradeoff", lambda figure: _draw(figure, found, 1, count), 0.6 + 4.4 * count, _legend_height(found, count) + 3.5
    )


def _legend_height(found: Tradeoff, columns: int) -> float:
    """Inches of the legend above that many panels side by side, and of what lies around the panels."""
    labels = sum(len(_curves(found.points, mode)) for mode in STYLES)
    return 0.4 + 0.2 * -(-labels // (LEGEND_COLUMNS * columns))


def caption(found: Tradeoff) -> str:
    """What the chart shows, and what the times were taken on."""
    replayed = {point.replayed for point in found.points}
    how = {True: "queries at what replayed ones of their route take alone", False: "each query timed alone"}
    times = " and ".join(how[kind] for kind in (True, False) if kind in replayed)
    return (
        "Success against policy time per action; numbers: actions a query. Bars: 95%, Wilson's score and a bootstrap "
        f"over episodes. Times: {times}, on {found.points[0].timed_on}."
    )


def _draw(figure: Figure, found: Tradeoff, rows: int, columns: int) -> None:
    shown = panels(found)
    lowest = min(p.success_interval[0] for p in found.points)
    highest = max(p.success_interval[1] for p in found.points)
    room = MARGIN * max(highest - lowest, 0.05)
    edges = [p.ms for p in found.points] + [x for p in found.points for x in p.ms_interval or ()]
    first = None
    for i, panel in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, columns, i, sharex=first, sharey=first)
        first = first or axes
        for mode, style in STYLES.items():
            for variant, points in _curves(panel.points, mode).items():
                _curve(axes, style, points, *_look(found, mode, variant))
        axes.set_title(panel.title, fontsize=10)
        if i > (rows - 1) * columns:
            axes.set_xlabel("policy time per action, ms")
        if (i - 1) % columns == 0:
            axes.set_ylabel("success, %")
    assert first is not None
    first.set_xscale("log")
    first.set_xlim(min(edges) / WIDER, max(edges) * WIDER)
    first.set_ylim((lowest - room) * 100, (highest + room) * 100)
    ticks = [tick for tick in TICKS if min(edges) / WIDER <= tick <= max(edges) * WIDER]
    first.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    first.set_xticks([], minor=True)
    figure.supxlabel("numbers: actions a query; bars: 95% intervals", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for axes in figure.axes[1:]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside upper center", ncols=LEGEND_COLUMNS * columns, frameon=False, **SPACING)


def _curves(points: Sequence[Point], mode: Mode) -> dict[str, list[Point]]:
    """The points of a mode, a curve for each variant, the longest first."""
    variants: dict[str, list[Point]] = {}
    for point in sorted((p for p in points if p.mode == mode), key=lambda p: p.n_action_steps):
        variants.setdefault(point.variant, []).append(point)
    return dict(sorted(variants.items(), key=lambda item: -len(item[1])))


def _look(found: Tradeoff, mode: Mode, variant: str) -> tuple[str, str]:
    """What the legend says of a variant, the same in every panel, and its marker if that is hollow. Of several, the one
    with most points has the mode's own marker."""
    every, style = list(_curves(found.points, mode)), STYLES[mode]
    name = f"{style.label}, {variant}" if len(every) > 1 else style.label
    return name, "" if variant == every[0] else HOLLOW[every.index(variant) % len(HOLLOW)]


def _curve(axes: Axes, style: Style, points: Sequence[Point], label: str, hollow: str) -> None:
    xs, ys = [p.ms for p in points], [p.success * 100 for p in points]
    order = np.argsort(xs)
    dense = np.geomspace(min(xs), max(xs), 200)  # divisions of the episodes between two runs: no line on a log axis
    line = np.interp(dense, np.take(xs, order), np.take(ys, order))
    axes.plot(dense, line, style.line, color=style.colour, linewidth=1.4)
    inside = "white" if hollow else style.colour
    axes.plot(xs, ys, hollow or style.marker, color=style.colour, markersize=6, markerfacecolor=inside, label=label)
    for point, x, y in zip(points, xs, ys, strict=True):
        low, high = point.success_interval
        axes.plot((x, x), (low * 100, high * 100), color=style.colour, linewidth=1.2, alpha=0.6)
        if point.ms_interval is not None:
            axes.plot(point.ms_interval, (y, y), color=style.colour, linewidth=1.2, alpha=0.6)
        place, offset, align, vertical = {
            "above": ((x, high * 100), (0, 2), "center", "bottom"),
            "below": ((x, low * 100), (0, -2), "center", "top"),
            "right": ((x, y), (7, 0), "left", "center"),
        }[style.side]
        axes.annotate(
            str(point.n_action_steps),
            place,
            xytext=offset,
            textcoords="offset points",
            ha=align,
            va=vertical,
            color=INK,
            fontsize=9,
        )
