"""Whole queries through `Policy`: timed, one of each kind in turn so that drifting clocks drift for all; or traced."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, record_function

from rsd_trt.errors import UserError
from rsd_trt.eval.profile.clock import Clock
from rsd_trt.eval.profile.inputs import QueryInputs
from rsd_trt.eval.profile.roofline import STAGES, Stage
from rsd_trt.files import replacing
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
TRACED = {"accepted query": Decision("accepted", 1), "rejected query": Decision("rejected", 1)}
TRACE_WARM_UP = 3  # of each query


@dataclass(frozen=True)
class QueryTimes:
    """ms of a kind of query. host_overhead: the host's time beyond that of the device; empty where they can't be told
    apart."""

    wall: tuple[float, ...]
    host_overhead: tuple[float, ...]


def time_queries(
    forward: Forward, given: QueryInputs, clock: Clock, samples: int, warm_up: int, baseline_only: bool = False
) -> dict[QueryKind, QueryTimes]:
    """The host's ms of each query, and directly after it the device's ms of the same launches."""
    config = given.bundle.config
    baseline = ScriptedPolicy(config, forward, "baseline", 1)
    rsd = ScriptedPolicy(config, forward, "rsd", 1)
    turns: list[tuple[QueryKind, ScriptedPolicy, Decision]] = [("baseline query", baseline, Decision("full", 1))]
    if not baseline_only:
        turns += [
            ("forced query", rsd, Decision("start", 1)),
            ("accepted query", rsd, TRACED["accepted query"]),
            ("rejected query", rsd, TRACED["rejected query"]),
        ]
    walls: dict[QueryKind, list[float]] = {kind: [] for kind, _, _ in turns}
    overheads: dict[QueryKind, list[float]] = {kind: [] for kind, _, _ in turns}
    seen = itertools.cycle(given.observations)
    apart = clock.cuda and not isinstance(forward, EagerForward)  # what is eager waits for the device as it goes
    for i in range(warm_up + samples):
        for kind, policy, decision in turns:
            observation = next(seen)
            wall = clock.wall(lambda p=policy, d=decision, o=observation: p.follow(d, o))  # type: ignore[misc]
            busy = clock.queued(lambda k=kind, o=observation: launch(forward, k, o)) if apart else None  # type: ignore[misc]
            if i >= warm_up:
                walls[kind].append(wall)
                overheads[kind] += [] if busy is None else [wall - busy]
    return {kind: QueryTimes(tuple(walls[kind]), tuple(overheads[kind])) for kind in walls}


@torch.inference_mode()
def launch(forward: Forward, kind: QueryKind, observation: Observation) -> None:
    """Enqueues what the device does for a query."""
    if kind == "baseline query":
        forward.whole([observation])
        return
    forward.early([observation])
    if kind != "accepted query":
        forward.late(range(1))


def write_trace(forward: Forward, given: QueryInputs, device: torch.device, path: Path) -> None:
    """A Chrome trace, for https://ui.perfetto.dev, of an accepted and a rejected query after others of their kind. Not
    while anything is timed: the profiler slows what it records.

    Raises:
        UserError: `path` cannot be written.
    """
    policy = ScriptedPolicy(given.bundle.config, forward, "rsd", 1)
    first, second = given.observations[:2]
    for _ in range(TRACE_WARM_UP):
        policy.reset()
        for decision in (Decision("start", 1), *TRACED.values()):
            policy.follow(decision, first)
    policy.follow(Decision("start", 1), first)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as found:
        for name, decision in TRACED.items():
            with record_function(name):
                policy.follow(decision, second)
    try:
        with replacing(path) as temporary:
            found.export_chrome_trace(str(temporary))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
