"""The command that distils a draft."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsd_trt.cli.console import (
    Bar,
    Choice,
    FiniteRange,
    Several,
    backbone_option,
    backbone_precision_option,
    device_option,
    from_options,
    json_option,
    show,
)
from rsd_trt.errors import missing_extra
from rsd_trt.training.request import DistillRequest, DraftSize

if TYPE_CHECKING:
    from rsd_trt.training.outcome import Distilled

MINUTES = 60 * 24 * 7.0  # at the most


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Write the new bundle to this folder."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Keep frames, labels and checkpoints in this folder. [default: OUT.distill]",
)
@click.option(
    "--minutes", type=FiniteRange(0, MINUTES, min_open=True), default=10.0, show_default=True, help="Train so long."
)
@click.option("--steps", type=click.IntRange(1), help="Train so many steps, in place of --minutes.")
@click.option("--batch", type=click.IntRange(1), help="Train on so many frames a step. [default: 1024, on the CPU 64]")
@click.option(
    "--lr", type=FiniteRange(0, 1, min_open=True), default=1e-3, show_default=True, help="Peak learning rate."
)
@click.option(
    "--draft",
    type=Choice(typing.get_args(DraftSize)),
    help="small: sees 128 pixels; large: 224, wider and deeper. [default: like the bundle's, else by the backbone]",
)
@click.option(
    "--live",
    is_flag=True,
    help="Let the main model label every augmented batch: fewer steps, better labels. For small backbones.",
)
@click.option(
    "--camera",
    multiple=True,
    metavar="CAMERA=NAME",
    help="Take what the data set calls NAME for the bundle's CAMERA. Once for each.",
)
@click.option(
    "--state",
    type=Several(),
    default=(),
    help="Take these vectors of the data set, in order, for the 8 numbers of state.",
)
@click.option("--turn", is_flag=True, help="Rotate the data set's frames by 180 degrees: it stores them upright.")
@click.option(
    "--label-batch", type=click.IntRange(1), default=32, show_default=True, help="Label so many frames at once."
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Seed weights and draws.")
@device_option
@backbone_option
@backbone_precision_option
@click.option("--fresh", is_flag=True, help="Start over instead of going on from --work.")
@json_option
def distill(as_json: bool, **options: object) -> None:
    """Distil a draft for BUNDLE from DATA, and write a bundle with it.

    DATA is a folder of recordings (rsd-trt eval --record), LIBERO's HDF5 demonstrations (a file or a folder), or a
    LeRobot data set (v2.1 or v3.0). Recordings hold the main head's chunks; frames of others are labelled by it first.

    A run that was stopped or killed goes on where it was.

    \b
    Example: rsd-trt distill bundles/mine recordings/ -o bundles/mine-rsd --minutes 10
    """
    request = from_options(DistillRequest, options)
    from rsd_trt.training.distill import Progress
    from rsd_trt.training.distill import distill as run

    with LabelBar() as labels, TrainingBar() as training:
        result = run(request, Progress(labels.update, training.update))
    if as_json:
        click.echo(json.dumps(result.to_json()))
        return
    from rsd_trt.training.tables import tables

    show(*tables(result))
    _say(result)


def _say(result: Distilled) -> None:
    """What was written, and what to do next."""
    if result.cost.reason is not None:
        click.echo(f"the costs are not known: {result.cost.reason}")
    if result.curve is None:
        click.echo(f"no picture of the learning curve: {missing_extra('matplotlib', 'report')}")
    picture = " and curve.png" if result.curve else ""
    click.echo(f"report, metrics{picture}: {result.folder} (with frames/, which may be removed)")
    rule = f"{result.rsd.rule} {result.rsd.threshold:g}" if result.rsd.threshold is not None else result.rsd.rule
    click.echo(f"bundle: {result.bundle}, which checks by the rule {rule}")
    shadow = f"rsd-trt eval {result.bundle} --mode shadow --out results/shadow"
    click.echo(f"next: {shadow} && rsd-trt calibrate {result.bundle} results/shadow/*_shadow_results.json")


class LabelBar(Bar):
    """Frames that are read, and labelled where they have to be."""

    def __init__(self) -> None:
        super().__init__("frames")
        self._shown = False

    def __enter__(self) -> LabelBar:
        """It shows itself with the first frames: before that, errors stand alone."""
        return self

    def update(self, done: int, total: int) -> None:
        self.progress.update(self.bar, completed=done, total=total)
        self._shown = done < total
        self.progress.start() if self._shown else self.progress.stop()


class TrainingBar(Bar):
    """The share of the training, and its last figures."""

    def __init__(self) -> None:
        super().__init__("training %", 100)
        self._words: dict[str, str] = {}

    def __enter__(self) -> TrainingBar:
        return self

    def update(self, share: float, line: Mapping[str, object]) -> None:
        if line["kind"] == "held_out":
            self._words["held out"] = f"agreement {line['agreement']:.1%}, blind {line['blind']:.1%}"
            self.progress.console.print(
                f"step {line['step']}: {self._words.get('loss', '')} held out: {self._words['held out']}",
                highlight=False,
            )
        else:
            self._words["loss"] = f"loss {line['loss']:.3f}, {line['samples_per_s']} frames/s,"
        self.progress.start()
        self.progress.update(self.bar, completed=min(100.0, 100 * share), words=" ".join(self._words.values()))


COMMANDS = (distill,)
