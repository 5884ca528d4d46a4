"""The virtual clock of the network study: what is executed when, and what counts as a reaction."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from examples.serving.network import Network, Robot, Step, virtual
from rsd_trt.config import ACTION_DIMS
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.observation import Observation


@dataclass
class Counting:
    """A policy whose chunk says when it was asked: step k gives 100 k, 100 k + 1, ... Checks pass where it is told."""

    n: int
    accepted: tuple[bool, ...] = ()
    asked: list[int] = field(default_factory=list)

    def answer(self, observations: list[Observation], chunks: list[Chunk]) -> list[Query]:
        [seen] = observations
        step = int(seen.proprio[0])
        accepted = len(self.asked) < len(self.accepted) and self.accepted[len(self.asked)]
        self.asked.append(step)
        chunk = np.zeros((8, ACTION_DIMS), np.float32)
        chunk[:, 0] = (100 * step + np.arange(8)) / 1e4
        checked = bool(self.accepted)
        route = "accepted" if accepted else "rejected"
        return [Query(chunk[: self.n], route, checked=checked, full_query=not accepted, chunk=chunk)]


def play(policy: Counting, way: str, network: Network, steps: int) -> list[tuple[int, int | None]]:
    """Ten thousand times what was executed, and the step whose frames it came from."""
    robot = Robot(way, virtual(policy, way, network))  # type: ignore[arg-type]
    out = []
    for step in range(steps):
        if robot.looks(step):
            robot.look(step, Observation(np.zeros(0, np.uint8), np.full(8, step, np.float32), ""))
        executed: Step = robot.act(step)
        out.append((round(float(executed[0][0]) * 1e4), executed[1]))
    return out


FAST, SLOW = Network(0, 10, 1, 15), Network(90, 20, 1, 15)  # a full query is answered after 0 and 2 steps


def test_open_loop_holds_the_last_action_until_it_is_answered() -> None:
    assert play(Counting(2), "open loop 2", FAST, 5) == [(0, 0), (1, 0), (200, 2), (201, 2), (400, 4)]
    late = play(Counting(2), "open loop 2", SLOW, 8)
    assert late == [(0, None), (0, None), (0, 0), (1, 0), (1, None), (1, None), (400, 4), (401, 4)]


def test_an_asynchronous_loop_goes_on_and_skips_what_is_too_late() -> None:
    assert play(Counting(2), "async 2", FAST, 4) == [(0, 0), (1, 0), (200, 2), (201, 2)]
    late = play(Counting(2), "async 2", SLOW, 8)
    assert late == [(0, None), (0, None), (2, 0), (3, 0), (202, 2), (203, 2), (402, 4), (403, 4)]


def test_only_what_is_rejected_crosses_the_network() -> None:
    edge = play(Counting(2, (False, True, False)), "rsd (edge)", SLOW, 9)
    assert edge == [(0, None), (0, None), (0, 0), (1, 0), (400, 0), (401, 0), (401, None), (401, None), (600, 6)]
    server = play(Counting(2, (False, True)), "rsd (server)", SLOW, 6)
    assert server[4] == (1, None)  # the check had to be asked over the network


@pytest.mark.parametrize(("way", "key"), [("async 4", (2,)), ("rsd (server)", (2, 2, 1)), ("rsd (edge)", (2, 2, 0))])
def test_equal_delays_are_run_once(way: str, key: tuple[int, ...]) -> None:
    assert SLOW.key(way) == key
