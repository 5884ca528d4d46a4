"""The tables of the pages say what the published reports and records say.

`python tests/test_tables.py` writes them anew. Each stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from functools import cache, partial, reduce
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from rsd_trt.config import state_and_seed
from rsd_trt.eval.read import read_run
from rsd_trt.eval.report.compare import Endpoint, compare
from rsd_trt.eval.report.cost import Price
from rsd_trt.eval.report.runs import read_runs
from rsd_trt.eval.results import Episode, Results
from rsd_trt.eval.statistics import holm, sign_flip, wilson
from rsd_trt.eval.summary import rate_interval
from rsd_trt.eval.table import Column, Measured, Table
from rsd_trt.runtime.serve.sessions import Alarm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (
    *(
        ROOT / "docs" / name
        for name in ("performance.md", "reference-results.md", "deploy.md", "openvla-oft.md", "your-policy.md")
    ),
    ROOT / "README.md",
    RESULTS / "pilot" / "README.md",
)
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

LAUNCHES = ("draft + head + decoder, with host decisions", "propose + predict")
LATE = "late:201:0.02-0.05"
COST = Column("cost per action", "ms")
COSTS = {  # of a check and of a full query: file, backend
    "OpenVLA-7B's shapes, H100, compiled, bf16": ("h100/profile_7b.json", "compiled"),
    "the same, after pauses of 40 ms": ("h100/profile_7b_pause.json", "compiled"),
    "this policy, 2 CPU cores, ONNX Runtime, fp32": ("cpu/profile.json", "ort"),
    "this policy, H100, CUDA graphs, fp32": ("h100/graph.json", "graph"),
    "this policy, H100, compiled, bf16": ("h100/compiled_bf16.json", "compiled"),
}
RIVALS = {"open loop, n = 2": "baseline_2", "open loop, n = 5": "baseline_5"}  # of rsd, by name: their files
SURE = "rsd, n = 2, m = 3, sure -0.06"
LOOPS = {f"open loop, n = {n}": f"late_baseline_{n}" for n in (2, 4)}
STILL = 0.9  # of the scenes, in the mix
MARGIN = 4.0  # points that rsd may lie below the first of them: declared before the runs
STAGES = ("preprocess", "vision", "blocks 1 to 8", "blocks 9 to 32", "predict", "full query")
OFT_STAGES = ("jpeg", "preprocess", "vision", "blocks", "predict", "full query")


def components() -> str:
    """What a rejected query launches beside the backbone, batch 1."""
    record = read("h200/components.json")
    rows = [row for row in record["rows"] if row["batch"] == 1 and row["what"] in LAUNCHES and row["ms"]]
    title = f"launch, batch 1, {device(record)}, {rows[0]['precision']}, n = {rows[0]['ms']['n']}"
    columns = (Column(title), *(Column(p, "ms") for p in ("p50", "p95", "p99")), Column("speed-up", "x"))
    values = ((row["ms"]["p50"], row["ms"]["p95"], row["ms"]["p99"], row["speedup"]) for row in rows)
    names = (f"{row['what']}: {row['variant']}" for row in rows)
    return Table("", columns, tuple((name, *of) for name, of in zip(names, values, strict=True))).markdown()


def stages() -> str:
    """p50 of the stages and of the full query."""
    return _stages("h200/stages.json", STAGES, whole=False)


def oft() -> str:
    """The same with OpenVLA-OFT's head."""
    return _stages("h100/oft_stages.json", OFT_STAGES, whole=True)


def _stages(name: str, stages: tuple[str, ...], whole: bool) -> str:
    """whole: every way at every input size, else eager and graph at the first size alone."""
    record = read(name)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in record.get("stages", record)["rows"]:
        if row["ms"] is not None:
            key = (row["images"], row["prompt_tokens"], row["backbone"], row["precision"])
            found.setdefault(key, {})[row["what"]] = row
    first, rows = min(found)[:2], []
    for (images, prompt, backbone, precision), of in sorted(found.items(), key=lambda item: item[0][:2]):
        if not whole and (images, prompt) != first and backbone in ("eager", "graph"):
            continue
        query, p50 = of["full query"], {what: row["ms"]["p50"] for what, row in of.items()}
        overhead = query.get("host_overhead_ms", query.get("outside_ms"))
        title = f"{images} image{'s' if images > 1 else ''}, {prompt} tokens: {backbone} {precision}"
        outside = overhead["p50"] if isinstance(overhead, dict) else overhead
        figures = (query["ms"]["p99"], query["times_roofline"], outside, query["speedup"])
        rows.append((title, *map(p50.get, stages), *figures))
    n = next(iter(found.values()))["full query"]["ms"]["n"]
    columns = (
        *(Column(f"p50, batch 1, {device(record)}, n = {n}"), *(Column(what, "ms") for what in stages)),
        *(Column("its p99", "ms"), Column("its p50 / roofline bound", "x"), Column("host overhead", "ms")),
        Column("over timm + transformers", "x"),
    )
    return Table("", columns, tuple(rows)).markdown()


