"""The tables of the pages say what the published reports and records say.

`python tests/test_tables.py` writes them anew. Each stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rsd_trt.eval.table import Column, Measured, Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (
    *(ROOT / "docs" / name for name in ("performance.md", "reference-results.md", "deploy.md")),
    ROOT / "README.md",
)
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

LAUNCHES = ("draft + head + decoder, with host decisions", "propose + predict")
LATE = "late:201:0.02-0.05"
COST = Column("cost per action", "ms")
STAGES = ("preprocess", "vision", "blocks 1 to 8", "blocks 9 to 32", "predict", "full query")


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
    record = read("h200/stages.json")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in record.get("stages", record)["rows"]:
        if row["ms"] is not None:
            key = (row["images"], row["prompt_tokens"], row["backbone"], row["precision"])
            found.setdefault(key, {})[row["what"]] = row
    first, rows = min(found)[:2], []
    for (images, prompt, backbone, precision), of in sorted(found.items(), key=lambda item: item[0][:2]):
        if (images, prompt) != first and backbone in ("eager", "graph"):
            continue
        whole, p50 = of["full query"], {what: row["ms"]["p50"] for what, row in of.items()}
        overhead = whole.get("host_overhead_ms", whole.get("outside_ms"))
        name = f"{images} image{'s' if images > 1 else ''}, {prompt} tokens: {backbone} {precision}"
        figures = (whole["ms"]["p99"], whole["times_roofline"], overhead and overhead["p50"], whole["speedup"])
        rows.append((name, *map(p50.get, STAGES), *figures))
    n = next(iter(found.values()))["full query"]["ms"]["n"]
    columns = (
        *(Column(f"p50, batch 1, {device(record)}, n = {n}"), *(Column(what, "ms") for what in STAGES)),
        *(Column("its p99", "ms"), Column("its p50 / roofline bound", "x"), Column("host overhead", "ms")),
        Column("over timm + transformers", "x"),
    )
    return Table("", columns, tuple(rows)).markdown()


def late() -> str:
    """Success and cost with a target that slides late, in short: the shipped rule beside open loop."""
    shipped = "rsd, n = 4, first 0.2"
    rows = [
        ("rsd" if name == shipped else name, _solved(run, "reached"), per_action[0], run["cost_per_action"])
        for name, per_action, run in runs(LATE)
        if name.startswith(("open loop", shipped))
    ]
    columns = Column(""), Column("success", "%"), Column("full queries per action", "ratio"), COST
    return Table("", columns, tuple(rows)).markdown()


def late_all() -> str:
    """The same of every run, with all that is counted."""
    return whole(LATE)


def still() -> str:
    """Success and cost where nothing happens."""
    return whole(None)


def network() -> str:
    """Reaction behind a network, one episode a cell. Costs of a full query that change nothing share a row."""
    rows = read("network/late.json")["rows"]
    rtts = sorted({row["rtt_ms"] for row in rows})
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for way, full in dict.fromkeys((row["way"], row["full_ms"]) for row in rows):
        cells = [row for row in rows if (row["way"], row["full_ms"]) == (way, full)]
        assert {x["episodes"] for x in cells} == {1}
        said = tuple(f"{x['reaction_p50']:g}{'' if x['solved'] else ', failed'}" for x in cells)
        found.setdefault((way, said), []).append(f"{full:g}")
    shared = len({row["full_ms"] for row in rows})
    names = (way if len(full) == shared else f"{way}, {' or '.join(full)} ms" for (way, _), full in found.items())
    columns = (Column("steps to react, by added round trip"), *(Column(f"{rtt:g} ms") for rtt in rtts))
    return Table("", columns, tuple((name, *said) for name, (_, said) in zip(names, found, strict=True))).markdown()


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
    "network": network,
    "components": components,
    "stages": stages,
    "late": late,
    "late-all": late_all,
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


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text("utf-8")), "utf-8")
