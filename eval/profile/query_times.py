"""Whole queries, timed through `Policy`: one of each kind in turn, so that clocks that drift do so for all."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from rsd_trt.eval.profile.clock import Clock
from rsd_trt.eval.profile.shapes import Scene
from rsd_trt.eval.profile.work import STAGES, Stage
from rsd_trt.runtime.forward import EagerForward, Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.scripted import Decision, ScriptedPolicy

QueryKind = Literal["accepted query", "rejected query", "forced query", "baseline query"]
# The stages of each. A forced full query does not wait for the draft, a rejected one does.
QUERIES: dict[QueryKind, tuple[Stage, ...]] = {
    "accepted query": tuple(stage for stage in STAGES if stage not in ("blocks > k", "predict")),
    "rejected query": STAGES,
    "forced query": STAGES,
    "baseline query": tuple(stage for stage in STAGES if stage != "propose"),
}


@dataclass(frozen=True)
class QueryTimes:
    """ms of a kind of query. outside: the host's time beyond that of the device; empty where they can't be told
    apart."""

    wall: tuple[float, ...]
    outside: tuple[float, ...]


def time_queries(
    forward: Forward, scene: Scene, clock: Clock, samples: int, warm_up: int, baseline_only: bool = False
) -> dict[QueryKind, QueryTimes]:
    """The host's ms of each query, and directly after it the device's ms of the same launches."""
    config = scene.bundle.config
    baseline = ScriptedPolicy(config, forward, "baseline", 1)
    rsd = ScriptedPolicy(config, forward, "rsd", 1)
    turns: list[tuple[QueryKind, ScriptedPolicy, Decision]] = [("baseline query", baseline, Decision("full", 1))]
    if not baseline_only:
        turns += [
            ("forced query", rsd, Decision("start", 1)),
            ("accepted query", rsd, Decision("accepted", 1)),
            ("rejected query", rsd, Decision("rejected", 1)),
        ]
    walls: dict[QueryKind, list[float]] = {kind: [] for kind, _, _ in turns}
    outsides: dict[QueryKind, list[float]] = {kind: [] for kind, _, _ in turns}
    seen = itertools.cycle(scene.observations)
    apart = clock.cuda and not isinstance(forward, EagerForward)  # what is eager waits for the device as it goes
    for i in range(warm_up + samples):
        for kind, policy, decision in turns:
            observation = next(seen)
            wall = clock.wall(lambda p=policy, d=decision, o=observation: p.follow(d, o))  # type: ignore[misc]
            busy = clock.queued(lambda k=kind, o=observation: launch(forward, k, o)) if apart else None  # type: ignore[misc]
            if i >= warm_up:
                walls[kind].append(wall)
                outsides[kind] += [] if busy is None else [wall - busy]
    return {kind: QueryTimes(tuple(walls[kind]), tuple(outsides[kind])) for kind in walls}


@torch.inference_mode()
def launch(forward: Forward, kind: QueryKind, observation: Observation) -> None:
    """Enqueues what the device does for a query."""
    if kind == "baseline query":
        forward.whole([observation])
        return
    forward.early([observation])
    if kind != "accepted query":
        forward.late(range(1))
