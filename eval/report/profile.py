"""What a profile leaves on disk: `profile.json` with every raw sample, and pictures of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.profile import components, stages
from rsd_trt.eval.profile.components import TEXTBOOK, ProfileRequest, Timing
from rsd_trt.eval.profile.stages import StageProfile, StagesRequest
from rsd_trt.eval.report.page import check_templates
from rsd_trt.eval.report.plots import check_plots, latency_chart, stage_chart
from rsd_trt.eval.report.profile_page import profile_page
from rsd_trt.files import write_atomically


class Stages(TypedDict):
    """The stages of a query, and all that their floors are made from."""

    boundary: str
    machine: dict[str, object]
    startups: list[dict[str, object]]
    rows: list[dict[str, object]]
    samples: list[list[float]]  # milliseconds, a list for each row
    outside_samples: list[list[float]]  # of queries: milliseconds of the host beyond those of the device


class Report(TypedDict):
    """`profile.json`: every row with its raw samples, and all that is needed to judge it."""

    boundary: str  # of the components
    command: str
    bundle: str
    bundle_sha256: str
    hardware: dict[str, str | int]
    versions: dict[str, str]
    rows: list[dict[str, object]]  # components
    samples: list[list[float]]  # milliseconds, a list for each row
    stages: Stages | None


def write_profile(
    bundle: Bundle, launches: ProfileRequest | None, query: StagesRequest | None, out: Path, command: str
) -> Report:
    """Times the components, the stages of a query, or both, and writes `profile.json`, `profile.html` and
    pictures into `out`: `profile.png` of the components, `stages.png` of the stages.

    Raises:
        UserError: nothing can be timed here, `out` cannot be written, or matplotlib or jinja2 is not installed.
    """
    check_plots()
    check_templates()
    timings = list(components.profile(bundle, launches)) if launches else []
    if launches and not any(timing.ms for timing in timings):
        raise UserError(f"nothing could be measured: {timings[0].reason if timings else 'no backend is given'}")
    found = stages.profile_stages(bundle, query) if query else None
    if found and not any(row.ms for row in found.rows):
        raise UserError(f"nothing could be measured: {found.rows[0].reason if found.rows else 'no backbone is given'}")
    device = (launches or query).device  # type: ignore[union-attr]
    report = _report(bundle, timings, found, host.hardware(str(device)), command)
    title = str(report["hardware"].get("gpu", report["hardware"]["cpu"]))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "profile.json", json.dumps(report) + "\n")
        if timings:
            latency_chart([timing for timing in timings if timing.what != TEXTBOOK], title, out / "profile.png")
        if found:
            stage_chart(found.rows, title, out / "stages.png")
        write_atomically(out / "profile.html", profile_page(report, found.rows if found else ()))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return report


def _report(
    bundle: Bundle, timings: list[Timing], found: StageProfile | None, hardware: dict[str, str | int], command: str
) -> Report:
    faster = components.speedups(timings)
    return Report(
        boundary=components.BOUNDARY,
        command=command,
        bundle=bundle.config.name,
        bundle_sha256=bundle.fingerprint,
        hardware=hardware,
        versions=host.versions(),
        rows=[{**timing.summary(), "speedup": faster.get(timing.key)} for timing in timings],
        samples=[[round(ms, 5) for ms in timing.ms] for timing in timings],
        stages=None if found is None else _stages(found),
    )


def _stages(found: StageProfile) -> Stages:
    return Stages(
        boundary=stages.BOUNDARY,
        machine=asdict(found.machine),
        startups=[
            {**asdict(startup.way), "load_s": startup.load_s, "first_s": startup.first_s} for startup in found.startups
        ],
        rows=[
            {**row.summary(), "speedup": speedup}
            for row, speedup in zip(found.rows, stages.speedups(found.rows), strict=True)
        ],
        samples=[[round(ms, 5) for ms in row.ms] for row in found.rows],
        outside_samples=[[round(ms, 5) for ms in row.outside_ms] for row in found.rows],
    )
