"""Commands that export a bundle, and prove the export equal."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from rsd_trt.cli.console import (
    BuildProgress,
    bundle_argument,
    device_option,
    engines_option,
    json_option,
    list_reasons,
    precision_option,
    show,
    split_list,
)
from rsd_trt.config import COMPONENTS, DEFAULT_ENGINES, Component, Precision
from rsd_trt.errors import UserError

if TYPE_CHECKING:
    from rsd_trt.flavour import Flavour

ExportTarget = Literal["auto", "tensorrt", "rtx", "onnx"]
MIN_ROWS = 64  # fewer inputs prove little


@click.command()
@bundle_argument
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=DEFAULT_ENGINES, show_default=True, help="Folder."
)
@click.option("--component", type=click.Choice(COMPONENTS), multiple=True, help="Only this one; may be repeated.")
@precision_option
@click.option(
    "--target",
    type=click.Choice(typing.get_args(ExportTarget)),
    default="auto",
    show_default=True,
    help="Engines to build beside ONNX. auto: what is installed and can build here, else none; onnx: none.",
)
@click.option("--compute-capability", callback=split_list, help="rtx: GPUs to build for, as in 8.9,12.0. [all]")
@click.option("--version-compatible", is_flag=True, help="tensorrt: engines that later versions can load.")
@click.option("--hardware-compatible", is_flag=True, help="tensorrt: engines that run on Ampere GPUs and later.")
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
    """Export draft, head, decoder and the fused accept and chain to ONNX and TensorRT engines.

    Writes OUT/<bundle>/ with a manifest. What is fresh is kept.

    \b
    Example: rsd-trt export --target rtx --compute-capability 8.9,12.0
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.export.run import ExportRequest, export_bundle
    from rsd_trt.export.to_engine import EngineOptions

    options = EngineOptions(compute_capability, version_compatible, hardware_compatible)
    request = ExportRequest(
        engines=out,
        components=component or COMPONENTS,
        precision=precision,
        flavour=choose_flavour(target),
        options=options,
        force=force,
        report=report,
    )
    opened = Bundle.open(bundle)
    with BuildProgress(2 * len(request.components) * (2 if request.flavour else 1)) as progress:
        outcomes = export_bundle(opened, request, progress.add, progress.step)
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
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rsd_trt.tables import outcomes_table

    show(outcomes_table(rows))
    click.echo(f"manifest: {out / opened.config.name / 'manifest.json'}")


def choose_flavour(target: ExportTarget) -> Flavour | None:
    """The TensorRT to build with; `auto` takes none, and says so, where none can build."""
    from rsd_trt import host
    from rsd_trt.flavour import find_flavour

    if target == "onnx":
        return None
    if target != "auto":
        return find_flavour(target)
    candidates: tuple[Literal["tensorrt", "rtx"], ...] = ("tensorrt", "rtx") if host.gpu() else ("rtx",)
    problems = []
    for candidate in candidates:
        try:
            return find_flavour(candidate)
        except UserError as error:
            problems.append(str(error))
    click.echo(f"ONNX only: {' '.join(problems)}", err=True)
    return None


@click.command()
@bundle_argument
@click.option("--backend", callback=split_list, default="graph,ort,trt", show_default=True, help="Backends to check.")
@click.option("-n", "--rows", type=click.IntRange(MIN_ROWS), default=MIN_ROWS, show_default=True, help="Inputs.")
@click.option(
    "--hidden",
    type=click.Path(path_type=Path),
    help="safetensors with recorded hidden states. [default: the bundle's, else seeded ones]",
)
@precision_option
@device_option
@engines_option
@json_option
def verify(
    bundle: Path,
    backend: tuple[str, ...],
    rows: int,
    hidden: Path | None,
    precision: Precision,
    device: str,
    engines: Path,
    as_json: bool,
) -> None:
    """Compare every component on every backend with PyTorch: errors, token flips, decisions, actions.

    Exit code 1 if a tolerance is exceeded, or nothing could be measured.

    \b
    Example: rsd-trt verify --backend ort --json
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval import parity
    from rsd_trt.runtime.backends import check_backend
    from rsd_trt.runtime.policy import check_device

    backends = [check_backend(name) for name in backend]
    opened = Bundle.open(bundle)
    found = parity.verify(opened, backends, check_device(device), precision, engines, rows, hidden)
    results = [parity.to_json(result) for result in found]
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        from rsd_trt.tables import parity_table

        show(parity_table([r for r in results if "exceeded" in r]))
        list_reasons("not measured", [r for r in results if r["status"] == "not measured"])
        list_reasons("FAILED", [r for r in results if r["status"] == "failed" and "reason" in r])
    failed = [r for r in results if r["status"] == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(results)} comparisons failed")
    if all(r["status"] == "not measured" for r in results):
        raise UserError("nothing could be measured")


COMMANDS = (export, verify)
