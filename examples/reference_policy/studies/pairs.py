"""Pairs of an old chunk and fresh frames, labelled by main: what the study of a gate head is made of.

A pair is *other* where main's fresh chunk does not confirm the steps that an accepted check would commit, as in
`rsd_trt.eval.report.calibrate`. Main is asked at every step of open loop, so that labels are free. *Counterfactual*
pairs share a state of the simulation: the target is put 0 to 8 cm aside and looked at again. *Blind* scores are made of
the frames that the chunk came from: within a state they are all equal. The simulators' processes do without torch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from examples.reference_policy.studies.cells import TRIALS, Cell, Job, JobSimulator
from examples.reference_policy.studies.pilot import TASKS
from rsd_trt.config import RsdConfig, RuleName
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.body import Body
from rsd_trt.eval.libero.episode import Act, Assignment, Finished
from rsd_trt.eval.libero.target import TARGET
from rsd_trt.eval.report.breakdown import confirmed
from rsd_trt.eval.report.calibrate import deviation
from rsd_trt.eval.results import QueryRecord
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.speculate import Actions, Check, Logits, Rule, Tokens, rule_of

if TYPE_CHECKING:
    from rsd_trt.models.vision_draft import VisionDraft
    from rsd_trt.runtime.forward import Forward

RULES: tuple[RuleName, ...] = ("first", "actions", "path", "likelihood")
LATE = "late:0.02-0.05"
HORIZONS = (4, 8)  # of open loop, in turn: chunks get that old
HELD_OUT = 35  # first initial state that is held out
SEEDS = (501, 601)  # first perturbation seed of training, and of what is held out
EVERY = 6  # steps between states that are looked at again
SHIFTS, FAR, ANGLES = 4, 0.08, 8  # shifted scenes of a state; m, the farthest; directions that are tried
MOST = 10.0  # of a deviation, as the gate reads it

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen(Observation):
    """shift: m that the target was put aside by; None: the scene as it is."""

    shift: float | None = None


@dataclass(frozen=True)
class Frame:
    """What main and draft say of a frame."""

    readout: NDArray[np.float32]  # [width], of the draft's trunk
    chunk: Actions  # [T, A], main's
    tokens: Tokens  # [T, D, L]
    guess: Actions  # [T, A], the draft's
    guess_tokens: Tokens  # [T, D, C]
    logits: Logits  # [T, D, K]


@dataclass(frozen=True)
class Pair:
    """An old chunk and fresh frames. Row 0 of features and deviations is of the fresh frames, row 1 blind."""

    features: NDArray[np.float32]  # [2, F]
    deviations: Floats  # [2, rules]
    other: bool
    age: int
    step: int = 0
    shift: float | None = None


class Stage(JobSimulator):
    """A simulator whose target can be put aside for a look."""

    shift: float | None = None

    def observation(self) -> Seen:
        seen = super().observation()
        return Seen(seen.images, seen.proprio, seen.instruction, self.shift)

    def shifted(self, random: np.random.Generator) -> Iterator[None]:
        """Shows the scene once as it is, then with the target aside, where there is room; then all is as before."""
        import mujoco

        physics, (now, images) = self.physics, (copy.copy(self.physics.data._data), dict(self._images))
        model, data = physics.model._model, physics.data._data
        physics.forward()
        body = Body(physics, TARGET)
        for distance in () if body.held else (0.0, *random.uniform(0.0, FAR, SHIFTS)):
            angles = random.uniform(0.0, 2 * np.pi, ANGLES)
            places = [(float(distance * np.cos(angle)), float(distance * np.sin(angle))) for angle in angles]
            place = next(filter(body.fits, places), None)
            if place is not None:
                body.put(place)
                self.shift, self._rendering = float(distance), True
                for name in self._control.cameras:
                    self._env.env._observables[name]._sensor({})
                yield
        mujoco.mj_copyData(data, model, now)
        self.shift, self._images = None, images


def play(simulator: Stage, assignment: Assignment, act: Act[Stage], looks: bool, jobs: Sequence[Job]) -> Finished:
    """An episode in a simulator's process: open loop, in which main is asked at every step."""
    job, started = jobs[assignment.trial // TRIALS], time.perf_counter()
    random = np.random.default_rng([job.seed, job.task, job.trial])
    simulator.reset(assignment.trial)
    course = simulator.perturbed(assignment.perturbation) if assignment.perturbation is not None else None
    phase, success = int(random.integers(1, EVERY)), False
    executed: list[NDArray[np.float32]] = []
    while len(executed) < assignment.max_steps and not success:
        step = len(executed)
        fresh = act(simulator, step).actions
        if step % EVERY == phase:
            for _ in simulator.shifted(random):
                act(simulator, step)
        if step % job.cell.n == 0:
            chunk = fresh
        action = chunk[step % job.cell.n]
        if course is not None:
            course.before_step(step, action)
        success = simulator.step(action, render=True)
        executed.append(action)
    return Finished(success, np.array(executed), time.perf_counter() - started, course.event if course else None)


class Collector:
    """Answers the simulators with main's chunks, and keeps the pairs of each job."""

    def __init__(self, forward: Forward, draft: VisionDraft, rsd: RsdConfig, jobs: Sequence[Job], end: float) -> None:
        """end: monotonic time at which the run ends."""
        self._forward, self._draft, self._rsd, self._jobs, self._end = forward, draft, rsd, jobs, end
        self._at: dict[int, tuple[int, list[Frame]]] = {}  # by environment: its job, and the frames of its steps
        self.pairs: dict[int, list[Pair]] = {}  # by job

    def reset(self, environment: int | None = None, episode: tuple[int, ...] | None = None) -> None:
        if environment is not None and episode is not None:
            number = episode[1] // TRIALS
            self._at[environment], self.pairs[number] = (number, []), []

    def act_batch(self, observations: Sequence[Observation], environments: Sequence[int]) -> list[Query]:
        if time.monotonic() > self._end:
            raise UserError("the time is up")  # which the pool lets pass
        return [
            self._answer(observation, environment, frame)
            for observation, environment, frame in zip(observations, environments, self.see(observations), strict=True)
        ]

    def see(self, observations: Sequence[Observation]) -> list[Frame]:
        import torch

        with torch.inference_mode():
            main, guess = self._forward.full(observations), self._forward.check(observations)
            device = self._forward.device
            assert main.tokens is not None and main.finite.all() and guess.finite.all(), "not finite"
            images = torch.from_numpy(np.stack([x.images for x in observations])).to(device)
            state = torch.from_numpy(np.stack([x.proprio for x in observations])).to(device)
            rows = torch.stack([self._forward.rows(x.instruction) for x in observations])
            draft = self._draft
            readouts = draft.see(draft.resize(images), draft.normalised(state), rows)[0].cpu().numpy()
        columns = (readouts, main.actions, main.tokens, guess.actions, guess.tokens, guess.logits)
        return [Frame(*(column[i].copy() for column in columns)) for i in range(len(observations))]

    def _answer(self, observation: Observation, environment: int, frame: Frame) -> Query:
        number, frames = self._at[environment]
        shift = observation.shift if isinstance(observation, Seen) else None
        if shift is None:
            frames.append(frame)
        step, horizon = len(frames) - 1, self._jobs[number].cell.n
        if step:
            age = (step - 1) % horizon + 1  # of the chunk that is executed until this step
            found = judged(frames[step - age], frame, age, self._rsd)
            if found is not None:
                self.pairs[number].append(replace(found, step=step, shift=shift))
        return Query(frame.chunk, "full")


def judged(old: Frame, now: Frame, age: int, rsd: RsdConfig) -> Pair | None:
    """The pair of main's chunk at `old`, of which `age` >= 1 steps are executed, and `now`; None where a query would
    check nothing."""
    chunk = Chunk(old.chunk, old.tokens, cursor=age)
    if chunk.due("", rsd.refresh) is not None:
        return None
    ahead = min(rsd.check_steps or rsd.n_action_steps, len(chunk.left))
    near = replace(chunk, actions=old.chunk[: age + ahead])  # gaps of the steps that count
    other = confirmed(np.asarray(near.gap(now.chunk)), np.array((*rsd.tolerance, 0.0))) < ahead
    deviations = np.array([_deviations(near, frame, rsd) for frame in (now, old)])
    left = np.zeros_like(old.chunk)
    left[: len(chunk.left)] = chunk.left
    there = np.arange(len(left))[:, None] < len(chunk.left)
    features = [
        np.concatenate([x.readout, *(part.ravel() for part in (left, x.guess, (x.guess - left) * there))])
        for x in (now, old)
    ]
    rest = np.concatenate(
        [np.full((2, 1), age / len(left)), there.T.repeat(2, 0), np.log1p(deviations.clip(0, MOST))], 1
    )
    return Pair(np.concatenate([features, rest], 1, dtype=np.float32), deviations, other, age)


@lru_cache(1)
def _rules(rsd: RsdConfig) -> list[tuple[RsdConfig, Rule]]:
    named = [structs.replace(rsd, rule=rule, threshold=0.0) for rule in RULES]
    return [(one, rule_of(one)) for one in named]


def _deviations(near: Chunk, frame: Frame, rsd: RsdConfig) -> list[float]:
    """What each rule compares with its threshold; of `actions`, the largest of all steps that would be committed."""
    assert near.tokens is not None
    gap, left, tokens = near.gap(frame.guess), near.left, near.tokens[near.cursor :]
    check = Check(left, tokens, frame.guess, frame.guess_tokens, frame.logits, len(left), near.cursor, ())

    def of(one: RsdConfig, score: float | None, first: int = 0) -> float:
        return deviation(QueryRecord(0, "rejected", 0, 0.0, True, True, score=score, draft_gap=gap[first:]), one)

    steps = range(len(left))
    return [
        max(of(one, None, i) for i in steps) if one.rule == "actions" else of(one, rule(check).score)
        for one, rule in _rules(rsd)
    ]


def plan(rounds: int) -> list[Job]:
    """In each round and task two late episodes and an undisturbed one for training, and as many that are held out."""
    splits = (0, HELD_OUT, SEEDS[0]), (HELD_OUT, TRIALS - HELD_OUT, SEEDS[1])
    made = []
    for i, task in product(range(rounds), TASKS):
        for (k, condition), (first, states, seed) in product(((2 * i, LATE), (i, "none"), (2 * i + 1, LATE)), splits):
            cell = Cell(HORIZONS[k % len(HORIZONS)])
            made.append(Job(cell, condition, task, first + k % states, seed + k // states))
    return made