def journeys() -> str:
    """What every step of the journeys takes at 7B."""
    record, names = read("h100/journeys.json"), ("OpenVLA-OFT", "RVQExperiment's files", "a data set")
    figures = ("wall_s", "processor_s", "resident_gb")
    columns = (Column(device(record)), Column("wall time", "s"), Column("processor time", "s"), Column("memory, GB"))
    rows = ((f"{names[row['journey'] - 1]}: {row['step']}", *map(row.get, figures)) for row in record["rows"])
    return Table("", columns, tuple(rows)).markdown()


def check() -> str:
    """What the queries of a policy of 7B take."""
    record = read("h100/profile_7b.json")
    what = {"check": "check", "full": "full query"}
    rows = [(f"{what[x['what']]}, {x['backend']}", x["ms"]) for x in record["costs"]]
    columns = (
        Column(f"batch 1, {device(record)}, bf16, n = {rows[0][1]['n']}"),
        Column("p50", "ms"),
        Column("p99", "ms"),
    )
    return Table("", columns, tuple((name, ms["p50"], ms["p99"]) for name, ms in rows)).markdown()


def loop() -> str:
    """What queries of the shipped policy take in a row, after pauses, and in episodes."""
    record, rows = read("h100/live.json"), []
    for one in record["rows"]:
        rsd, title = one["mode"] == "rsd", f"{one['backend']}, {one['precision']}"
        told, what, mode = ("check", "check", "rsd") if rsd else ("full", "full query", f"open loop, n = {one['n']}")
        rows.append((f"{what}, {title}: p50", *(one[x][told] for x in ("in_a_row", "after_pauses")), one[told]["p50"]))
        asked = ("in_a_row", "after_pauses", "measured")
        rows.append((f"an action of {mode}, {title}", *(one["ms_per_action"][x] for x in asked)))
    columns = (
        *(Column(device(record)), Column("in a row", "ms")),
        *(Column("after pauses", "ms"), Column("in episodes", "ms")),
    )
    return Table("", columns, tuple(rows)).markdown()


def late_all() -> str:
    """Success and cost with a target that slides late, of every run on one seed."""
    return whole(LATE)


def confirmation() -> str:
    """The runs on seeds that nothing was chosen on."""
    rows = []
    for name, run in confirmed().items():
        solved = Endpoint.of(run.settings).reached
        interval = rate_interval(run.episodes, run.settings.seeds, solved)
        reached = Measured(fmean(map(solved, run.episodes)), interval)
        success = Measured(run.final_success_rate, run.final_success_interval)
        rows.append((name, reached, success, run.full_queries / run.steps, run.checks / run.steps))
    columns = (
        *(
            Column(f"{run.total_episodes:,} episodes a run"),
            Column("success within 100 steps", "%"),
            Column("success", "%"),
        ),
        *(Column("full queries per action", "ratio"), Column("checks per action", "ratio")),
    )
    return Table("", columns, tuple(rows)).markdown()


def proof() -> str:
    """rsd against open loop: the two comparisons that were declared, with Holm's adjustment for two."""
    runs = confirmed()
    near, above = (compare(runs[name], runs["rsd"]) for name in RIVALS)
    low, high = near.points_interval
    within = NormalDist().cdf(-(near.points + MARGIN) / ((high - low) / (2 * NormalDist().inv_cdf(0.975))))
    tasks = len(near.by_task)
    beyond = [100 * gain * tasks / near.pairs + MARGIN for gain in near.by_task]
    by_task = sign_flip(beyond) / 2 if sum(beyond) > 0 else 1 - sign_flip(beyond) / 2
    assert above.points > 0, "the test of rsd above open loop is of both sides"
    claims = (f"at most {MARGIN:g} points below {next(iter(RIVALS))}", f"above {list(RIVALS)[1]}")
    rows = (
        (claim, Measured(one.points, one.points_interval), one.mcnemar.gained, one.mcnemar.lost, p, task_p)
        for claim, one, p, task_p in zip(
            claims, (near, above), holm([within, above.mcnemar.p]), holm([by_task, above.by_task_p]), strict=True
        )
    )
    columns = (
        *(Column("rsd is"), Column("points (95%)", "points"), Column("gained"), Column("lost")),
        *(Column("p, Holm", "p"), Column("p by task, Holm", "p")),
    )
    return Table("", columns, tuple(rows)).markdown()


