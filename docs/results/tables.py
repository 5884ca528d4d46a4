"""Makes the tables of the README and the model card from the results below this folder: python docs/results/tables.py

Each stands between `<!-- table: NAME -->` and `<!-- end -->`. With --check nothing is written, and the exit code is 1
if a table is not what its results say.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parents[1]
PAGES = (ROOT / "README.md", ROOT / "examples" / "reference_policy" / "README.md")
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Json = Mapping[str, Any]

TEXTBOOK = "draft + head + decoder, with host decisions"
PAIR = "accept + chain"
LAUNCHES = {  # (what, variant) of a row of components.json -> what it is called
    (TEXTBOOK, "torch"): "draft, head and decoder apart, decisions on the host, eager PyTorch",
    (PAIR, "torch"): "`accept + chain`, eager PyTorch (the reference for parity)",
    (PAIR, "ort"): "`accept + chain`, ONNX Runtime",
    (PAIR, "ort + CUDA graph"): "`accept + chain`, ONNX Runtime with its CUDA graph (`--backend ort`)",
    (PAIR, "graph"): "`accept + chain`, CUDA graphs (`--backend graph`)",
    (PAIR, "trt"): "`accept + chain`, TensorRT (`--backend trt`)",
}
STAGES = ("preprocess", "vision", "blocks <= k", "blocks > k")
QUERIES = ("accepted query", "rejected query", "baseline query")


def reference(record: Json, short: bool = False) -> list[str]:
    """The runs of the reference policy that were replayed: undisturbed, and with the target displaced. A control stands
    beside the tolerance whose rate it has. short: only those at 1 action a query, without their milliseconds."""
    found: dict[tuple[str, int, str], dict[bool, tuple[Json, Json]]] = {}
    runs = [(row, headline(row["results"])) for row in record["rows"]]
    rates = {
        (row["disturb"], run["rsd_stats"]["draft_acceptance_rate"]): tolerance(run)
        for row, run in runs
        if row["mode"] == "rsd"
    }
    for row, run in runs:
        mode, variant = row["mode"], ""
        if mode == "rsd":
            variant = tolerance(run)
        elif mode == "random":
            variant = rates[row["disturb"], run["settings"]["accept_rate"]]
        found.setdefault((mode, row["n_action_steps"], variant), {})[row["disturb"] is not None] = row, run
    order = {mode: i for i, mode in enumerate(("baseline", "rsd", "random"))}
    told = [0, 1, 3] if short else [0, 1, 2, 3]
    lines = []
    for (mode, n, variant), pair in sorted(found.items(), key=lambda item: (order[item[0][0]], *item[0][1:])):
        if n == 1 or not short:
            name = f"a coin that accepts as often as rsd at {variant}" if mode == "random" else mode
            name += f", {variant}" if mode == "rsd" else ""
            figures = [cells(*pair.get(displaced, ()))[i] for displaced in (False, True) for i in told]
            lines.append((name, *([] if short else [str(n)]), *figures))
    calm = [("success", "accepted; full passes", "ms per action", "speed-up")[i] for i in told]
    title = f"libero_spatial{', 1 action a query' if short else ''}; times: {device(record)}"
    columns = (title, *([] if short else ["actions a query"]), *calm, *(f"target displaced: {name}" for name in calm))
    return table(columns, lines)


def cells(row: Json | None = None, run: Json | None = None) -> tuple[str, str, str, str]:
    """Success, acceptance, milliseconds and speed-up of a run."""
    if row is None or run is None:
        return "not measured", "", "", ""
    low, high = run["final_success_interval"]
    rate = run["rsd_stats"]["draft_acceptance_rate"]
    share = f"{run['total_successes']}/{run['total_episodes']}, {run['final_success_rate']:.1%}"
    return (
        f"{share} ({low * 100:.1f} to {high * 100:.1f})",
        "" if rate is None else f"{rate:.1%}; {row['full_passes'] / row['queries']:.1%}",
        f"{row['ms_per_action']:.2f}",
        f"{times(row['speedup'])}{bounds(row['speedup_interval'], 'x')}",
    )


@cache
def headline(name: str) -> Json:
    """A results file of the reference policy without its episodes."""
    data = json.loads(gzip.decompress((RESULTS / "reference" / name).read_bytes()))
    return {key: value for key, value in data.items() if key != "episodes"}


def named(row: Json) -> str:
    """The mode of a run of the reference policy that was replayed, with the tolerance of rsd."""
    return f"rsd, {tolerance(headline(row['results']))}" if row["mode"] == "rsd" else str(row["mode"])


def tolerance(run: Json) -> str:
    """Of a run of mode rsd."""
    return f"tolerance {run['settings']['rsd']['tolerance'][0]:g}"


def components(report: Json) -> list[str]:
    """What a rejected query launches beside the backbone, batch 1."""
    rows = {(row["what"], row["variant"]): row for row in report["rows"] if row["batch"] == 1}
    first = next(iter(rows.values()))
    title = f"launch, batch 1, {device(report)}, {first['precision']}, n = {first['ms']['n']}"
    lines = []
    for key, name in LAUNCHES.items():
        row = rows.get(key)
        if row is None or row["ms"] is None:
            lines.append((name, "not measured", "", "", ""))
        else:
            lines.append((name, *(f"{row['ms'][p]:.3f}" for p in ("p50", "p95", "p99")), times(row["speedup"])))
    return table((title, "p50 ms", "p95 ms", "p99 ms", "speed-up"), lines)


def stages(report: Json) -> list[str]:
    """p50 of the stages and of whole queries: of every backbone in the first shape, in the others of the fastest and of
    what people run."""
    found: dict[tuple[object, ...], dict[str, Json]] = {}
    for row in report["stages"]["rows"]:
        key = row["images"], row["prompt_tokens"], row["backbone"], row["precision"]
        if row["ms"] is not None:
            found.setdefault(key, {})[row["what"]] = row
    first, lines = min(found)[:2], []
    for (images, prompt, backbone, precision), rows in sorted(found.items(), key=lambda item: item[0][:2]):
        if (images, prompt) != first and backbone in ("eager", "graph"):
            continue
        whole = rows["baseline query"]
        outside = whole["outside_ms"]
        lines.append(
            (
                f"{images} image{'s' if images != 1 else ''}, {prompt} tokens: {backbone} {precision}",
                *(f"{rows[stage]['ms']['p50']:.2f}" if stage in rows else "" for stage in STAGES),
                *(f"{rows[query]['ms']['p50']:.2f}" if query in rows else "" for query in QUERIES),
                f"{whole['ms']['p99']:.2f}",
                f"{whole['times_floor']:.2f}x",
                "" if outside is None else f"{outside['p50']:.2f}",
                times(whole["speedup"]),
            )
        )
    title = f"p50 ms, batch 1, {device(report)}, n = {next(iter(found.values()))['baseline query']['ms']['n']}"
    columns = (*STAGES, *QUERIES, "its p99", "its floor", "outside the GPU", "over timm + transformers")
    return table((title, *columns), lines)


def replay(record: Json) -> list[str]:
    """Whose decisions cost what by whose clock."""
    first = record["rows"][0]
    precision = "" if first["backbone_precision"] == "bundle" else f" {first['backbone_precision']}"
    clock = f"clock of {record['bundle']}, {first['backbone']}{precision}, {device(record)}"
    lines = [
        (
            f"{row['decisions_of']}, {named(row)}, {row['n_action_steps']} action{'s' * (row['n_action_steps'] > 1)}",
            f"{sum(row['route_queries'].values()):,}",
            str(row["episodes"]),
            f"{row['queries']:,}",
            f"{row['full_passes']:,}",
            f"{row['ms_per_action']:.2f}{bounds(row['ms_per_action_interval'], '')}",
            f"{times(row['speedup'])}{bounds(row['speedup_interval'], 'x')}",
        )
        for row in record["rows"]
    ]
    columns = ("queries replayed", "episodes priced", "queries", "full passes", "ms per action", "over the baseline")
    return table((f"a replay: decisions of ..., {clock}", *columns), lines)


TABLES: dict[str, tuple[str, Callable[[Json], list[str]]]] = {
    "reference": ("reference/replay.json", reference),
    "reference-1": ("reference/replay.json", partial(reference, short=True)),
    "components": ("h200/components.json", components),
    "stages": ("h200/stages.json", stages),
    "replay": ("h200/replay.json", replay),
}


def device(report: Json) -> str:
    """The GPU's name, else the processor's."""
    return str(report["hardware"].get("gpu", report["hardware"]["cpu"]))


def times(value: float | None) -> str:
    """`1.23x`, or nothing."""
    return "" if value is None else f"{value:.2f}x"


def bounds(interval: Sequence[float] | None, unit: str) -> str:
    """` (1.10x to 1.20x)`, or nothing."""
    return "" if interval is None else f" ({interval[0]:.2f}{unit} to {interval[1]:.2f}{unit})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A pipe table: text in the first column, numbers in the others."""
    cells = [[cell.replace("|", "\\|").replace("<=", "&le;") for cell in line] for line in (columns, *rows)]
    lines = ["| " + " | ".join(line).replace("|  ", "| ").rstrip() + " |" for line in cells]
    return [lines[0], "|---|" + "--:|" * (len(columns) - 1), *lines[1:]]


def fill(text: str) -> str:
    """The text with every table made anew.

    Raises:
        KeyError: a table that is not in `TABLES`.
    """

    def block(match: re.Match[str]) -> str:
        name, make = TABLES[match[2]]
        path = RESULTS / name
        lines = make(json.loads(path.read_text("utf-8"))) if path.is_file() else ["Not measured yet."]
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return BLOCK.sub(block, text)


def main() -> int:
    """Writes the pages, or checks them."""
    before = {page: page.read_text("utf-8") for page in PAGES}
    after = {page: fill(text) for page, text in before.items()}
    if "--check" in sys.argv[1:]:
        return int(before != after)
    for page, text in after.items():
        page.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
