"""The TensorRT distributions: which is installed, and what it can do here. They have one Python API where we use it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from rsd_trt.errors import Unavailable, installing
from rsd_trt.host import Gpu

# `lean` is TensorRT's small runtime: it builds nothing, and loads the full TensorRT's version-compatible engines.
Target = Literal["tensorrt", "rtx", "lean"]
EngineKind = Literal["tensorrt", "rtx"]
MODULES: dict[Target, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx", "lean": "tensorrt_lean"}
EXTRAS: dict[Target, str] = {"tensorrt": "trt", "rtx": "rtx", "lean": "lean"}
# What TensorRT-RTX builds for and runs on, but for 7.5: it has no float32 matrix product there, and the codec has one.
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class Distribution:
    """An installed TensorRT."""

    target: Target
    module: ModuleType

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def kind(self) -> EngineKind:
        """The engines that it loads, as the manifest names them."""
        return "rtx" if self.target == "rtx" else "tensorrt"

    def check_runs_on(self, gpu: Gpu | None) -> None:
        """Raises Unavailable unless this distribution runs on `gpu`. Nothing of the lean runtime may be called before:
        without a driver it does not raise, but ends the process."""
        if gpu is None:
            raise Unavailable("TensorRT engines need an NVIDIA GPU, and none is usable here", "Use: --backend ort")
        if self.target == "rtx" and gpu.compute_capability not in RTX_CAPABILITIES:
            raise Unavailable(
                f"TensorRT-RTX {self.version} runs on compute capability {', '.join(RTX_CAPABILITIES)}; "
                f"{gpu.name} has {gpu.compute_capability}",
                f"Use: --backend ort, or {installing('trt', 'lean')}",
            )


def find_distribution(target: Target | None = None) -> Distribution:
    """The TensorRT asked for, or the first one installed.

    Raises:
        Unavailable: it is not installed, or its libraries cannot be loaded.
    """
    wanted: tuple[Target, ...] = (target,) if target else tuple(MODULES)
    problems = []
    for name in wanted:
        try:
            return Distribution(name, importlib.import_module(MODULES[name]))
        except ImportError as error:
            problems.append(f"{MODULES[name]} cannot be imported ({error})")
    raise Unavailable("; ".join(problems), f"Install it: {installing(*(EXTRAS[name] for name in wanted))}")


def runnable_distribution(gpu: Gpu | None) -> Distribution:
    """The first installed TensorRT that runs on `gpu`: the full one, RTX, the lean runtime.

    Raises:
        Unavailable: there is none; with the reason for each that is installed.
    """
    first, problems = find_distribution(), []
    for name in MODULES if gpu is not None else (first.target,):
        try:
            distribution = find_distribution(name)
        except Unavailable:
            continue
        try:
            distribution.check_runs_on(gpu)
            return distribution
        except Unavailable as error:
            problems.append(error)
    raise Unavailable("; ".join(problem.message for problem in problems), problems[0].remedy)


def collecting_logger(trt: ModuleType, messages: list[str]) -> object:
    """A TensorRT logger that appends errors to `messages`: what fails returns None or False, and says why only here."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)

    return Logger()
