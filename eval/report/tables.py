"""The tables of a report, and of the commands that read results files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from rsd_trt.config import ACTION_NAMES
from rsd_trt.eval.report.breakdown import Agreement
from rsd_trt.eval.report.calibrate import Calibration
from rsd_trt.eval.report.compare import Comparison, SpeedUp, needed
from rsd_trt.eval.report.cost import COUNTED, Price, measured
from rsd_trt.eval.report.runs import RULE, Run, condition
from rsd_trt.eval.results import Results, TaskResult
from rsd_trt.eval.statistics import counted
from rsd_trt.eval.table import Column, Measured, Table, Value
from rsd_trt.records import to_json

Row = tuple[Value, ...]
VERDICT = Column("verdict", "verdict")


def tasks_table(results: Results) -> Table:
    """`rsd-trt eval`: a row for each task, and all of them below."""
    settings = results.settings
    backend = f", {settings.bundle.backend}" if settings.bundle is not None else ""
    rows: list[Row] = [
        (f"{task.task_id}  {task.task_description}", _task(task), task.errors or None) for task in results.task_results
    ]
    rate, bounds, n = results.final_success_rate, results.final_success_interval, results.total_episodes
    return Table(
        f"{settings.suite}, {settings.label}{backend} on {settings.device}",
        (Column("task"), Column("success (95%)", "%"), Column("errors")),
        (*rows, ("all", Measured(rate, bounds, n), results.errors or None)),
    )


def _task(task: TaskResult | None) -> Measured | None:
    return None if task is None else Measured(task.success_rate, task.success_interval, task.episodes)


_COUNTS = (
    *(Column("full queries per action", "ratio"), Column("checks per action", "ratio"), Column("accepted", "%", 1)),
    *(Column("partial", "%", 3), Column("rejected", "%", 3), Column("unusable drafts", rank=6)),
    Column("clipped steps", rank=6),
)


def _counts(results: Results) -> Row:
    stats, steps = results.rsd_stats, results.steps
    return (
        *(results.full_queries / steps if steps else None, results.checks / steps if steps else None),
        *(stats.draft_acceptance_rate, stats.partial_acceptance_rate, stats.full_rejection_rate),
        *(results.unusable_drafts or None, results.clipped_steps or None),
    )


def counts_table(results: Results) -> Table:
    """`rsd-trt eval`: how its queries went, and what they took."""
    times = results.query_ms or {}
    took = (results.avg_inference_time_ms, times.get("p50"), times.get("p95"), results.steps_per_second)
    columns = (
        *(Column("actions"), *_COUNTS, Column("time per action", "ms"), Column("query p50", "ms", 4)),
        *(Column("query p95", "ms", 4), Column("steps per second", rank=5)),
    )
    return _without_empty(Table("", columns, ((results.steps, *_counts(results), *took),)))


def matrix(runs: Sequence[Run], price: Price = COUNTED) -> Table:
    """Every run: how often it succeeds, what an action costs, and what that is worth beside open loop."""
    within = dict.fromkeys(run.endpoint.within for run in runs)
    cost = Column("cost per action", "ms") if price.unit == "ms" else Column("full queries per action", "ratio")
    columns = (
        *(Column("condition"), Column("run"), Column("success (95%)", "%")),
        *(Column(f"within {'/'.join(map(str, within))} steps (95%)", "%"), cost),
        *(Column("cheaper than n = 1 (95%)", "x", 2), Column("cheaper than the best open loop (95%)", "x", 3)),
        *(Column("accepted", "%", 1), VERDICT),
    )
    several = len({run.results.settings.perturb for run in runs}) > 1
    rows: list[Row] = []
    for run in runs:
        found = run.results
        single, best = run.rival("open loop, n = 1"), run.rival("open loop of no higher cost")
        rows.append(
            (
                condition(found.settings.perturb) if several else None,
                f"{run.number}: {run.label if several else run.name}",
                Measured(found.final_success_rate, found.final_success_interval),
                Measured(run.reached, run.reached_interval),
                run.cost,
                _times(single.versus.speedup) if single else None,
                _times(best.versus.speedup) if best else None,
                found.rsd_stats.draft_acceptance_rate,
                _verdict(run),
            )
        )
    note = (
        f"Cost: {price.told}. Accepted: of the checks. Best open loop: that with most successes within the steps among "
        "those of no higher cost; the verdict is on these successes, by both tests."
    )
    return _without_empty(Table("", columns, tuple(rows), note, grouped=several))


def _verdict(run: Run) -> str | None:
    if run.results.settings.mode != "rsd":
        return None
    if run.alone is not None:
        return "not compared"
    best = run.rival("open loop of no higher cost")
    if best is None:
        return "no open loop costs as little"
    if best.verdict != "not shown":
        return f"{best.verdict} (p = {max(best.p, best.by_task_p):.2g})"
    return f"not shown; {best.needed} would" if best.needed else "not shown; no difference measured"


def all_counts_table(runs: Sequence[Run]) -> Table:
    """Every run: its episodes, and how its queries went."""
    columns = (
        *(Column("run"), Column("episodes"), Column("errors"), Column("mean steps", "steps")),
        *(*_COUNTS, Column("measured per action", "ms")),
    )
    rows: list[Row] = []
    for run in runs:
        found = run.results
        episodes = (found.total_episodes, found.errors or None, run.mean_steps)
        rows.append((_numbered(run), *episodes, *_counts(found), measured(found)))
    note = (
        "Mean steps: to success, a failure or a later success counting as all of them. Measured: medians by route of a "
        "run with one worker. Accepted, partial, rejected: of the checks."
    )
    return _without_empty(Table("", columns, tuple(rows), note))


def _numbered(run: Run) -> str:
    return f"{run.number}: {run.name}"


def _times(found: SpeedUp | None) -> Measured | None:
    return None if found is None else Measured(found.value, found.interval)


def _without_empty(table: Table) -> Table:
    """Without columns that have no value in any row."""
    kept = [i for i in range(len(table.columns)) if any(_told(row[i]) for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    columns = tuple(table.columns[i] for i in kept)
    return Table(table.title, columns, rows, table.note if rows else "", grouped=table.grouped)


def _told(value: Value) -> bool:
    return value is not None and not (isinstance(value, Measured) and value.value is None)


_PAIRED = (
    *(Column("pairs", rank=2), Column("left out", rank=5), Column("points (95%)", "points")),
    *(Column("gained"), Column("lost")),
)


def _paired(found: Comparison) -> Row:
    points = Measured(found.points, found.points_interval)
    return found.pairs, found.left_out or None, points, found.mcnemar.gained, found.mcnemar.lost


def rivals_table(runs: Sequence[Run]) -> Table:
    """Every run that checks beside its rivals, or why not."""
    columns = (
        *(Column("run"), Column("against"), *_PAIRED, Column("p, Holm", "p"), Column("by task, Holm", "p"), VERDICT),
        *(Column("would be shown by"), Column("times less cost (95%)", "x"), Column("note")),
    )
    numbers = {run.name: run.number for run in runs}
    rows: list[Row] = []
    for run in runs:
        for one in run.against:
            found = one.versus
            against = f"{one.rival}: run {numbers[found.names[0]]}"
            lacking = None if one.needed is None else str(one.needed)
            tests = (one.p, one.by_task_p, one.verdict, lacking)
            rows.append((_numbered(run), against, *_paired(found), *tests, _times(found.speedup), _note(found)))
        if run.alone is not None:
            rows.append((_numbered(run), f"not compared: {run.alone}", *[None] * (len(columns) - 2)))
    return _without_empty(Table("", columns, tuple(rows), RULE, grouped=True))


def comparison_table(found: Comparison) -> Table:
    """`rsd-trt compare`."""
    columns = (
        *(Column("run"), Column("against"), *_PAIRED, Column("success p", "p"), Column("by task", "p")),
        *(Column("difference", "verdict"), Column("would be shown by", rank=3)),
        *(Column("smallest provable loss", rank=4), Column("mean steps before", "steps", 3)),
        *(Column("after", "steps", 3), Column("p", "p", 3), Column("times less cost (95%)", "x", 1)),
        Column("note", rank=3),
    )
    told = found.difference == "not shown"
    lacking = needed(found, found.mcnemar.p, found.by_task_p) if told else None
    row = (
        *(*reversed(found.names), *_paired(found), found.mcnemar.p, found.by_task_p, found.difference),
        *(None if lacking is None else str(lacking), found.provable_loss, *found.steps, found.steps_p),
        *(_times(found.speedup), _note(found)),
    )
    note = (
        f"Success within {found.within} steps, over the initial states that both runs ended without an error. "
        "Success p: McNemar's exact test, or with several seeds a sign-flip test of the initial states' sums. "
        "Difference: where both tests are below 5%. Would be shown by: so many episodes, with 80% power, if it is as "
        "large as measured. Smallest provable loss: the fewest episodes lost, none gained, that McNemar's exact test "
        f"could show. Cost: {found.cost_unit} per action."
    )
    return _without_empty(Table("", columns, (row,), note))


def _note(found: Comparison) -> str | None:
    return f"other hardware: {'; '.join(found.other_hardware)}" if found.other_hardware else None


def suites_table(runs: Sequence[Run]) -> Table:
    """A row for each task of each suite, a column for each run."""
    found: dict[tuple[str, int], dict[int, TaskResult]] = {}
    for run in runs:
        for task in run.results.task_results:
            found.setdefault((run.results.task_suite, task.task_id), {})[run.number] = task
    several = len({suite for suite, _ in found}) > 1
    rows = []
    for (suite, task_id), by_run in sorted(found.items()):
        title = f"{suite} {task_id}" if several else f"{task_id}"
        described = next(iter(by_run.values())).task_description
        rates = (by_run[run.number].success_rate if run.number in by_run else None for run in runs)
        rows.append((f"{title}: {described}", *rates))
    columns = (Column("task"), *(Column(f"run {run.number}", "%") for run in runs))
    return Table("", columns, tuple(rows), "Success. Intervals are in performance_comparison.json.")


def shadow_tables(runs: Sequence[Run]) -> tuple[Table, ...]:
    """What shadow mode tells: decisions, and agreement by dimension and by step ahead."""
    head = (Column("draft agrees", "%"), Column("main head agrees", "%"), Column("median gap", "error"))
    dimensions: list[Row] = []
    steps: list[Row] = []
    decisions: list[Row] = []
    for run in runs:
        found = run.breakdown
        if found.by_dimension is not None and found.by_step is not None:
            dimensions += _agreement(run, ACTION_NAMES, found.by_dimension)
            steps += _agreement(run, [str(i + 1) for i in range(len(found.by_step.n))], found.by_step)
        if (judged := found.decisions) is not None:
            quiet, other = judged.true_accept + judged.false_reject, judged.true_reject + judged.false_accept
            shares = (judged.false_reject / quiet if quiet else None, judged.false_accept / other if other else None)
            counts = (judged.true_accept, judged.false_accept, judged.true_reject, judged.false_reject)
            decisions.append((_numbered(run), *counts, *shares))
    columns = (
        *(Column("run"), Column("accepted rightly"), Column("accepted wrongly"), Column("rejected rightly")),
        *(Column("rejected wrongly"), Column("false rejects", "%"), Column("false accepts", "%")),
    )
    note = "False rejects: of the checks that main's new chunk confirms. False accepts: of the others."
    by_dimension = (Column("run"), Column("dimension"), *head, Column("steps"))
    by_step = (Column("run"), Column("step"), *head, Column("checks"))
    return (
        Table("Decisions, judged by main's new chunk", columns, tuple(decisions), note if decisions else ""),
        Table("Agreement by dimension", by_dimension, tuple(dimensions), grouped=True),
        Table("Agreement by step ahead", by_step, tuple(steps), grouped=True),
    )


def _agreement(run: Run, what: Sequence[str], found: Agreement) -> list[Row]:
    return [(_numbered(run), *row) for row in zip(what, found.draft, found.main, found.gap, found.n, strict=True)]


def tokens_table(runs: Sequence[Run]) -> Table:
    """Equal tokens of draft and main head, by RFSQ layer."""
    known = [run for run in runs if run.breakdown.layers]
    layers = range(max((len(run.breakdown.layers) for run in known), default=0))
    rows: list[Row] = []
    for run in known:
        found = run.breakdown.layers
        shares = (found[i].equal if i < len(found) else None for i in layers)
        odd = [f"L{i}" for i, layer in enumerate(found) if layer.verdict != "ok"]
        rows.append((_numbered(run), *shares, found[0].chance, f"odd: chance in {', '.join(odd)}" if odd else "ok"))
    columns = (Column("run"), *(Column(f"L{i}", "%") for i in layers), Column("by chance", "%"), VERDICT)
    return Table("Equal tokens of draft and main head", columns, tuple(rows))


def actions_table(runs: Sequence[Run]) -> Table:
    """Executed actions that are odd beside the training data's."""
    columns = (
        *(Column("run"), Column("dimension"), Column("min", "signed"), Column("mean", "signed")),
        *(Column("max", "signed"), Column("training 1%", "signed"), Column("training 99%", "signed")),
        *(Column("outside", "%"), VERDICT),
    )
    rows = tuple(
        (
            *(_numbered(run), one.dimension, one.minimum, one.mean, one.maximum, *(one.training or (None, None))),
            *(one.outside, one.verdict),
        )
        for run in runs
        for one in run.breakdown.actions
        if one.verdict.startswith("odd")
    )
    return Table("Executed actions that are odd, environment units", columns, rows, grouped=True)


