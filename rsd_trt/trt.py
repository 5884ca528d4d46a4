"""The two TensorRTs: which is installed, and what it can do here. Both have the same Python API where we use it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from rsd_trt.errors import Unavailable
from rsd_trt.host import Gpu

Target = Literal["tensorrt", "rtx"]
MODULES: dict[Target, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
EXTRAS: dict[Target, str] = {"tensorrt": "trt", "rtx": "rtx"}
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

    def check_runs_on(self, gpu: Gpu | None) -> None:
        """Raises Unavailable unless this distribution runs on `gpu`."""
        if gpu is None:
            raise Unavailable("TensorRT engines need an NVIDIA GPU, and none is usable here", "Use: --backend ort")
        if self.target == "rtx" and gpu.compute_capability not in RTX_CAPABILITIES:
            raise Unavailable(
                f"TensorRT-RTX {self.version} runs on compute capability {', '.join(RTX_CAPABILITIES)}; "
                f"{gpu.name} has {gpu.compute_capability}",
                "Use: --backend ort, or pip install 'rsd-trt[trt]'",
            )


def find_distribution(target: Target | None = None) -> Distribution:
    """The TensorRT asked for, or the first one installed.

    Raises:
        Unavailable: it is not installed, or its libraries cannot be loaded.
    """
    wanted: tuple[Target, ...] = (target,) if target else ("tensorrt", "rtx")
    problems = []
    for name in wanted:
        try:
            return Distribution(name, importlib.import_module(MODULES[name]))
        except ImportError as error:
            problems.append(f"{MODULES[name]} cannot be imported ({error})")
    extras = " or ".join(f"'rsd-trt[{EXTRAS[name]}]'" for name in wanted)
    raise Unavailable("; ".join(problems), f"Install it: pip install {extras}")


def runnable_distribution(gpu: Gpu | None) -> Distribution:
    """The installed TensorRT that runs on `gpu`; of two, the full TensorRT.

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
