"""Which backend opens, and what the others say."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rsd_trt import host, weights
from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, MODES, BackboneKind, BackbonePrecision, Backend, Component, Mode
from rsd_trt.errors import UserError
from rsd_trt.export.to_onnx import example_inputs
from rsd_trt.manifest import folder_of, read_manifest
from rsd_trt.runtime import backends
from rsd_trt.runtime.backends import Launcher, check_backend, default_backbone, open_backbone
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.session import TorchSession
from rsd_trt.runtime.speculate import RandomAcceptance
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
            "nothing of {bundle} is exported in {engines}/tiny. "
            "Export it: rsd-trt export {bundle} --precision fp32 -o {engines}",
        ),
    ],
)
def test_what_cannot_run_here_says_what_to_use(bundle: Bundle, tmp_path: Path, backend: Backend, message: str) -> None:
    with pytest.raises(UserError) as error:
        Launcher(bundle, backend, CPU, engines=tmp_path).open("propose", "1")
    assert str(error.value) == message.format(engines=tmp_path, bundle=bundle.path)


@pytest.mark.parametrize(
    ("kind", "precision", "message"),
    [
        ("eager", "fp8", "backbone precision fp8 does not go with --backbone eager: .* Use: --backbone compiled"),
        ("graph", "fp8", "backbone precision fp8 does not go with --backbone graph: .* Use: --backbone compiled"),
        ("graph", "bf16", "backbone graph needs a CUDA device, not cpu. Use: --backbone eager"),
        ("compield", "bf16", "backbone 'compield' is unknown; did you mean 'compiled'?"),
        ("eager", "int4", "backbone precision 'int4' is unknown"),
    ],
)
def test_a_backbone_that_cannot_run_like_that(
    bundle: Bundle, kind: BackboneKind, precision: BackbonePrecision, message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        open_backbone(bundle, CPU, kind, precision)


def test_fp8_needs_widths_that_the_products_take(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="widths that are multiples of 16: hidden is 32, intermediate 88"):
        backends.check_fp8(bundle, CPU)


def test_draft_and_head_are_not_run_in_every_precision(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="precision 'fp8' is unknown"):
        Launcher(bundle, "torch", CPU, "fp8")


def test_a_policy_says_which_exports_it_runs(bundle: Bundle, exported: Callable[..., Path]) -> None:
    engines = exported("fp32")
    exports = Policy.load(bundle, backend="ort", engines=engines).exports
    manifest = read_manifest(folder_of(bundle, engines), bundle)
    for component in ("propose", "predict"):
        artefact = manifest.find(component, "fp32", "1", "onnx")
        assert artefact is not None
        assert exports.pop(component) == artefact.files[0].sha256
    assert not exports
    assert Policy.load(bundle).exports == {}


@pytest.mark.parametrize("mode", MODES)
def test_a_query_reaches_its_launches_in_nine_calls(
    bundle: Bundle, exported: Callable[..., Path], observe: Callable[..., Observation], mode: Mode
) -> None:
    rule = RandomAcceptance(0.5, 0) if mode == "random" else None
    policy = Policy.load(bundle, mode, "ort", engines=exported("fp32"), rule=rule)
    calls: list[list[str]] = []

    def launch() -> None:
        stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent.name == "runtime"]
        ours = [frame.name for frame in stack if not Path(frame.filename).name.startswith("test_")]
        calls.append([*ours[ours.index("act_batch") :], "launch"])

    policy.act(observe(bundle.config.control, 1))
    for made in policy._forward._vision._made.values() if policy._forward._vision else ():
        made.launch = launch
    for session in policy._forward.sessions.values():
        for batch, (buffers, _) in session._prepared.items():  # type: ignore[attr-defined]
            session._prepared[batch] = buffers, launch  # type: ignore[attr-defined]
    (query,) = policy.act_batch([observe(bundle.config.control, 0)], [0])
    assert len(calls) == (query.checked + query.full_query)
    assert max(map(len, calls)) <= 9, calls


def test_what_is_compiled_needs_triton(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="backbone compiled needs Triton, which"):
        open_backbone(bundle, torch.device("cuda"), "compiled")
    with pytest.raises(UserError, match=r"backend compiled needs Triton, which .* Use: --backend graph"):
        Launcher(bundle, "compiled", torch.device("cuda")).open("propose", "1")


@pytest.mark.parametrize("backend", ["graph", "compiled"])
def test_cuda_graphs_need_a_gpu(bundle: Bundle, backend: Backend) -> None:
    with pytest.raises(UserError, match=f"backend {backend} needs a CUDA device, not cpu. Use: --backend torch or ort"):
        Launcher(bundle, backend, CPU).open("propose", "1")


@pytest.mark.parametrize(
    ("backend", "device", "kind"),
    [
        ("torch", "cuda", "eager"),
        ("ort", "cuda", "graph"),
        ("compiled", "cuda", "compiled"),
        ("compiled", "cpu", "eager"),
    ],
)
def test_the_backbone_that_goes_with_a_backend(backend: Backend, device: str, kind: BackboneKind) -> None:
    assert default_backbone(backend, torch.device(device)) == kind


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
    with pytest.raises(UserError, match=r"nothing of .* is exported in .*\. Export it: .* --target rtx"):
        Launcher(bundle, "trt", torch.device("cuda:1"), "fp16", tmp_path).open("head", "dynamic")
    assert asked == ["cuda:1"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("grahp", "; did you mean 'graph'?"),
        ("trtt", "; did you mean 'trt'?"),
        ("x", " (one of: compiled, graph, ort, torch, trt)"),
    ],
)
def test_an_unknown_backend_is_refused(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        check_backend(name)
    assert str(error.value) == f"backend {name!r} is unknown{hint}"


def test_half_precision_is_of_the_weights_not_of_the_ports(bundle: Bundle, exported: Callable[..., Path]) -> None:
    for backend in ("torch", "ort"):
        session = Launcher(bundle, backend, CPU, "fp16", exported("fp16", "propose")).open("propose", "dynamic")
        logits = session.run(example_inputs(session.signature, 2))["logits"]
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
