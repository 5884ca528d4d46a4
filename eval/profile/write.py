"""What a profile leaves on disk: JSON with every raw sample, a chart, and a page that needs no network."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from rsd_trt import __version__
from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.plots import can_plot
from rsd_trt.eval.profile import components, stages
from rsd_trt.eval.profile.charts import latency_chart, stage_chart
from rsd_trt.eval.profile.components import ProfileRequest, speedups
from rsd_trt.eval.profile.costs import cost_boundary, costs
from rsd_trt.eval.profile.stages import QueryProfile, QueryRequest
from rsd_trt.eval.profile.tables import cost_table, latency_table, machine_table, stage_tables, startup_table
from rsd_trt.eval.table import Column, Table
from rsd_trt.eval.verify.result import record
from rsd_trt.files import check_folder, write_atomically, writing
from rsd_trt.load import LoadMeter, Steadiness, fit_threads, steadiness
from rsd_trt.records import from_json, to_json

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; background: white; }
.wide { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; }
caption { text-align: left; font-weight: bold; }
th, td { padding: 0.15rem 0.6rem; text-align: left; border-bottom: 1px solid #8884; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.faint { opacity: 0.7; }
pre { white-space: pre-wrap; }
"""
Record = dict[str, object]


def write_components(
    bundle: Bundle, request: ProfileRequest, out: Path, command: str
) -> tuple[Record, list[tuple[str, str]], list[Table]]:
    """Times queries and components, and writes `profile.json`, `profile.html` and `profile.png` into `out`. Returns the
    record, what is missing and why, and the tables.

    Raises:
        UserError: nothing can be timed here, or `out` cannot be written.
    """
    load = _begin(request.device, out)
    priced = list(costs(bundle, request))
    timings = list(components.profile(bundle, request))
    if not any(timing.ms for timing in timings):
        raise UserError(f"nothing could be measured: {timings[0].reason if timings else 'no backend is given'}")
    faster = speedups(timings)
    found = record(
        bundle,
        request.device,
        command,
        boundary=components.BOUNDARY,
        cost_boundary=cost_boundary(request),
        costs=[cost.summary() for cost in priced],
        cost_samples=[_rounded(cost.ms) for cost in priced],
        rows=[{**timing.summary(), "speedup": faster.get(timing.key)} for timing in timings],
        samples=[_rounded(timing.ms) for timing in timings],
        clock=_clock(load, {f"{x.backend} {x.what} query": x.ms for x in priced}),
    )
    tables = [
        cost_table(priced, f"{cost_boundary(request)}; n = {request.samples}"),
        latency_table(timings, f"{components.BOUNDARY}; n = {request.samples}"),
    ]
    missing = [(f"{x.backend} {x.what} query", x.reason) for x in priced if x.reason is not None]
    missing += [(f"{x.variant} {x.what}, batch {x.batch}", x.reason) for x in timings if x.reason is not None]
    lines = [f"{what}: {reason}" for what, reason in missing]
    _write(out, "profile", found, tables, lines, lambda title, path: latency_chart(timings, title, path))
    return found, missing, tables


def write_query(
    bundle: Bundle, request: QueryRequest, out: Path, command: str
) -> tuple[Record, QueryProfile, list[Table]]:
    """Times the stages of a full query and the query, and writes `profile_query.json`, `.html` and `.png` into `out`.
    Returns the record, what was measured, and the tables of it.

    Raises:
        UserError: nothing can be timed here, or `out` cannot be written.
    """
    load = _begin(request.device, out)
    profile = stages.profile_query(bundle, request)
    if not any(row.ms for row in profile.rows):
        raise UserError(f"nothing could be measured: {profile.rows[0].reason}")
    found = record(
        bundle,
        request.device,
        command,
        boundary=stages.BOUNDARY,
        machine=asdict(profile.machine),
        startups=[{**asdict(x.configuration), "load_s": x.load_s, "first_s": x.first_s} for x in profile.startups],
        rows=[{**row.summary(), "speedup": x} for row, x in zip(profile.rows, profile.speedups(), strict=True)],
        samples=[_rounded(row.ms) for row in profile.rows],
        clock=_clock(load, {f"{x.configuration.name} {x.what}, {x.configuration.size}": x.ms for x in profile.rows}),
    )
    tables = [*stage_tables(profile), machine_table(profile.machine), startup_table(profile.startups)]
    missing = [
        f"{x.configuration.name}, {x.configuration.size}: {x.reason}" for x in profile.rows if x.reason is not None
    ]
    _write(out, "profile_query", found, tables, missing, lambda title, path: stage_chart(profile.rows, title, path))
    return found, profile, tables


def _begin(device: torch.device, out: Path) -> LoadMeter:
    """Measures what else runs here from now on, beside the threads that a run with one worker has.

    Raises:
        UserError: `out` cannot be written.
    """
    check_folder(out)
    if device.type == "cpu":
        fit_threads(workers=1)
    return LoadMeter()


def _clock(load: LoadMeter, times: Mapping[str, Sequence[float]]) -> Record:
    """How steady the machine was while the times were taken."""
    cores = len(os.sched_getaffinity(0))
    return to_json(steadiness(times, load.lap(), cores, min(torch.get_num_threads(), cores)))


def _write(
    out: Path,
    name: str,
    found: Record,
    tables: Sequence[Table],
    missing: Sequence[str],
    draw: Callable[[str, Path], None],
) -> None:
    """JSON, chart (where matplotlib is installed) and page of one name.

    Raises:
        UserError: `out` cannot be written.
    """
    hardware, versions = found["hardware"], found["versions"]
    assert isinstance(hardware, dict) and isinstance(versions, dict)
    device = str(hardware.get("gpu", hardware["cpu"]))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / f"{name}.json", json.dumps(found) + "\n")
        parts, chart = [], out / f"{name}.png"
        chart.unlink(missing_ok=True)
        if can_plot():
            draw(device, chart)
            drawn = base64.b64encode(chart.read_bytes()).decode("ascii")
            parts.append(f'<p><img alt="The chart of the tables below" src="data:image/png;base64,{drawn}"></p>')
        pairs = tuple((str(key), str(value)) for key, value in (hardware | versions).items())
        settings = Table("hardware and versions", (Column(""), Column("")), pairs, headless=True)
        clock = from_json(Steadiness, found["clock"], "clock")
        parts += [f"<p><strong>Disturbed: {html.escape(sentence)}.</strong></p>" for sentence in clock.disturbed]
        parts += [table.__html__() for table in tables if table]
        if missing:
            parts.append(
                f"<h2>Not measured</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in missing)}</ul>"
            )
        parts += [settings.__html__(), f"<pre>{html.escape(str(found['command']))}</pre>"]
        title = f"Latency of {found['bundle']} on {device}"
        about = f"rsd-trt {__version__}. Bundle sha256 {str(found['bundle_sha256'])[:12]}. {found['boundary']}."
        write_atomically(out / f"{name}.html", _page(title, about, parts))


def _page(title: str, about: str, parts: Sequence[str]) -> str:
    """title, about: text; parts: HTML."""
    title, body = html.escape(title), "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="faint">{html.escape(about)}</p>
{body}
</body>
</html>
"""


def _rounded(samples: Sequence[float]) -> list[float]:
    return [round(ms, 5) for ms in samples]