def costs() -> str:
    """What an action of these runs costs where a check and a full query cost that much."""
    rows = []
    for told in COSTS:
        price = price_of(told)
        each = [price.per_action(run) for run in confirmed().values()]
        rows.append((told, price.check, price.full, Measured(price.check / price.full), *each))
    columns = (
        *(Column(""), Column("check", "ms"), Column("full query", "ms"), Column("check / full query", "%")),
        *(Column(f"an action of {name}", "ms") for name in confirmed()),
    )
    return Table("", columns, tuple(rows)).markdown()


def price_of(told: str) -> Price:
    """The medians of one of `COSTS`."""
    name, backend = COSTS[told]
    ms = {x["what"]: x["ms"]["p50"] for x in read(name)["costs"] if x["backend"] == backend and x["ms"]}
    return Price(ms["check"], ms["full"], "ms", told)


@cache
def confirmed() -> dict[str, Results]:
    """rsd, and the runs of open loop that it is set against."""
    files = {"rsd": "rsd", **RIVALS}
    return {name: read_run(RESULTS / "confirmation" / f"{file}.json.gz") for name, file in files.items()}


def rivals() -> str:
    """The shipped setting of rsd beside the other runs of the frontier, where the target slides late."""
    runs = {
        **{f"open loop, n = {n}": f"baseline_{n}" for n in (1, 2, 4, 5, 6)},
        **{"rsd, n = 4": "rsd_first", "random, n = 2": "random"},
    }
    rsd = published("late_rsd_likelihood")
    found = [(name, compare(published(f"late_{file}"), rsd)) for name, file in runs.items()]
    found.append(("open loop, the best n of each task", compare(best_of_each_task(rsd), rsd)))
    rows = (
        (name, Measured(one.points, one.points_interval), test.gained, test.lost, test.p, one.by_task_p)
        for name, one in found
        for test in (one.mcnemar,)
    )
    columns = (
        *(Column("rsd, n = 2, against"), Column("points (95%)", "points"), Column("gained"), Column("lost")),
        *(Column("p", "p"), Column("p by task", "p")),
    )
    return Table("", columns, tuple(rows)).markdown()


def best_of_each_task(rsd: Results) -> Results:
    """Open loop with the n of each task that solves most, picked afterwards from these runs, at rsd's cost at the most:
    checks cost what they cost at OpenVLA-7B's shapes."""
    price = price_of(next(iter(COSTS)))
    most = (price.per_action(rsd) or 0.0) / price.full  # full queries
    runs, reached = [published(f"late_baseline_{n}") for n in (1, 2, 4, 5, 6, 8)], Endpoint.of(rsd.settings).reached
    tasks = rsd.settings.tasks
    solved, over = np.zeros((2, len(tasks), len(runs)), np.float32)  # over: full queries above that cost
    for i, run in enumerate(runs):
        for episode in run.episodes:
            place = tasks.index(episode.task_id), i
            solved[place] += reached(episode)
            over[place] += sum(query.full_query for query in episode.queries) - most * episode.steps
    both = [reduce(np.add.outer, each) for each in (solved, over)]  # [runs, runs, ...], an axis for each task
    best = np.unravel_index(np.where(both[1] <= 0, both[0], -1).argmax(), both[0].shape)
    picked = [e for task, i in zip(tasks, best, strict=True) for e in runs[i].episodes if e.task_id == task]
    return replace(runs[0], episodes=tuple(picked))


