"""Recorded episodes in the place of a policy: to bring up a robot's integration without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ControlConfig, Dims, RsdConfig
from rsd_trt.errors import UserError
from rsd_trt.recordings import RecordedEpisode, Recordings
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.loop import NOTHING, Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.interface import Interface
from rsd_trt.runtime.speculate import Tokens


class Replay:
    """Each episode that begins is given the actions that were executed in the next recorded one of its instruction (of
    any, where none has it), n at a time. At their end there is a fault: nothing is repeated."""

    batch = 1

    def __init__(self, recordings: Recordings, n: int) -> None:
        """Raises UserError: there is no episode."""
        self._episodes = [episode for episode in recordings.episodes if len(episode)]
        if not self._episodes:
            raise UserError(f"{recordings.folder} has no episode to replay", "Make some: rsd-trt eval --record")
        self._n = n
        self._begun = Counter[str]()  # episodes, by instruction

    def answer(self, observations: Sequence[Observation], chunks: Sequence[Chunk]) -> list[Query]:
        return [self._query(observation, chunk) for observation, chunk in zip(observations, chunks, strict=True)]

    def full(self, observations: Sequence[Observation], condition: Tokens | None) -> Main:
        raise UserError("recordings are replayed to clients with sessions: there is no model to ask")

    def instruction_rows(self, instruction: str) -> NDArray[np.float32]:
        raise UserError("recordings are replayed: there is no draft to feed")

    def warm_up(self, instruction: str) -> None:
        """There is nothing to prepare."""

    def _query(self, observation: Observation, chunk: Chunk) -> Query:
        route = chunk.due(observation.instruction, None) or "full"
        if chunk.actions is None or route == "instruction":
            chunk.actions, chunk.cursor = self._episode(observation.instruction), 1
            chunk.instruction = observation.instruction
        actions = chunk.actions[chunk.cursor : chunk.cursor + self._n].copy()
        if len(actions) < self._n:
            return Query(NOTHING, "fault", fault="the recorded episode is over")
        chunk.cursor += self._n
        return Query(actions, route if route in ("start", "instruction") else "full")

    def _episode(self, instruction: str) -> NDArray[np.float32]:
        """The actions of the instruction's next episode, behind a row that is not one of them: a client that executed
        nothing of its first reply may go back to it."""
        own = [x for x in self._episodes if x.facts.instructions[0] == instruction]
        key, fitting = (instruction, own) if own else ("", self._episodes)
        actions = _executed(fitting[self._begun[key] % len(fitting)])
        self._begun[key] += 1
        return np.concatenate([np.zeros_like(actions[:1]), actions])


def _executed(episode: RecordedEpisode) -> NDArray[np.float32]:
    """An episode's actions [N, A] without those that were committed and not executed."""
    found = episode.read("actions", "committed", "step")
    step, committed = found["step"], found["committed"]
    last = step[-1] + committed[-1] if episode.facts.steps is None else episode.facts.steps
    parts = np.split(found["actions"], committed.cumsum()[:-1])
    executed = np.diff(step, append=last).clip(0)
    return np.concatenate([part[:count] for part, count in zip(parts, executed, strict=True)])


def replay_interface(recordings: Recordings, n: int) -> Interface:
    """What clients are told: they may send frames of any size."""
    facts = recordings.facts
    return Interface(
        name=f"{facts.bundle}-recorded",
        fingerprint=facts.fingerprint,
        mode="baseline",
        n=n,
        dims=Dims(T=facts.chunk),
        rsd=RsdConfig(n_action_steps=n),
        control=ControlConfig(cameras=facts.cameras, rotate_images=False),
        side=None,
        reads_state=False,
    )
