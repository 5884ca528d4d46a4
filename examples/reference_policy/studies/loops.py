"""The loops of the pilot's cells around one forward: what the pool asks in a policy's place.

A full query takes `latency` control steps. Until it is answered the robot goes on with what is left of its old chunk,
and holds when nothing is left: no motion, the gripper as it was. The new chunk is entered at the number of steps that
the robot went on by: `latency` where it never had to hold. A check costs nothing here, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from examples.reference_policy.studies.cells import TRIALS, Cell, Guess, Rule
from rsd_trt.config import ARM_DIMS
from rsd_trt.runtime.chunk import Query
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.speculate import (
    Actions,
    RandomAcceptance,
    Route,
    agreeing_prefix,
    agreeing_steps,
    steps_until_switch,
)

LOOK_AHEAD = 4  # steps, at least, over which the rule `path` sums the motion
OPEN = -1.0  # the gripper's command before the first one


@dataclass
class State:
    """What is remembered of an environment between queries."""

    cell: Cell
    episode: tuple[int, ...]
    chunk: Actions | None = None  # [T, A]
    cursor: int = 0
    accepted_in_a_row: int = 0
    gripper: float = OPEN  # the last command
    queries: int = 0

    @property
    def left(self) -> Actions | None:
        """[steps, A], what is left of the chunk."""
        return None if self.chunk is None else self.chunk[self.cursor :]


@dataclass
class Loops:
    """Answers the queries of many environments, each with the cell of its episode, from forwards that they share."""

    forward: Forward
    cell_of: Callable[[int], Cell]  # of a job's number
    seed: int = 0
    states: dict[int, State] = field(default_factory=dict)

    def reset(self, environment: int | None = None, episode: tuple[int, ...] | None = None) -> None:
        """Forgets the chunk of one environment, or of all; `episode`: its task, and a job's number and trial in one."""
        for i in list(self.states) if environment is None else [environment]:
            if episode is not None:
                self.states[i] = State(self.cell_of(episode[1] // TRIALS), episode)
            elif i in self.states:
                self.states[i] = State(self.states[i].cell, self.states[i].episode)

    @torch.inference_mode()
    def act_batch(self, observations: Sequence[Observation], environments: Sequence[int]) -> list[Query]:
        """One query for each (observation, environment)."""
        states = [self.states[i] for i in environments]
        answers: dict[int, Query] = {}
        kinds = [state.cell.guess if state.cell.guess in ("draft", "alone") else "main" for state in states]
        for kind in dict.fromkeys(kinds):
            index = [i for i, other in enumerate(kinds) if other == kind]
            fresh, guesses = self._chunks([observations[i] for i in index], kind)
            for i, chunk, guess in zip(index, fresh, guesses, strict=True):
                answers[i] = _answer(states[i], chunk, guess, self.seed)
        return [answers[i] for i in range(len(states))]

    def _chunks(self, observations: Sequence[Observation], kind: Guess) -> tuple[Actions, Actions]:
        """Fresh chunks [B, T, A] of main, or of a draft that acts alone, and what the old ones are checked against: the
        draft's, or the same."""
        guess = None if kind == "main" else self.forward.check(observations).actions.copy()
        fresh = guess if kind == "alone" and guess is not None else self.forward.full(observations).actions.copy()
        return fresh, fresh if guess is None else guess


def _answer(state: State, fresh: Actions, guess: Actions, seed: int) -> Query:
    """Decides, by main's fresh chunk [T, A] and what the rest of the old one is checked against [T, A]."""
    cell = state.cell
    state.queries += 1
    if not np.isfinite(fresh).all() or not np.isfinite(guess).all():
        return Query(
            np.zeros((0, fresh.shape[1]), np.float32), "fault", fault="main's or the draft's actions are not finite"
        )
    route = _due(state, len(fresh))
    left = state.left
    if route is None and left is not None:
        confirmed = _confirmed(state, left, guess, seed)
        count = min(confirmed, cell.m)
        if count:
            state.cursor += count
            state.accepted_in_a_row += 1
            verdict: Route = "accepted" if count == min(cell.m, len(left)) else "partial"
            return _query(state, left[:count], verdict, confirmed, full_query=False)
    old = np.zeros((0, fresh.shape[1]), np.float32) if left is None else left[: cell.latency]
    hold = np.zeros((cell.latency - len(old), fresh.shape[1]), np.float32)
    hold[:, ARM_DIMS] = old[-1, ARM_DIMS] if len(old) else state.gripper
    new = fresh[len(old) : len(old) + cell.n]
    state.chunk, state.cursor, state.accepted_in_a_row = fresh, len(old) + len(new), 0
    return _query(state, np.concatenate([old, hold, new]), route or "rejected", None, full_query=True)


def _query(state: State, actions: Actions, route: Route, prefix: int | None, full_query: bool) -> Query:
    state.gripper = float(actions[-1, ARM_DIMS])
    checked = route in ("accepted", "partial", "rejected")
    return Query(actions.copy(), route, checked, full_query, prefix)


def _due(state: State, steps: int) -> Route | None:
    """Why the query is a full one whatever a check would say; None where there is something to check."""
    cell, chunk = state.cell, state.chunk
    if cell.guess in ("none", "alone"):
        return "full"
    if chunk is None:
        return "start"
    if state.cursor >= steps:
        return "exhausted"
    if (chunk[state.cursor, ARM_DIMS] > 0) != (chunk[state.cursor - 1, ARM_DIMS] > 0):
        return "gripper"
    return "refresh" if cell.refresh is not None and state.accepted_in_a_row + 1 >= cell.refresh else None


def _confirmed(state: State, left: Actions, guess: Actions, seed: int) -> int:
    """How many of the steps that are left are confirmed."""
    cell = state.cell
    if cell.guess == "random":
        return len(left) * RandomAcceptance(cell.tolerance, seed).accepts((*state.episode, state.queries))
    return confirmed(cell.rule, guess, left, state.gripper, cell.tolerance, cell.m)


def confirmed(rule: Rule, guess: Actions, left: Actions, gripper: float, tolerance: float, m: int) -> int:
    """The steps of `left` [k, A], of a chunk, that a guess [T, A] from now on confirms.

    first: all, if the first step agrees. path: all, if over the next steps (m, and `LOOK_AHEAD` at least) the summed
    motion of both stays within the tolerance, and the first gripper command is the same. actions: the leading steps
    that agree and keep the gripper as it was.
    """
    now = guess[: len(left)]
    agreeing = agreeing_steps(now, left, np.full(ARM_DIMS, tolerance, np.float32))
    if rule == "first":
        return len(left) * bool(agreeing[0])
    if rule == "actions":
        return min(agreeing_prefix(agreeing), steps_until_switch(left, gripper))
    ahead = max(m, LOOK_AHEAD)
    drift: NDArray[np.float32] = np.abs(np.cumsum(now[:ahead, :ARM_DIMS] - left[:ahead, :ARM_DIMS], axis=0))
    same = (now[0, ARM_DIMS] > 0) == (left[0, ARM_DIMS] > 0)
    return len(left) * bool(same and (drift <= tolerance).all())
