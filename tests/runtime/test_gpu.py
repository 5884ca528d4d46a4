"""What only a GPU can show: CUDA graphs, ONNX Runtime's CUDA provider, TensorRT, and no allocation when warm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, Mode
from rsd_trt.errors import UserError
from rsd_trt.eval.latency import ProfileRequest, profile
from rsd_trt.eval.parity import Parity, verify
from rsd_trt.export.run import ExportRequest, export_bundle
from rsd_trt.flavour import find_flavour
from rsd_trt.runtime.backends import Backend
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def engines(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    export_bundle(bundle, ExportRequest(folder), lambda _: None, lambda *_: None)
    return folder


@pytest.mark.parametrize("backend", ["graph", "ort"])
def test_every_component_equals_pytorch(bundle: Bundle, engines: Path, backend: Backend) -> None:
    results = list(verify(bundle, [backend], CUDA, "fp32", engines, rows=64))
    assert len(results) == 2 * len(COMPONENTS)
    for result in results:
        assert isinstance(result, Parity), result
        assert not result.exceeded, result


def test_warm_sessions_allocate_nothing(bundle: Bundle, engines: Path) -> None:
    request = ProfileRequest((("graph", True), ("ort", True), ("ort", False)), (1, 8), CUDA, "fp32", engines, 50, 10)
    rows = list(profile(bundle, request))
    assert {(row.allocations, row.grown) for row in rows} == {(0, 0)}


@pytest.mark.parametrize("mode", ["baseline", "rsd", "shadow"])
def test_every_backend_acts_alike(
    bundle: Bundle, engines: Path, mode: Mode, observe: Callable[..., Observation]
) -> None:
    chosen: dict[Backend, list[np.ndarray]] = {}  # type: ignore[type-arg]
    for backend in ("torch", "graph", "ort"):
        policy = Policy.load(bundle, mode, backend, "cuda", engines=engines)
        chosen[backend] = [policy.act(observe(bundle.config.control, seed)) for seed in range(6)]
    for backend in ("graph", "ort"):
        for expected, found in zip(chosen["torch"], chosen[backend], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_tensorrt_equals_pytorch_or_says_why_not(bundle: Bundle, tmp_path: Path) -> None:
    from rsd_trt import host

    try:
        flavour = find_flavour()
        flavour.check_runs_on(host.gpu())
    except UserError as error:
        pytest.skip(f"not measured: {error}")
    export_bundle(bundle, ExportRequest(tmp_path, flavour=flavour), lambda _: None, lambda *_: None)
    for result in verify(bundle, ["trt"], CUDA, "fp32", tmp_path, rows=64):
        assert isinstance(result, Parity), result
        assert not result.exceeded, result
