"""The tables of a profile: the same on the terminal and on its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rsd_trt.eval.profile.components import Timing, speedups
from rsd_trt.eval.profile.replay_record import Replay
from rsd_trt.eval.profile.roofline import Machine
from rsd_trt.eval.profile.stages import QueryProfile, StageTiming, Startup
from rsd_trt.eval.statistics import percentiles
from rsd_trt.eval.table import Column, Table, Value, interval

ROOFLINE = (
    "roofline bound: the larger of bytes / bandwidth and FLOPs / rate, summed over the stages; bytes and FLOPs are "
    "counted from the configuration"
)


def latency_table(timings: Sequence[Timing], note: str) -> Table:
    """Milliseconds of one launch of each component, and of the pair."""
    faster, rows = speedups(timings), []
    for x in timings:
        if ms := percentiles(x.ms):
            figures = (ms["p50"], ms["p90"], ms["p95"], ms["p99"], ms["max"])
            rows.append((x.what, x.variant, x.batch, *figures, faster.get(x.key), x.grown))
    columns = (
        Column("what"),
        Column("backend"),
        Column("batch"),
        Column("p50", "ms"),
        Column("p90", "ms", rank=4),
        Column("p95", "ms", rank=2),
        Column("p99", "ms"),
        Column("max", "ms", rank=3),
        Column("over eager", "x"),
        Column("GPU bytes grown", rank=5),
    )
    return Table("launches of components", columns, tuple(rows), note)


def stage_tables(profile: QueryProfile) -> list[Table]:
    """Milliseconds of stages and queries, and how far they are from what the hardware allows; one for a size."""
    rows: dict[str, list[tuple[Value, ...]]] = {}
    for x, speedup in zip(profile.rows, profile.speedups(), strict=True):
        if ms := percentiles(x.ms):
            rows.setdefault(x.configuration.size, []).append((*_stage_cells(x, ms), speedup))
    columns = (
        Column("backbone"),
        Column("what"),
        Column("p50", "ms"),
        Column("p95", "ms", rank=3),
        Column("p99", "ms"),
        Column("host overhead", "ms", rank=2),
        Column("moved", "MB", rank=6),
        Column("computed", "GFLOP", rank=5),
        Column("roofline bound", "ms", rank=4),
        Column("bound by", rank=1),
        Column("p50 / roofline", "x"),
        Column("over timm + transformers", "x"),
    )
    return [Table(size, columns, tuple(found), grouped=True) for size, found in rows.items()]


def _stage_cells(x: StageTiming, ms: dict[str, float]) -> tuple[Value, ...]:
    assert x.bytes is not None and x.flops is not None
    overhead = percentiles(x.host_overhead_ms)
    work = (x.bytes / 1e6, x.flops / 1e9, x.roofline_ms, x.bound, x.times_roofline)
    return x.configuration.name, x.what, ms["p50"], ms["p95"], ms["p99"], overhead["p50"] if overhead else None, *work


def machine_table(machine: Machine) -> Table:
    """What roofline bounds are made from."""
    copy = f"copy of {machine.copied_bytes / 2**20:,.0f} MiB on the device"
    rows = [(copy, f"{machine.bytes_per_s / 1e9:,.4g} GB/s")]
    for dtype, rate in machine.flops_per_s.items():
        side = machine.matrix_side
        rows.append((f"{dtype} product of random {side} x {side} matrices", f"{rate / 1e12:,.3g} TFLOP/s"))
    return Table(
        "measured in this run, the fastest of 20", (Column(""), Column("")), tuple(rows), ROOFLINE, headless=True
    )


def startup_table(startups: Sequence[Startup]) -> Table:
    """What a backbone costs before its first queries."""
    columns = (
        Column("backbone"),
        Column("input size"),
        Column("loading", "s"),
        Column("first queries of every kind (capture, compilation)", "s"),
    )
    rows = tuple((x.configuration.name, x.configuration.size, x.load_s, x.first_s) for x in startups)
    return Table("start-up", columns, rows)


def replay_table(replay: Replay) -> Table:
    """Whose decisions, by whose clock."""
    clock = replay.rows[0]
    precision = "" if clock.backbone_precision == "bundle" else f" {clock.backbone_precision}"
    title = f"a replay: decisions of the runs below, clock of {replay.bundle}, {clock.backbone}{precision} backbone"
    columns = (
        Column("decisions of"),
        Column("actions a query"),
        Column("episodes", rank=1),
        Column("queries", rank=3),
        Column("full queries", rank=2),
        Column("ms/action", "ms"),
        Column("95% interval"),
        Column("speed-up", "x"),
        Column("95% interval"),
        Column("replayed queries", rank=4),
    )
    rows = tuple(
        (
            f"{row.decisions_of}, {row.mode}, {Path(row.results).name}",
            row.n_action_steps,
            row.episodes,
            row.queries,
            row.full_queries,
            row.ms_per_action,
            interval(row.ms_per_action_interval, "ms") if row.ms_per_action_interval else "too few",
            row.speedup,
            interval(row.speedup_interval, "x"),
            sum(row.route_queries.values()),
        )
        for row in replay.rows
    )
    return Table(title, columns, rows, f"a replay: {replay.boundary}")
