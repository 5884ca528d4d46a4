"""Seats that need neither Ray nor a simulator: what they answer is made up at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from msgspec import structs
from synthetic import TASKS, settings

from rsd_trt.eval.libero.pool import Meter
from rsd_trt.eval.libero.request import EvalRequest
from rsd_trt.eval.libero.run import Job
from rsd_trt.eval.results import Episode, EpisodeKey, QueryRecord
from rsd_trt.eval.sweep.board import Answer, Lost, Place, Refused
from rsd_trt.eval.sweep.plan import Run, Sweep

QUERY = QueryRecord(step=0, route="start", committed=2, ms=10.0, checked=False, full_query=True)


def episode(key: EpisodeKey, queries: int = 2, run: str = "") -> Episode:
    return Episode(*key, sum(key) % 3 > 0, steps=2 * queries, seconds=2.0, queries=(QUERY,) * queries, run=run)


def sweep(out: Path, runs: int, trials: int, tasks: int = 1) -> Sweep:
    """Runs of open loop that differ in n."""
    request = EvalRequest(mode="baseline", tasks=tuple(range(tasks)), trials=trials, workers=2)
    made = [replace(request, n_action_steps=i + 1, out=out / f"run{i}") for i in range(runs)]
    return Sweep(tuple(Run(one.out.name, one) for one in made), (), out)


@dataclass
class FakeSeats:
    """They answer in turn, an episode at a time. `strike(number of the answer, place)` says what a seat answers
    instead of its next episode; after that it is replaced."""

    count: int
    strike: Callable[[int, Place], Refused | Lost | None] = lambda number, place: None
    queries: int = 2
    told: int = 0
    hardware: dict[str, str | int] = field(default_factory=dict)  # by the number of the seat: its processor
    work: dict[Place, deque[Answer]] = field(default_factory=dict)
    asked: list[tuple[str, str, EpisodeKey]] = field(default_factory=list)  # (node, run, episode)
    made: int = 0

    def places(self) -> Sequence[Place]:
        while len(self.work) < self.count:
            self.work[Place(f"node{self.made}", workers=2)] = deque()
            self.made += 1
        return list(self.work)

    def open(self, place: Place, requests: Sequence[EvalRequest]) -> None:
        self.work[place].append([self.job(place, request) for request in requests])

    def job(self, place: Place, request: EvalRequest) -> Job:
        made = settings(request.mode, tasks=request.tasks, trials=request.trials, timing="batched", device="cpu")
        machine = {**made.hardware, "cpu": self.hardware.get(place.node, "any")}
        n = request.n_action_steps or made.n_action_steps
        alike = structs.replace(made, hardware=machine, n_action_steps=n)
        return Job(alike, {task: TASKS[task] for task in made.tasks})

    def run(self, place: Place, keys: Sequence[Sequence[EpisodeKey]]) -> None:
        assert place.group is not None
        for run, request, mine in zip(place.group.runs, place.group.requests, keys, strict=True):
            told = self.job(place, request).settings.run
            self.asked += [(place.node, run.name, key) for key in mine]
            self.work[place].extend(episode(key, self.queries, told) for key in mine)
        self.work[place].append(Meter(seconds=1.0, wall=4.0, cores=2, gpus=0))

    def answers(self) -> Iterable[tuple[Place, Answer]]:
        for place, waiting in list(self.work.items()):
            if waiting:
                self.told += 1
                answer = self.strike(self.told, place) or waiting.popleft()
                if isinstance(answer, (Refused, Lost)):
                    del self.work[place]
                yield place, answer


class Quiet:
    """Nobody follows."""

    def __init__(self) -> None:
        self.added: list[tuple[str, EpisodeKey]] = []
        self.losses: list[str] = []
        self.started: tuple[int, int, int] = (0, 0, 0)

    def start(self, total: int, done: int, successes: int) -> None:
        self.started = (total, done, successes)

    def add(self, run: str, episode: Episode) -> None:
        self.added.append((run, episode.key))

    def lost(self, message: str) -> None:
        self.losses.append(message)
