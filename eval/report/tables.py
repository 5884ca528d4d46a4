"""The tables of a report, and of the commands that read results files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from rsd_trt.config import ACTION_NAMES
from rsd_trt.eval.report.breakdown import PHASES, Agreement
from rsd_trt.eval.report.calibrate import Calibration
from rsd_trt.eval.report.compare import Comparison, SpeedUp
from rsd_trt.eval.report.cost import COUNTED, Price, measured
from rsd_trt.eval.report.runs import RULE, Run, condition
from rsd_trt.eval.results import Results, TaskResult
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


def counts_table(results: Results) -> Table:
    """`rsd-trt eval`: how its queries went, and what they took."""
    stats, times, steps = results.rsd_stats, results.query_ms or {}, results.steps
    row = (
        *(steps, results.full_queries / steps if steps else None, results.checks / steps if steps else None),
        *(stats.draft_acceptance_rate, stats.partial_acceptance_rate, stats.full_rejection_rate),
        *(results.unusable_drafts or None, results.clipped_steps or None),
        *(results.avg_inference_time_ms, times.get("p50"), times.get("p95"), results.steps_per_second),
    )
    columns = (
        *(Column("actions"), Column("full queries per action", "ratio"), Column("checks per action", "ratio")),
        *(*_SHARES, *_ODDITIES, Column("time per action", "ms"), Column("query p50", "ms", 4)),
        *(Column("query p95", "ms", 4), Column("steps per second", rank=5)),
    )
    return _without_empty(Table("", columns, (row,)))


_SHARES = (Column("accepted", "%", 1), Column("partial", "%", 3), Column("rejected", "%", 3))
_ODDITIES = (Column("unusable drafts", rank=6), Column("clipped steps", rank=6))


def matrix(runs: Sequence[Run], price: Price = COUNTED) -> Table:
    """Every run: how often and how soon it succeeds, what it costs, and what that is worth beside open loop."""
    within = dict.fromkeys(run.endpoint.within for run in runs)
    soon = f"within {'/'.join(map(str, within))} steps (95%)"
    columns = (
        *(Column("condition"), Column("run"), Column("episodes", rank=4), Column("errors", rank=6)),
        *(Column("success (95%)", "%"), Column(soon, "%"), Column("mean steps", "steps", 2)),
        *(Column("full queries per action", "ratio"), Column("checks per action", "ratio", 1)),
        *(Column("cost per action", "ms"), Column("measured", "ms", 5)),
        *(Column("less than open loop, n = 1 (95%)", "x", 2), Column("than the best of no higher cost (95%)", "x", 2)),
        *(*_SHARES, *_ODDITIES, VERDICT),
    )
    several = len({run.results.settings.perturb for run in runs}) > 1
    rows = []
    for run in sorted(runs, key=lambda run: run.results.settings.perturb or ""):
        found, steps = run.results, run.results.steps
        single, best = run.rival("open loop, n = 1"), run.rival("open loop of no higher cost")
        stats = found.rsd_stats
        rows.append(
            (
                *(condition(found.settings.perturb) if several else None, run.label if several else run.name),
                *(found.total_episodes, found.errors or None),
                Measured(found.final_success_rate, found.final_success_interval),
                *(Measured(run.reached, run.reached_interval), run.mean_steps),
                *(found.full_queries / steps if steps else None, found.checks / steps if steps else None),
                *(run.cost if price.unit == "ms" else None, measured(found)),
                *(_times(single.versus.speedup) if single else None, _times(best.versus.speedup) if best else None),
                *(stats.draft_acceptance_rate, stats.partial_acceptance_rate, stats.full_rejection_rate),
                *(found.unusable_drafts or None, found.clipped_steps or None, _verdict(run)),
            )
        )
    note = (
        f"Cost: {price.told}. Mean steps: to success, a failure or a later success counting as all of them. Measured: "
        "medians by route of a run with one worker. Accepted, partial, rejected: of the checks. Verdict: success "
        "within the steps beside the best run of open loop of no higher cost, as declared below."
    )
    return _without_empty(Table("", columns, tuple(rows), note, grouped=several))


def _verdict(run: Run) -> str | None:
    if run.open_loop or run.results.settings.mode == "shadow":
        return None
    if run.alone is not None:
        return "not compared"
    best = run.rival("open loop of no higher cost")
    return "no open loop costs as little" if best is None else f"{best.verdict} (p = {best.p:.2g})"


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
    *(
        Column("pairs", rank=2),
        Column("left out", rank=5),
        Column("points (95%)", "points"),
        Column("gained"),
        Column("lost"),
    ),
)
_SOFTER = (
    *(
        Column("difference", "verdict"),
        Column("smallest provable loss", rank=4),
        Column("mean steps before", "steps", 3),
    ),
    *(Column("after", "steps", 3), Column("p", "p", 3), Column("times less cost (95%)", "x", 1)),
)


def rivals_table(runs: Sequence[Run]) -> Table:
    """Every run that checks beside its rivals, or why not."""
    columns = (
        *(Column("run"), Column("against"), *_PAIRED, Column("p, Holm", "p"), Column("by task, Holm", "p")),
        *(*_SOFTER, Column("note", rank=3)),
    )
    rows: list[Row] = []
    for run in runs:
        for one in run.against:
            before, after = _paired(one.versus)
            control = " (p not adjusted)" if one.rival == "random acceptance" else ""
            against = f"{one.rival}: {one.versus.names[0]}{control}"
            rows.append((run.name, against, *before, one.p, one.by_task_p, one.verdict, *after, _note(one.versus)))
        if run.alone is not None:
            rows.append((run.name, None, *[None] * (len(columns) - 3), f"not compared: {run.alone}"))
    return _without_empty(Table("Against open loop", columns, tuple(rows), RULE, grouped=True))


def comparison_table(found: Comparison) -> Table:
    """`rsd-trt compare`."""
    columns = (
        *(Column("run"), Column("against"), *_PAIRED, Column("McNemar p", "p"), Column("by task", "p")),
        *(*_SOFTER, Column("note", rank=3)),
    )
    before, after = _paired(found)
    row = (*reversed(found.names), *before, found.mcnemar.p, found.by_task_p, found.difference, *after, _note(found))
    note = (
        f"Success within {found.within} steps, over the initial states that both runs ended without an error. Smallest "
        "provable loss: the fewest episodes lost, none gained, that McNemar's exact test could show. Cost: "
        f"{found.cost_unit} per action."
    )
    return _without_empty(Table("", columns, (row,), note))


def _paired(found: Comparison) -> tuple[Row, Row]:
    """The cells before the tests, and those after the verdict."""
    test, points = found.mcnemar, Measured(found.points, found.points_interval)
    before = (found.pairs, found.left_out, points, test.gained, test.lost)
    return before, (found.provable_loss, *found.steps, found.steps_p, _times(found.speedup))


def _note(found: Comparison) -> str | None:
    return f"other hardware: {'; '.join(found.other_hardware)}" if found.other_hardware else None


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
    """Of the shadow-mode runs: by dimension, by step ahead, by RFSQ layer, and decisions."""
    head = (Column("draft agrees", "%"), Column("main head agrees", "%"), Column("median gap", "error"))
    dimensions: list[Row] = []
    steps: list[Row] = []
    layers: list[Row] = []
    decisions: list[Row] = []
    for run in runs:
        found = run.breakdown
        if found.by_dimension is not None and found.by_step is not None:
            dimensions += _agreement(run.name, ACTION_NAMES, found.by_dimension)
            steps += _agreement(run.name, [str(i + 1) for i in range(len(found.by_step.n))], found.by_step)
        layers += [(run.name, f"L{i}", one.equal, one.chance, one.verdict) for i, one in enumerate(found.layers)]
        if (judged := found.decisions) is not None:
            quiet, other = judged.true_accept + judged.false_reject, judged.true_reject + judged.false_accept
            shares = (judged.false_reject / quiet if quiet else None, judged.false_accept / other if other else None)
            counts = (judged.true_accept, judged.false_accept, judged.true_reject, judged.false_reject)
            decisions.append((run.name, *counts, *shares))
    columns = (
        *(Column("run"), Column("accepted rightly"), Column("accepted wrongly"), Column("rejected rightly")),
        *(Column("rejected wrongly"), Column("false rejects", "%"), Column("false accepts", "%")),
    )
    note = "False rejects: of the checks that main's new chunk confirms. False accepts: of the others."
    of_layers = (Column("run"), Column("layer"), Column("equal", "%"), Column("by chance", "%"), VERDICT)
    return (
        Table("Decisions, judged by main's new chunk", columns, tuple(decisions), note if decisions else ""),
        Table(
            "Agreement by dimension",
            (Column("run"), Column("dimension"), *head, Column("steps")),
            tuple(dimensions),
            grouped=True,
        ),
        Table(
            "Agreement by step ahead",
            (Column("run"), Column("step"), *head, Column("checks")),
            tuple(steps),
            grouped=True,
        ),
        Table("Equal tokens of draft and main head", of_layers, tuple(layers), grouped=True),
    )


def _agreement(name: str, what: Sequence[str], found: Agreement) -> list[Row]:
    return [(name, *row) for row in zip(what, found.draft, found.main, found.gap, found.n, strict=True)]


def actions_table(runs: Sequence[Run]) -> Table:
    """Executed actions that are odd beside the training data's."""
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
        if one.verdict.startswith("odd")
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
        *(
            Column("a core"),
            Column("a GPU"),
            Column("queries per forward"),
            Column("policy computes", "%"),
            Column("bound by"),
            Column("GPU busy", "%"),
        ),
    )
    rows: list[Row] = []
    for run in runs:
        if (found := run.results.throughput) is None:
            rows.append((run.name, *[None] * 7, "not measured: interrupted", None))
        else:
            speed = found.episodes_per_second
            each = (speed / found.cores if found.cores else None, speed / found.gpus if found.gpus else None)
            counts = (found.workers, found.wall_seconds, speed, *each, found.rows_per_forward)
            rows.append((run.name, *counts, found.policy_share, found.bound, found.gpu_utilisation))
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
    """`rsd-trt calibrate`: false rejects, false accepts and acceptance on the held-out episodes."""
    columns = (
        *(Column(""), Column("alpha", "p"), Column("accepted (95%)", "%"), Column("rejected wrongly (95%)", "%")),
        *(Column("accepted wrongly (95%)", "%"), Column("threshold", rank=1)),
    )
    rows = [("before", found.before), ("chosen", found.chosen), *(("", other) for other in found.curve)]
    return Table(
        f"{found.chosen.rsd.rule}, on {found.episodes[1]} held-out episodes",
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
        "Wrongly: a check is right where main's new chunk confirms the steps that it would commit.",
    )
