"""An ONNX file -> a serialised engine, with TensorRT 10, TensorRT 11 or TensorRT-RTX.

Networks are strongly typed: precision is what the graph says. That is TensorRT 11's and RTX's only kind, and is
asked for on TensorRT 10. Nothing here runs an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from rsd_trt.config import MAX_BATCH
from rsd_trt.errors import UserError
from rsd_trt.files import write_atomically
from rsd_trt.host import Gpu
from rsd_trt.models.signature import BATCH, Signature
from rsd_trt.trt import RTX_CAPABILITIES, Distribution, collecting_logger

WORKSPACE_BYTES = 1 << 30


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is built for. `compute_capabilities` are RTX's; the two flags are TensorRT's."""

    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """The options as they stand in the manifest."""
        names = ("version_compatible", "hardware_compatible")
        return ("strongly_typed", "no_tf32", *(name for name in names if getattr(self, name)))


class Progress(Protocol):
    """Told how far a build is: the phase's name, steps done and steps in all."""

    def __call__(self, phase: str, done: int, total: int) -> None: ...


def check_options(distribution: Distribution, options: EngineOptions, gpu: Gpu | None) -> None:
    """Raises UserError for what this distribution cannot build here."""
    if distribution.target == "lean":
        raise UserError("TensorRT's lean runtime builds no engines", "Use: --target tensorrt --version-compatible")
    if distribution.target == "tensorrt" and gpu is None:
        raise UserError(
            "TensorRT builds an engine on the GPU that will run it, and none is usable here",
            "Build ahead of time: --target rtx",
        )
    if distribution.target == "tensorrt" and options.compute_capabilities:
        raise UserError("--compute-capability is for --target rtx: TensorRT builds for the GPU at hand")
    if distribution.target == "rtx" and (options.version_compatible or options.hardware_compatible):
        raise UserError("--version-compatible and --hardware-compatible are for --target tensorrt")
    for capability in options.compute_capabilities:
        if capability not in RTX_CAPABILITIES:
            known = ", ".join(RTX_CAPABILITIES)
            raise UserError(f"TensorRT-RTX does not build for compute capability {capability} (known: {known})")


def build_engine(
    onnx: Path,
    signature: Signature,
    distribution: Distribution,
    options: EngineOptions,
    timing_cache: Path,
    on_progress: Progress,
) -> bytes:
    """The serialised engine of an ONNX file.

    Raises:
        UserError: the parser or the builder refused; with what it logged.
    """
    trt = distribution.module
    messages: list[str] = []
    logger = collecting_logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # A file that is no ONNX at all may parse as an empty network.
    if not parser.parse_from_file(str(onnx)) or network.num_outputs != len(signature.outputs):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise UserError(
            f"{distribution.target} cannot parse {onnx}: {'; '.join(errors or messages) or 'no network in it'}"
        )
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt, on_progress)
    _add_profile(builder, config, network, signature)
    if distribution.target == "rtx":
        _set_capabilities(trt, config, options.compute_capabilities)
    else:
        _set_compatibility(trt, config, options)
        cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
        if not config.set_timing_cache(cache, ignore_mismatch=False):  # it is of another GPU or another TensorRT
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise UserError(f"{distribution.target} {distribution.version} cannot build {onnx}: {'; '.join(messages[-3:])}")
    if distribution.target == "tensorrt":
        write_atomically(timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(serialised)


def layer_report(engine: bytes, distribution: Distribution) -> str:
    """The engine inspector's description of every layer, as JSON. Needs the GPU that the engine is for."""
    trt = distribution.module
    messages: list[str] = []
    runtime = trt.Runtime(collecting_logger(trt, messages))
    runtime.engine_host_code_allowed = True  # of the engine just built
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        raise UserError(f"the engine cannot be loaded for a report: {'; '.join(messages[-3:])}")
    inspector = loaded.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _add_profile(builder: object, config: object, network: object, signature: Signature) -> None:
    """One profile for the dynamic batch, 1 to MAX_BATCH, best at 1; none for a static graph."""
    profile = builder.create_optimization_profile()  # type: ignore[attr-defined]
    dynamic = False
    for i in range(network.num_inputs):  # type: ignore[attr-defined]
        entry = network.get_input(i)  # type: ignore[attr-defined]
        if -1 in tuple(entry.shape):
            port = next(port for port in signature.inputs if port.name == entry.name)
            assert port.dims[0] == BATCH
            profile.set_shape(entry.name, *(signature.shape(port, batch) for batch in (1, 1, MAX_BATCH)))
            dynamic = True
    if dynamic and config.add_optimization_profile(profile) < 0:  # type: ignore[attr-defined]
        raise RuntimeError("the optimisation profile does not fit the network")


def _set_capabilities(trt: ModuleType, config: object, capabilities: tuple[str, ...]) -> None:
    """RTX: the GPUs to build for ahead of time; none is a portable engine."""
    config.num_compute_capabilities = len(capabilities)  # type: ignore[attr-defined]
    for i, capability in enumerate(capabilities):
        value = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
        if not config.set_compute_capability(value, i):  # type: ignore[attr-defined]
            raise UserError(f"TensorRT-RTX does not build for compute capability {capability}")


def _set_compatibility(trt: ModuleType, config: object, options: EngineOptions) -> None:
    """TensorRT: engines that other versions or other GPUs of at least this generation can load."""
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)  # type: ignore[attr-defined]
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS  # type: ignore[attr-defined]


def _monitor(trt: ModuleType, on_progress: Progress) -> object:
    """TensorRT's progress monitor, reporting its outermost phase."""
    totals: dict[str, int] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not totals:
                totals[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in totals:
                on_progress(phase, step + 1, totals[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            totals.pop(phase, None)

    return Monitor()
