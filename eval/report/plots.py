"""Measurements as pictures: with units, and in colours that colour-blind people can tell apart."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsd_trt.errors import missing_extra
from rsd_trt.eval.profile.work import STAGES
from rsd_trt.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rsd_trt.eval.profile.components import Timing
    from rsd_trt.eval.profile.stages import StageTiming

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's palette
STAGE_COLOURS = dict(zip(STAGES, COLOURS, strict=True))
UNDIVIDED = "not divided"
MARKS = {"accepted query": "o", "rejected query": "D", "baseline query": "s"}


def check_plots() -> None:
    """Raises UserError unless charts can be drawn: to be called before what they show is measured."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", "report") from None


def latency_chart(timings: Sequence[Timing], title: str, path: Path) -> None:
    """A bar chart of p50 with p5 to p95 as error bars, one panel for each batch size."""
    from matplotlib.figure import Figure

    measured = [t for t in timings if t.ms]
    batches = sorted({t.batch for t in measured})
    figure = Figure(figsize=(11, 3.6 * len(batches)), layout="constrained")
    for panel, batch in enumerate(batches, start=1):
        axes = figure.add_subplot(len(batches), 1, panel)
        here = [t for t in measured if t.batch == batch]
        names = list(dict.fromkeys(t.what for t in here))
        variants = list(dict.fromkeys(t.variant for t in here))
        width = 0.8 / len(variants)
        for i, variant in enumerate(variants):
            rows = {t.what: t.ms for t in here if t.variant == variant}
            present = [name for name in names if name in rows]
            places = [names.index(name) + (i - (len(variants) - 1) / 2) * width for name in present]
            low, mid, high = np.percentile([rows[name] for name in present], (5, 50, 95), axis=1)
            errors = (mid - low, high - mid)
            bars = axes.bar(places, mid, width, yerr=errors, label=variant, color=COLOURS[i], capsize=2)
            axes.bar_label(bars, fmt="%.2g", fontsize=7, padding=2)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("ms (p50; p5 to p95)")
        axes.set_title(f"{title}, batch {batch}, n = {len(here[0].ms)}", fontsize=10)
        axes.legend(fontsize=8, frameon=False, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def stage_chart(rows: Sequence[StageTiming], title: str, path: Path) -> None:
    """The stages of a query on each backbone, as bars beside each other; a panel for each shape."""
    from matplotlib.figure import Figure

    count = len({row.way.shape for row in rows if row.ms})
    ways = len({row.way.name for row in rows if row.ms})
    figure = Figure(figsize=(11, 1.1 + count * (0.75 + 0.42 * ways)), layout="constrained")
    draw_stages(figure, rows)
    figure.suptitle(f"Stages of a query, batch 1, {title}", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_stages(
    figure: Figure,
    rows: Sequence[StageTiming],
    columns: int = 5,
    ink: str = "black",
    label: int = 80,
    titled: bool = True,
) -> None:
    """p50 of each stage, its floor as a line in it, and of whole queries as marks; grey: what isn't divided.

    columns: of the legend; label: characters a line of a backbone's name.
    """
    measured = [row for row in rows if row.ms]
    shapes = list(dict.fromkeys(row.way.shape for row in measured))
    names = list(dict.fromkeys(row.way.name for row in reversed(measured)))
    panels = figure.subplots(len(shapes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, shape in zip(panels, shapes, strict=True):
        for place, name in enumerate(names):
            _draw_way(axes, place, [row for row in measured if (row.way.shape, row.way.name) == (shape, name)], ink)
        axes.set_yticks(range(len(names)), [textwrap.fill(name, label) for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        if titled:
            axes.set_title(shape, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", visible=False)
    panels[-1].set_xlim(left=0)  # of all, which share it; last, because a limit ends automatic scaling
    panels[-1].set_xlabel("ms (p50; line: floor)")
    found = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    shown = {label: handle for handle, label in found}
    order = [label for label in (*STAGES, UNDIVIDED, *MARKS) if label in shown]
    handles = [shown[label] for label in order]
    figure.legend(handles, order, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _draw_way(axes: Axes, place: int, rows: Sequence[StageTiming], ink: str, height: float = 0.6) -> None:
    """One backbone in one shape."""
    medians = {row.what: float(np.median(row.ms)) for row in rows}
    floors = {row.what: row.roofline_ms or 0.0 for row in rows}
    left = 0.0
    for stage in STAGES:
        if stage in medians:
            axes.barh(place, medians[stage], height, left=left, color=STAGE_COLOURS[stage], label=stage)
            axes.plot((left + floors[stage],) * 2, (place - height / 2, place + height / 2), color=ink, linewidth=1)
            left += medians[stage]
    whole = medians.get("baseline query")
    if whole is not None and "predict" not in medians:
        axes.barh(place, max(0.0, whole - left), height, left=left, color="#b8b8b8", label=UNDIVIDED)
    for query, marker in MARKS.items():
        if query in medians:
            (mark,) = axes.plot(medians[query], place, marker, color="white", markersize=6.5, label=query, zorder=3)
            mark.set_markeredgecolor("black")
