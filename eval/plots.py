"""Measurements as pictures: with units, and in colours that colour-blind people can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsd_trt.errors import missing_extra
from rsd_trt.files import replacing

if TYPE_CHECKING:
    from rsd_trt.eval.latency import Timing

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's palette


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
