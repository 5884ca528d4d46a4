"""A component in ONNX Runtime, on the CPU or with the CUDA provider."""

from __future__ import annotations

from pathlib import Path

import torch

from rsd_trt.errors import Unavailable, missing_extra
from rsd_trt.models.signature import Signature
from rsd_trt.runtime.session import BufferedSession, Buffers, Launch

ELEMENT_TYPES = {torch.float32: 1, torch.uint8: 2, torch.int64: 7, torch.bool: 9}  # onnx.TensorProto's numbers

LOG_ERRORS = 3  # onnxruntime's severity: 0 verbose .. 4 fatal


class OrtSession(BufferedSession):
    """Inputs and outputs are bound to torch tensors by address. On CUDA the run is a CUDA graph unless told not to.

    Non-obvious: ONNX Runtime gets a stream of its own, since the default one cannot be captured; events order it
    with torch's current stream, so that no call waits on the host.

    Raises:
        Unavailable: ONNX Runtime is not installed, cannot run the graph, or did not take the provider asked for.
    """

    def __init__(
        self,
        onnx: Path,
        signature: Signature,
        device: torch.device,
        cuda_graph: bool = True,
        sha256: str | None = None,
    ) -> None:
        """sha256: of the file, as the caller has checked it."""
        super().__init__(signature, device, sha256)
        cuda = device.type == "cuda"
        try:
            import onnxruntime
        except ImportError:
            raise missing_extra("onnxruntime", "cuda" if cuda else "cpu") from None
        onnxruntime.set_default_logger_severity(LOG_ERRORS)
        provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
        remedy = f"Install it: pip install 'rsd-trt[{'cuda' if cuda else 'cpu'}]'"
        if provider not in onnxruntime.get_available_providers():
            raise Unavailable(
                f"onnxruntime {onnxruntime.__version__} has no {provider} (it has "
                f"{', '.join(onnxruntime.get_available_providers())})",
                remedy,
            )
        self.cuda_graph = cuda and cuda_graph
        self.stream = torch.cuda.Stream(device) if cuda else None
        options: dict[str, str] = {}
        if self.stream is not None:
            onnxruntime.preload_dlls()
            options = {
                "device_id": str(device.index or 0),
                "use_tf32": "0",
                "user_compute_stream": str(self.stream.cuda_stream),
                "enable_cuda_graph": str(int(self.cuda_graph)),
            }
        session_options = onnxruntime.SessionOptions()
        session_options.log_severity_level = LOG_ERRORS
        session_options.intra_op_num_threads = torch.get_num_threads()
        # Spinning threads would take the cores from the backbone, which runs next.
        session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(
                str(onnx), session_options, providers=[(provider, options)], enable_fallback=False
            )
        except Exception as error:  # the library's exceptions share no base class
            raise Unavailable(f"onnxruntime {onnxruntime.__version__} cannot run {onnx}: {error}") from None
        active = self.session.get_providers()[0]
        if active != provider:
            raise Unavailable(f"onnxruntime took {active} instead of {provider}, which cannot be loaded", remedy)
        self.new_run_options = onnxruntime.RunOptions

    def prepare(self, buffers: Buffers, batch: int) -> Launch:
        binding = self.session.io_binding()
        index = self.device.index or 0
        for name, tensor in buffers.inputs.items():
            element = ELEMENT_TYPES[tensor.dtype]
            binding.bind_input(name, self.device.type, index, element, tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in buffers.outputs.items():
            element = ELEMENT_TYPES[tensor.dtype]
            binding.bind_output(name, self.device.type, index, element, tuple(tensor.shape), tensor.data_ptr())
        options = self.new_run_options()
        if self.stream is None:
            return lambda: self.session.run_with_iobinding(binding, options)
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(batch))
        stream = self.stream

        def launch() -> None:
            current = torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            self.session.run_with_iobinding(binding, options)
            current.wait_stream(stream)

        torch.cuda.synchronize(self.device)
        for _ in range(3):  # the first runs allocate, and the capture follows them
            launch()
        return launch
