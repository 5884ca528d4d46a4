"""A policy that is told its decisions runs what these decisions run, and nothing else."""

from __future__ import annotations

import pytest
from scripted import DRAFT_BLOCK, Draft, Frame, Main, N, World, configure

from rsd_trt.errors import PolicyFault
from rsd_trt.runtime.chunk import Query
from rsd_trt.runtime.forward import EagerForward
from rsd_trt.runtime.scripted import Decision, ScriptedPolicy
from rsd_trt.runtime.speculate import Route

STEPS = [(0, 1)] * 6
OTHER = [(5, -1)] * 6  # agrees with nothing
EARLY, WHOLE = DRAFT_BLOCK, N


class Script:
    """A policy whose draft always says the opposite of its main head."""

    def __init__(self, n_action_steps: int = 2, mode: str = "rsd", frame: Frame | None = None) -> None:
        self.world = World([frame or Frame(draft=OTHER, main=STEPS)])
        config = configure()
        forward = EagerForward(config, self.world, Draft(self.world), Main(self.world), self.world)  # type: ignore[arg-type]
        self.policy = ScriptedPolicy(config, forward, mode, n_action_steps)  # type: ignore[arg-type]

    def follow(self, route: Route, committed: int) -> tuple[Query, int]:
        """The query, and how many blocks it ran."""
        self.world.ran.clear()
        query = self.policy.follow(Decision(route, committed), 0)  # type: ignore[arg-type]
        return query, len(self.world.ran)


def test_each_route_runs_its_blocks() -> None:
    script = Script()
    turns: list[tuple[Route, int, int]] = [
        ("start", 1, WHOLE),
        ("accepted", 2, EARLY),
        ("partial", 1, EARLY),
        ("rejected", 1, WHOLE),
        ("gripper", 2, WHOLE),
        ("refresh", 1, WHOLE),
        ("accepted", 2, EARLY),
        ("accepted", 2, EARLY),
        ("accepted", 1, EARLY),  # all that is left
        ("exhausted", 1, WHOLE),
    ]
    for route, committed, blocks in turns:
        query, ran = script.follow(route, committed)
        assert (query.route, len(query.actions), query.full_query) == (route, committed, blocks == WHOLE)
        assert ran == blocks


def test_in_full_or_in_part_is_the_same_work() -> None:
    script = Script()
    script.follow("start", 4)
    assert script.follow("partial", 2)[0].route == "accepted"  # all that is left


def test_a_baseline_commits_what_it_is_told() -> None:
    script = Script(n_action_steps=4, mode="baseline")
    query, ran = script.follow("full", 4)
    assert (query.route, len(query.actions), ran) == ("full", 4, WHOLE)


@pytest.mark.parametrize(("route", "committed"), [("accepted", 3), ("accepted", 0), ("start", 7)])
def test_what_no_policy_decides_is_a_bug(route: Route, committed: int) -> None:
    script = Script()
    script.follow("start", 1)
    with pytest.raises(ValueError, match="cannot be followed"):
        script.follow(route, committed)


def test_a_fault_ends_it() -> None:
    with pytest.raises(PolicyFault, match="not finite"):
        Script(frame=Frame(draft=STEPS, main=STEPS, nan="head")).follow("start", 1)
