"""A component as a TensorRT engine, run by any of the distributions. Short, since their bindings have the same names
here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from rsd_trt.config import MAX_BATCH
from rsd_trt.errors import UserError, reason
from rsd_trt.models.signature import Signature
from rsd_trt.runtime.session import BufferedSession, Buffers, Launch, capture
from rsd_trt.trt import Distribution, collecting_logger

REBUILD = "Rebuild: rsd-trt export --force"


class TrtSession(BufferedSession):
    """Runs an engine on torch tensors by address, from a CUDA graph for each batch size.

    An engine is code: with a `sha256`, the very bytes that are loaded are checked, whatever lay there before. The
    caller has checked the GPU. A CUDA graph knows an execution context's memory by address only: the session keeps the
    contexts as long as the graphs.

    Raises:
        UserError: the engine cannot be loaded, is not the one asked for, or its ports are not the signature's.
    """

    def __init__(
        self,
        engine: Path,
        signature: Signature,
        device: torch.device,
        distribution: Distribution,
        sha256: str | None = None,
    ) -> None:
        super().__init__(signature, device, sha256)
        self.contexts: list[object] = []
        content = engine.read_bytes()
        if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise UserError(
                f"{engine} was exchanged while it was loaded: its sha256 is {found[:8]}, checked was {sha256[:8]}",
                REBUILD,
            )
        trt = distribution.module
        self.messages: list[str] = []
        self.logger = collecting_logger(trt, self.messages)
        self.runtime = trt.Runtime(self.logger)
        self.runtime.engine_host_code_allowed = True  # version-compatible engines bring their own runtime
        self.engine = self.runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            told = f": {reason(RuntimeError('; '.join(self.messages)))}" if self.messages else ""
            raise UserError(f"{distribution.target} {distribution.version} cannot load {engine}{told}", REBUILD)
        ports = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        wanted = [port.name for port in (*signature.inputs, *signature.outputs)]
        if sorted(ports) != sorted(wanted):
            raise UserError(f"{engine} has the ports {ports}, not {wanted}", REBUILD)

    def prepare(self, buffers: Buffers, batch: int) -> Launch:
        context = self.engine.create_execution_context()
        if context is None:
            raise UserError(
                "TensorRT cannot make an execution context, perhaps for want of GPU memory",
                "Free some, or use --backend ort",
            )
        for name, tensor in buffers.inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise UserError(f"the engine does not take a batch of {batch} in {name}; exports take 1..{MAX_BATCH}")
        for name, tensor in {**buffers.inputs, **buffers.outputs}.items():
            context.set_tensor_address(name, tensor.data_ptr())

        def launch() -> None:
            if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
                raise RuntimeError(f"TensorRT could not enqueue the engine: {self.messages[-1:]}")

        self.contexts.append(context)
        return capture(launch, self.device).replay