def codec_table(runs: Sequence[Run]) -> Table:
    """What decoding tokens loses, and how often the gripper switches."""
    columns = (
        *(Column("run"), Column("codec round trip, RMS", "error"), Column("codec", "verdict")),
        *(Column("gripper switches, succeeded"), Column("failed"), Column("gripper", "verdict")),
    )
    rows = []
    for run in runs:
        found = run.breakdown
        switches = found.gripper
        codec = (found.codec_rms, found.codec_verdict)
        rows.append((_numbered(run), *codec, switches.succeeded, switches.failed, switches.verdict))
    return Table("Codec and gripper", columns, tuple(rows))


def routes_table(runs: Sequence[Run]) -> Table:
    """Latency of a query by kind of route."""
    columns = (
        *(Column("run"), Column("route"), Column("queries", rank=1), Column("p5", "ms", 2)),
        *(Column("p50", "ms"), Column("p95", "ms"), Column("p99", "ms"), Column("of policy time", "%")),
    )
    rows: tuple[Row, ...] = tuple(
        (_numbered(run), part.group, part.queries, *(part.ms[p] for p in ("p5", "p50", "p95", "p99")), part.share)
        for run in runs
        for part in run.breakdown.routes
    )
    note = "Rejected queries run the whole backbone; those called full query did too, without a chunk to test."
    return Table("", columns, rows, note if rows else "", grouped=True)


