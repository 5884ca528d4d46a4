"""The command that times a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
from click.core import ParameterSource

from rsd_trt.cli.console import (
    ReplayProgress,
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
    DEFAULT_BUNDLE,
    BackboneKind,
    BackbonePrecision,
    Precision,
)
from rsd_trt.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rsd_trt.eval.profile.replay_record import Replay
    from rsd_trt.eval.report.profile import Report

# Which options mean something only beside which.
NEEDS = {
    "episodes": ("replay",),
    "backbone": ("stages", "replay"),
    "backbone_precision": ("stages", "replay"),
    "images": ("stages", "replay"),
    "prompt_tokens": ("stages", "replay"),
    "trace": ("stages",),
}
NOT_WITH_REPLAY = ("stages", "batch", "samples", "warm_up")
ONE_FOR_REPLAY = ("backend", "backbone", "backbone_precision", "images", "prompt_tokens")


@click.command()
@bundle_argument
@click.argument("more", type=click.Path(path_type=Path), nargs=-1, metavar="")
@click.option(
    "--backend",
    callback=split_list,
    default="torch,graph,ort,trt",
    show_default=True,
    help="What components are timed on. With --replay: what runs them (graph, or torch beside an eager backbone).",
)
@click.option("--batch", callback=split_list, default="1", show_default=True, help="Batch sizes, as in 1,8.")
@click.option(
    "--stages", is_flag=True, help="Time the stages of a query and whole queries, and components only if --backend."
)
@click.option(
    "--replay",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="RESULTS...",
    help="Measure what the decisions recorded in these results files would cost on the bundle.",
)
@click.option(
    "--episodes", type=click.IntRange(1), default=50, show_default=True, help="With --replay: how many to measure."
)
@click.option(
    "--backbone", callback=split_list, help=f"Of {', '.join(BACKBONES)}. [default: all that run here; --replay: graph]"
)
@click.option(
    "--backbone-precision",
    callback=split_list,
    default="bundle",
    show_default=True,
    help=f"Of {', '.join(BACKBONE_PRECISIONS)}.",
)
@click.option("--images", callback=split_list, help="Images of an observation, as in 1,2. [default: the bundle's]")
@click.option("--prompt-tokens", callback=split_list, help="As in 28,64. [default: a LIBERO instruction's]")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --stages: write a Chrome trace of an accepted and a full query on the last backbone that could run.",
)
@click.option("-n", "--samples", type=click.IntRange(2), default=300, show_default=True, help="Launches of each row.")
@click.option("--warm-up", type=click.IntRange(1), default=50, show_default=True, help="Launches before them.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder.")
@precision_option
@device_option
@engines_option
@json_option
@click.pass_context
def profile(
    ctx: click.Context,
    bundle: Path,
    more: tuple[Path, ...],
    backend: tuple[str, ...],
    batch: tuple[str, ...],
    stages: bool,
    replay: tuple[Path, ...],
    episodes: int,
    backbone: tuple[str, ...],
    backbone_precision: tuple[str, ...],
    images: tuple[str, ...],
    prompt_tokens: tuple[str, ...],
    trace: Path | None,
    samples: int,
    warm_up: int,
    out: Path,
    precision: Precision,
    device: str,
    engines: Path,
    as_json: bool,
) -> None:
    """Time the components on every backend, the stages of a query on every backbone, or recorded decisions.

    Writes OUT/profile.json with every raw sample, and charts; with --replay, OUT/replay.json. On CUDA, ort is timed
    with and without its CUDA graph.

    \b
    Example: rsd-trt profile --backend torch,ort --batch 1,8
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) != ParameterSource.DEFAULT}
    bundle, results = _sort_out(bundle, replay, more)
    _check_usage(ctx.params, given)
    sizes, views, prompts = _sizes(batch, "batch"), _sizes(images, "images"), _sizes(prompt_tokens, "prompt-tokens")
    if not sizes:
        raise click.UsageError(f"--batch {','.join(batch)} is not a list of sizes such as 1,8")
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.profile.shapes import Shape
    from rsd_trt.runtime.backends import check_backend
    from rsd_trt.runtime.policy import check_device

    for names, known, what in (
        (backbone, BACKBONES, "backbone"),
        (backbone_precision, BACKBONE_PRECISIONS, "backbone precision"),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"{what} {name!r} is unknown{did_you_mean(name, known)}")
    kinds = cast("tuple[BackboneKind, ...]", backbone)
    precisions = cast("tuple[BackbonePrecision, ...]", backbone_precision)
    backends = [check_backend(name) for name in backend]
    target = check_device(device)
    command = command_line()
    shapes = tuple(Shape(i, p) for i in views or (None,) for p in prompts or (None,))
    opened = Bundle.open(bundle)
    if replay:
        from rsd_trt.eval.profile.replay import ReplayRequest, write_replay
        from rsd_trt.runtime.backends import Launcher, default_backbone

        kind = kinds[0] if kinds else default_backbone(backends[0] if "backend" in given else "graph", target)
        chosen = backends[0] if "backend" in given else "torch" if kind == "eager" else "graph"
        launcher = Launcher(opened, chosen, target, precision, engines)
        request = ReplayRequest(results, episodes, launcher, kind, precisions[0], shapes[0])
        with ReplayProgress() as progress:
            record = write_replay(request, out, command, progress.advance)
        _print_replay(record, out, as_json)
        return
    from rsd_trt.eval.profile.components import ProfileRequest
    from rsd_trt.eval.profile.stages import StagesRequest
    from rsd_trt.eval.report.profile import write_profile

    components = query = None
    if not stages or "backend" in given:
        variants = [(name, True) for name in backends]
        if target.type == "cuda" and "ort" in backends:
            variants.insert(backends.index("ort"), ("ort", False))
        components = ProfileRequest(tuple(variants), sizes, target, precision, engines, samples, warm_up)
    if stages:
        kinds = kinds or (BACKBONES if target.type == "cuda" else ("eager",))
        pairs = tuple((k, p) for k in kinds for p in precisions)
        query = StagesRequest(pairs, shapes, target, precision, samples, warm_up)
    report = write_profile(opened, components, query, out, command)
    if trace is not None and query is not None and report["stages"] is not None:
        from rsd_trt.eval.profile.stages import number_of
        from rsd_trt.eval.profile.trace import write_trace

        ran = {(row["backbone"], row["precision"]) for row in report["stages"]["startups"]}
        pair = next(p for p in reversed(query.backbones) if (p[0], number_of(opened, p[1])) in ran)
        write_trace(opened, target, pair, precision, shapes[0], trace)
    _print_profile(report, out, samples, as_json)
    if trace is not None and not as_json:
        click.echo(f"trace, for ui.perfetto.dev: {trace}")


