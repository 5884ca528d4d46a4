"""The tables of a profile: the same on the terminal and on its page."""

from __future__ import annotations

from collections.abc import Sequence

from rsd_trt.eval.profile.components import Timing, speedups
from rsd_trt.eval.profile.costs import Cost
from rsd_trt.eval.profile.roofline import Machine
from rsd_trt.eval.profile.stages import QueryProfile, StageTiming, Startup
from rsd_trt.eval.statistics import percentiles
from rsd_trt.eval.table import Column, Table, Value

ROOFLINE = (
    "roofline bound: the larger of bytes / bandwidth and FLOPs / rate, summed over the stages; bytes and FLOPs are "
    "counted from the configuration"
)


def cost_table(found: Sequence[Cost], note: str) -> Table:
    """What a check and a full query take on each backend, and the one as a share of the other."""
    pairs: dict[tuple[str, str], dict[str, Cost]] = {}
    for cost in found:
        if cost.ms:
            backbone = f"{cost.backbone}{'' if cost.backbone_precision == 'bundle' else f' {cost.backbone_precision}'}"
            pairs.setdefault((f"{cost.backend} {cost.precision}", backbone), {})[cost.what] = cost
    rows: list[tuple[Value, ...]] = []
    for kind, of in pairs.items():
        check, full = (percentiles(of[what].ms) if what in of else None for what in ("check", "full"))
        share = check["p50"] / full["p50"] if check and full else None
        rows.append((*kind, *(ms[p] if ms else None for ms in (check, full) for p in ("p50", "p99")), share))
    columns = (
        *(Column("backend"), Column("backbone"), Column("check p50", "ms"), Column("check p99", "ms", 1)),
        *(Column("full query p50", "ms"), Column("full query p99", "ms", 1), Column("check / full", "%")),
    )
    return Table("what queries cost", columns, tuple(rows), note)


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
    work = (x.bytes / 1e6, x.flops / 1e9, x.roofline_ms, x.bound, x.times_roofline)
    return x.configuration.name, x.what, ms["p50"], ms["p95"], ms["p99"], x.host_overhead_ms, *work


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
