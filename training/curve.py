"""The picture of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsd_trt.eval.plots import COLOURS
from rsd_trt.files import replacing
from rsd_trt.training.measure import SHOWN


def learning_curve(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss of the training, and agreement and blind agreement on held-out episodes, from lines of metrics."""
    from matplotlib.figure import Figure

    train = [line for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "held_out"]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(name for name in (train[0] if train else {}) if name.startswith("ce")):
        losses = [x[name] for x in train]
        left.plot([x["step"] for x in train], losses, "o-", color=COLOURS[i], markersize=3, label=f"L{name[2:]}")
    left.set(xlabel="step", ylabel="cross-entropy", title="training, augmented frames")
    for i, name in enumerate(("agreement", "blind")):
        points = [100 * x[name] for x in held_out]
        right.plot([x["step"] for x in held_out], points, "o-", color=COLOURS[i], markersize=3, label=name)
    right.set(xlabel="step", ylabel=f"% of frames, at {SHOWN}", title="held-out episodes", ylim=(0, 100))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
