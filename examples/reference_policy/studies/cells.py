"""What the pilot compares: ways to spend queries, and the conditions they meet. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rsd_trt.eval.libero.episode import Assignment
from rsd_trt.eval.libero.perturb import PerturbSpec
from rsd_trt.eval.libero.simulator import Simulator

Guess = Literal["none", "main", "draft", "random", "alone"]
Rule = Literal["first", "actions", "path"]

TRIALS = 50  # initial states of a task: `Assignment.trial` is the job's number times this, plus the state's number
CONDITIONS = (
    "none",
    "late:0.02-0.05",
    "late:0.05-0.08",
    "moving:0.02-0.06",
    "moving:0.06-0.1",
    "harmless",
)


@dataclass(frozen=True)
class Cell:
    """One way to spend queries.

    guess: what the rest of a chunk is checked against: nothing (open loop), main's own fresh chunk (the oracle), the
    bundle's draft, or a coin; `alone`: nothing, and the draft stands in main's place, full queries and all. n: actions
    of the chunk that a full query commits. m: actions between checks. latency: control steps that pass until a full
    query is answered. refresh: every refresh-th query at the latest is a full one.
    """

    n: int
    latency: int = 0
    guess: Guess = "none"
    rule: Rule = "first"
    tolerance: float = 0.0  # environment units; of a coin, its rate of acceptance
    m: int = 0
    refresh: int | None = None

    @property
    def name(self) -> str:
        """`open n=4 d=0`, `main first 0.2 m=2 n=4 d=0`."""
        checked = f"{self.tolerance:g} m={self.m}"
        way = {"none": "open", "alone": "draft alone", "random": f"random {checked}"}.get(
            self.guess, f"{self.guess} {self.rule} {checked}"
        )
        refresh = f" r={self.refresh}" if self.refresh else ""
        return f"{way} n={self.n} d={self.latency}{refresh}"


@dataclass(frozen=True)
class Job:
    """One episode of a cell."""

    cell: Cell
    condition: str  # `none`, or a perturbation without its seed
    task: int
    trial: int
    seed: int  # of the perturbation

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        return self.condition, self.cell.name, self.task, self.trial, self.seed

    def assignment(self, number: int, max_steps: int) -> Assignment:
        spec = perturb_spec(self.condition, self.seed)
        perturbation = spec.draw(self.task, self.trial) if spec else None
        return Assignment(self.task, number * TRIALS + self.trial, max_steps, perturbation=perturbation)


class JobSimulator(Simulator):
    """A simulator that is reset to the initial state in a job's number, so that one serves every cell."""

    def reset(self, trial: int, render: bool = True) -> None:
        super().reset(trial % TRIALS, render)


def perturb_spec(condition: str, seed: int) -> PerturbSpec | None:
    """`late:0.02-0.05` and a seed -> the perturbation.

    Raises:
        UserError: an unknown kind or dose.
    """
    if condition == "none":
        return None
    kind, _, dose = condition.partition(":")
    return PerturbSpec.parse(f"{kind}:{seed}" + (f":{dose}" if dose else ""))


def jobs(
    cells: Sequence[Cell], conditions: Iterable[str], tasks: Sequence[int], trials: Sequence[int], seeds: Sequence[int]
) -> Iterator[Job]:
    """Every episode: all cells of one (seed, trial, task) before the next one, so that a run that is cut short has as
    many of each cell, paired. Tasks that a condition has no room in are left out of it."""
    for seed in seeds:
        for trial in trials:
            for task in tasks:
                for condition in conditions:
                    spec = perturb_spec(condition, seed)
                    if (spec is None and seed != seeds[0]) or (spec is not None and not spec.has_room(task)):
                        continue  # without a perturbation, another seed is the same episode
                    for cell in cells:
                        yield Job(cell, condition, task, trial, seed)


def shard(found: Sequence[Job], index: int, count: int) -> list[Job]:
    """The jobs of one of `count` processes: whole (condition, task, trial, seed), so that every one has every cell."""
    keys = {key: i for i, key in enumerate(dict.fromkeys((j.condition, j.task, j.trial, j.seed) for j in found))}
    return [job for job in found if keys[job.condition, job.task, job.trial, job.seed] % count == index]
