"""Commands that time a bundle: its components, the stages of a query, and recorded decisions."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rsd_trt.cli.console import (
    Choice,
    ReplayProgress,
    Several,
    Sizes,
    backbone_precision_option,
    bundle_argument,
    command_line,
    device_option,
    engines_option,
    from_options,
    json_option,
    list_reasons,
    precision_option,
    show,
)
from rsd_trt.config import (
    BACKBONE_PRECISIONS,
    BACKBONES,
    BACKENDS,
    DEFAULT_BUNDLE,
    BackboneKind,
    BackbonePrecision,
    Backend,
    Precision,
)

samples_option = click.option(
    "-n", "--samples", type=click.IntRange(2), default=300, show_default=True, help="Launches of each row."
)
warm_up_option = click.option(
    "--warm-up", type=click.IntRange(1), default=50, show_default=True, help="Launches before them."
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder to write into."
)


@click.command()
@bundle_argument
@click.option(
    "--backend",
    "backends",
    type=Several(BACKENDS),
    default="torch,graph,ort,trt",
    show_default=True,
    help="Backends to time; on CUDA, ort with and without its CUDA graph.",
)
@click.option("--batch", "batches", type=Sizes(), default="1", show_default=True, help="Batch sizes, as in 1,8.")
@samples_option
@warm_up_option
@out_option
@precision_option
@device_option
@engines_option
@json_option
def profile(bundle: Path, device: str, out: Path, as_json: bool, **options: object) -> None:
    """Time the components on every backend.

    Writes OUT/profile.json with every raw sample, a chart and a page.

    \b
    Example: rsd-trt profile --backend torch,ort --batch 1,8
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.profile.components import ProfileRequest
    from rsd_trt.eval.profile.write import write_components
    from rsd_trt.runtime.backends import check_device

    request = from_options(ProfileRequest, options, device=check_device(device))
    record, timings, table = write_components(Bundle.open(bundle), request, out, command_line())
    if as_json:
        click.echo(json.dumps(record))
        return
    show(table)
    list_reasons("not measured", ((f"{x.variant} {x.what}", x.reason) for x in timings if x.reason is not None))
    _print_files(out, "profile")


@click.command()
@bundle_argument
@click.option(
    "--backbone",
    "backbones",
    type=Several(BACKBONES),
    default=(),
    help=f"Of {', '.join(BACKBONES)}. [default: all that may run here]",
)
@click.option(
    "--backbone-precision",
    "backbone_precisions",
    type=Several(BACKBONE_PRECISIONS),
    default="bundle",
    show_default=True,
    help=f"Of {', '.join(BACKBONE_PRECISIONS)}.",
)
@click.option("--images", type=Sizes(), default=(), help="Images of an observation, as in 1,2. [default: the bundle's]")
@click.option("--prompt-tokens", type=Sizes(), default=(), help="As in 28,64. [default: a LIBERO instruction's]")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a Chrome trace of an accepted and a full query on the last backbone that could run.",
)
@samples_option
@warm_up_option
@out_option
@precision_option
@device_option
@json_option
def profile_query(bundle: Path, device: str, out: Path, trace: Path | None, as_json: bool, **options: object) -> None:
    """Time the stages of a query, and whole queries, on every backbone.

    Says how far each is from the roofline bound of this machine. Writes OUT/profile_query.json with every raw sample,
    a chart and a page.

    \b
    Example: rsd-trt profile-query --backbone eager,compiled --images 1,2
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.profile.stages import BOUNDARY, QueryRequest, trace_query
    from rsd_trt.eval.profile.write import write_query
    from rsd_trt.runtime.backends import check_device

    request = from_options(QueryRequest, options, device=check_device(device))
    opened = Bundle.open(bundle)
    record, found, tables = write_query(opened, request, out, command_line())
    if trace is not None:
        trace_query(opened, request, trace)
    if as_json:
        click.echo(json.dumps(record))
        return
    show(*tables)
    click.echo(f"{BOUNDARY}; n = {request.samples}")
    missing = ((f"{x.configuration.name} {x.what}", x.reason) for x in found.rows if x.reason is not None)
    list_reasons("not measured", missing)
    _print_files(out, "profile_query")
    if trace is not None:
        click.echo(f"trace, for ui.perfetto.dev: {trace}")


@click.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RESULTS...")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    default=DEFAULT_BUNDLE,
    help="The bundle whose time is measured. [default: the reference policy]",
)
@click.option(
    "--episodes", type=click.IntRange(1), default=50, show_default=True, help="How many episodes to answer again."
)
@click.option("--backend", type=Choice(BACKENDS), help="What runs the components. [default: graph; torch beside eager]")
@click.option("--backbone", type=Choice(BACKBONES), help="How the backbone runs. [default: graph; eager on the CPU]")
@backbone_precision_option
@click.option("--images", type=click.IntRange(1), help="Images of an observation. [default: the bundle's]")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Of every prompt. [default: the tasks' own]")
@out_option
@precision_option
@device_option
@engines_option
@json_option
def replay(
    results: tuple[Path, ...],
    bundle: Path,
    episodes: int,
    backend: Backend | None,
    backbone: BackboneKind | None,
    backbone_precision: BackbonePrecision,
    images: int | None,
    prompt_tokens: int | None,
    out: Path,
    precision: Precision,
    device: str,
    engines: Path,
    as_json: bool,
) -> None:
    """Measure what the decisions recorded in results files would cost on a bundle.

    Writes OUT/replay.json.

    \b
    Example: rsd-trt replay results/libero_spatial_rsd_results.json --bundle bundles/7b --episodes 30
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.profile.inputs import InputSize
    from rsd_trt.eval.profile.replay import ReplayRequest, write_replay
    from rsd_trt.eval.profile.tables import replay_table
    from rsd_trt.records import to_json
    from rsd_trt.runtime.backends import Launcher, check_device, default_backbone

    target = check_device(device)
    kind = backbone or default_backbone(backend or "graph", target)
    launcher = Launcher(
        Bundle.open(bundle), backend or ("torch" if kind == "eager" else "graph"), target, precision, engines
    )
    size = InputSize(images, prompt_tokens)
    request = ReplayRequest(results, episodes, launcher, kind, backbone_precision, size)
    with ReplayProgress() as progress:
        record = write_replay(request, out, command_line(), progress.advance)
    if as_json:
        click.echo(json.dumps(to_json(record)))
        return
    show(replay_table(record))
    click.echo(f"written: {out / 'replay.json'}")


def _print_files(out: Path, name: str) -> None:
    for what, ending in (("raw samples", "json"), ("page", "html"), ("chart", "png")):
        click.echo(f"{what}: {out / f'{name}.{ending}'}")


COMMANDS = (profile, profile_query, replay)
