"""The pilot's episodes as a table: a row for each cell, under the condition and the latency that it met."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rsd_trt.eval.statistics import wilson

HORIZON = 100  # steps: success within them, and the limit of the restricted mean
BUDGET = 0.20  # full queries per action
POINTS = 0.10  # that n = 1, or the oracle, has to lie above the best open loop at the budget
Record = Mapping[str, object]


@dataclass(frozen=True)
class Row:
    """A cell under a condition."""

    condition: str
    latency: int
    cell: str
    episodes: int
    perturbed: int  # in which the perturbation happened
    within: float  # share that succeeds within `HORIZON` steps
    within_interval: tuple[float, float] | None  # 95%, Wilson's
    success: float
    success_interval: tuple[float, float] | None
    restricted_steps: float  # mean of min(steps to success, HORIZON)
    full_queries: float  # per action
    checks: float  # per action
    accepted: float | None  # of the checks, in part too
    reaction: float | None  # steps from the event to the first action of a chunk that was made from a frame of it, mean
    open_loop: bool


def read(folder: Path) -> list[Record]:
    """The records of every shard below `folder`. A last line that a kill cut short is left out."""
    found: list[Record] = []
    for path in sorted(folder.glob("episodes*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def rows(records: Iterable[Record]) -> list[Row]:
    """A row for each (condition, latency, cell), the cheapest last. Errors are left out."""
    groups: dict[tuple[str, int, str], list[Mapping[str, float]]] = {}
    for record in records:
        if record["error"] is None:
            key = (str(record["condition"]), int(str(record["latency"])), str(record["cell"]))
            groups.setdefault(key, []).append(record)  # type: ignore[arg-type]
    made = [_row(*key, group) for key, group in groups.items()]
    return sorted(made, key=lambda row: (row.condition, row.latency, -row.full_queries))


def _row(condition: str, latency: int, cell: str, group: Sequence[Mapping[str, float]]) -> Row:
    count, steps = len(group), sum(record["steps"] for record in group)
    early = sum(bool(record["success"]) and record["steps"] <= HORIZON for record in group)
    solved = sum(bool(record["success"]) for record in group)
    checks = sum(record["checks"] for record in group)
    reactions = [record["reaction"] for record in group if record["reaction"] is not None]
    return Row(
        condition=condition,
        latency=latency,
        cell=cell,
        episodes=count,
        perturbed=sum(record["event_step"] is not None for record in group),
        within=early / count,
        within_interval=wilson(early, count),
        success=solved / count,
        success_interval=wilson(solved, count),
        restricted_steps=sum(min(record["steps"], HORIZON) if record["success"] else HORIZON for record in group)
        / count,
        full_queries=sum(record["full_queries"] for record in group) / steps,
        checks=checks / steps,
        accepted=sum(record["accepted"] for record in group) / checks if checks else None,
        reaction=sum(reactions) / len(reactions) if reactions else None,
        open_loop=cell.startswith("open "),
    )


@dataclass(frozen=True)
class Room:
    """How far the best lies above the best open loop that costs no more than the budget, in points of `within`."""

    condition: str
    latency: int
    budget: str | None  # the best open loop at the budget
    n1: float | None  # n = 1 above it: the room there is
    best: str | None  # the best that checks at the budget
    gain: float | None  # and how far it lies above


def room(table: Sequence[Row]) -> list[Room]:
    """For each condition and latency."""
    found = []
    for condition, latency in dict.fromkeys((row.condition, row.latency) for row in table):
        here = [row for row in table if (row.condition, row.latency) == (condition, latency)]
        cheap = [row for row in here if row.full_queries <= BUDGET]
        rival = max((row for row in cheap if row.open_loop), key=lambda row: row.within, default=None)
        best = max((row for row in cheap if row.checks), key=lambda row: row.within, default=None)
        n1 = next((row for row in here if row.cell.startswith("open n=1 ")), None)
        found.append(
            Room(
                condition,
                latency,
                rival.cell if rival else None,
                n1.within - rival.within if n1 and rival else None,
                best.cell if best else None,
                best.within - rival.within if best and rival else None,
            )
        )
    return found


def text(table: Sequence[Row], rooms: Sequence[Room]) -> str:
    """Both tables for a terminal."""
    lines = []
    for place in rooms:
        lines.append(f"\n{place.condition}, latency {place.latency} steps")
        lines.append(
            f"{'cell':<34}{'episodes':>9}{'event':>6}{f'<= {HORIZON} steps':>24}{'success':>24}{'steps':>7}"
            f"{'full/act':>9}{'chk/act':>8}{'accept':>7}{'react':>6}"
        )
        for row in table:
            if (row.condition, row.latency) == (place.condition, place.latency):
                lines.append(
                    f"{row.cell:<34}{row.episodes:>9}{row.perturbed:>6}{_share(row.within, row.within_interval):>24}"
                    f"{_share(row.success, row.success_interval):>24}{row.restricted_steps:>7.1f}"
                    f"{row.full_queries:>9.3f}{row.checks:>8.3f}{_or(row.accepted, '.0%'):>7}"
                    f"{_or(row.reaction, '.1f'):>6}"
                )
        lines.append(
            f"best open loop at {BUDGET:.2f}: {place.budget or '-'}; n = 1 above it: {_points(place.n1)}; "
            f"best with checks: {place.best or '-'}, above it: {_points(place.gain)} (wanted: {POINTS:+.0%})"
        )
    return "\n".join(lines)


def as_json(table: Sequence[Row], rooms: Sequence[Room]) -> dict[str, object]:
    return {"cells": [asdict(row) for row in table], "room": [asdict(place) for place in rooms]}


def _share(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.1%}" + (f" ({interval[0]:.1%}-{interval[1]:.1%})" if interval else "")


def _or(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} points"