def throughput_table(runs: Sequence[Run]) -> Table:
    """How fast each run was as a whole; where some shared a model, they were together."""
    columns = (
        *(Column("run"), Column("together"), Column("workers"), Column("wall time", "s")),
        *(
            Column("episodes per second"),
            Column("a core"),
            Column("a GPU"),
            Column("queries per forward"),
            Column("policy computes", "%"),
        ),
        *(Column("bound by"), Column("GPU busy", "%")),
    )
    rows: list[Row] = []
    for run in runs:
        if (found := run.results.throughput) is None:
            rows.append((_numbered(run), *[None] * 8, "not measured: interrupted", None))
        else:
            speed = found.episodes_per_second
            each = (speed / found.cores if found.cores else None, speed / found.gpus if found.gpus else None)
            together = None if found.runs == 1 else counted(found.runs, "run")
            counts = (together, found.workers, found.wall_seconds, speed, *each, found.rows_per_forward)
            rows.append((_numbered(run), *counts, found.policy_share, found.bound, found.gpu_utilisation))
    return _without_empty(Table("", columns, tuple(rows)))


def files_table(runs: Sequence[Run]) -> Table:
    """Which files the report is made from, by their contents."""
    rows: tuple[Row, ...] = tuple(
        (_numbered(run), str(run.path), hashlib.sha256(run.path.read_bytes()).hexdigest(), run.results.settings.run)
        for run in runs
    )
    return Table("Files", (Column("run"), Column("file"), Column("sha256"), Column("id")), rows)


