"""The robot's loop, the load test and the proxy run as their pages say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from serving import SIDE, Stub, running, stub_service

from examples.robot import robot
from examples.serving import load
from examples.serving.network import DT_MS, Asked, Network, Robot, virtual
from rsd_trt.runtime.chunk import Query
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.edge import EdgePolicy

JUMP = 11  # the step at which the stub's world jumps


def test_the_robots_loop_runs_and_stops_where_there_is_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    with running(stub_service()) as port:
        robot.main([f"ws://127.0.0.1:{port}", "--mode", "baseline", "--steps", "4", "--ahead", "1"])
        url = f"ws://127.0.0.1:{port}"
    assert capsys.readouterr().out.startswith("step 2: full, 2 actions, ")
    with pytest.raises(Exception, match=f"{url} cannot be reached"):
        robot.main([url, "--mode", "baseline"])


@dataclass
class Clock:
    """In the place of `time`."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_robot_does_not_make_up_for_what_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, moves, look = Clock(), [], robot.look
    monkeypatch.setattr(robot, "time", clock)
    monkeypatch.setattr(robot, "move", lambda action: moves.append(clock.now))

    def slow(*what: object) -> Observation:
        clock.sleep(0.6)
        return look(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(robot, "look", slow)
    with running(stub_service()) as port:
        robot.main([f"ws://127.0.0.1:{port}", "--mode", "baseline", "--steps", "6"])
    np.testing.assert_allclose(np.diff(moves), [0.05, 0.65, 0.05, 0.65, 0.05])


@pytest.mark.parametrize("error", [OSError("camera 1 is gone"), KeyboardInterrupt()])
def test_the_robot_brakes_whatever_happens(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: object) -> Observation:
        raise error

    monkeypatch.setattr(robot, "look", look)
    with running(stub_service()) as port, pytest.raises(SystemExit, match=f"stopped: {type(error).__name__}"):
        robot.main([f"ws://127.0.0.1:{port}", "--mode", "baseline"])


def test_the_load_test_measures(capsys: pytest.CaptureFixture[str]) -> None:
    load.main(["--stub", "--clients", "2", "--queries", "60"])
    found = json.loads(capsys.readouterr().out)
    assert (found["clients"], found["queries"]) == (2, 80)  # without the first 20 of each
    assert 0 < found["p50_ms"] <= found["p99_ms"]


@dataclass
class Waiting:
    """A query that a thread asks over a network that is there."""

    future: Future[Query]

    def answer(self, step: int) -> Query | None:
        return self.future.result() if self.future.done() else None


@dataclass
class GoingOn:
    """A query of a robot that goes on: it is looked for at the end of the step."""

    edge: EdgePolicy
    seen: Observation

    def answer(self, step: int) -> Query:
        return self.edge.query(self.seen)


def walk(robot: Robot, seconds: float, steps: int = 20) -> list[tuple[int, int | None]]:
    """What is executed at each step, and the step whose frames it was computed from. The stub's world moves on with
    each action, and jumps once. seconds: of a step."""
    executed, began = [], time.monotonic()
    for step in range(steps):
        if robot.looks(step):
            images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
            images[0, 0, 0] = 10 * (step - robot.held) + 60 * (step >= JUMP)
            robot.look(step, Observation(images, np.zeros(8, np.float32), "go"))
        time.sleep(max(0.0, began + (step + 1) * seconds - time.monotonic()))
        action, seen = robot.act(step)
        executed.append((round(float(action[0]) * 1e3), seen))
    return executed


def walk_in_real_time(stub: Stub, way: str, rtt: int, ahead: int) -> list[tuple[int, int | None]]:
    """`walk` at 20 Hz, with the client at the robot's side, over the proxy."""
    command = [sys.executable, "-m", "examples.serving.proxy", "--rtt", str(rtt), "--to"]
    with (
        running(stub_service(stub)) as port,
        ThreadPoolExecutor(1) as thread,
        subprocess.Popen([*command, f"127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True) as proxy,
    ):
        assert proxy.stdout is not None
        edge = EdgePolicy(f"ws://{proxy.stdout.readline().split()[0]}", mode="baseline", ahead=ahead)
        edge._loop.mode, edge._loop._check = stub.loop.mode, stub.check

        def ask(step: int, seen: Observation) -> Asked:
            return GoingOn(edge, seen) if edge._ahead.goes_on() else Waiting(thread.submit(edge.query, seen))

        found = walk(Robot(way, ask), DT_MS / 1e3)
        edge.close()
        proxy.terminate()
    return found


def test_an_edge_that_asks_ahead_holds_only_until_its_first_answer() -> None:
    """Full queries take 2 steps: one is asked 2 steps before a chunk's end (8, 17) and one at the jump (11)."""
    robot = Robot("rsd (async edge)", virtual(Stub(), "rsd (async edge)", Network(100, 20, 0.3, 1)))  # type: ignore[arg-type]
    executed = walk(robot, 0)
    assert executed[:2] == [(0, None)] * 2
    assert executed[2:13] == [(10 * i, 0 if i < 8 else 8) for i in range(11)]
    assert executed[13:] == [(170 + 10 * i, 11 if i < 6 else 17) for i in range(7)]
    assert (robot.held, robot.full_queries, robot.checks) == (2, 4, 5)


@pytest.mark.slow
@pytest.mark.parametrize("rtt", [0, 50, 100])
@pytest.mark.parametrize("way", ["rsd (edge)", "rsd (async edge)", "open loop 2", "async 4"])
def test_the_network_studys_clock_is_the_real_one(way: str, rtt: int) -> None:
    """The same actions at the same steps, with full queries of 20 ms. A busy machine may be late: it may try again."""
    stub = Stub("rsd" if way.startswith("rsd") else "baseline", seconds=0.02)
    network = Network(rtt, 20, 0.3, 1)
    expected = walk(Robot(way, virtual(stub, way, network)), 0)  # type: ignore[arg-type]
    ahead = network.key(way)[1] if way == "rsd (async edge)" else 0
    assert any(walk_in_real_time(stub, way, rtt, ahead) == expected for _ in range(5))
    reaction = next(step for step, (_, seen) in enumerate(expected) if seen is not None and seen >= JUMP) - JUMP
    print(f"{way}, {rtt} ms: reaction {reaction} steps")
