"""The command that exports a bundle."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from rsd_trt.cli.console import BuildProgress, Choice, Several, bundle_argument, json_option, precision_option, show
from rsd_trt.config import COMPONENTS, DEFAULT_ENGINES, Component, Precision
from rsd_trt.errors import UserError

if TYPE_CHECKING:
    from rsd_trt.eval.table import Table
    from rsd_trt.export.run import Outcome
    from rsd_trt.trt import Distribution

ExportTarget = Literal["auto", "tensorrt", "rtx", "onnx"]


@click.command()
@bundle_argument
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=DEFAULT_ENGINES,
    show_default=True,
    help="Write to it.",
)
@click.option("--component", type=Choice(COMPONENTS), multiple=True, help="Export only this one; may be repeated.")
@precision_option
@click.option(
    "--target",
    type=Choice(typing.get_args(ExportTarget)),
    default="auto",
    show_default=True,
    help="Build these engines beside ONNX. auto: what is installed and can build here, else none; onnx: none.",
)
@click.option(
    "--compute-capability", type=Several(), default=(), help="rtx: build for these GPUs, as in 8.9,12.0. [all]"
)
@click.option("--version-compatible", is_flag=True, help="tensorrt: build engines that later versions load.")
@click.option("--hardware-compatible", is_flag=True, help="tensorrt: build engines that run on Ampere GPUs and later.")
@click.option("--report", is_flag=True, help="Write the engine inspector's layers beside each engine (needs the GPU).")
@click.option("--force", is_flag=True, help="Build everything again, fresh or not.")
@json_option
def export(
    bundle: Path,
    out: Path,
    component: tuple[Component, ...],
    precision: Precision,
    target: ExportTarget,
    compute_capability: tuple[str, ...],
    version_compatible: bool,
    hardware_compatible: bool,
    report: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Export draft, head, decoder and the fused propose and predict to ONNX and TensorRT engines.

    Writes OUT/<bundle>/ with a manifest. What is fresh is kept.

    \b
    Example: rsd-trt export --target rtx --compute-capability 8.9,12.0
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.export.run import ExportRequest, export_bundle
    from rsd_trt.export.to_engine import EngineOptions

    options = EngineOptions(compute_capability, version_compatible, hardware_compatible)
    opened = Bundle.open(bundle)
    request = ExportRequest(
        engines=out,
        components=component or opened.components or COMPONENTS,
        precision=precision,
        distribution=choose_distribution(target),
        options=options,
        force=force,
        report=report,
    )
    with BuildProgress(2 * len(request.components) * (2 if request.distribution else 1)) as progress:
        outcomes = export_bundle(opened, request, progress.add, progress.step)
    if as_json:
        rows = [
            {
                "artefact": outcome.artefact.name,
                "built": outcome.built,
                "reason": outcome.reason,
                "seconds": outcome.artefact.build_seconds,
                "files": [str(out / opened.config.name / file.name) for file in outcome.artefact.files],
            }
            for outcome in outcomes
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    show(outcomes_table(outcomes))
    click.echo(f"manifest: {out / opened.config.name / 'manifest.json'}")


def outcomes_table(outcomes: Sequence[Outcome]) -> Table:
    """What was built, what was kept, and why."""
    from rsd_trt.eval.table import Column, Table

    columns = (Column("artefact"), Column("state", "verdict"), Column("build", "s"))
    rows = tuple(
        (x.artefact.name, f"built: {x.reason}" if x.built else "fresh", x.artefact.build_seconds) for x in outcomes
    )
    return Table("", columns, rows)


def choose_distribution(target: ExportTarget) -> Distribution | None:
    """The TensorRT to build with; `auto` takes none, and says so, where none can build."""
    from rsd_trt import host
    from rsd_trt.trt import find_distribution

    if target == "onnx":
        return None
    if target != "auto":
        return find_distribution(target)
    candidates: tuple[Literal["tensorrt", "rtx"], ...] = ("tensorrt", "rtx") if host.gpu() else ("rtx",)
    problems = []
    for candidate in candidates:
        try:
            return find_distribution(candidate)
        except UserError as error:
            problems.append(str(error))
    click.echo(f"ONNX only: {' '.join(problems)}", err=True)
    return None


COMMANDS = (export,)
