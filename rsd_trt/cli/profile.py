"""Commands that time a bundle: what its queries cost, its components, and the stages of a full query."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import click

from rsd_trt.cli.console import (
    Several,
    Sizes,
    backbone_option,
    backbone_precision_option,
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
    note_disturbed,
    precision_option,
    show,
)
from rsd_trt.config import BACKBONES, BACKENDS, DEFAULT_RESULTS
from rsd_trt.errors import missing_extra

samples_option = click.option(
    "-n", "--samples", type=click.IntRange(2), default=300, show_default=True, help="Time so many launches of each row."
)
warm_up_option = click.option(
    "--warm-up", type=click.IntRange(1), default=50, show_default=True, help="Launch so often before."
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path), default=DEFAULT_RESULTS, show_default=True, help="Write to this folder."
)


@click.command()
@bundle_argument
@click.option(
    "--backend",
    "backends",
    type=Several(BACKENDS),
    default="torch,graph,compiled,ort,trt",
    show_default=True,
    help="Time these backends; on CUDA, ort with and without its CUDA graph.",
)
@click.option("--batch", "batches", type=Sizes(), default="1", show_default=True, help="Time these sizes, as in 1,8.")
@samples_option
@warm_up_option
@click.option(
    "--pause",
    type=click.FloatRange(0, 1000),
    default=0.0,
    show_default=True,
    help="Wait so many ms before each query, as a robot does: a host that was idle answers more slowly.",
)
@out_option
@precision_option
@backbone_option
@backbone_precision_option
@device_option
@engines_option
@json_option
def profile(bundle: Path, device: str, out: Path, as_json: bool, **options: object) -> None:
    """Time a check, a full query and the components on every backend.

    Writes OUT/profile.json with every raw sample, a chart and a page. rsd-trt report --profile reads it. Exit code 1 if
    a backend or backbone that is given could not be timed.

    \b
    Example: rsd-trt profile --backend torch,ort --batch 1,8
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.profile.components import ProfileRequest
    from rsd_trt.eval.profile.write import write_components
    from rsd_trt.runtime.backends import check_device

    request = from_options(ProfileRequest, options, device=check_device(device))
    record, missing, tables = write_components(Bundle.open(bundle), request, out, command_line())
    if as_json:
        click.echo(json.dumps(record))
    else:
        show(*tables)
        note_disturbed(record["clock"])
        list_reasons("not measured", missing)
        _print_files(out, "profile")
    rows, costs = (cast("list[dict[str, str | None]]", record[name]) for name in ("rows", "costs"))
    check_measured((f"{x['what']} batch {x['batch']}", {"backends": str(x["backend"])}, x["reason"]) for x in rows)
    names = {"backends": "backend", "backbone": "backbone", "backbone_precision": "backbone_precision"}
    queries = [x for x in costs if x["what"] == "full"]  # a check has none in a bundle without a draft
    check_measured(("full", {name: str(x[key]) for name, key in names.items()}, x["reason"]) for x in queries)


@click.command()
@bundle_argument
@backbones_option
@backbone_precisions_option
@click.option("--images", type=Sizes(), default=(), help="Show so many images, as in 1,2. [default: the bundle's]")
@click.option("--prompt-tokens", type=Sizes(), default=(), help="Ask so many tokens, as in 28,64. [default: as LIBERO]")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a Chrome trace of a check and a full query on the last backbone that could run.",
)
@samples_option
@warm_up_option
@out_option
@precision_option
@device_option
@json_option
def profile_query(bundle: Path, device: str, out: Path, trace: Path | None, as_json: bool, **options: object) -> None:
    """Time the stages of a full query, and the query, on every backbone.

    Says how far each is from the roofline bound of this machine. Writes OUT/profile_query.json with every raw sample,
    a chart and a page. Exit code 1 if a backbone that is given could not be timed.

    \b
    Example: rsd-trt profile-query --backbone eager,compiled --images 1,2
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.profile.stages import BOUNDARY, FULL, QueryRequest, trace_query
    from rsd_trt.eval.profile.write import write_query
    from rsd_trt.runtime.backends import check_device

    request = from_options(QueryRequest, options, device=check_device(device))
    opened = Bundle.open(bundle)
    record, found, tables = write_query(opened, request, out, command_line())
    if trace is not None:
        trace_query(opened, request, trace)
    if as_json:
        click.echo(json.dumps(record))
    else:
        show(*tables)
        note_disturbed(record["clock"])
        click.echo(f"{BOUNDARY}; n = {request.samples}")
        missing = ((f"{x.configuration.name} {x.what}", x.reason) for x in found.rows if x.reason is not None)
        list_reasons("not measured", missing)
        _print_files(out, "profile_query")
        if trace is not None:
            click.echo(f"trace, for ui.perfetto.dev: {trace}")
    names = {"backbones": "backbone", "backbone_precisions": "precision"}
    full = [x for x in found.rows if x.what == FULL and x.configuration.backbone in BACKBONES]
    check_measured(
        (x.configuration.size, {name: getattr(x.configuration, key) for name, key in names.items()}, x.reason)
        for x in full
    )


def _print_files(out: Path, name: str) -> None:
    for what, ending in (("raw samples", "json"), ("page", "html"), ("chart", "png")):
        if (file := out / f"{name}.{ending}").exists():
            click.echo(f"{what}: {file}")
        else:
            click.echo(f"no {what}: {missing_extra('matplotlib', 'report')}")


COMMANDS = (profile, profile_query)
