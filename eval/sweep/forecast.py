"""What a sweep will take and what it can show, before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Annotated

from rsd_trt.eval.statistics import smallest_difference
from rsd_trt.eval.sweep.plan import Sweep
from rsd_trt.eval.sweep.run import state_of

ASSUMED_SECONDS = 10.0  # of an episode in a simulator's process, where none was measured
DISCORDANT = (0.1, 0.15)  # shares of pairs whose outcomes differ, of which a difference is told


@dataclass(frozen=True)
class RunForecast:
    """A run that is to come."""

    name: str
    episodes: int
    missing: int
    seconds_an_episode: Annotated[float, "in one simulator's process"]
    seconds_of: Annotated[str, "whose speed that is: this run, the sweep's other runs, or assumed"]


@dataclass(frozen=True)
class Forecast:
    """A sweep that is to come."""

    runs: tuple[RunForecast, ...]
    episodes: int
    missing: int
    workers: Annotated[int, "simulator processes at a time, of all models together"]
    hours: Annotated[float, "that the missing episodes take"]
    comparisons: int
    pairs: Annotated[int, "of the comparison with the fewest"]
    smallest_difference: Annotated[
        dict[str, float | None],
        "of success that McNemar's exact test shows with power .8 after Holm, by the share of pairs that differ",
    ]


def forecast(sweep: Sweep, places: int = 1) -> Forecast:
    """places: models that are loaded at a time, each with the simulators of its run."""
    states = {run.name: state_of(run) for run in sweep.runs}
    seconds = {name: [line.seconds for line in state.lines.values()] for name, state in states.items()}
    every = [value for values in seconds.values() for value in values]
    runs = []
    for name, state in states.items():
        if own := seconds[name]:
            speed = fmean(own), "this run"
        elif every:
            speed = fmean(every), "the sweep's other runs"
        else:
            speed = ASSUMED_SECONDS, "assumed"
        runs.append(RunForecast(name, state.total, state.missing, *speed))
    workers = {run.name: run.request.workers for run in sweep.runs}
    tested = {one.run for one in sweep.comparisons}
    pairs = min((states[name].total for name in tested), default=0)
    tests = len(sweep.comparisons)
    return Forecast(
        runs=tuple(runs),
        episodes=sum(run.episodes for run in runs),
        missing=sum(run.missing for run in runs),
        workers=places * max(workers.values()),
        hours=sum(run.missing * run.seconds_an_episode / (places * workers[run.name]) for run in runs) / 3600,
        comparisons=tests,
        pairs=pairs,
        smallest_difference={
            f"{share:.0%}": smallest_difference(pairs, tests, share) if tests else None for share in DISCORDANT
        },
    )
