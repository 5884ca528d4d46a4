"""`profile.html`: a profile as one page that needs no network."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rsd_trt import __version__
from rsd_trt.eval.profile.stages import ORACLE, StageTiming
from rsd_trt.eval.report.grids import Grid
from rsd_trt.eval.report.page import render
from rsd_trt.eval.report.plots import draw_stages
from rsd_trt.eval.report.svg import INK, Chart, draw_chart
from rsd_trt.eval.report.wording import ABSENT, listed
from rsd_trt.eval.statistics import percentiles

if TYPE_CHECKING:
    from rsd_trt.eval.report.profile import Report, Stages

LABEL = 14  # characters a line of a backbone's name beside its bar
QUERY_COLUMNS = ("baseline query", "accepted query", "rejected query", "forced query")


@dataclass(frozen=True)
class ShapePart:
    """What was measured in one shape."""

    name: str
    chart: Chart
    queries: Grid
    rows: Grid


@dataclass(frozen=True)
class ProfilePage:
    """All that the template shows."""

    title: str
    version: str
    bundle: str
    samples: str
    command: str
    sentences: tuple[str, ...]
    shapes: tuple[ShapePart, ...]
    boundary: str
    machine: Grid
    startups: Grid
    unmeasured: tuple[str, ...]
    components: Grid
    components_boundary: str
    settings: Grid


def profile_page(report: Report, rows: Sequence[StageTiming]) -> str:
    """The page. rows: those of the report's stages."""
    hardware, stages = report["hardware"], report["stages"]
    measured = [row for row in rows if row.ms]
    shapes = dict.fromkeys(row.way.shape for row in measured)
    counts = {len(samples) for samples in (*report["samples"], *(row.ms for row in measured)) if samples}
    page = ProfilePage(
        title=f"Latency of {report['bundle']} on {hardware.get('gpu', hardware['cpu'])}",
        version=__version__,
        bundle=f"{report['bundle']}, sha256 {report['bundle_sha256'][:12]}",
        samples=listed([f"{count:,}" for count in sorted(counts)]),
        command=report["command"],
        sentences=tuple(sentences(measured)),
        shapes=tuple(_shape(name, [row for row in measured if row.way.shape == name]) for name in shapes),
        boundary=stages["boundary"].capitalize() if stages else "",
        machine=_machine(stages) if stages else Grid((), ()),
        startups=_startups(stages) if stages else Grid((), ()),
        unmeasured=tuple(f"{r.way.name}, {r.way.shape}: {r.reason}" for r in rows if r.reason is not None),
        components=_components(report),
        components_boundary=report["boundary"].capitalize(),
        settings=_settings(report),
    )
    return render("profile.html.jinja", page)


def sentences(rows: Sequence[StageTiming]) -> list[str]:
    """For each shape, what a query costs on the backbone that answers a baseline query fastest."""
    found = []
    for shape in dict.fromkeys(row.way.shape for row in rows):
        whole = {row.way: p50(row) for row in rows if row.way.shape == shape and row.what == "baseline query"}
        way = min((way for way in whole if way.backbone != ORACLE), key=whole.__getitem__, default=None)
        if way is None:
            continue
        line = f"{shape}: {way.name} is fastest, with {whole[way]:.2f} ms for a baseline query"
        for other, ms in whole.items():
            if other.backbone == ORACLE:
                line += f" ({ms / whole[way]:.2f}x over {ms:.2f} ms of {other.name})"
        accepted = [p50(row) for row in rows if row.way == way and row.what == "accepted query"]
        for ms in accepted:
            line += f" and {ms:.2f} ms for an accepted one ({whole[way] / ms:.2f}x)"
        found.append(line + ".")
    return found


def p50(row: StageTiming) -> float:
    """The median of a row that was measured."""
    found = percentiles(row.ms)
    assert found is not None
    return found["p50"]


def _shape(name: str, rows: Sequence[StageTiming]) -> ShapePart:
    ways = list(dict.fromkeys(row.way for row in rows))
    lines = sum(max(2, len(textwrap.wrap(way.name, LABEL))) for way in ways)
    chart = draw_chart(
        f"stages {name}",
        lambda figure: draw_stages(figure, rows, columns=3, ink=INK, label=LABEL, titled=False),
        1.6 + 0.22 * lines,
        f"{name}: p50 of each stage, side by side; lines: their floors; marks: whole queries.",
    )
    medians = {(row.way, row.what): p50(row) for row in rows}
    queries = Grid(
        ("backbone", *(query.removesuffix(" query") for query in QUERY_COLUMNS)),
        tuple((way.name, *(_ms(medians.get((way, query))) for query in QUERY_COLUMNS)) for way in ways),
    )
    columns = ("backbone, stage", "p50", "p95", "p99", "outside the GPU", "MB", "GFLOP", "floor", "bound by", "/ floor")
    return ShapePart(name, chart, queries, Grid(columns, tuple(map(_row, rows))))


def _row(row: StageTiming) -> tuple[str, ...]:
    ms, outside = percentiles(row.ms), percentiles(row.outside_ms)
    assert ms is not None and row.roofline_ms is not None and row.bytes is not None and row.flops is not None
    return (
        f"{row.way.name}, {row.what}",
        *(_ms(ms[key]) for key in ("p50", "p95", "p99")),
        _ms(outside["p50"] if outside else None),
        f"{row.bytes / 1e6:,.1f}",
        f"{row.flops / 1e9:,.1f}",
        _ms(row.roofline_ms),
        str(row.bound),
        f"{ms['p50'] / row.roofline_ms:.2f}",
    )


def _ms(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def _machine(stages: Stages) -> Grid:
    machine = stages["machine"]
    rates = cast("Mapping[str, float]", machine["flops_per_s"])
    side = machine["matrix_side"]
    rows = [("copy on the device", f"{cast(float, machine['bytes_per_s']) / 1e9:,.0f} GB/s")]
    rows += [(f"{name} product of {side} x {side}", f"{rate / 1e12:,.3g} TFLOP/s") for name, rate in rates.items()]
    return Grid(("measured in this run, the fastest of 20", ""), tuple(rows))


def _startups(stages: Stages) -> Grid:
    columns = ("backbone", "images", "prompt tokens", "loading, s", "first queries (capture, compilation), s")
    return Grid(
        columns,
        tuple(
            (
                f"{row['backbone']} {row['precision']}",
                str(row["images"]),
                str(row["prompt_tokens"]),
                f"{row['load_s']:.1f}",
                f"{row['first_s']:.1f}",
            )
            for row in stages["startups"]
        ),
    )


def _components(report: Report) -> Grid:
    rows = []
    for row in report["rows"]:
        if (ms := cast("Mapping[str, float] | None", row["ms"])) is not None:
            speedup = ABSENT if row["speedup"] is None else f"{row['speedup']:.2f}x"
            values = (_ms(ms[key]) for key in ("p50", "p95", "p99"))
            rows.append((str(row["what"]), str(row["variant"]), str(row["batch"]), *values, speedup))
    return Grid(("what", "backend", "batch", "p50", "p95", "p99", "over eager"), tuple(rows))


def _settings(report: Report) -> Grid:
    pairs = [*report["hardware"].items(), *report["versions"].items()]
    return Grid(("", ""), tuple((name, str(value)) for name, value in pairs))
