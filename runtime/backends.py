"""Which backend runs a component: one place that opens sessions, and says why it cannot."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import DEFAULT_ENGINES, Component, Precision
from rsd_trt.errors import Unavailable, UserError, did_you_mean
from rsd_trt.flavour import runnable_flavour
from rsd_trt.manifest import Batch, usable
from rsd_trt.runtime.session import Session, TorchSession

Backend = Literal["torch", "graph", "ort", "trt"]
BACKENDS: tuple[Backend, ...] = typing.get_args(Backend)


@dataclass(frozen=True)
class Launcher:
    """How components are run: the backend and what it needs to open a session."""

    bundle: Bundle
    backend: Backend
    device: torch.device
    precision: Precision = "fp32"
    engines: Path = DEFAULT_ENGINES
    cuda_graph: bool = True  # `ort` alone can do without
    opened: dict[str, str] = field(default_factory=dict)  # sha256 of every export that a session was opened on

    def open(self, component: Component, batch: Batch) -> Session:
        """A session for one row, or for any number of them.

        Raises:
            UserError: the backend cannot run here, or its artefact is missing or not fresh; with the remedy.
        """
        device, precision = self.device, self.precision
        if self.backend == "torch":
            return TorchSession(self.bundle.component(component, device, precision))
        if self.backend == "graph":
            if device.type != "cuda":
                raise Unavailable(f"backend graph needs a CUDA device, not {device}. Use: --backend torch or ort")
            from rsd_trt.runtime.graph_session import GraphSession

            return GraphSession(self.bundle.component(component, device, precision), device)
        signature = self.bundle.component(component).signature
        if self.backend == "ort":
            from rsd_trt.runtime.ort_session import OrtSession

            artefact, file = usable(self.bundle, self.engines, (component, precision, batch, "onnx"))
            self.opened[component] = artefact.files[0].sha256
            return OrtSession(file, signature, device, self.cuda_graph)
        from rsd_trt.runtime.trt_session import TrtSession

        gpu = host.gpu(str(device)) if device.type == "cuda" else None
        flavour = runnable_flavour(gpu)
        key = (component, precision, batch, flavour.target)
        artefact, file = usable(self.bundle, self.engines, key, flavour.version, gpu)
        self.opened[component] = artefact.files[0].sha256
        return TrtSession(file, signature, device, flavour, artefact.files[0].sha256)


def check_backend(name: str) -> Backend:
    """Raises UserError unless there is such a backend."""
    if name not in BACKENDS:
        raise UserError(f"backend {name!r} is unknown{did_you_mean(name, BACKENDS)}")
    return name
