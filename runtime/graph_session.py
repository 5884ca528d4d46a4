"""A component as one CUDA graph of its PyTorch module, with the classifiers stacked."""

from __future__ import annotations

import torch
from torch import Tensor

from rsd_trt.models.classifiers import stacked
from rsd_trt.models.signature import Exportable
from rsd_trt.runtime.session import BufferedSession, Buffers, Launch, Tensors, capture


class GraphSession(BufferedSession):
    """Replays the module's kernels from a CUDA graph, one graph for each batch size."""

    def __init__(self, module: Exportable, device: torch.device) -> None:
        super().__init__(module.signature, device)
        self.module = stacked(module)

    def call(self, inputs: Tensors) -> dict[str, Tensor]:
        """Enqueues the module's kernels, to be captured."""
        outputs = self.module(*(inputs[port.name] for port in self.signature.inputs))
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        return {port.name: value for port, value in zip(self.signature.outputs, values, strict=True)}

    def prepare(self, buffers: Buffers, batch: int) -> Launch:
        def launch() -> None:
            # What the captured run writes to is at a fixed address too: the outputs need no copy.
            buffers.outputs.update(self.call(buffers.inputs))

        with torch.inference_mode():
            return capture(launch, self.device).replay
