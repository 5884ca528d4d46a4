"""How long components take on each backend, measured in one run on the same inputs.

The timing boundary: inputs on the device, outputs on the device, the clock read after a synchronisation on both
sides. One sample is one launch, as in a control loop; nothing is pipelined.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision, Backend, Component, Precision
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.clock import Call, Clock
from rsd_trt.eval.statistics import percentiles
from rsd_trt.eval.verify.inputs import hidden_states, make_case
from rsd_trt.manifest import Batch
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.session import Session

SPIN_UP_SECONDS = 1.0
BOUNDARY = "inputs and outputs on the device, clocks synchronised, one launch a sample"

RowKey = tuple[str, str, int]  # what, variant, batch


@dataclass(frozen=True)
class Timing:
    """One row of the profile."""

    what: str
    backend: str
    precision: Precision
    batch: int
    cuda_graph: bool
    ms: tuple[float, ...]  # raw samples, in order
    allocations: int | None  # of GPU memory through torch during the samples; None on the CPU
    reason: str | None = None  # why there are no samples: not measured
    grown: int | None = None  # bytes of GPU memory taken during the samples, by anybody; None on the CPU

    @property
    def variant(self) -> str:
        """The backend as people call it: `ort + CUDA graph`."""
        told = self.cuda_graph and self.backend not in ("graph", "compiled")  # which are nothing else
        return f"{self.backend} + CUDA graph" if told else self.backend

    @property
    def key(self) -> RowKey:
        return self.what, self.variant, self.batch

    def summary(self) -> dict[str, object]:
        """The row without its raw samples."""
        return {**asdict(self), "variant": self.variant, "ms": percentiles(self.ms)}


@dataclass(frozen=True)
class ProfileRequest:
    """What to time: every backend at every batch size; on CUDA, `ort` with and without its CUDA graph."""

    backends: tuple[Backend, ...]
    batches: tuple[int, ...]
    device: torch.device
    precision: Precision
    engines: Path
    samples: int
    warm_up: int
    backbone: BackboneKind | None = None  # of the costs; None: that of the backend
    backbone_precision: BackbonePrecision = "bundle"
    pause: float = 0.0  # ms between two whole queries


def profile(bundle: Bundle, request: ProfileRequest) -> Iterator[Timing]:
    """Every component on every backend and batch size."""
    device = request.device
    launcher = Launcher(bundle, "torch", device)
    case = make_case(launcher, hidden_states(bundle, max(request.batches), None, device))
    _spin_up(launcher.open("predict", "dynamic"), case.inputs["predict"])
    for batch in request.batches:
        inputs = {component: _first(given, batch) for component, given in case.inputs.items()}
        for backend in request.backends:
            for graph in (False, True) if backend == "ort" and device.type == "cuda" else (True,):
                launcher = Launcher(bundle, backend, device, request.precision, request.engines, graph)
                yield from _variant(launcher, batch, inputs, request)


def _spin_up(session: Session, inputs: dict[str, Tensor]) -> None:
    """Keeps the device busy until its clocks have risen, so that the first row is not slower than the others."""
    until = time.perf_counter() + SPIN_UP_SECONDS
    while time.perf_counter() < until:
        session.run(inputs)


def _first(inputs: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    return {name: x[:batch].clone() for name, x in inputs.items()}


def _variant(
    launcher: Launcher, batch: int, inputs: dict[Component, dict[str, Tensor]], request: ProfileRequest
) -> Iterator[Timing]:
    """All rows of one backend at one batch size."""
    variant: Batch = "1" if batch == 1 else "dynamic"
    graph = launcher.device.type == "cuda" and launcher.backend != "torch" and launcher.cuda_graph

    def row(what: str, call: Call | None, reason: str | None = None) -> Timing:
        samples, allocations, grown = time_calls(call, request) if call else ((), None, None)
        return Timing(what, launcher.backend, launcher.precision, batch, graph, samples, allocations, reason, grown)

    for component in inputs:
        try:
            session = launcher.open(component, variant)
        except UserError as error:
            yield row(component, None, str(error))
            continue
        yield row(component, lambda s=session, x=inputs[component]: s.run(x))  # type: ignore[misc]


@torch.inference_mode()
def time_calls(call: Call, request: ProfileRequest) -> tuple[tuple[float, ...], int | None, int | None]:
    """Milliseconds of each call after the warm-up, the allocations that they made through torch, and the bytes by
    which the GPU's used memory grew (that counts ONNX Runtime's and TensorRT's own too)."""
    clock = Clock(request.device)
    for _ in range(request.warm_up):
        call()
    if not clock.cuda:
        return tuple(clock.wall(call) for _ in range(request.samples)), None, None

    def memory() -> tuple[int, int]:
        made = torch.cuda.memory_stats(request.device)["allocation.all.allocated"]
        return int(made), torch.cuda.mem_get_info(request.device)[0]

    allocated, free = memory()
    samples = tuple(clock.wall(call) for _ in range(request.samples))
    allocated_after, free_after = memory()
    return samples, allocated_after - allocated, free - free_after


def speedups(timings: Sequence[Timing]) -> dict[RowKey, float]:
    """p50 of eager PyTorch over p50 of each row."""
    medians = {timing.key: p["p50"] for timing in timings if (p := percentiles(timing.ms))}
    eager = {(what, batch): ms for (what, variant, batch), ms in medians.items() if variant == "torch"}
    return {(w, v, b): eager[w, b] / ms for (w, v, b), ms in medians.items() if (w, b) in eager}
