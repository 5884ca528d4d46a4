"""Which backend opens, and what the others say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rsd_trt import host, weights
from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, Component
from rsd_trt.errors import UserError
from rsd_trt.export.to_onnx import example_inputs
from rsd_trt.runtime import backends
from rsd_trt.runtime.backends import BACKENDS, Backend, Launcher, check_backend, open_backbone
from rsd_trt.runtime.session import TorchSession
from rsd_trt.trt import Distribution

CPU = torch.device("cpu")


@pytest.mark.parametrize("component", COMPONENTS)
def test_torch_runs_the_module_itself(bundle: Bundle, component: Component) -> None:
    session = Launcher(bundle, "torch", CPU).open(component, "dynamic")
    assert isinstance(session, TorchSession)
    outputs = session.run(example_inputs(session.signature, 3))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        port.name: session.signature.shape(port, 3) for port in session.signature.outputs
    }


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("graph", "backend graph needs a CUDA device, not cpu. Use: --backend torch or ort"),
        ("trt", "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort"),
        (
            "ort",
            "{engines}/tiny has no propose fp32 batch 1 (onnx). "
            "Build it: rsd-trt export {bundle} --precision fp32 -o {engines}",
        ),
    ],
)
def test_what_cannot_run_here_says_what_to_use(bundle: Bundle, tmp_path: Path, backend: Backend, message: str) -> None:
    with pytest.raises(UserError) as error:
        Launcher(bundle, backend, CPU, engines=tmp_path).open("propose", "1")
    assert str(error.value) == message.format(engines=tmp_path, bundle=bundle.path)


def test_a_compiled_backbone_needs_triton(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="backbone compiled needs Triton, which"):
        open_backbone(bundle, torch.device("cuda"), "compiled")


def test_the_engine_is_checked_against_the_device_that_runs_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def gpu(device: str) -> host.Gpu:
        asked.append(device)
        return host.Gpu("second card", "12.0", "600.1")

    monkeypatch.setattr(host, "gpu", gpu)
    monkeypatch.setattr(backends, "runnable_distribution", lambda gpu: Distribution("rtx", ModuleType("double")))
    monkeypatch.setattr(Distribution, "version", "1.2.3")
    with pytest.raises(UserError, match=r"has no head fp16 batch dynamic \(rtx\)\. Build it: .* --target rtx"):
        Launcher(bundle, "trt", torch.device("cuda:1"), "fp16", tmp_path).open("head", "dynamic")
    assert asked == ["cuda:1"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("grahp", "; did you mean 'graph'?"),
        ("trtt", "; did you mean 'trt'?"),
        ("x", " (one of: graph, ort, torch, trt)"),
    ],
)
def test_an_unknown_backend_is_refused(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        check_backend(name)
    assert str(error.value) == f"backend {name!r} is unknown{hint}"


def test_every_backend_is_known() -> None:
    assert [check_backend(name) for name in BACKENDS] == list(BACKENDS)


def test_half_precision_is_of_the_weights_not_of_the_ports(bundle: Bundle, exported: Callable[..., Path]) -> None:
    for backend in ("torch", "ort"):
        session = Launcher(bundle, backend, CPU, "fp16", exported("fp16")).open("head", "dynamic")
        (logits,) = session.run(example_inputs(session.signature, 2)).values()
        assert logits.dtype == torch.float32
        assert torch.equal(logits, logits.half().float()), "the logits were not computed in half precision"


def test_a_backbone_is_converted_while_it_is_loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that cannot hold the float32 weights of the bundle holds them in bfloat16."""
    state = bundle.backbone().state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    monkeypatch.setattr(weights, "free_memory", lambda _: sum(value.nbytes for value in state.values()) * 2 // 3)
    with pytest.raises(UserError, match="are free"):
        open_backbone(bundle, CPU, "eager")
    for key, value in open_backbone(bundle, CPU, "eager", "bf16").state_dict().items():
        assert torch.equal(value, state[key].bfloat16())