def mix() -> str:
    """Runs where 90% of the scenes are still, and in 10% the target slides late."""
    still = {name: published(file) for name, file in (("rsd", "rsd_likelihood"), *RIVALS.items())}
    rates = {name: (by_state(still[name]), by_state(late)) for name, late in confirmed().items()}
    draw, rows = np.random.default_rng(0), []
    for name, late in confirmed().items():
        points = [100 * (a - b) for a, b in zip(rates["rsd"], rates[name], strict=True)]
        means = [x[draw.integers(0, len(x), (10_000, len(x)))].mean(1) for x in points]
        low, high = np.percentile(STILL * means[0] + (1 - STILL) * means[1], (2.5, 97.5))
        gain = Measured(STILL * points[0].mean() + (1 - STILL) * points[1].mean(), (low, high))
        counts = [(run.full_queries / len(run.episodes), run.steps / len(run.episodes)) for run in (still[name], late)]
        solved, full, steps = (
            STILL * a + (1 - STILL) * b for a, b in ((x.mean() for x in rates[name]), *zip(*counts, strict=True))
        )
        rows.append((name, Measured(solved), full / steps, None if name == "rsd" else gain))
    columns = (
        *(Column("90% still, 10% late"), Column("success within 100 steps", "%")),
        *(Column("full queries per action", "ratio"), Column("rsd above it (95%)", "points")),
    )
    return Table("", columns, tuple(rows)).markdown()


def harmless() -> str:
    """rsd where something harmless happens, beside the same initial states where nothing does."""
    moved, calm = published("harmless_rsd_likelihood"), published("rsd_likelihood")
    states = {episode.key for episode in moved.episodes}
    pairs = [sorted((e for e in run.episodes if e.key in states), key=lambda e: e.key) for run in (calm, moved)]
    counts = np.array([[[sum(q.full_query for q in e.queries), e.steps] for e in one] for one in pairs], float)
    drawn = np.random.default_rng(0).integers(0, len(states), (10_000, len(states)))
    sums = counts[:, drawn].sum(2)  # [2, draws, 2]
    more = 100 * (sums[1, :, 0] / sums[1, :, 1] / (sums[0, :, 0] / sums[0, :, 1]) - 1)
    asked = counts.sum(1)[:, 0] / counts.sum(1)[:, 1]
    gain = Measured(100 * (asked[1] / asked[0] - 1), tuple(np.percentile(more, (2.5, 97.5))))
    reached, rows = Endpoint.of(moved.settings).reached, []
    for name, one, each in (("still", pairs[0], asked[0]), ("harmless", pairs[1], asked[1])):
        solved = sum(reached(episode) for episode in one)
        rate = Measured(solved / len(one), wilson(solved, len(one)))
        rows.append((name, rate, each, gain if name == "harmless" else None))
    columns = (
        *(Column(f"{len(states)} episodes a run"), Column("success within 100 steps", "%")),
        *(Column("full queries per action", "ratio"), Column("more of them, % (95%)", "points")),
    )
    return Table("", columns, tuple(rows)).markdown()


def by_state(run: Results) -> NDArray[np.float64]:
    """How often each initial state of each task is solved within the endpoint's steps."""
    reached, found = Endpoint.of(run.settings).reached, defaultdict(list)
    for episode in run.episodes:
        state, _ = state_and_seed(episode.trial, run.settings.seeds)
        found[episode.task_id, state].append(reached(episode))
    return np.array([fmean(found[state]) for state in sorted(found)])


@cache
def published(name: str) -> Results:
    """A run of the frontier."""
    return read_run(RESULTS / "reference" / f"{name}.json.gz")


def still() -> str:
    """Success and cost where nothing happens."""
    return whole(None)


def nearer() -> str:
    """Runs with other n and m than the shipped ones."""
    made = [run for run in read("pilot/rules.json")["runs"] if run["perturb"].startswith("late:104:")]
    found = [run for run in made if "refresh" not in run]
    rows = []
    for run in sorted(found, key=lambda run: -float(run["within_100_steps"])):
        limit = run["threshold"] if run["rule"] == "likelihood" else run["tolerance"]
        rsd = f"rsd, n = {run['n_action_steps']}, m = {run['check_steps']}, {run['rule']} {limit}"
        name = rsd if run["rule"] else f"open loop, n = {run['n_action_steps']}"
        solved = [Measured(run[x] / run["episodes"]) for x in ("within_100_steps", "successes")]
        rows.append((name, *solved, run["full_queries_per_action"], run["checks_per_action"]))
    columns = (
        *(Column(f"{found[0]['episodes']} episodes a run"), Column("success within 100 steps", "%")),
        *(Column("success", "%"), Column("full queries per action", "ratio"), Column("checks per action", "ratio")),
    )
    return Table("", columns, tuple(rows)).markdown()


