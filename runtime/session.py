"""One protocol for every way of running a component, PyTorch eager and as CUDA graphs, and what the fast ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rsd_trt.models.classifiers import stacked
from rsd_trt.models.fast.compiling import compile_arguments
from rsd_trt.models.signature import BATCH, Exportable, Signature

Tensors = Mapping[str, Tensor]


class Session(Protocol):
    """Runs one component."""

    signature: Signature
    sha256: str | None  # of the exported file that it runs; None where there is none

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        """Inputs and outputs by port name, on the session's device.

        The returned tensors belong to the session: the next `run` may overwrite them.
        """
        ...

    def bound(self, batch: int) -> tuple[Buffers, Launch]:
        """The buffers for a batch size, and what runs the component on them. They are those of `run`, too."""
        ...


class TorchSession:
    """Eager PyTorch: what every other backend is compared with by `rsd-trt verify`."""

    sha256: str | None = None

    def __init__(self, module: Exportable, device: torch.device | None = None) -> None:
        """device: where the module is; by default the CPU."""
        self.module = module
        self.device = device or torch.device("cpu")
        self.signature = module.signature

    def bound(self, batch: int) -> tuple[Buffers, Launch]:
        buffers = Buffers.allocate(self.signature, batch, self.device)
        return buffers, lambda: buffers.outputs.update(self.run(buffers.inputs))

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        check_inputs(self.signature, inputs)
        with torch.inference_mode():
            return by_name(self.module, inputs)


@dataclass(frozen=True)
class Buffers:
    """Tensors at fixed addresses for one batch size."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @classmethod
    def allocate(cls, signature: Signature, batch: int, device: torch.device) -> Buffers:
        inputs, outputs = (
            {
                port.name: torch.zeros(signature.shape(port, batch), dtype=getattr(torch, port.dtype), device=device)
                for port in ports
            }
            for ports in (signature.inputs, signature.outputs)
        )
        return cls(inputs, outputs)


class BufferedSession(ABC):
    """A session that launches on fixed buffers: allocated and prepared at a batch size's first run, reused after.

    Subclasses implement `prepare`, which returns what launches one batch size, and own what a launch needs.
    """

    def __init__(self, signature: Signature, device: torch.device, sha256: str | None = None) -> None:
        self.signature = signature
        self.device = device
        self.sha256 = sha256
        self._prepared: dict[int, tuple[Buffers, Launch]] = {}

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        check_inputs(self.signature, inputs)
        buffers, launch = self.bound(batch_size(self.signature, inputs))
        for name, buffer in buffers.inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        launch()
        return buffers.outputs

    def bound(self, batch: int) -> tuple[Buffers, Launch]:
        if batch not in self._prepared:
            buffers = Buffers.allocate(self.signature, batch, self.device)
            self._prepared[batch] = buffers, self.prepare(buffers, batch)
        return self._prepared[batch]

    @abstractmethod
    def prepare(self, buffers: Buffers, batch: int) -> Launch:
        """What reads `buffers.inputs` and fills `buffers.outputs`, in the order of torch's current stream."""


class Launch(Protocol):
    """Enqueues one run."""

    def __call__(self) -> None: ...


class GraphSession(BufferedSession):
    """The PyTorch module with its classifiers stacked, as one CUDA graph for each batch size."""

    def __init__(self, module: Exportable, device: torch.device, compiled: bool = False) -> None:
        """compiled: of the kernels that torch.compile makes, at a batch size's first run."""
        super().__init__(module.signature, device)
        self.module = stacked(module)
        if compiled:
            self.module.compile(fullgraph=True, **compile_arguments())

    def prepare(self, buffers: Buffers, batch: int) -> Launch:
        with torch.inference_mode():
            return capture(lambda: self.compute(buffers), self.device).replay

    def compute(self, buffers: Buffers) -> None:
        """What is captured. It writes to fixed addresses too: the outputs need no copy."""
        buffers.outputs.update(by_name(self.module, buffers.inputs))


def by_name(module: Exportable, inputs: Tensors) -> dict[str, Tensor]:
    """Runs a module on inputs by port name -> its outputs, by port name."""
    outputs = module(*(inputs[port.name] for port in module.signature.inputs))
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    return {port.name: value for port, value in zip(module.signature.outputs, values, strict=True)}


def batch_size(signature: Signature, inputs: Tensors) -> int:
    """The batch of a run's inputs."""
    return next(len(inputs[port.name]) for port in signature.inputs if port.dims[0] == BATCH)


def check_inputs(signature: Signature, inputs: Tensors) -> None:
    """Compares names, shapes and dtypes with the signature.

    Raises:
        ValueError: the port, what it got and what it takes. A caller's bug, so not a `UserError`.
    """
    names = [port.name for port in signature.inputs]
    if set(inputs) != set(names):
        raise ValueError(f"inputs {sorted(inputs)} are not the ports {names}")
    batch = batch_size(signature, inputs)
    for port in signature.inputs:
        value = inputs[port.name]
        if tuple(value.shape) != signature.shape(port, batch) or value.dtype != getattr(torch, port.dtype):
            raise ValueError(f"{signature.describe(port)} got {list(value.shape)} {value.dtype}")


def capture(
    launch: Launch, device: torch.device, warm_up: int = 3, pool: torch.cuda._POOL_HANDLE | None = None
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `launch`, after runs that let it allocate and choose kernels.

    The graph keeps nothing alive but memory from its own pool: what `launch` reads and writes is the caller's to keep.
    pool: of memory, which graphs that never run at the same time may share.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            launch()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        launch()
    return graph
