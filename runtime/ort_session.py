"""A component in ONNX Runtime, on the CPU or with the CUDA provider."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from rsd_trt.errors import Unavailable, UserError, installing, missing_extra, shown
from rsd_trt.manifest import File
from rsd_trt.models.signature import Signature
from rsd_trt.runtime.external_data import locations
from rsd_trt.runtime.session import BufferedSession, Buffers, Launch

ELEMENT_TYPES = {torch.float32: 1, torch.uint8: 2, torch.int64: 7, torch.bool: 9}  # onnx.TensorProto's numbers

REBUILD = "Rebuild: rsd-trt export --force"
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
        files: Sequence[File] = (),
    ) -> None:
        """files: the graph and its external weights, as the caller has checked them. The very bytes that are loaded are
        checked again, and a graph that names another file is refused."""
        super().__init__(signature, device, files[0].sha256 if files else None)
        cuda = device.type == "cuda"
        try:
            import onnxruntime
        except ImportError:
            raise missing_extra("onnxruntime", "cuda" if cuda else "cpu") from None
        onnxruntime.set_default_logger_severity(LOG_ERRORS)
        provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
        remedy = f"Install it: {installing('cuda' if cuda else 'cpu')}"
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
        graph, weights = read_graph(onnx, files)
        if weights:
            if not hasattr(session_options, "add_external_initializers_from_files_in_memory"):
                raise Unavailable(
                    f"onnxruntime {onnxruntime.__version__} loads no weights of {onnx} from memory",
                    "Install a later one: pip install --upgrade onnxruntime",
                )
            sizes = [len(content) for content in weights.values()]
            session_options.add_external_initializers_from_files_in_memory([*weights], [*weights.values()], sizes)
        try:
            self.session = onnxruntime.InferenceSession(
                graph, session_options, providers=[(provider, options)], enable_fallback=False
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
            return partial(self.session.run_with_iobinding, binding, options)
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


def read_graph(onnx: Path, files: Sequence[File]) -> tuple[bytes, dict[str, bytes]]:
    """The graph, and its external weights by file name.

    Raises:
        UserError: a file is another than it was, or the graph names one that does not belong to it.
    """
    contents = {
        onnx.name: onnx.read_bytes(),
        **{file.name: (onnx.parent / file.name).read_bytes() for file in files[1:]},
    }
    for file in files:
        if (found := hashlib.sha256(contents[file.name]).hexdigest()) != file.sha256:
            raise UserError(
                f"{onnx.parent / file.name} was exchanged while it was loaded: its sha256 is {found[:8]}, checked was "
                f"{file.sha256[:8]}",
                REBUILD,
            )
    graph = contents.pop(onnx.name)
    try:
        named = locations(graph)
    except ValueError as error:
        raise Unavailable(f"{onnx} is no ONNX graph: {error}", REBUILD) from None
    if strange := sorted(named - contents.keys()):
        raise UserError(f"{onnx} reads weights from {shown(strange[0])}, which is no file of it", REBUILD)
    return graph, contents
