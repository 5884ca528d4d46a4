"""The tables of a report, and of the commands that read results files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from rsd_trt.config import ACTION_NAMES
from rsd_trt.eval.report.breakdown import PHASES, Agreement
from rsd_trt.eval.report.calibrate import Calibration
from rsd_trt.eval.report.compare import Comparison, SpeedUp, moved
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.tradeoff import RULE, Point, Tradeoff
from rsd_trt.eval.results import Results, TaskResult
from rsd_trt.eval.table import Column, Measured, Table, Value
from rsd_trt.records import to_json

Row = tuple[Value, ...]
VERDICT = Column("verdict", "verdict")
SHARES = (
    "Time: of the policy. Accepted, partial, rejected: of the queries that tested a chunk. Full queries: of all. "
    "Episodes that ended in an error are neither successes nor failures."
)


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


def runs_table(runs: Mapping[str, Results], title: str = "", points: Sequence[Point] = ()) -> Table:
    """The figures of runs, a row each. points: of those whose cost is known, which may be that of a replay."""
    columns = (
        *(Column("run"), Column("success (95%)", "%"), Column("errors", rank=5)),
        *(Column("time per action (95%)", "ms"), Column("timed", rank=6), Column("speed-up (95%)", "x", 2)),
        *(Column("query p50", "ms", 7), Column("query p95", "ms", 8), Column("queries", rank=9)),
        *(Column("full queries", "%", 1), Column("actions per query", rank=4), Column("accepted", "%")),
        *(Column("partial", "%", 3), Column("rejected", "%", 3), Column("target moved in", rank=5)),
        Column("steps per second", rank=10),
    )
    costs = {point.run: point for point in points}
    rows: list[Row] = []
    for name, run in runs.items():
        stats, times, cost = run.rsd_stats, run.query_ms or {}, costs.get(name)
        ms = Measured(cost.ms, cost.ms_interval) if cost else Measured(run.avg_inference_time_ms)
        rows.append(
            (
                *(name, Measured(run.final_success_rate, run.final_success_interval, run.total_episodes), run.errors),
                *(ms, "replayed" if cost and cost.replayed else None, _speedup(cost.speedup) if cost else None),
                *(times.get("p50"), times.get("p95"), run.queries),
                *(run.full_queries / run.queries if run.queries else None, run.actions_per_query),
                *(stats.draft_acceptance_rate, stats.partial_acceptance_rate, stats.full_rejection_rate),
                *(moved(run), run.steps_per_second),
            )
        )
    return _without_empty(Table(title, columns, tuple(rows), SHARES))


def _without_empty(table: Table) -> Table:
    """Without columns that have no value in any row."""
    kept = [i for i in range(len(table.columns)) if any(_told(row[i]) for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(table.title, tuple(table.columns[i] for i in kept), rows, table.note if rows else "")


def _told(value: Value) -> bool:
    return value is not None and not (isinstance(value, Measured) and value.value is None)


def targets_table(runs: Sequence[Run]) -> Table:
    """What each run says about the targets."""
    rows = [
        (
            run.name,
            f"{target.what} > {target.bound}",
            Measured(target.value, target.interval, unit=target.unit),
            f"{target.verdict}: {target.reason}" if target.reason else target.verdict,
        )
        for run in runs
        for target in run.targets
    ]
    columns = (Column("run"), Column("target"), Column("measured (95%)", "%"), VERDICT)
    return Table("", columns, tuple(rows), grouped=True)


def comparisons_table(runs: Sequence[Run]) -> Table:
    """Every run against its baseline, or why not, and those of mode rsd against their control."""
    told = [(run.name, run.baseline, run.versus, run.alone) for run in runs if run.versus or run.alone]
    told += [(run.name, run.control, run.versus_control, None) for run in runs if run.versus_control]
    return comparison_table(told)


def comparison_table(told: Sequence[tuple[str, str | None, Comparison | None, str | None]]) -> Table:
    """(run, the run that it is set against, their comparison, else why there is none)."""
    columns = (
        *(Column("run"), Column("against"), Column("pairs", rank=2), Column("left out", rank=5)),
        *(Column("success, points", "points", 1), Column("gained"), Column("lost"), Column("McNemar p", "p")),
        *(Column("difference", "verdict"), Column("smallest provable loss", rank=4)),
        *(Column("ms before", "ms", 6), Column("ms after", "ms", 6), Column("speed-up (95%)", "x")),
        Column("note", rank=3),
    )
    note = (
        "Over the initial states that both runs ended without an error. Success: the difference. "
        "Smallest provable loss: the fewest episodes lost, none gained, that McNemar's exact test could show. "
        "Speed-up: of policy time per action, bootstrapped over episodes."
    )
    return _without_empty(Table("Against the baseline", columns, tuple(_compared(*one) for one in told), note))


def _compared(name: str, other: str | None, versus: Comparison | None, alone: str | None) -> Row:
    if versus is None:
        return (name, other, *[None] * 11, f"not compared: {alone}")
    test, (before, after) = versus.mcnemar, versus.ms_per_action or (None, None)
    notes = [f"no speed-up: {versus.no_speedup}"] if versus.speedup is None else []
    notes += ["replayed"] if versus.speedup is not None and versus.speedup.replayed else []
    notes += [f"other hardware: {'; '.join(versus.other_hardware)}"] if versus.other_hardware else []
    return (
        *(name, other, versus.pairs, versus.left_out, versus.success_points, test.gained, test.lost, test.p),
        *(versus.difference, versus.provable_loss, before, after, _speedup(versus.speedup), "; ".join(notes) or None),
    )


def _speedup(found: SpeedUp | None) -> Measured | None:
    return None if found is None else Measured(found.value, found.interval)


def same_cost_table(found: Tradeoff) -> Table:
    """Every run that is no baseline against the baseline that costs the same."""
    columns = (
        *(Column("run"), Column("the dearer baseline"), Column("its share", "%"), Column("the cheaper one")),
        *(Column("pairs"), Column("success of the baseline", "%"), Column("of the run", "%")),
        *(Column("sign-flip p", "p"), VERDICT),
    )
    rows = []
    for row in found.same_cost:
        dearer, cheaper = (*row.neighbours, None, None)[:2]
        names = (dearer.run if dearer else None, dearer.share if dearer else None, cheaper.run if cheaper else None)
        rows.append((row.run, *names, row.pairs, *(row.success or (None, None)), row.p, row.verdict))
    return Table("Against the baseline that costs the same", columns, tuple(rows), RULE)


def suites_table(runs: Sequence[Run]) -> Table:
    """A row for each task of each suite, a column for each run."""
    found: dict[tuple[str, int], dict[int, TaskResult]] = {}
    for i, run in enumerate(runs):
        for task in run.results.task_results:
            found.setdefault((run.results.task_suite, task.task_id), {})[i] = task
    suites = {suite for suite, _ in found}
    rows = []
    for (suite, task_id), by_run in sorted(found.items()):
        description = next(iter(by_run.values())).task_description
        title = f"{suite} {task_id}: {description}" if len(suites) > 1 else f"{task_id}: {description}"
        rows.append((title, *(_task(by_run.get(i)) for i in range(len(runs)))))
    return Table("", (Column("task"), *(Column(run.name, "%") for run in runs)), tuple(rows))


def phases_table(runs: Sequence[Run]) -> Table:
    """Share of accepted queries by decile of the episode, a column for each run that tested a chunk."""
    known = [run for run in runs if any(phase.tested for phase in run.breakdown.phases)]
    columns = (Column("of the episode"), *(Column(run.name, "%") for run in known))
    rows = []
    for i in range(PHASES if known else 0):
        here = [run.breakdown.phases[i] for run in known]
        shares = (Measured(p.accepted / p.tested, n=p.tested) if p.tested else None for p in here)
        rows.append((f"{i * 100 // PHASES}% to {(i + 1) * 100 // PHASES}%", *shares))
    return Table("Accepted queries by part of the episode", columns, tuple(rows))


def agreement_tables(runs: Sequence[Run]) -> tuple[Table, ...]:
    """Of the shadow-mode runs: by dimension, by step ahead; of all runs with a draft: by RFSQ layer; decisions."""
    head = (Column("draft agrees", "%"), Column("main head agrees", "%"), Column("median gap", "error"))
    layer_columns = (Column("run"), Column("layer"), Column("equal", "%"), Column("by chance", "%"), VERDICT)
    decision_columns = (
        *(Column("run"), Column("accepted rightly"), Column("accepted wrongly")),
        *(Column("rejected rightly"), Column("rejected wrongly"), Column("wrong of the accepted", "%")),
    )
    dimensions: list[Row] = []
    steps: list[Row] = []
    layers: list[Row] = []
    decisions: list[Row] = []
    for run in runs:
        found, judged = run.breakdown, run.results.judgements
        if found.by_dimension is not None and found.by_step is not None:
            dimensions += _agreement(run.name, ACTION_NAMES, found.by_dimension)
            steps += _agreement(run.name, [str(i + 1) for i in range(len(found.by_step.n))], found.by_step)
        layers += [(run.name, f"L{i}", one.equal, one.chance, one.verdict) for i, one in enumerate(found.layers)]
        if judged:
            right, wrong = judged.get("true_accept", 0), judged.get("false_accept", 0)
            rejected = (judged.get("true_reject", 0), judged.get("false_reject", 0))
            share = wrong / (right + wrong) if right + wrong else None
            decisions.append((run.name, right, wrong, *rejected, share))
    by_dimension = (Column("run"), Column("dimension"), *head, Column("steps"))
    by_step = (Column("run"), Column("step"), *head, Column("queries"))
    return (
        Table("Agreement by dimension", by_dimension, tuple(dimensions), grouped=True),
        Table("Agreement by step ahead", by_step, tuple(steps), grouped=True),
        Table("Equal tokens of draft and main head", layer_columns, tuple(layers), grouped=True),
        Table("Decisions, judged by the main head", decision_columns, tuple(decisions)),
    )


def _agreement(name: str, what: Sequence[str], found: Agreement) -> list[Row]:
    return [(name, *row) for row in zip(what, found.draft, found.main, found.gap, found.n, strict=True)]


def actions_table(runs: Sequence[Run]) -> Table:
    """Executed actions beside the training data's."""
    columns = (
        *(Column("run"), Column("dimension"), Column("min", "signed"), Column("mean", "signed")),
        *(Column("max", "signed"), Column("training 1%", "signed"), Column("training 99%", "signed")),
        *(Column("outside", "%"), VERDICT),
    )
    rows = tuple(
        (
            *(run.name, one.dimension, one.minimum, one.mean, one.maximum, *(one.training or (None, None))),
            *(one.outside, one.verdict),
        )
        for run in runs
        for one in run.breakdown.actions
    )
    return Table("Executed actions, environment units", columns, rows, grouped=True)


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
        rows.append((run.name, *codec, switches.succeeded, switches.failed, switches.verdict))
    return Table("Codec and gripper", columns, tuple(rows))


