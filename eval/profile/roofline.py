"""How fast a stage could be on this machine: its work over the bandwidth and the matrix rates that are measured here.

floor = max(bytes / bandwidth, FLOPs / rate), the roofline (Williams et al. 2009). A stage whose bytes take longer is
bound by the memory, else by the arithmetic. Floors of stages that run one after the other add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from rsd_trt.errors import UserError
from rsd_trt.eval.profile.clock import Clock
from rsd_trt.eval.profile.work import Number, Work

REPEATS = 20
CUDA_COPY, CPU_COPY = 1 << 30, 1 << 27  # bytes: far more than any cache holds
CUDA_SIDE, CPU_SIDE = 8192, 1024  # of square matrices

Bound = Literal["compute", "memory"]


@dataclass(frozen=True)
class Floor:
    """The least time that some work takes."""

    ms: float
    bound: Bound


@dataclass(frozen=True)
class Machine:
    """What a device was seen to do: the fastest of `REPEATS` large copies and matrix products."""

    bytes_per_s: float  # read and written by a copy from device to device
    flops_per_s: dict[str, float]  # of a square matrix product on random data, by precision
    matrix_side: int
    copied_bytes: int

    def floor(self, work: Work) -> Floor:
        """The least time that `work` takes here."""
        memory = work.bytes / self.bytes_per_s * 1e3
        compute = sum(flops / self.flops_per_s[number] for number, flops in work.flops.items()) * 1e3
        return Floor(max(memory, compute), "compute" if compute > memory else "memory")


def measure_machine(device: torch.device, numbers: Iterable[Number]) -> Machine:
    """Copies and multiplies, for a second or so.

    Raises:
        UserError: the device has too little memory free.
    """
    clock = Clock(device)
    size, side = (CUDA_COPY, CUDA_SIDE) if clock.cuda else (CPU_COPY, CPU_SIDE)
    try:
        with torch.inference_mode():
            copied = 2 * size / _fastest(clock, _copy(size, device))
            rates = {str(n): 2 * side**3 / _fastest(clock, _matmul(n, side, device)) for n in numbers}
    except torch.OutOfMemoryError as error:
        raise UserError(f"{device} has too little memory free to be measured: {str(error).splitlines()[0]}") from None
    return Machine(copied, rates, side, size)


def _fastest(clock: Clock, run: Callable[[], object]) -> float:
    """Seconds of the fastest call; the first two are not counted."""
    times = [clock.issued(run) if (ms := clock.queued(run)) is None else ms for _ in range(2 + REPEATS)]
    return min(times[2:]) / 1e3


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _matmul(number: Number, side: int, device: torch.device) -> Callable[[], object]:
    """A product of random square matrices: on zeros a GPU draws less power, and is faster."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    if number == "fp8":
        x, y = (z.to(torch.float8_e4m3fn) for z in (a, b))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[number]
    a, b = a.to(dtype), b.to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)
