"""Which TensorRT is taken, and what it says where it cannot run."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import tensorrt_rtx

from rsd_trt.errors import Unavailable, UserError, installing
from rsd_trt.host import Gpu
from rsd_trt.trt import MODULES, RTX_CAPABILITIES, Distribution, Target, find_distribution, runnable_distribution

ADA = Gpu("NVIDIA RTX 4090", "8.9", "600.1")
HOPPER = Gpu("NVIDIA H200", "9.0", "600.1")


def install(monkeypatch: pytest.MonkeyPatch, *targets: Target) -> None:
    """Only these TensorRTs can be imported."""
    real = importlib.import_module

    def fake(name: str) -> ModuleType:
        if name not in MODULES.values():
            return real(name)
        if name in [MODULES[target] for target in targets]:
            return ModuleType(name)
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", fake)


@pytest.mark.parametrize(
    ("installed", "asked", "found"),
    [
        (("tensorrt", "rtx"), None, "tensorrt"),
        (("tensorrt", "rtx"), "rtx", "rtx"),
        (("rtx",), None, "rtx"),
        (("tensorrt",), "tensorrt", "tensorrt"),
        (("lean",), None, "lean"),
        (("tensorrt", "rtx", "lean"), "lean", "lean"),
    ],
)
def test_the_distribution_asked_for_or_the_first_one_installed(
    installed: tuple[Target, ...], asked: Target | None, found: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *installed)
    distribution = find_distribution(asked)
    assert (distribution.target, distribution.module.__name__) == (found, MODULES[found])


@pytest.mark.parametrize(
    ("installed", "asked", "message"),
    [
        (
            (),
            None,
            "tensorrt cannot be imported (No module named 'tensorrt'); tensorrt_rtx cannot be imported (No module "
            "named 'tensorrt_rtx'); tensorrt_lean cannot be imported (No module named 'tensorrt_lean'). "
            f"Install it: {installing('trt', 'rtx', 'lean')}",
        ),
        (
            ("rtx",),
            "tensorrt",
            f"tensorrt cannot be imported (No module named 'tensorrt'). Install it: {installing('trt')}",
        ),
        (
            ("tensorrt",),
            "rtx",
            f"tensorrt_rtx cannot be imported (No module named 'tensorrt_rtx'). Install it: {installing('rtx')}",
        ),
    ],
)
def test_a_missing_distribution_says_what_to_install(
    installed: tuple[Target, ...], asked: Target | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *installed)
    with pytest.raises(UserError) as error:
        find_distribution(asked)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("target", "gpu", "message"),
    [
        ("tensorrt", ADA, None),
        ("tensorrt", HOPPER, None),
        ("rtx", ADA, None),
        (
            "rtx",
            HOPPER,
            "TensorRT-RTX 1.2.3 runs on compute capability 8.0, 8.6, 8.9, 12.0, 12.1; NVIDIA H200 has 9.0. "
            f"Use: --backend ort, or {installing('trt', 'lean')}",
        ),
        ("lean", HOPPER, None),
        ("lean", None, "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort"),
        ("rtx", None, "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort"),
        ("tensorrt", None, "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort"),
    ],
)
def test_where_a_distribution_runs(target: Target, gpu: Gpu | None, message: str | None) -> None:
    module = ModuleType("double")
    module.__version__ = "1.2.3"  # type: ignore[attr-defined]
    distribution = Distribution(target, module)
    if message is None:
        distribution.check_runs_on(gpu)
        return
    with pytest.raises(UserError) as error:
        distribution.check_runs_on(gpu)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("installed", "gpu", "found"),
    [
        (("tensorrt", "rtx"), ADA, "tensorrt"),
        (("rtx",), ADA, "rtx"),
        (("tensorrt", "rtx"), HOPPER, "tensorrt"),
        (("tensorrt", "lean"), HOPPER, "tensorrt"),
        (("rtx", "lean"), HOPPER, "lean"),
        (("rtx", "lean"), ADA, "rtx"),
        (("lean",), ADA, "lean"),
        (("lean",), None, "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort"),
        ((), ADA, "tensorrt cannot be imported (No module named 'tensorrt'); tensorrt_rtx cannot be imported "),
        ((), None, "tensorrt cannot be imported (No module named 'tensorrt'); tensorrt_rtx cannot be imported "),
        (("rtx",), None, "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort"),
        (("tensorrt", "rtx"), None, "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort"),
        (("rtx",), HOPPER, "TensorRT-RTX 1.2.3 runs on compute capability 8.0, "),
    ],
)
def test_the_first_distribution_that_runs_on_the_gpu_is_taken(
    installed: tuple[Target, ...], gpu: Gpu | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *installed)
    monkeypatch.setattr(Distribution, "version", "1.2.3")
    if found in MODULES:
        assert runnable_distribution(gpu).target == found
        return
    with pytest.raises(Unavailable) as error:
        runnable_distribution(gpu)
    assert str(error.value).startswith(found)


def test_the_capabilities_are_those_of_the_installed_rtx() -> None:
    names = {f"SM{capability.replace('.', '')}" for capability in RTX_CAPABILITIES}
    assert names == set(tensorrt_rtx.ComputeCapability.__members__) - {"NONE", "CURRENT", "SM75"}
    assert find_distribution("rtx").version == tensorrt_rtx.__version__