def settings_tables(runs: Sequence[Run]) -> tuple[Table, Table]:
    """(settings that differ, each value with the numbers of its runs; settings that all runs share)."""
    flat = [dict(_flat(to_json(run.results.settings))) for run in runs]
    shared: list[Row] = []
    varying: list[Row] = []
    for key in dict.fromkeys(key for settings in flat for key in settings):
        by_value: dict[str, list[str]] = {}
        for run, settings in zip(runs, flat, strict=True):
            by_value.setdefault(settings.get(key, "absent"), []).append(str(run.number))
        told = [f"{value} ({', '.join(numbers)})" for value, numbers in by_value.items()]
        (shared.append((key, *by_value)) if len(told) == 1 else varying.append((key, "; ".join(told))))
    columns = (Column("setting"), Column("value"))
    return (
        Table("What differs, with the numbers of the runs", columns, tuple(varying), headless=True),
        Table("What all runs share", columns, tuple(shared), headless=True),
    )


def _flat(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """A nested object as dotted keys and JSON texts."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def calibration_table(found: Calibration) -> Table:
    """`rsd-trt calibrate`: false rejects, false accepts and acceptance on the held-out episodes."""
    columns = (
        *(Column(""), Column("alpha", "p"), Column("accepted (95%)", "%"), Column("rejected wrongly (95%)", "%")),
        *(Column("accepted wrongly (95%)", "%"), Column("threshold", rank=1)),
    )
    rows = [("before", found.before), ("chosen", found.chosen), *(("", other) for other in found.curve)]
    return Table(
        f"{found.chosen.rsd.rule}, on {found.episodes[1]} held-out {found.unit}",
        columns,
        tuple(
            (
                *(name, row.alpha, Measured(row.acceptance, row.acceptance_interval)),
                Measured(row.false_rejects, row.false_rejects_interval),
                Measured(row.false_accepts, row.false_accepts_interval),
                f"{row.rsd.threshold or 0:.3f}"
                if row.rsd.rule == "likelihood"
                else " ".join(f"{x:.3f}" for x in row.rsd.tolerance),
            )
            for name, row in rows
        ),
        "Wrongly: a check is right where main's new chunk confirms the steps that it would commit."
        + (f" AUC for that, of all checks: {found.auc:.3f}" if found.auc is not None else ""),
    )
