"""The clock's arithmetic, with made-up times: the host's, and a GPU's that keeps its queue."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from rsd_trt.eval.profile import clock
from rsd_trt.eval.profile.clock import FIRST_WAIT, LONGEST_WAIT, Clock


def test_on_the_cpu_all_three_read_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def run() -> None:
        now[0] += 0.25

    found = Clock(torch.device("cpu"))
    assert [found.wall(run), found.issued(run), found.queued(run)] == [250, 250, 250]


class Gpu:
    """A device with a queue: work takes as long as it is said to, and begins when it is issued and the last is done."""

    def __init__(self) -> None:
        self.host = 0.0  # ms
        self.free = 0.0  # when the device has done all that is queued
        self.waits: list[int] = []

    def enqueue(self, ms: float) -> None:
        self.free = max(self.free, self.host) + ms

    def sleep(self, cycles: int) -> None:
        self.waits.append(cycles)
        self.enqueue(cycles / FIRST_WAIT)

    def synchronize(self, device: object = None) -> None:
        self.host = max(self.host, self.free)

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.gpu.enqueue(0)
        self.at = self.gpu.free

    def query(self) -> bool:
        return self.gpu.host >= self.at

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: made.host / 1e3))
    return made


def test_issuing_is_in_the_hosts_time_and_not_in_the_devices(gpu: Gpu) -> None:
    def run() -> None:
        gpu.host += 0.5  # to issue it
        gpu.enqueue(2)

    found = Clock(torch.device("cuda"))
    assert (found.wall(run), found.issued(run), found.queued(run)) == (2.5, 2.5, 2)
    assert gpu.waits == [FIRST_WAIT]


def test_the_device_is_held_up_until_all_is_issued(gpu: Gpu) -> None:
    def run() -> None:
        gpu.host += 3
        gpu.enqueue(2)

    found = Clock(torch.device("cuda"))
    assert found.queued(run) == found.queued(run) == 2
    assert gpu.waits == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT, 4 * FIRST_WAIT]  # 1 ms, 2 ms, 4 ms, and stays


def test_what_waits_for_the_device_has_no_time_of_its_own(gpu: Gpu) -> None:
    def run() -> None:
        gpu.enqueue(2)
        gpu.synchronize()

    found = Clock(torch.device("cuda"))
    assert found.queued(run) is None
    assert max(gpu.waits) == LONGEST_WAIT
    assert found.issued(run) == 2


def test_real_time_passes() -> None:
    assert Clock(torch.device("cpu")).wall(lambda: time.sleep(0.002)) >= 2
