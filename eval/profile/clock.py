"""Milliseconds of a call, on the host's clock and on the GPU's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

FIRST_WAIT = 2_000_000  # GPU cycles, about 1 ms
LONGEST_WAIT = 64 * FIRST_WAIT

Call = Callable[[], object]


class Clock:
    """Times calls on one device, one at a time. On the CPU, where calls return when they are done, all three
    methods read the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._wait = FIRST_WAIT

    def synchronise(self) -> None:
        """Waits until the device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def wall(self, call: Call) -> float:
        """ms of the host's clock, synchronised on both sides."""
        self.synchronise()
        started = time.perf_counter()
        call()
        self.synchronise()
        return (time.perf_counter() - started) * 1e3

    def issued(self, call: Call) -> float:
        """ms between two events around a call on an idle device: what the host takes to issue the work is in it."""
        if not self.cuda:
            return self.wall(call)
        self.synchronise()
        start, end = self._events()
        start.record()
        call()
        end.record()
        self.synchronise()
        return start.elapsed_time(end)

    def queued(self, call: Call) -> float | None:
        """ms that the device itself is busy: the call is issued while the device is held up by a wait that lasts until
        all of it is in the queue. None where that can't be, since the call waits for the device."""
        if not self.cuda:
            return self.wall(call)
        while self._wait <= LONGEST_WAIT:
            self.synchronise()
            start, end = self._events()
            torch.cuda._sleep(self._wait)
            start.record()
            call()
            end.record()
            in_time = not start.query()
            self.synchronise()
            if in_time:
                return start.elapsed_time(end)
            self._wait *= 2
        self._wait = FIRST_WAIT
        return None

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
