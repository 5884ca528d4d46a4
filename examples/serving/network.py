"""What a network costs: LIBERO episodes in which the world does not wait for an answer.

    python -m examples.serving.network --tasks 0,1 --trials 8 --workers 16 --device cuda --out network.json
    python -m examples.serving.network --perturb none --ways "rsd (edge)" --trials 8 --out undisturbed.json

The simulator steps at 20 Hz. A query asked with the frames of step k is answered rtt + cost later, and its actions are
used from step k + floor((rtt + cost) / 50 ms) on; until then the last action is held, or what is left is executed. The
clock is a virtual one, so that costs are inputs: a full query of the reference policy, of 7B compiled and of 7B eager,
a check in the server, and at the robot's side. What the policy answers is computed.

Ways: `open loop n` asks for n actions when there are none; `async n` asks every n steps while the chunk runs, and skips
what came too late; `rsd (server)` and `rsd (edge)` are the loop of the bundle, its checks on this or that side of the
network; `rsd (async edge)` asks ahead for full queries, and goes on with its chunk meanwhile. Reaction: steps from the
move of the target to the first action that was computed from frames behind it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.config import DEFAULT_BUNDLE
from rsd_trt.eval.libero.perturb import PerturbSpec
from rsd_trt.files import write_atomically
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.serve.ahead import Ahead

if TYPE_CHECKING:
    from rsd_trt.eval.libero.simulator import Simulator

DT_MS = 50.0
MAX_STEPS = 220
NS = (1, 2, 4, 8)
WAYS = (*(f"open loop {n}" for n in NS), *(f"async {n}" for n in NS), "rsd (server)", "rsd (edge)", "rsd (async edge)")
IDLE = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)

State = tuple[int, int]  # a task and a trial of it
Step = tuple[NDArray[np.float32], int | None]  # an action, and the step whose frames it was computed from


@dataclass(frozen=True)
class Network:
    """What queries take, ms."""

    rtt: float
    full: float
    check: float  # in the server
    edge_check: float

    def steps(self, way: str, query: Query) -> int:
        """After how many steps the answer is there."""
        ms = self.rtt + self.full if query.full_query else 0.0
        if "edge" in way:
            ms += self.edge_check * query.checked
        elif way == "rsd (server)":
            ms = self.rtt + self.full * query.full_query + self.check * query.checked
        return int(ms // DT_MS)

    def key(self, way: str) -> tuple[int, ...]:
        """What the network does to a way: equal keys, equal episodes."""
        none: NDArray[np.float32] = np.zeros((0, 7), np.float32)
        kinds = [(False, True), (True, True), (True, False)] if way.startswith("rsd") else [(False, True)]
        return tuple(self.steps(way, Query(none, "full", checked=c, full_query=f)) for c, f in kinds)


class Asked(Protocol):
    """A query under way."""

    def answer(self, step: int) -> Query | None:
        """What came back, if it is there in time for the action of that step."""


@dataclass(frozen=True)
class Virtual:
    """A query that was computed, and is there from step `at` on."""

    query: Query
    at: int

    def answer(self, step: int) -> Query | None:
        return self.query if step >= self.at else None


def virtual(policy: Policy, way: str, network: Network) -> Callable[[int, Observation], Asked]:
    """Asks a policy, behind a network that is not there."""
    if way == "rsd (async edge)":
        return VirtualAhead(policy, way, network).ask
    chunk = Chunk()

    def ask(step: int, observation: Observation) -> Asked:
        [query] = policy.answer([observation], [chunk])
        return Virtual(query, step + network.steps(way, query))

    return ask


@dataclass(frozen=True)
class Later:
    """A query that was computed, and is there from a step of the clock on."""

    clock: VirtualAhead
    at: int
    answer: tuple[Query, Chunk]

    def done(self) -> bool:
        return self.clock.step >= self.at

    def result(self) -> tuple[Query, Chunk]:
        self.clock.step = max(self.clock.step, self.at)
        return self.answer


class VirtualAhead:
    """The loop that asks ahead, in virtual time."""

    def __init__(self, policy: Policy, way: str, network: Network) -> None:
        self.policy, self.way, self.network = policy, way, network
        _, rejected, _ = network.key(way)
        self.ahead = Ahead(policy.loop, self._begin, rejected)
        self.step = 0

    def ask(self, step: int, observation: Observation) -> Asked:
        self.step = step
        query, at = self.ahead.query(observation), self.step
        actions = [query.actions]
        while query.route == "late":  # the next ones do not look
            self.step += 1
            if not self.ahead.goes_on():
                break
            actions.append(self.ahead.query(observation).actions)
        return Virtual(structs.replace(query, actions=np.concatenate(actions)), at)

    def _begin(self, observation: Observation, chunk: Chunk) -> Later:
        [query] = self.policy.answer([observation], [chunk])
        late = self.network.steps(self.way, query)
        if not query.full_query:  # a check is waited for
            self.step += late
        return Later(self, self.step + late * query.full_query, (query, chunk))


@dataclass
class Robot:
    """What stands between the policy and the world: what is under way, and what is to be executed."""

    way: str
    ask: Callable[[int, Observation], Asked]
    ahead: list[Step] = field(default_factory=list)
    coming: tuple[int, Asked] | None = None  # with the frames of which step
    last: NDArray[np.float32] = field(default_factory=IDLE.copy)
    seen: int | None = None  # the step of the last full query's frames
    full_queries: int = 0
    checks: int = 0
    held: int = 0

    @property
    def asynchronous(self) -> int:
        """n of the way `async n`, else 0."""
        return int(self.way.split()[1]) if self.way.startswith("async") else 0

    def looks(self, step: int) -> bool:
        """Whether a query is asked at this step."""
        self._arrive(step)
        if self.asynchronous:
            return self.coming is None and step % self.asynchronous == 0
        return not self.ahead and self.coming is None

    def look(self, step: int, observation: Observation) -> None:
        """Asks, where it `looks`."""
        self.coming = step, self.ask(step, observation)

    def act(self, step: int) -> Step:
        """The action of a step, at its end: the last one where there is nothing else."""
        self._arrive(step)
        if not self.ahead:
            self.held += 1
            return self.last, None
        self.last, seen = self.ahead.pop(0)
        return self.last, seen

    def _arrive(self, step: int) -> None:
        if self.coming is None or (query := self.coming[1].answer(step)) is None:
            return
        asked, self.coming = self.coming[0], None
        if query.fault is not None:
            raise RuntimeError(query.fault)
        self.full_queries += query.full_query
        self.checks += query.checked
        if query.full_query:
            self.seen = asked - query.skipped
        actions = query.actions
        if self.asynchronous:
            assert query.chunk is not None
            actions = np.clip(query.chunk, -1, 1)[step - asked :]  # the rest came too late
        self.ahead = [(action, self.seen) for action in actions]


@dataclass(frozen=True)
class Cell:
    """An episode to run."""

    way: str
    network: Network


@dataclass(frozen=True)
class Outcome:
    success: bool
    steps: int
    reaction: int | None
    full_queries: int
    checks: int
    held: int


def episode(
    policies: dict[str, Policy], simulator: Simulator, cell: Cell, task: int, trial: int, perturb: str
) -> Outcome:
    """One trial in real time's stead."""
    robot = Robot(cell.way, virtual(policies[policy_of(cell.way)], cell.way, cell.network))
    simulator.reset(trial, render=True)
    course = simulator.perturbed(PerturbSpec.parse(perturb).draw(task, trial)) if perturb != "none" else None
    executed: list[Step] = []
    success = False
    while len(executed) < MAX_STEPS and not success:
        step = len(executed)
        if robot.looks(step):
            robot.look(step, simulator.observation())
        action, seen = robot.act(step)
        if course is not None:
            course.before_step(step, action)
        success = simulator.step(action, render=robot.looks(step + 1))
        executed.append((action, seen))
    event = None if course is None else course.event
    reaction = None
    if event is not None:
        answers = (i for i, (_, seen) in enumerate(executed) if seen is not None and seen > event.step)
        reaction = next(answers, len(executed)) - event.step
    return Outcome(success, len(executed), reaction, robot.full_queries, robot.checks, robot.held)


