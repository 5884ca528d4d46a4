"""Profiles as pictures: with units, and in colours that colour-blind people can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsd_trt.eval.plots import COLOURS
from rsd_trt.eval.profile.components import Timing
from rsd_trt.eval.profile.roofline import STAGES
from rsd_trt.eval.profile.stages import FULL, StageTiming
from rsd_trt.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGE_COLOURS = dict(zip(STAGES, COLOURS, strict=False))
UNDIVIDED = "not divided"
MARKS = {FULL: "s"}
BAR = 0.6  # of the room that a configuration has


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
    _save(figure, path)


def stage_chart(rows: Sequence[StageTiming], title: str, path: Path) -> None:
    """p50 of each stage side by side, its roofline bound as a line in it, and of the full query as a mark; grey: what
    is not divided. A bar for each backbone, a panel for each input size."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.ms]
    sizes = list(dict.fromkeys(row.configuration.size for row in measured))
    names = list(dict.fromkeys(row.configuration.name for row in reversed(measured)))
    figure = Figure(figsize=(11, 1.1 + len(sizes) * (0.75 + 0.42 * len(names))), layout="constrained")
    panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, size in zip(panels, sizes, strict=True):
        for place, name in enumerate(names):
            here = [x for x in measured if (x.configuration.size, x.configuration.name) == (size, name)]
            _draw_configuration(axes, place, here)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_title(size, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlim(left=0)  # of all, which share it; last, because a limit ends automatic scaling
    panels[-1].set_xlabel("ms (p50; line: roofline bound)")
    found = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    shown = {label: handle for handle, label in found}
    order = [label for label in (*STAGES, UNDIVIDED, *MARKS) if label in shown]
    handles = [shown[label] for label in order]
    figure.legend(handles, order, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(f"Stages of a query, batch 1, {title}", fontsize=11)
    _save(figure, path)


def _draw_configuration(axes: Axes, place: int, rows: Sequence[StageTiming]) -> None:
    """One backbone at one input size."""
    medians = {row.what: float(np.median(row.ms)) for row in rows}
    bounds = {row.what: row.roofline_ms or 0.0 for row in rows}
    left = 0.0
    for stage in STAGES:
        if stage in medians:
            axes.barh(place, medians[stage], BAR, left=left, color=STAGE_COLOURS[stage], label=stage)
            at = left + bounds[stage]
            axes.plot((at, at), (place - BAR / 2, place + BAR / 2), color="black", linewidth=1)
            left += medians[stage]
    whole = medians.get(FULL)
    if whole is not None and "predict" not in medians:
        axes.barh(place, max(0.0, whole - left), BAR, left=left, color="#b8b8b8", label=UNDIVIDED)
    for query, marker in MARKS.items():
        if query in medians:
            (mark,) = axes.plot(medians[query], place, marker, color="white", markersize=6.5, label=query, zorder=3)
            mark.set_markeredgecolor("black")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