def surer() -> str:
    """A check period that follows the score, beside runs of the frontier on the same initial states."""
    made = read("pilot/sure.json")["episodes"]
    sides = {SURE: {(e["task"], e["trial"]): [e[x] for x in ("success", "steps", "full", "checks")] for e in made}}
    states, rows, before = sorted(sides[SURE]), [], None
    for name, file in {"rsd, n = 2, m = 1": "late_rsd_likelihood", **LOOPS}.items():
        sides[name] = {
            e.key: [e.success, e.steps, sum(q.full_query for q in e.queries), sum(q.checked for q in e.queries)]
            for e in published(file).episodes
        }
    for name, side in sides.items():
        success, steps, full, checks = np.array([side[state] for state in states], float).T
        early = success * (steps <= 100)
        differ = (None, None) if before is None else (int((before > early).sum()), int((early > before).sum()))
        rates = Measured(early.mean()), Measured(success.mean())
        rows.append((name, *rates, full.sum() / steps.sum(), checks.sum() / steps.sum(), *differ))
        before = early if before is None else before
    columns = (
        *(Column(f"{len(states)} episodes a run"), Column("success within 100 steps", "%"), Column("success", "%")),
        *(Column("full queries per action", "ratio"), Column("checks per action", "ratio")),
        *(Column("the first row solves, and this not"), Column("the other way round")),
    )
    return Table("", columns, tuple(rows)).markdown()


def latency() -> str:
    """Who solves how many, by the steps that a full query takes."""
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in read("pilot/latency.json")["cells"]:
        cells.setdefault(cell["cell"].rpartition(" d=")[0], {})[cell["latency"]] = cell
    steps = sorted({d for of in cells.values() for d in of})
    names = {"open": "open loop", "main": "oracle,", "draft first": "rsd, first", "random": "random"}
    rows = []
    for name, of in sorted(cells.items(), key=lambda item: -float(item[1][0]["full_queries"])):
        start = max((x for x in names if name.startswith(x)), key=len, default="")
        told = names.get(start, "") + name.removeprefix(start)
        rows.append(
            (told, *(f"{round(x['within'] * x['episodes'])} of {x['episodes']}" for _, x in sorted(of.items())))
        )
    return Table("", (Column(""), *(Column(f"d = {d}") for d in steps)), tuple(rows)).markdown()


def network(name: str) -> str:
    """Reaction and success behind a network. Costs of a full query that change nothing share a row."""
    rows = read(f"network/{name}.json")["rows"]
    rtts, said = sorted({row["rtt_ms"] for row in rows}), ("reaction_p50", "reaction_p90", "solved")
    (episodes,) = {row["episodes"] for row in rows}
    found: dict[tuple[str, tuple[Any, ...]], list[str]] = {}
    for way, full in dict.fromkeys((row["way"], row["full_ms"]) for row in rows):
        cells = sorted((row for row in rows if (row["way"], row["full_ms"]) == (way, full)), key=lambda x: x["rtt_ms"])
        figures = (*(cell[x] for x in said for cell in cells), cells[1]["full_queries_per_action"])
        found.setdefault((way, figures), []).append(f"{full:g}")
    shared = len({row["full_ms"] for row in rows})
    names = (way if len(full) == shared else f"{way}, {' or '.join(full)} ms" for (way, _), full in found.items())
    columns = (
        Column("by added round trip"),
        *(
            Column(f"{what} {rtt:g} ms")
            for what in ("steps to react, p50:", "p90:", f"solved of {episodes}:")
            for rtt in rtts
        ),
        Column(f"full queries per action: {rtts[1]:g} ms"),
    )
    made = ((name, *(f"{x:g}" for x in of)) for name, (_, of) in zip(names, found, strict=True))
    return Table("", columns, tuple(made)).markdown()


def judges() -> str:
    """How well rules and a gate head tell that the main model would now say something else."""
    record, sets = read("pilot/gate.json"), ("late", "undisturbed", "counterfactual, of chunks that held")
    found = {(one["set"], one["score"]): one for one in record["scores"]}
    columns = tuple(Column(f"{name}, {found[name, 'gate']['pairs']:,} pairs", "ratio") for name in sets)
    names = ("first", "actions", "path", "likelihood", "gate", "blind likelihood", "blind gate")
    each = ((found[name, score]["auc"] for name in sets) for score in names)
    rows = ((score, *(Measured(x, (low, high)) for x, low, high in of)) for score, of in zip(names, each, strict=True))
    return Table("", (Column("AUC (95%)"), *columns), tuple(rows)).markdown()


