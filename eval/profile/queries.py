"""Whole queries, timed on the host's clock and on the device's, or traced. A query is one of two kinds:

check   uint8 frames in the host's memory -> the draft's coarse actions there
full    uint8 frames in the host's memory -> the main head's chunk there
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, record_function

from rsd_trt.errors import UserError
from rsd_trt.eval.profile.inputs import QueryInputs
from rsd_trt.files import replacing
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.observation import Observation

QueryKind = Literal["check", "full"]
KINDS: tuple[QueryKind, ...] = ("check", "full")
TRACE_WARM_UP = 3  # of each query


def answer(forward: Forward, kind: QueryKind, observation: Observation) -> object:
    """What a query gives, on the host."""
    forward.begin([observation])
    return forward.check([observation]) if kind == "check" else forward.full([observation])


def time_queries(
    forward: Forward,
    given: QueryInputs,
    samples: int,
    warm_up: int,
    kinds: Sequence[QueryKind],
    pause: float = 0.0,
) -> dict[QueryKind, tuple[float, ...]]:
    """The host's ms of each query. One of each kind in turn, so that drifting clocks drift for all. pause: ms before
    each, as between a robot's queries, in which the host's caches and its core cool down."""
    walls: dict[QueryKind, list[float]] = {kind: [] for kind in kinds}
    seen = itertools.cycle(given.observations)
    for i in range(warm_up + samples):
        for kind in kinds:
            observation = next(seen)
            time.sleep(pause / 1e3)
            started = time.perf_counter()
            answer(forward, kind, observation)  # on the host: nothing is left to wait for
            ms = (time.perf_counter() - started) * 1e3
            if i >= warm_up:
                walls[kind].append(ms)
    return {kind: tuple(ms) for kind, ms in walls.items()}


def write_trace(
    forward: Forward, given: QueryInputs, device: torch.device, path: Path, kinds: Sequence[QueryKind]
) -> None:
    """A Chrome trace, for https://ui.perfetto.dev, of a query of each kind after others of it. Not while anything is
    timed: the profiler slows what it records.

    Raises:
        UserError: `path` cannot be written.
    """
    first, second = given.observations[:2]
    for kind in [*kinds] * TRACE_WARM_UP:
        answer(forward, kind, first)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as found:
        for kind in kinds:
            with record_function(f"{kind} query"):
                answer(forward, kind, second)
    try:
        with replacing(path) as temporary:
            found.export_chrome_trace(str(temporary))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