def routes_table(runs: Sequence[Run]) -> Table:
    """Latency of a query by kind of route."""
    columns = (
        *(Column("run"), Column("route"), Column("queries", rank=1), Column("p5", "ms", 2)),
        *(Column("p50", "ms"), Column("p95", "ms"), Column("p99", "ms"), Column("of policy time", "%")),
    )
    rows: tuple[Row, ...] = tuple(
        (run.name, part.group, part.queries, *(part.ms[p] for p in ("p5", "p50", "p95", "p99")), part.share)
        for run in runs
        for part in run.breakdown.routes
    )
    note = "Rejected queries run the whole backbone; those called full query did too, without a chunk to test."
    return Table("Latency by route", columns, rows, note if rows else "", grouped=True)


def throughput_table(runs: Sequence[Run]) -> Table:
    """How fast each run was as a whole."""
    columns = (
        *(Column("run"), Column("workers"), Column("wall time", "s"), Column("episodes per second")),
        *(Column("queries per forward"), Column("policy computes", "%"), Column("bound by"), Column("GPU busy", "%")),
    )
    rows: list[Row] = []
    for run in runs:
        if (found := run.results.throughput) is None:
            rows.append((run.name, *[None] * 5, "not measured: interrupted", None))
        else:
            speed = (found.workers, found.wall_seconds, found.episodes_per_second, found.rows_per_forward)
            rows.append((run.name, *speed, found.policy_share, found.bound, found.gpu_utilisation))
    return Table("", columns, tuple(rows))


