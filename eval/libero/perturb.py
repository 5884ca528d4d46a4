"""What `--perturb` asks for: a kind of perturbation, its seed, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rsd_trt.config import PERTURBATIONS, SEEDS_APART, PerturbKind, state_and_seed
from rsd_trt.errors import UserError, did_you_mean
from rsd_trt.eval.libero.course import Perturbation
from rsd_trt.eval.libero.harmless import draw_frozen, draw_harmless
from rsd_trt.eval.libero.target import SUITE, draw_displace, draw_late, draw_moving

Dose = tuple[float, float]

DOSES: dict[PerturbKind, Dose] = {  # those that have one, and what it is where none is given
    "late": (0.02, 0.08),  # m that the target slides
    "moving": (0.02, 0.10),  # m/s
}
MAX_DOSE = 0.2
STREAMS: dict[PerturbKind, int] = {"late": 1, "moving": 2, "harmless": 3, "frozen": 4}
SLIDE_ROOM = {3: 0.05, 4: 0.05, 5: 0.0}  # m of a path on cookie box, in drawer, on ramekin; the other tasks have more
NO_TRACK = (3, 5)  # tasks without room to move to and fro


@dataclass(frozen=True)
class PerturbSpec:
    """A kind of perturbation: what happens in an episode is drawn from a seed, the task and the initial state alone."""

    kind: PerturbKind
    seeds: tuple[int, ...]
    dose: Dose | None = None  # the range that the kind's dose is drawn from; None: its usual one

    @classmethod
    def parse(cls, text: str) -> PerturbSpec:
        """`KIND:SEEDS`, `KIND:SEEDS:LOW-HIGH`, or `SEEDS` for a displacement. SEEDS: one, or several as in 7+8+9.

        Raises:
            UserError: an unknown kind, no seed, or a dose that the kind has not.
        """
        kind, *rest = text.split(":") if ":" in text else ("displace", text)
        if kind not in PERTURBATIONS:
            raise UserError(f"perturbation {kind!r} is unknown{did_you_mean(kind, PERTURBATIONS)}")
        seeds = rest[0].split(SEEDS_APART)
        if len(rest) > 2 or not all(seed.isascii() and seed.isdigit() for seed in seeds):
            raise UserError(f"perturbation {text!r} is not KIND:SEED or KIND:SEED:LOW-HIGH, as in late:7:0.02-0.05")
        if len(set(map(int, seeds))) < len(seeds):
            raise UserError(f"perturbation {text!r} names a seed twice")
        return cls(kind, tuple(map(int, seeds)), _dose(kind, rest[1]) if len(rest) == 2 else None)

    def __str__(self) -> str:
        dose = "" if self.dose is None else f":{self.dose[0]:g}-{self.dose[1]:g}"
        return f"{self.kind}:{SEEDS_APART.join(map(str, self.seeds))}{dose}"

    def draw(self, task: int, trial: int) -> Perturbation:
        """The perturbation of an episode."""
        state, which = state_and_seed(trial, len(self.seeds))
        key = (self.seeds[which], task, state)
        if self.kind == "displace":
            return draw_displace(np.random.default_rng(key))
        random = np.random.default_rng([*key, STREAMS[self.kind]])
        if self.kind == "late":
            return draw_late(key, random, self.dose or DOSES["late"])
        if self.kind == "moving":
            return draw_moving(key, random, self.dose or DOSES["moving"])
        return draw_harmless(random) if self.kind == "harmless" else draw_frozen(random)

    def check(self, suite: str, tasks: Sequence[int]) -> None:
        """Raises UserError unless it can happen in the suite's tasks."""
        if suite != SUITE:
            raise UserError(f"--perturb displaces the bowl of {SUITE}; it has no target for {suite}")
        if cramped := [task for task in tasks if not self.has_room(task)]:
            left = ",".join(str(task) for task in tasks if task not in cramped)
            raise UserError(
                f"--perturb {self} moves the target, and tasks {', '.join(map(str, cramped))} have no room for that. "
                f"Leave them out: --tasks {left or '0-2,6-9'}"
            )

    def has_room(self, task: int) -> bool:
        """Whether the task has room for it in most of its scenes. Where a single one has none, nothing happens."""
        if self.kind == "late":
            return SLIDE_ROOM.get(task, MAX_DOSE) >= (self.dose or DOSES["late"])[1]
        return self.kind != "moving" or task not in NO_TRACK


def _dose(kind: PerturbKind, text: str) -> Dose:
    if kind not in DOSES:
        raise UserError(f"perturbation {kind} has no dose, and {text!r} is one. Use: {kind}:SEED")
    try:
        low, high = (float(part) for part in text.split("-"))
    except ValueError:
        raise UserError(f"dose {text!r} is not LOW-HIGH, as in 0.02-0.05") from None
    if not (0 < low <= high <= MAX_DOSE and math.isfinite(high)):
        raise UserError(f"dose {text} must be 0 < LOW <= HIGH <= {MAX_DOSE:g} (m, or m/s)")
    return low, high
