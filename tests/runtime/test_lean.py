"""TensorRT's lean runtime on a GPU: what it cannot load it refuses, with one line of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.export.to_engine import EngineOptions, build_engine
from rsd_trt.export.to_onnx import export_onnx
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.trt_session import TrtSession
from rsd_trt.trt import Distribution, find_distribution, runnable_distribution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.fixture
def lean() -> Distribution:
    try:
        found = find_distribution("lean")
        found.check_runs_on(host.gpu())
    except UserError as error:
        pytest.skip(f"not measured: {error}")
    return found


@pytest.mark.parametrize("plan", ["damaged", "rtx"])
def test_it_refuses_what_it_cannot_load(
    bundle: Bundle, lean: Distribution, tmp_path: Path, plan: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "decoder.engine"
    file.write_bytes(b"ftrt" + bytes(4096) if plan == "damaged" else rtx_plan(bundle, tmp_path))
    capfd.readouterr()
    with pytest.raises(UserError) as error:
        TrtSession(file, bundle.component("decoder").signature, CUDA, lean)
    told = str(error.value)
    assert told.startswith(f"lean {lean.version} cannot load {file}")
    assert told.endswith(". Rebuild: rsd-trt export --force")
    assert "\n" not in told
    assert capfd.readouterr() == ("", ""), "TensorRT prints beside our line"


def rtx_plan(bundle: Bundle, folder: Path) -> bytes:
    """TensorRT-RTX's engine of the decoder; skips where it is not installed."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    module = bundle.component("decoder")
    (onnx,) = export_onnx(module, "1", folder / "decoder.onnx")
    rtx = find_distribution("rtx")
    return build_engine(onnx, module.signature, rtx, EngineOptions(), folder / "cache", lambda *_: None)


def test_it_asks_for_a_version_compatible_engine(bundle: Bundle, lean: Distribution, tmp_path: Path) -> None:
    if runnable_distribution(host.gpu()).target != "lean":
        pytest.skip("another TensorRT comes first here")
    with pytest.raises(UserError) as error:
        Launcher(bundle, "trt", CUDA, engines=tmp_path).open("propose", "1")
    assert "is exported in " in str(error.value)
    assert "--target tensorrt --version-compatible" in str(error.value)