def files_table(runs: Sequence[Run]) -> Table:
    """Which files the report is made from, by their contents."""
    rows: tuple[Row, ...] = tuple(
        (run.name, str(run.path), hashlib.sha256(run.path.read_bytes()).hexdigest(), run.results.settings.run)
        for run in runs
    )
    return Table("Files", (Column("run"), Column("file"), Column("sha256"), Column("id")), rows)


def settings_tables(runs: Sequence[Run]) -> tuple[Table, Table]:
    """(settings that differ, with a column for each run; settings that all runs share)."""
    flat = [dict(_flat(to_json(run.results.settings))) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [(key, tuple(settings.get(key) for settings in flat)) for key in keys]
    shared: tuple[Row, ...] = tuple((key, values[0]) for key, values in rows if len(set(values)) == 1)
    varying: tuple[Row, ...] = tuple((key, *values) for key, values in rows if len(set(values)) > 1)
    return (
        Table("What differs between the runs", (Column("setting"), *(Column(run.name) for run in runs)), varying),
        Table("", (Column("setting"), Column("value")), shared, headless=True),
    )


def _flat(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """A nested object as dotted keys and JSON texts."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def calibration_table(found: Calibration) -> Table:
    """`rsd-trt calibrate`: acceptance against false accepts on the held-out episodes."""
    columns = (
        *(Column(""), Column("alpha", "p"), Column("accepted (95%)", "%"), Column("accepted wrongly (95%)", "%")),
        Column("tolerance by dimension", rank=1),
    )
    rows = [("before", found.before), ("chosen", found.chosen), *(("", other) for other in found.curve)]
    return Table(
        f"On {found.episodes[2]} held-out episodes",
        columns,
        tuple(
            (
                *(name, row.alpha, Measured(row.acceptance, row.acceptance_interval)),
                Measured(row.false_accepts, row.false_accepts_interval),
                " ".join(f"{x:.3f}" for x in row.tolerance),
            )
            for name, row in rows
        ),
    )
