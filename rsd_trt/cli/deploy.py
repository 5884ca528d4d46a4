"""Commands that export a bundle, and prove the export equal."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import click

from rsd_trt.cli.console import (
    BuildProgress,
    bundle_argument,
    command_line,
    device_option,
    engines_option,
    json_option,
    list_reasons,
    precision_option,
    show,
    split_list,
)
from rsd_trt.config import (
    BACKBONE_PRECISIONS,
    BACKBONES,
    COMPONENTS,
    DEFAULT_ENGINES,
    SUITES,
    Component,
    Precision,
)
from rsd_trt.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from rsd_trt.bundle import Bundle
    from rsd_trt.trt import Distribution

NameT = TypeVar("NameT", bound=str)
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
    """Export draft, head, decoder and the fused propose and predict to ONNX and TensorRT engines.

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
        distribution=choose_distribution(target),
        options=options,
        force=force,
        report=report,
    )
    opened = Bundle.open(bundle)
    with BuildProgress(2 * len(request.components) * (2 if request.distribution else 1)) as progress:
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
@click.option(
    "--backbone", callback=split_list, help="Check the backbone instead, run in these ways: eager,graph,compiled."
)
@click.option(
    "--backbone-precision", callback=split_list, default="bundle", show_default=True, help="As in bundle,bf16,fp8."
)
@click.option("--libero", type=click.Choice(SUITES), help="Show the backbone a suite's first scenes, not noise.")
@click.option("--sensitivity", is_flag=True, help="Measure what each matrix product of the backbone loses in FP8.")
@device_option
@engines_option
@json_option
def verify(
    bundle: Path,
    backend: tuple[str, ...],
    rows: int,
    hidden: Path | None,
    precision: Precision,
    backbone: tuple[str, ...],
    backbone_precision: tuple[str, ...],
    libero: str | None,
    sensitivity: bool,
    device: str,
    engines: Path,
    as_json: bool,
) -> None:
    """Compare every component on every backend with PyTorch: errors, token flips, decisions, actions.

    With --backbone: preprocessing with PIL, the vision towers with timm's, the Llama blocks with transformers', and
    the whole backbone, in every way it is run, with both together. Exit code 1 if a tolerance is exceeded, or nothing
    could be measured.

    \b
    Example: rsd-trt verify --backbone eager,graph --backbone-precision bundle,bf16,fp8
    """
    if backbone or sensitivity:
        verify_backbone(bundle, backbone, backbone_precision, libero, sensitivity, rows, device, as_json)
        return
    if libero:
        raise click.UsageError("--libero shows scenes to the backbone: it needs --backbone or --sensitivity")
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.verify import components
    from rsd_trt.runtime.backends import check_backend
    from rsd_trt.runtime.policy import check_device

    backends = [check_backend(name) for name in backend]
    opened, target = Bundle.open(bundle), check_device(device)
    found = components.verify(opened, backends, target, precision, engines, rows, hidden)
    results = [components.to_json(result) for result in found]
    if as_json:
        print_record(opened, target, results)
    else:
        from rsd_trt.tables import parity_table

        show(parity_table([r for r in results if "exceeded" in r]))
    conclude(results, as_json)


def verify_backbone(
    path: Path,
    kinds: Sequence[str],
    precisions: Sequence[str],
    suite: str | None,
    fp8_sensitivity: bool,
    rows: int,
    device: str,
    as_json: bool,
) -> None:
    """`rsd-trt verify --backbone` and `--sensitivity`."""
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.verify import backbone
    from rsd_trt.eval.verify.components import to_json
    from rsd_trt.eval.verify.fp8_sensitivity import sensitivity
    from rsd_trt.eval.verify.scenes import libero_observations, random_observations
    from rsd_trt.runtime.policy import check_device
    from rsd_trt.tables import backbone_table, sensitivity_table

    chosen = [one_of("backbone", kind, BACKBONES) for kind in kinds]
    wanted = [one_of("backbone precision", precision, BACKBONE_PRECISIONS) for precision in precisions]
    opened, target = Bundle.open(path), check_device(device)
    control = opened.config.control
    seen = list(libero_observations(suite, control)) if suite else random_observations(control, rows)
    if fp8_sensitivity:
        losses = [asdict(loss) for loss in sensitivity(opened, target, seen)]
        if as_json:
            print_record(opened, target, losses)
        else:
            show(sensitivity_table(losses))
        return
    results = [to_json(x) for x in backbone.verify_backbone(opened, chosen, wanted, target, seen)]
    if as_json:
        print_record(opened, target, results)
    else:
        show(backbone_table([r for r in results if "exceeded" in r]))
    conclude(results, as_json)


def print_record(bundle: Bundle, device: torch.device, rows: Sequence[Mapping[str, object]]) -> None:
    """The measurements as JSON, with all that it takes to make them again."""
    from rsd_trt import host

    record = {
        "command": command_line(),
        "bundle": bundle.config.name,
        "bundle_sha256": bundle.fingerprint,
        "hardware": host.hardware(str(device)),
        "versions": host.versions(),
        "rows": rows,
    }
    click.echo(json.dumps(record, indent=2))


def one_of(what: str, name: str, options: Sequence[NameT]) -> NameT:
    """Raises UserError unless `name` is one of the options."""
    for option in options:
        if option == name:
            return option
    raise UserError(f"{what} {name!r} is unknown{did_you_mean(name, options)}")


def conclude(results: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Says what was not compared, unless as JSON, and raises UserError if a comparison failed or none was made."""
    if not as_json:
        list_reasons("not measured", [r for r in results if r["status"] == "not measured"])
        list_reasons("FAILED", [r for r in results if r["status"] == "failed" and "reason" in r])
    failed = [r for r in results if r["status"] == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(results)} comparisons failed")
    if all(r["status"] == "not measured" for r in results):
        raise UserError("nothing could be measured")


COMMANDS = (export, verify)
