"""What a replay leaves on disk: `replay.json`, the milliseconds per action of runs whose own times say nothing.

A replay computes the queries of some of a run's episodes again, each alone and with a synchronised clock: the same
routes, in the same order, on one bundle and one machine. What a query of each route takes is then the price of the same
decision in all episodes of the run, so that a figure is of all its decisions and not of a few. A row belongs to the
run whose name (`Settings.run`) it carries.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from rsd_trt.config import Mode
from rsd_trt.errors import UserError
from rsd_trt.records import Natural, Record, read_record, told


class ReplayRow(Record, frozen=True):
    """One results file, replayed."""

    results: Annotated[str, told("the results file, as it was named")]
    run: Annotated[str, told("the run that the file holds: its settings' name")]
    mode: Mode
    n_action_steps: Natural
    perturb: Annotated[str | None, told("the perturbation, as --perturb takes it; null if there is none")]
    backend: str
    backbone: Annotated[str, told("how the backbone runs")]
    precision: str
    episodes: Annotated[Natural, told("of the run, that are priced: no error, and a price for each of their routes")]
    queries: Natural
    full_queries: Natural
    actions: Annotated[Natural, told("that these episodes executed")]
    ms_per_action: Annotated[float, told("every query at the price of its route / executed actions")]
    ms_per_action_interval: Annotated[
        tuple[float, float] | None, told("95%, bootstrap over episodes at fixed prices; null for too few")
    ]
    suite: Annotated[str, told("that the decisions were made in")]
    decisions_of: Annotated[str, told("the bundle that made them")]
    route_ms: Annotated[dict[str, float], told("measured, of the replayed episodes: p50 of a query, by route")]
    route_queries: Annotated[dict[str, Natural], told("how many that is of")]
    episode_ms: Annotated[tuple[float, ...], told("measured, of the queries of each of `Replay.replayed`")]
    replayed_ms_per_action: Annotated[float, told("measured, of these episodes")]
    priced_ms_per_action: Annotated[float, told("what the prices make of the same episodes")]
    backbone_precision: Annotated[str, told("bundle: what its weights are stored in")] = "bundle"
    baseline: Annotated[str | None, told("the baseline run, of as many actions a query, that speedup is over")] = None
    speedup: Annotated[float | None, told("of an action, over the baseline's, on the episodes of both")] = None
    speedup_interval: Annotated[tuple[float, float] | None, told("95%, bootstrap over episodes; null for too few")] = (
        None
    )

    def __post_init__(self) -> None:
        """Raises UserError: out of range."""
        if not self.ms_per_action > 0:
            raise UserError(f"the ms_per_action of {self.results} is {self.ms_per_action}: it must be > 0")
        bounds = self.ms_per_action_interval
        if bounds is not None and not 0 < bounds[0] <= bounds[1]:
            raise UserError(f"the ms_per_action_interval of {self.results} is {bounds}: it must be two times, in order")


class Replay(Record, frozen=True):
    """Runs of one bundle, replayed on one machine."""

    command: str
    bundle: Annotated[str, told("the bundle's name")]
    bundle_sha256: str
    hardware: dict[str, str | int]
    versions: dict[str, str]
    boundary: Annotated[str, told("in words, what the times include")]
    rows: tuple[ReplayRow, ...]
    prices: Annotated[
        dict[str, dict[str, float]], "ms of a query by route: in mode baseline, and in modes with a draft (`draft`)"
    ]
    replayed: Annotated[dict[str, tuple[tuple[Natural, ...], ...]], "by suite, the (task, trial) of each episode"]
    images: Annotated[Natural | None, told("of an observation")] = None
    prompt_tokens: Annotated[Natural | None, told("of every prompt; null if they are the tasks' own")] = None

    def row(self, run: str) -> ReplayRow | None:
        """That of the run of that name."""
        return next((row for row in self.rows if row.run == run), None)


def read_replay(path: Path) -> Replay:
    """A replay.json, checked.

    Raises:
        UserError: it cannot be read, is not a replay, or times a run twice.
    """
    try:
        replay = read_record(Replay, path)
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    twice = [run for run, count in Counter(row.run for row in replay.rows).items() if count > 1]
    if twice:
        raise UserError(f"{path} times run {twice[0]} twice. Replay again")
    return replay
