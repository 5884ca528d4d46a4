"""What else keeps the processor busy: a clock that was read on a disturbed machine says so."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from rsd_trt.records import Positive, Record, told

STEADY = 1.5  # p95 / p50 up to which the times of one route are those of an undisturbed machine
FEWEST = 20  # times of a route that its p95 is looked at from
SHORTEST = 1.0  # s: the kernel counts in hundredths, and moments are dominated by that
SLACK = 0.25  # cores that a system is busy with by itself
BUSY = (1, 2, 3, 6, 7, 8)  # columns of a processor's line in /proc/stat: user, nice, system, irq, softirq, steal


class Steadiness(Record, frozen=True):
    """How far the times of a run or a profile can be trusted."""

    others: Annotated[
        float | None, told("mean number of this process's cores that other processes kept busy; null: not measured")
    ]
    cores: Annotated[Positive, told("that this process may run on")]
    spread: Annotated[dict[str, float], told("p95 / p50 of the times, by route; of those with enough of them")]
    disturbed: Annotated[tuple[str, ...], told("what disturbed it, a sentence each; empty: nothing was noticed")]


def steadiness(times: Mapping[str, Sequence[float]], others: float | None, cores: int, own: int) -> Steadiness:
    """Of the machine that gave the times, by route. cores: that it may run on; own: that it needs
    at a time."""
    from statistics import median, quantiles

    spread = {
        route: round(quantiles(ms, n=20, method="inclusive")[-1] / middle, 3)
        for route, ms in times.items()
        if len(ms) >= FEWEST and (middle := median(ms)) > 0
    }
    said = [
        f"p95 / p50 of {route} is {ratio:.2g} (up to {STEADY:g} is steady)"
        for route, ratio in spread.items()
        if ratio > STEADY
    ]
    if others is not None and others > max(cores - own, 0) + SLACK:
        said.insert(0, f"other processes kept {others:.1f} of {cores} cores busy, and this one needs {own}")
    return Steadiness(None if others is None else round(others, 2), cores, spread, tuple(said))


class LoadMeter:
    """Measures how many cores processes other than this one and its children keep busy, from lap to lap."""

    def __init__(self) -> None:
        self._cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        self._last: float | None = None
        self._before = self._read()

    def lap(self) -> float | None:
        """The mean number of cores since the lap before, of those that this process may run on. A lap that is too short
        to tell goes on, and the answer is that of the one before it; None without one, or where the kernel says
        nothing."""
        now = self._read()
        seconds = now[0] - self._before[0]
        if now[1] is None or self._before[1] is None:
            return None
        if seconds >= SHORTEST:
            busy, own = now[1] - self._before[1], now[2] - self._before[2]
            self._last, self._before = max(busy - own, 0.0) / seconds, now
        return self._last

    def _read(self) -> tuple[float, float | None, float]:
        """Seconds: of the clock, of the busy cores together, and of this process and its children."""
        tick = os.sysconf("SC_CLK_TCK")
        try:
            lines = [line.split() for line in Path("/proc/stat").read_text("ascii").splitlines()]
        except OSError:
            return time.monotonic(), None, 0.0
        busy = sum(int(line[column]) for line in lines if line[0] in self._cores for column in BUSY) / tick
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        own += sum(_seconds(child.pid, tick) for child in multiprocessing.active_children() if child.pid is not None)
        return time.monotonic(), busy or None, own


def _seconds(pid: int, tick: int) -> float:
    """That a process has computed."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return 0.0  # it has just ended
    return (int(fields[11]) + int(fields[12])) / tick


def fit_threads(workers: int) -> None:
    """Has PyTorch use as many threads as there are cores free of simulator workers, or of what else this command keeps
    busy; OMP_NUM_THREADS overrules it. With one more, one busy process makes a query several times as long."""
    import torch

    if not re.match(r"\s*[1-9]", os.environ.get("OMP_NUM_THREADS", "")):  # what is no number overrules nothing
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) - workers, 1))