def whole(perturb: str | None) -> str:
    """All runs of a condition."""
    found = runs(perturb)
    rows = (
        (name, _solved(run, "reached"), _solved(run, "success"), *per_action, run["cost_per_action"])
        for name, per_action, run in found
    )
    first = found[0][2]
    columns = (
        *(Column(f"{first['episodes']} episodes a run"), Column(f"success within {first['within']} steps", "%")),
        *(Column("success", "%"), Column("full queries per action", "ratio"), Column("checks per action", "ratio")),
        COST,
    )
    return Table("", columns, tuple(rows)).markdown()


def runs(perturb: str | None) -> list[tuple[str, list[float], dict[str, Any]]]:
    """The runs of a condition, dearest first: name, full queries and checks per action, record."""
    record = read("reference/performance_comparison.json")
    found = [run for run in record["runs"] if run["settings"]["perturb"] == perturb]
    return [
        (
            run["name"].replace(f", {perturb}", "").replace(", unperturbed", "").removesuffix(", m = 2"),
            [run[x] / run["actions"] for x in ("full_queries", "checks")],
            run,
        )
        for run in sorted(found, key=lambda run: -float(run["cost_per_action"]))
    ]


def _solved(run: dict[str, Any], what: str) -> Measured:
    return Measured(run[f"{what}_rate"], tuple(run[f"{what}_interval"]), None)


def read(name: str) -> dict[str, Any]:
    """A record."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text("utf-8"))
    return found


def device(record: dict[str, Any]) -> str:
    """The GPU's name, else the processor's."""
    return str(record["hardware"].get("gpu", record["hardware"]["cpu"]))


TABLES = {
    "network": partial(network, "late"),
    "ahead": partial(network, "ahead"),
    "components": components,
    "stages": stages,
    "oft": oft,
    "journeys": journeys,
    "nearer": nearer,
    "surer": surer,
    "latency": latency,
    "check": check,
    "loop": loop,
    "late-all": late_all,
    "confirmation": confirmation,
    "proof": proof,
    "costs": costs,
    "rivals": rivals,
    "mix": mix,
    "harmless": harmless,
    "judges": judges,
    "still": still,
}


def fill(text: str) -> str:
    """The text with every table made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_say_what_the_results_say(page: Path) -> None:
    text = page.read_text("utf-8")
    assert BLOCK.search(text)
    assert fill(text) == text, "python tests/test_tables.py"


def test_every_table_stands_on_a_page() -> None:
    named = {match[2] for page in PAGES for match in BLOCK.finditer(page.read_text("utf-8"))}
    assert named == set(TABLES)


def test_a_changed_figure_changes_the_table() -> None:
    page = PAGES[0].read_text("utf-8")
    stale = page.replace("| 0.201 |", "| 0.101 |")
    assert stale != page and fill(stale) == page


@pytest.mark.slow
def test_what_7b_would_make_of_the_frontier() -> None:
    files = sorted((RESULTS / "reference").glob("*.json.gz"))
    _, runs = read_runs(files, RESULTS / "h100" / "profile_7b.json")
    (rsd,) = (run for run in runs if run.path.name == "late_rsd_likelihood.json.gz")
    best = rsd.rival("open loop of no higher cost")
    assert best is not None and (best.label, best.verdict) == ("open loop, n = 6", "above")
    page = (ROOT / "docs" / "reference-results.md").read_text("utf-8")
    assert f"by task with p = {best.by_task_p:.2g} after Holm" in page


def test_the_episodes_in_which_the_alarm_is_raised() -> None:
    page = " ".join((ROOT / "docs" / "deploy.md").read_text("utf-8").split())
    late, still = (alarmed(run) for run in (confirmed()["rsd"], published("rsd_likelihood")))
    failed = sum(not episode.success for episode in late)
    assert f"in {len(late)} of [1,350 late episodes](results/README.md), of which {failed} fail" in page
    assert f"and in {len(still)} of 500 still ones" in page


def alarmed(run: Results, expected: float = 0.3) -> list[Episode]:
    """The episodes in which a server would have raised the alarm."""
    found = []
    for episode in run.episodes:
        alarm = Alarm(expected)
        for query in episode.queries:
            if query.checked:
                alarm.recent.append(query.route == "rejected")
            if alarm.raised:
                found.append(episode)
                break
    return found


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text("utf-8")), "utf-8")
