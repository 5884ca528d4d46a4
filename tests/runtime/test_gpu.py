"""What only a GPU can show: CUDA graphs, ONNX Runtime's CUDA provider, TensorRT, and no allocation when warm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from examples.reference_policy.studies.fp8_sensitivity import sensitivity
from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, COMPONENTS, MODES, BackboneKind, Backend, Mode
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.components import ProfileRequest, profile
from rsd_trt.eval.verify.backbone import BackboneRequest, exact_float32, verify_backbone
from rsd_trt.eval.verify.components import VerifyRequest, verify
from rsd_trt.eval.verify.inputs import INSTRUCTIONS, random_observations
from rsd_trt.eval.verify.result import BackboneParity, Parity
from rsd_trt.export.run import ExportRequest, export_bundle
from rsd_trt.export.to_engine import EngineOptions, check_options
from rsd_trt.presets import byte_tokenizer, conventions, initialise, preset
from rsd_trt.runtime.backends import Launcher, open_forward
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.speculate import RandomAcceptance
from rsd_trt.trt import runnable_distribution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


def has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


ORT = pytest.param("ort", marks=pytest.mark.skipif(not has_cuda_provider(), reason="no onnxruntime-gpu"))


@pytest.fixture(scope="module")
def engines(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    export_bundle(bundle, ExportRequest(folder), lambda _: None, lambda *_: None)
    return folder


@pytest.mark.parametrize("backend", ["graph", "compiled", ORT])
def test_every_component_equals_pytorch(bundle: Bundle, engines: Path, backend: Backend) -> None:
    results = list(verify(bundle, VerifyRequest((backend,), CUDA, engines=engines)))
    assert len(results) == 2 * len(COMPONENTS)
    for result in results:
        assert isinstance(result, Parity), result
        assert not result.exceeded, result


@pytest.mark.parametrize("backend", ["graph", "compiled", ORT])
def test_warm_sessions_allocate_nothing(bundle: Bundle, engines: Path, backend: Backend) -> None:
    request = ProfileRequest((backend,), (1, 8), CUDA, "fp32", engines, 50, 10)
    rows = list(profile(bundle, request))
    assert {(row.allocations, row.grown) for row in rows} == {(0, 0)}


@pytest.mark.parametrize("mode", ["baseline", "rsd", "shadow"])
@pytest.mark.parametrize("backend", ["graph", "compiled", ORT])
def test_every_backend_acts_as_pytorch(
    bundle: Bundle, engines: Path, backend: Backend, mode: Mode, observe: Callable[..., Observation]
) -> None:
    slow, fast = (Policy.load(bundle, mode, name, "cuda", engines=engines) for name in ("torch", backend))
    for seed in range(6):
        seen = observe(bundle.config.control, seed)
        np.testing.assert_allclose(fast.act(seen), slow.act(seen), atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("backbone", ["graph", "compiled"])
def test_every_backbone_acts_as_the_eager_one(
    bundle: Bundle, observe: Callable[..., Observation], backbone: BackboneKind, batch: int
) -> None:
    """In every mode; drafts of an untrained bundle are accepted now and then with a wide tolerance."""
    rsd = structs.replace(bundle.config.rsd, tolerance=(1.0,) * ARM_DIMS)
    wide = dataclasses.replace(bundle, config=structs.replace(bundle.config, rsd=rsd))
    environments = range(batch)
    with exact_float32():
        for mode in MODES:
            eager, fast = (
                Policy.load(
                    wide,
                    mode,
                    "graph",
                    "cuda",
                    environments=batch,
                    batch=batch,
                    backbone=kind,
                    rule=RandomAcceptance(0.5, 0) if mode == "random" else None,
                )
                for kind in ("eager", backbone)
            )
            routes = set()
            for step in range(8):
                seen = [observe(wide.config.control, 10 * step + env, "") for env in environments]  # as in the warm-up
                answers = (policy.act_batch(seen, environments) for policy in (eager, fast))
                for expected, found in zip(*answers, strict=True):
                    assert (found.route, found.prefix, found.fault) == (expected.route, expected.prefix, None)
                    np.testing.assert_allclose(found.actions, expected.actions, atol=1e-4)
                    routes.add(found.route)
            assert len(routes) > 1 or mode == "baseline"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("backbone", ["graph", "compiled"])
def test_openvla_ofts_head_on_every_backbone(
    tmp_path: Path, observe: Callable[..., Observation], backbone: BackboneKind, batch: int
) -> None:
    """Attention to both sides and action tokens, with prompts of different lengths in a batch."""
    oft = initialise(tmp_path / "oft", "tiny", seed=0, head="oft-l1")
    words = ("pick up the bowl", "lift", "put the bowl on the plate")
    with exact_float32():
        eager, fast = (open_forward(Launcher(oft, "graph", CUDA), "dynamic", kind) for kind in ("eager", backbone))
        for step in range(3):
            seen = [observe(oft.config.control, 10 * step + env, words[env]) for env in range(batch)]
            expected = eager.full(seen)
            hidden = eager.hidden.clone()
            found = fast.full(seen)
            assert found.tokens is None
            torch.testing.assert_close(fast.hidden, hidden, rtol=0, atol=1e-3)
            # One level of one pixel, where a rounding falls otherwise in a padded batch, moves an action by up to 2e-3.
            np.testing.assert_allclose(found.actions[..., :ARM_DIMS], expected.actions[..., :ARM_DIMS], atol=2e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_openvlas_pixels_on_the_device_are_the_hosts(observe: Callable[..., Observation], compiled: bool) -> None:
    """In units of 8-bit levels; one level where a rounding falls otherwise."""
    control = conventions("openvla-oft")
    backbone = structs.replace(preset("tiny", "tiny").backbone, image_size=224)
    here, there = (Preprocessor(control, backbone, byte_tokenizer(), device) for device in (torch.device("cpu"), CUDA))
    if compiled:
        there.compile()
    images = torch.from_numpy(observe(control).images[None])
    std = torch.tensor(backbone.towers[0].std).view(3, 1, 1)
    error = (there.pixels(images)[:, :, 0].cpu() - here.pixels(images)[:, :, 0]).abs() * std * 255
    assert error.mean() < 0.01


def warm_forward(bundle: Bundle, count: int) -> tuple[Forward, list[list[Observation]]]:
    """A forward whose graphs are captured, and fresh batches of the same size."""
    forward = open_forward(Launcher(bundle, "graph", CUDA), "dynamic", "graph")
    seen = random_observations(bundle.config.control, 8 * count)
    seen = [dataclasses.replace(x, instruction=INSTRUCTIONS[0]) for x in seen]
    batches = [seen[i : i + count] for i in range(0, len(seen), count)]
    for some in batches[:2]:
        decide(forward, some)
    return forward, batches


@torch.inference_mode()
def decide(forward: Forward, batch: list[Observation]) -> None:
    """A rejected query: two decisions."""
    forward.check(batch)
    forward.full(batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_warm_queries_allocate_nothing(bundle: Bundle, batch: int) -> None:
    forward, batches = warm_forward(bundle, batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for seen in batches:
        decide(forward, seen)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for counter in ("allocation.all.allocated", "num_alloc_retries", "num_device_alloc"):
        assert after.get(counter) == before.get(counter), counter


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decision_waits_for_the_device_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    forward, batches = warm_forward(bundle, batch)
    real, waits = torch.cuda.Stream.synchronize, []

    def wait(self: torch.cuda.Stream) -> None:
        waits.append(1)
        torch.cuda.set_sync_debug_mode("default")
        real(self)
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(torch.cuda.Stream, "synchronize", wait)
    torch.cuda.set_sync_debug_mode("error")  # any other wait raises
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=CUDA).item()
        for seen in batches:
            decide(forward, seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 2 * len(batches)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no FP8")
def test_fp8_is_close(tmp_path: Path) -> None:
    small = initialise(tmp_path / "small", "reference", seed=0)
    seen = random_observations(small.config.control, 32)
    request = BackboneRequest(("graph", "compiled"), ("bundle", "bf16", "fp8"), CUDA)
    results = list(verify_backbone(small, request, seen))
    for result in results:
        if not isinstance(result, BackboneParity):
            refused = (result.backend, result.precision) == ("graph", "fp8")
            assert refused or "timm is not installed" in result.reason
        else:
            assert not result.exceeded, result
    losses = {row.what: row for row in sensitivity(small, CUDA, seen)}
    assert losses["all"].cosine < losses["the MLPs"].cosine < 1


def test_tensorrt_equals_pytorch_or_says_why_not(bundle: Bundle, tmp_path: Path) -> None:
    try:
        distribution = runnable_distribution(host.gpu())
        check_options(distribution, EngineOptions(), host.gpu())
    except UserError as error:
        pytest.skip(f"not measured: {error}")
    export_bundle(bundle, ExportRequest(tmp_path, distribution=distribution), lambda _: None, lambda *_: None)
    for result in verify(bundle, VerifyRequest(("trt",), CUDA, engines=tmp_path)):
        assert isinstance(result, Parity), result
        assert not result.exceeded, result