def _sort_out(bundle: Path, replay: tuple[Path, ...], more: tuple[Path, ...]) -> tuple[Path, tuple[Path, ...]]:
    """The bundle and the results files. After `--replay A`, further files stand where the bundle may: a bundle is a
    folder, and results are a file."""
    if not replay:
        if more:
            raise click.UsageError(f"Got an unexpected argument ({more[0]}): only --replay takes several files")
        return bundle, ()
    if bundle.is_file() or bundle.suffix in (".json", ".gz"):
        return DEFAULT_BUNDLE, (*replay, bundle, *more)
    return bundle, (*replay, *more)


def _check_usage(values: dict[str, object], given: set[str]) -> None:
    """Raises UsageError for options that clash, or that say nothing beside the others."""
    for name in NOT_WITH_REPLAY if values["replay"] else ():
        if name in given:
            raise click.UsageError(f"--{name.replace('_', '-')} cannot be used with --replay")
    for name, needed in NEEDS.items():
        if name in given and not any(values[other] for other in needed):
            raise click.UsageError(f"--{name.replace('_', '-')} needs {' or '.join(f'--{other}' for other in needed)}")
    for name in ONE_FOR_REPLAY if values["replay"] else ():
        if name in given and len(cast("Sequence[str]", values[name])) != 1:
            raise click.UsageError(f"--replay takes one --{name.replace('_', '-')}")
    for name in ("backbone", "backbone_precision"):
        if name in given and not values[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} is empty")


def _sizes(values: tuple[str, ...], name: str) -> tuple[int, ...]:
    """Numbers of at least 1."""
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise click.UsageError(f"--{name} {','.join(values)} is not a list of sizes such as 1,8")
    return tuple(map(int, values))


def _print_profile(report: Report, out: Path, samples: int, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report))
        return
    from rsd_trt.tables import latency_table, machine_line, stages_tables

    if measured := [row for row in report["rows"] if row["ms"]]:
        show(latency_table(measured, f"ms, {report['boundary']}, n = {samples}"))
    list_reasons("not measured", [row for row in report["rows"] if not row["ms"]])
    if (stages := report["stages"]) is not None:
        show(*stages_tables([row for row in stages["rows"] if row["ms"]]))
        click.echo(f"ms, {stages['boundary']}, n = {samples}\n{machine_line(stages['machine'])}")
        for startup in stages["startups"]:
            click.echo(
                f"start-up of {startup['backbone']} {startup['precision']}, {startup['images']} image(s), "
                f"{startup['prompt_tokens']} prompt tokens: {startup['load_s']:.1f} s to load, "
                f"{startup['first_s']:.1f} s until queries of every kind were answered"
            )
        list_reasons("not measured", [row for row in stages["rows"] if not row["ms"]])
    files = [name for name in ("profile.png", "stages.png") if report["stages" if name[0] == "s" else "rows"]]
    click.echo(f"raw samples: {out / 'profile.json'}\npage: {out / 'profile.html'}")
    for name in files:
        click.echo(f"chart: {out / name}")


def _print_replay(record: Replay, out: Path, as_json: bool) -> None:
    from rsd_trt.jsonio import to_json

    if as_json:
        click.echo(json.dumps(to_json(record)))
        return
    from rsd_trt.tables import replay_table

    show(replay_table(record))
    click.echo(f"a replay: {record.boundary}\nwritten: {out / 'replay.json'}")


COMMANDS = (profile,)
