"""Commands that compare a bundle's components, and its backbone, with a reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsd_trt.cli.console import (
    Several,
    Suite,
    backbone_precisions_option,
    backbones_option,
    bundle_argument,
    check_measured,
    command_line,
    device_option,
    engines_option,
    from_options,
    json_option,
    list_reasons,
    precision_option,
    show,
)
from rsd_trt.config import BACKBONES, BACKENDS, BackboneKind
from rsd_trt.errors import UserError

if TYPE_CHECKING:
    from rsd_trt.eval.table import Table
    from rsd_trt.eval.verify.result import Result

# With fewer, no share of decisions, or of tokens or steps, is known well enough to pass.
LEAST_INPUTS, INPUTS = 192, 512
LEAST_IMAGES, IMAGES = 32, 64


@click.command()
@bundle_argument
@click.option(
    "--backend",
    "backends",
    type=Several(BACKENDS),
    default="graph,compiled,ort,trt",
    show_default=True,
    help="Check these backends.",
)
@click.option(
    "-n",
    "--inputs",
    type=click.IntRange(LEAST_INPUTS),
    default=INPUTS,
    show_default=True,
    help="Run every component on so many hidden states.",
)
@click.option(
    "--hidden",
    type=click.Path(path_type=Path),
    help="Take the hidden states of this safetensors file. [default: the bundle's, else seeded ones]",
)
@precision_option
@device_option
@engines_option
@json_option
def verify(bundle: Path, device: str, as_json: bool, **options: object) -> None:
    """Compare every component on every backend with PyTorch: errors, token mismatch, decisions, actions.

    Shares of tokens and decisions are judged by the upper end of their intervals. Exit code 1 if a tolerance is
    exceeded, nothing could be measured, or a backend that is given could not.

    \b
    Example: rsd-trt verify --backend ort --precision fp16
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.verify import components
    from rsd_trt.eval.verify.result import Parity, parity_table, record, to_json
    from rsd_trt.runtime.backends import check_device

    request = from_options(components.VerifyRequest, options, device=check_device(device))
    opened = Bundle.open(bundle)
    results = list(components.verify(opened, request))
    table = parity_table([x for x in results if isinstance(x, Parity)])
    _conclude(results, table, record(opened, request.device, command_line(), rows=list(map(to_json, results))), as_json)
    check_measured((f"{x.component} batch {x.batch}", {"backends": x.backend}, _reason(x)) for x in results)


@click.command()
@bundle_argument
@backbones_option
@backbone_precisions_option
@click.option("-n", "--inputs", type=click.IntRange(LEAST_IMAGES), help=f"Show it so much noise. [default: {IMAGES}]")
@click.option("--libero", type=Suite(), help="Show it the first images of every task of a suite, not noise.")
@device_option
@json_option
def verify_backbone(
    bundle: Path,
    backbones: tuple[BackboneKind, ...],
    inputs: int | None,
    libero: str | None,
    device: str,
    as_json: bool,
    **options: object,
) -> None:
    """Compare the backbone, in every way it is run, with timm's towers and transformers' Llama on the same weights.

    Preprocessing is compared with PIL's, and towers and Llama blocks each alone, too. Tokens and steps of chunks are
    judged by the upper end of their intervals. Exit code 1 if a limit is exceeded, nothing could be measured, or what
    is given by its option could not.

    \b
    Example: rsd-trt verify-backbone --backbone eager,compiled --backbone-precision bundle,bf16
    """
    if libero and inputs is not None:
        raise click.UsageError("-n counts images of noise: it cannot be used with --libero")
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.verify import backbone
    from rsd_trt.eval.verify.inputs import libero_observations, random_observations
    from rsd_trt.eval.verify.result import BackboneParity, backbone_table, record, to_json
    from rsd_trt.runtime.backends import check_device

    target = check_device(device)
    usual = BACKBONES if target.type == "cuda" else BACKBONES[:1]
    request = from_options(backbone.BackboneRequest, options, backbones=backbones or usual, device=target)
    opened = Bundle.open(bundle)
    control = opened.config.control
    seen = list(libero_observations(libero, control)) if libero else random_observations(control, inputs or IMAGES)
    shown = f"{len(seen)} first scenes of {libero}" if libero else f"{len(seen)} images of noise"
    results = list(backbone.verify_backbone(opened, request, seen))
    table = backbone_table([x for x in results if isinstance(x, BackboneParity)], shown)
    rows = list(map(to_json, results))
    _conclude(results, table, record(opened, target, command_line(), shown=shown, rows=rows), as_json)
    if "fp8" in request.backbone_precisions and not libero and not as_json:
        click.echo("what fp8 changes on the bundle's own scenes: --libero SUITE")
    whole = [x for x in results if x.component == "backbone" and x.backend in BACKBONES]
    check_measured(
        ("backbone", {"backbones": x.backend, "backbone_precisions": x.precision}, _reason(x)) for x in whole
    )


def _reason(result: Result) -> str | None:
    """Why it was not measured; None if it was."""
    from rsd_trt.eval.verify.result import NotMeasured

    return result.reason if isinstance(result, NotMeasured) else None


def _conclude(results: Sequence[Result], table: Table, found: dict[str, object], as_json: bool) -> None:
    """Prints the table or the record, and raises UserError if a comparison failed or none could be made."""
    from rsd_trt.eval.verify.result import NotMeasured

    missing = [x for x in results if isinstance(x, NotMeasured)]
    reasons = {x.reason for x in missing if x.failed} or {x.reason for x in missing}  # what can be mended goes first
    if as_json:
        click.echo(json.dumps(found, indent=2))
    if not table and len(reasons) == 1:
        raise UserError(f"nothing could be measured: {reasons.pop()}")
    if not as_json:
        show(*[table] if table else [])
        list_reasons("not measured", ((f"{x.backend} {x.component}", x.reason) for x in missing if not x.failed))
        list_reasons("FAILED", ((f"{x.backend} {x.component}", x.reason) for x in missing if x.failed))
    if failed := sum(result.status == "failed" for result in results):
        raise UserError(f"{failed} of {len(results)} comparisons failed")
    if all(result.status == "not measured" for result in results):
        raise UserError("nothing could be measured")


COMMANDS = (verify, verify_backbone)
