"""Measurements as pictures: with units, and in colours that colour-blind people can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsd_trt.errors import missing_extra
from rsd_trt.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rsd_trt.eval.latency import Timing
    from rsd_trt.eval.stages import StageTiming

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's palette
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
    """The p50 of each backbone's stages, stacked, one panel for each shape; a mark is a whole baseline query, a line in
    each part the floor."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row.images, row.prompt_tokens) for row in rows if row.ms))
    kinds = list(dict.fromkeys((row.backbone, row.precision) for row in rows if row.ms))
    figure = Figure(figsize=(11, 0.9 + len(shapes) * (0.9 + 0.45 * len(kinds))), layout="constrained")
    panels = figure.subplots(len(shapes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, shape in zip(panels, shapes, strict=True):
        here = [row for row in rows if (row.images, row.prompt_tokens) == shape and row.ms]
        for place, kind in enumerate(reversed(kinds)):
            draw_stages(axes, place, [row for row in here if (row.backbone, row.precision) == kind])
        axes.set_yticks(range(len(kinds)), [f"{backbone} {precision}" for backbone, precision in reversed(kinds)])
        axes.set_ylim(-0.6, len(kinds) - 0.4)
        images, prompt = shape
        axes.set_title(f"{images} image{'s' if images > 1 else ''}, {prompt} prompt tokens", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    panels[-1].set_xlabel("ms (p50)")
    found = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    shown = {label: handle for handle, label in found}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(f"Stages of a query, batch 1, {title}", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_stages(axes: Axes, place: float, rows: Sequence[StageTiming], height: float = 0.6) -> None:
    """One backbone's stages side by side, their floors as lines, and its whole queries as marks. What a backbone is not
    divided into is grey."""
    from rsd_trt.eval.work import STAGES

    medians = {row.what: float(np.median(row.ms)) for row in rows}
    floors = {row.what: row.floor_ms for row in rows}
    left = 0.0
    for colour, stage in zip(COLOURS, STAGES, strict=True):
        if stage not in medians:
            continue
        axes.barh(place, medians[stage], height, left=left, color=colour, label=stage)
        if (floor := floors[stage]) is not None:
            axes.plot((left + floor,) * 2, (place - height / 2, place + height / 2), color="black", linewidth=1)
        left += medians[stage]
    whole = medians.get("baseline query")
    if whole is not None and "chain" not in medians:
        axes.barh(place, max(0.0, whole - left), height, left=left, color="#d0d0d0", label="not divided")
    for query, marker in MARKS.items():
        if query in medians:
            (mark,) = axes.plot(medians[query], place, marker, color="white", markersize=7, label=query, zorder=3)
            mark.set_markeredgecolor("black")
