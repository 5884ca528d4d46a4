"""Results as tables for a terminal. They are built here and printed by the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from rich.markup import escape
from rich.table import Table

from rsd_trt.doctor import Line
from rsd_trt.eval.profile.replay_record import Replay
from rsd_trt.eval.report.calibrate import Calibration
from rsd_trt.eval.report.compare import FIGURES
from rsd_trt.eval.report.conclusion import targets
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.wording import interval, number
from rsd_trt.eval.results import Results

Json = Mapping[str, object]


def bundle_table(description: Json) -> Table:
    """`rsd-trt info`."""
    table = Table(title=f"{escape(str(description['path']))}  ({_trained(description['trained'])})", show_header=True)
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("sha256")
    table.add_column("inputs -> outputs")
    parts = cast(Mapping[str, "Json | None"], description["parts"])
    for name, part in parts.items():
        if part is None:
            table.add_row(name, "absent")
            continue
        inputs, outputs = cast(Sequence[str], part["inputs"]), cast(Sequence[str], part["outputs"])
        ports = f"{', '.join(inputs)} -> {', '.join(outputs)}" if inputs else ""
        ports = f"weights in {part['folder']}" if part["folder"] else ports
        size = f"{cast(int, part['bytes']) / 1e6:.1f}"
        table.add_row(name, f"{part['parameters']:,}", size, str(part["sha256"])[:12], ports.replace("[", r"\["))
    return table


def conventions_table(description: Json) -> Table:
    """Every convention of the bundle's `dims`, `rsd` and `control` sections, a line each."""
    table = Table(show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    config = cast(Mapping[str, Json], description["config"])
    table.add_row("protocol", str(description["protocol"]))
    for section in ("dims", "rsd", "control"):
        for key, value in config[section].items():
            table.add_row(f"{section}.{key}", repr(value).replace("[", r"\["))
    table.add_row("codec.scale", str(config["codec"]["scale"]))
    table.add_row("codec round-trip MSE", f"{description['round_trip_mse']}")
    return table


def artefacts_table(description: Json) -> Table:
    """`rsd-trt info`: what has been exported, and whether it may still be used."""
    table = Table(title="exports" if description["exports"] else "nothing exported yet: rsd-trt export")
    table.add_column("artefact")
    table.add_column("MB", justify="right")
    table.add_column("state")
    for row in cast(Sequence[Json], description["exports"]):
        table.add_row(str(row["artefact"]), f"{cast(int, row['bytes']) / 1e6:.1f}", str(row["reason"]))
    return table


def outcomes_table(rows: Sequence[Json]) -> Table:
    """`rsd-trt export`: what was built, what was kept, and why."""
    table = Table()
    table.add_column("artefact")
    table.add_column("state")
    table.add_column("build s", justify="right")
    for row in rows:
        state = f"built: {row['reason']}" if row["built"] else "fresh"
        table.add_row(str(row["artefact"]), state, f"{row['seconds']:.1f}")
    return table


def parity_table(results: Sequence[Json]) -> Table:
    """`rsd-trt verify`: a row for each component, backend and variant."""
    table = Table(title="against eager PyTorch in float32")
    for name in ("component", "backend", "batch"):
        table.add_column(name)
    for name in ("max abs", "p99 abs", "cosine", "worst token flips", "decision flips", "action max abs"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for row in results:
        start = [str(row["component"]), f"{row['backend']} {row['precision']}", str(row["batch"])]
        flips = cast("Sequence[float] | None", row["flips"])
        table.add_row(
            *start,
            f"{row['max_abs']:.2g}",
            f"{row['p99_abs']:.2g}",
            f"{row['cosine']:.6f}",
            "-" if flips is None else f"{max(flips):.3%} (L{flips.index(max(flips))})",
            "-" if row["decision_flips"] is None else f"{row['decision_flips']:.2%}",
            "-" if row["action_max_abs"] is None else f"{row['action_max_abs']:.2g}",
            "passed" if row["status"] == "passed" else f"FAILED: {'; '.join(cast(Sequence[str], row['exceeded']))}",
        )
    return table


def backbone_table(results: Sequence[Json]) -> Table:
    """`rsd-trt verify --backbone`: a row for each way of running it, or a part of it, and each reference."""
    table = Table(title="worst of all inputs; k: after the draft's block, N: after the last one and the final norm")
    for name in ("what", "batch", "against"):
        table.add_column(name)
    for name in ("max abs k, N", "cosine k, N", "worst flips draft, main", "action max abs", "steps apart"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for row in results:
        what = row["backend"] if row["component"] == "backbone" else row["component"]
        errors = (row[key] for key in ("early_max_abs", "max_abs"))
        cosines = (row[key] for key in ("early_cosine", "cosine"))
        flips = (cast("Sequence[float] | None", row[key]) for key in ("draft_flips", "flips"))
        table.add_row(
            f"{what} {row['precision']}",
            str(row["batch"]),
            str(row["reference"]),
            ", ".join(f"{x:.2g}" for x in errors if x is not None),
            ", ".join(f"{x:.6f}" for x in cosines if x is not None),
            ", ".join(f"{max(x):.2%} (L{x.index(max(x))})" for x in flips if x is not None) or "-",
            "-" if row["action_max_abs"] is None else f"{row['action_max_abs']:.2g}",
            "-" if row["steps_apart"] is None else f"{row['steps_apart']:.2%}",
            "passed" if row["status"] == "passed" else f"FAILED: {'; '.join(cast(Sequence[str], row['exceeded']))}",
        )
    return table


def sensitivity_table(rows: Sequence[Json]) -> Table:
    """`rsd-trt verify --sensitivity`: a row for each choice of products in FP8."""
    title = "these products in FP8, the others in bf16, beside all in bf16; cosines are of the hidden states"
    table = Table(title=title)
    table.add_column("in FP8")
    for name in ("products", "after block N, worst", "mean", "after block k, worst"):
        table.add_column(name, justify="right")
    for name in ("draft flips", "token flips", "mean action error", "steps apart"):
        table.add_column(name, justify="right")
    for row in rows:
        cosines = (f"{row[key]:.6f}" for key in ("cosine", "mean_cosine", "early_cosine"))
        flips = (f"{row[key]:.2%}" for key in ("draft_flips", "flips"))
        apart = (f"{row['action_mean_abs']:.4f}", f"{row['steps_apart']:.2%}")
        table.add_row(str(row["what"]), str(row["products"]), *cosines, *flips, *apart)
    return table


def latency_table(rows: Sequence[Json], title: str) -> Table:
    """`rsd-trt profile`: milliseconds of one launch."""
    table = Table(title=title)
    for name in ("what", "backend", "batch"):
        table.add_column(name)
    for name in ("p50", "p90", "p95", "p99", "max", "vs eager", "GPU bytes grown"):
        table.add_column(name, justify="right")
    for row in rows:
        start = [str(row["what"]), str(row["variant"]), str(row["batch"])]
        ms = cast("Mapping[str, float]", row["ms"])
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        figures = (f"{ms[key]:.3f}" for key in ("p50", "p90", "p95", "p99", "max"))
        grown = "-" if row["grown"] is None else str(row["grown"])
        table.add_row(*start, *figures, speedup, grown)
    return table


def stages_tables(rows: Sequence[Json]) -> list[Table]:
    """`rsd-trt profile --stages`: milliseconds, and how far they are from what the hardware allows; one for a shape."""
    tables: dict[tuple[object, object], Table] = {}
    last: dict[tuple[object, object], str] = {}
    for row in rows:
        shape = row["images"], row["prompt_tokens"]
        if shape not in tables:
            tables[shape] = table = Table(title=f"images: {shape[0]}, prompt tokens: {shape[1]}", title_justify="left")
            for name in ("backbone", "what"):
                table.add_column(name, no_wrap=True)
            for name in ("p50", "p95", "p99", "outside GPU", "MB", "GFLOP", "floor", "bound by", "/ floor", "speed-up"):
                table.add_column(name, justify="right", no_wrap=True)
        way = f"{row['backbone']} {row['precision']}"
        again = way == last.get(shape)
        last[shape] = way
        if not again:
            tables[shape].add_section()
        ms, outside = cast("Mapping[str, float]", row["ms"]), cast("Mapping[str, float] | None", row["outside_ms"])
        tables[shape].add_row(
            "" if again else way,
            str(row["what"]),
            *(f"{ms[key]:.3f}" for key in ("p50", "p95", "p99")),
            "-" if outside is None else f"{outside['p50']:.3f}",
            f"{cast(int, row['bytes']) / 1e6:,.1f}",
            f"{cast(int, row['flops']) / 1e9:,.1f}",
            f"{row['roofline_ms']:.3f}",
            str(row["bound"]),
            f"{row['times_roofline']:.2f}",
            "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        )
    return list(tables.values())


def machine_line(machine: Json) -> str:
    """What floors are made from."""
    rates = cast("Mapping[str, float]", machine["flops_per_s"])
    found = ", ".join(f"{number} {rate / 1e12:,.3g} TFLOP/s" for number, rate in rates.items())
    side = machine["matrix_side"]
    return (
        f"floors are of what was measured in this run: {cast(float, machine['bytes_per_s']) / 1e9:,.4g} GB/s (copy of "
        f"{cast(int, machine['copied_bytes']) / 2**20:,.0f} MiB), {found} (random {side} x {side} matrices)"
    )


def replay_table(replay: Replay) -> Table:
    """`rsd-trt profile --replay`: whose decisions, by whose clock."""
    clock = replay.rows[0]
    precision = "" if clock.backbone_precision == "bundle" else f" {clock.backbone_precision}"
    title = f"a replay: decisions of the runs below, clock of {replay.bundle}, {clock.backbone}{precision} backbone"
    table = Table(title=escape(title))
    for name in ("decisions of", "actions a query"):
        table.add_column(name)
    for name in ("episodes", "queries", "full queries", "ms/action", "95% interval", "speed-up", "95% interval"):
        table.add_column(name, justify="right")
    table.add_column("replayed queries", justify="right")
    for row in replay.rows:
        bounds = row.ms_per_action_interval
        table.add_row(
            escape(f"{row.decisions_of}, {row.mode}, {Path(row.results).name}"),
            str(row.n_action_steps),
            str(row.episodes),
            f"{row.queries:,}",
            f"{row.full_queries:,}",
            f"{row.ms_per_action:.3f}",
            f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "too few",
            f"{row.speedup:.2f}x" if row.speedup else "-",
            interval(row.speedup_interval, "x") if row.speedup else "-",
            f"{sum(row.route_queries.values()):,}",
        )
    return table


def summary_table(results: Results) -> Table:
    """`rsd-trt eval`: a row for each task, and all of them below."""
    settings = results.settings
    ran = f"{settings.label}, {escape(settings.backend)} on {escape(settings.device)}"
    table = Table(title=f"{settings.suite}, {ran if settings.policy == 'bundle' else settings.label}")
    table.add_column("task")
    table.add_column("success", justify="right")
    table.add_column("95% interval", justify="right")
    for task in results.task_results:
        errors = f", {task.errors} errors" if task.errors else ""
        table.add_row(
            f"{task.task_id}  {escape(task.task_description)}",
            f"{task.successes}/{task.episodes}{errors}",
            interval(task.success_interval, "%"),
        )
    table.add_section()
    total = f"{results.total_successes}/{results.total_episodes}"
    table.add_row("all", total, interval(results.final_success_interval, "%"))
    return table


def figures_table(runs: Mapping[str, Mapping[str, float | None]]) -> Table:
    """The figures of one or more runs, a column each."""
    table = Table()
    table.add_column("")
    for name in runs:
        table.add_column(escape(name), justify="right")
    for key, figure in FIGURES.items():
        table.add_row(figure.label, *(number(figures.get(key), figure.unit) for figures in runs.values()))
    return table


def targets_table(runs: Sequence[Run]) -> Table:
    """`rsd-trt report`: what each run says about the experiment's targets."""
    table = Table()
    for name in ("run", "target", "measured", "95% interval", "verdict"):
        table.add_column(name)
    for run in (run for run in runs if not run.throughput_only):
        for target in targets(run):
            measured = number(target.value, target.unit)
            bounds = interval(target.interval, target.unit)
            verdict = f"{target.verdict} ({escape(target.reason)})" if target.reason else target.verdict
            table.add_row(escape(run.name), f"{target.what} > {target.bound}", measured, bounds, verdict)
        table.add_section()
    return table


def calibration_table(calibration: Calibration) -> Table:
    """`rsd-trt calibrate`: acceptance against false accepts on the held-out episodes."""
    rows = [("before", calibration.before), ("chosen", calibration.chosen)]
    rows += [("", other) for other in calibration.curve]
    table = Table(title=f"on {calibration.episodes[2]} held-out episodes")
    for name in ("", "alpha"):
        table.add_column(name)
    for name in ("accepted", "95% interval", "accepted wrongly", "95% interval", "tolerance by dimension"):
        table.add_column(name, justify="right")
    for name, row in rows:
        table.add_row(
            name,
            number(row.alpha),
            number(row.acceptance, "%"),
            interval(row.acceptance_interval, "%"),
            number(row.false_accepts, "%"),
            interval(row.false_accepts_interval, "%"),
            " ".join(f"{x:.3f}" for x in row.tolerance),
        )
        if name == "chosen":
            table.add_section()
    return table


def doctor_table(lines: Sequence[Line], backend: str) -> Table:
    """`rsd-trt doctor`: a row for each check."""
    styles = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[bold red]BROKEN[/]"}
    table = Table(title=f"for --backend {backend}")
    table.add_column("state")
    table.add_column("what")
    table.add_column("found", overflow="fold", ratio=3)
    table.add_column("remedy", overflow="fold", ratio=2)
    for line in lines:
        table.add_row(styles[line.state], line.what, escape(line.found), escape(line.remedy or ""))
    return table


def _trained(trained: object) -> str:
    return "trained" if trained else "UNTRAINED: its actions mean nothing"