_POLICIES: dict[str, Policy] = {}  # of a worker
_SIMULATORS: dict[int, Simulator] = {}  # the last one: building it takes seconds


def policy_of(way: str) -> str:
    """Ways on either side of the network, or in whatever order, ask the same policy."""
    return "rsd" if way.startswith("rsd") else way.replace("async", "open loop")


def prepare(bundle: Path, device: str, ways: Sequence[str]) -> None:
    """A worker's policies: they share what they can."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    for way in ways:
        name = policy_of(way)
        if name not in _POLICIES:
            n = None if name == "rsd" else int(name.split()[-1])
            mode = "rsd" if name == "rsd" else "baseline"
            _POLICIES[name] = Policy.load(bundle, mode, device=device, n_action_steps=n)  # type: ignore[arg-type]


def run(job: tuple[State, tuple[Cell, ...], str, Path]) -> tuple[State, dict[Cell, Outcome]]:
    """Cells on one initial state."""
    from rsd_trt.bundle import Bundle
    from rsd_trt.eval.libero.simulator import Simulator

    (task, trial), cells, perturb, bundle = job
    if task not in _SIMULATORS:
        while _SIMULATORS:
            _SIMULATORS.popitem()[1].close()
        _SIMULATORS[task] = Simulator("libero_spatial", task, Bundle.open(bundle).config.control)
    outcomes = {cell: episode(_POLICIES, _SIMULATORS[task], cell, task, trial, perturb) for cell in cells}
    return (task, trial), outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, object]:
    reactions = [x.reaction for x in outcomes if x.reaction is not None]
    steps = sum(x.steps for x in outcomes)
    return {
        "episodes": len(outcomes),
        "solved": sum(x.success for x in outcomes),
        "mean_steps": round(steps / len(outcomes), 1),
        "reaction_p50": None if not reactions else float(np.percentile(reactions, 50)),
        "reaction_p90": None if not reactions else float(np.percentile(reactions, 90)),
        "full_queries_per_action": round(sum(x.full_queries for x in outcomes) / steps, 3),
        "checks_per_action": round(sum(x.checks for x in outcomes) / steps, 3),
        "held_share": round(sum(x.held for x in outcomes) / steps, 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", default="0,1,2,6", help="of libero_spatial")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--perturb", default="late:7", help="as rsd-trt eval has it; none: undisturbed")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of these")
    parser.add_argument("--rtt", default="0,50,100", help="ms")
    parser.add_argument("--full", default="2.4,9,36", help="ms: reference policy, 7B compiled, 7B eager on an H200")
    parser.add_argument("--check", type=float, default=0.3, help="ms, in the server")
    parser.add_argument("--edge-check", type=float, default=15.0, help="ms, at the robot's side (rsd-trt edge)")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    networks = [
        Network(rtt, full, given.check, given.edge_check)
        for rtt in map(float, given.rtt.split(","))
        for full in map(float, given.full.split(","))
    ]
    ways = given.ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--ways has {unknown[0]!r}, which is none of {', '.join(WAYS)}")
    unique: dict[tuple[object, ...], Cell] = {}
    for way in ways:
        for network in networks:
            unique.setdefault((way, *network.key(way)), Cell(way, network))
    jobs = [
        ((task, trial), tuple(cell for cell in unique.values() if cell.way == way), given.perturb, given.bundle)
        for task in map(int, given.tasks.split(","))
        for trial in range(given.trials)
        for way in ways
    ]
    found: dict[State, dict[Cell, Outcome]] = defaultdict(dict)
    rows: list[dict[str, object]] = []
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "examples.serving.network", *words])
    context = multiprocessing.get_context("spawn")
    with context.Pool(given.workers, prepare, (given.bundle, given.device, ways), maxtasksperchild=None) as pool:
        for state, outcomes in pool.imap_unordered(run, jobs):
            found[state] |= outcomes
            whole = [cells for cells in found.values() if len(cells) == len(unique)]  # what every way has been at
            if whole:
                rows = _rows(ways, networks, unique, whole, given.perturb)
                write_atomically(given.out, json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    print(f"{'way':16} {'rtt':>4} {'full':>5}  solved  steps  reaction p50/p90  full/action  held")
    for row in rows:
        print(
            f"{row['way']:16} {row['rtt_ms']:4g} {row['full_ms']:5g} {row['solved']:3}/{row['episodes']:<3}"
            f" {row['mean_steps']:6}  {row['reaction_p50']!s:>6} / {row['reaction_p90']!s:<6}"
            f" {row['full_queries_per_action']:9} {row['held_share']:7}"
        )


def _rows(
    ways: Sequence[str],
    networks: Sequence[Network],
    unique: dict[tuple[object, ...], Cell],
    found: Sequence[dict[Cell, Outcome]],
    perturb: str,
) -> list[dict[str, object]]:
    rows = []
    for way in ways:
        for network in networks:
            cell = unique[(way, *network.key(way))]
            row = {"way": way, "rtt_ms": network.rtt, "full_ms": network.full, "perturb": perturb}
            rows.append(row | {"steps_late": network.key(way)} | summary([outcomes[cell] for outcomes in found]))
    return rows


if __name__ == "__main__":
    main()
