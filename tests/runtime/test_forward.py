"""Checks and full queries: one launch from frames to actions, and a backbone that runs no oftener than it must."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rsd_trt.bundle import Bundle, save
from rsd_trt.config import Backend, BundleConfig, HeadConfig, HiddenDraftConfig
from rsd_trt.errors import UserError
from rsd_trt.models.signature import Signature
from rsd_trt.models.vision_draft import instruction_rows
from rsd_trt.presets import byte_tokenizer, preset
from rsd_trt.runtime import check
from rsd_trt.runtime.backends import Launcher, open_forward
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.session import Buffers, GraphSession

CPU = torch.device("cpu")
WORDS = ("pick up the bowl", "lift")


def forward_of(bundle: Bundle, backend: Backend = "torch", engines: Path = Path()) -> Forward:
    return open_forward(Launcher(bundle, backend, CPU, engines=engines), "dynamic")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny bundle whose draft reads the backbone's last hidden state, and whose head the draft's tokens."""
    from rsd_trt.bundle import outline

    config: BundleConfig = replace(
        preset("tiny", "hidden"),
        draft=HiddenDraftConfig(width=16, mlp_width=32, positions=1),
        head=HeadConfig("conditioned", feature=32, width=16, embedding=4),
    )
    torch.manual_seed(0)
    parts = {part: outline(config, part).to_empty(device="cpu") for part in ("backbone", "draft", "head", "codec")}
    for part in parts.values():
        for tensor in part.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 0.3) if tensor.is_floating_point() else tensor.zero_()
    return save(tmp_path_factory.mktemp("bundles") / "hidden", config, parts, byte_tokenizer())


def counting(forward: Forward) -> list[int]:
    """The sizes of the batches that the backbone runs."""
    ran: list[int] = []
    real = forward._backbone

    def run(observations: Sequence[Observation]) -> Tensor:
        ran.append(len(observations))
        return real(observations)

    forward._backbone = run
    return ran


@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_a_check_is_the_component_on_what_is_seen(
    bundle: Bundle, exported: Callable[..., Path], observe: Callable[..., Observation], backend: Backend
) -> None:
    config = bundle.config
    forward = forward_of(bundle, backend, exported("fp32"))
    ran = counting(forward)
    embed, propose = bundle.backbone().llama.embed_tokens, bundle.component("propose")
    for batch in (3, 1, 2, 3):  # buffers of a size are used again, and for other instructions
        seen = [observe(config.control, 10 * batch + i, WORDS[(batch + i) % 2]) for i in range(batch)]
        prompts = [torch.tensor(forward._preprocess.prompt_tokens(x.instruction)) for x in seen]
        rows = [instruction_rows(embed(prompt), config.draft.instruction) for prompt in prompts]  # type: ignore[union-attr]
        frames, states = (
            torch.from_numpy(np.stack([getattr(x, name) for x in seen])) for name in ("images", "proprio")
        )
        with torch.no_grad():
            tokens, actions, logits, finite = propose(frames, states, torch.stack(rows))
        guess = forward.check(seen)
        np.testing.assert_array_equal(guess.tokens, tokens.numpy())
        np.testing.assert_allclose(guess.actions, actions.numpy(), atol=1e-5)
        np.testing.assert_allclose(guess.logits.reshape(logits.shape), logits.numpy(), atol=1e-4)
        assert guess.finite.tolist() == finite.tolist() == [True] * batch
    assert ran == []


class Operations(TorchDispatchMode):
    """Notes every operation of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.add(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


def test_a_check_on_onnxruntime_runs_no_operation_of_pytorch(
    bundle: Bundle, exported: Callable[..., Path], observe: Callable[..., Observation]
) -> None:
    forward = forward_of(bundle, "ort", exported("fp32"))
    control = bundle.config.control
    for words in WORDS:
        forward.warm_up(observe(control, 0, words))
    for seed, words, allowed in ((1, WORDS[1], set()), (2, WORDS[0], {"select", "copy_"})):
        with Operations() as operations:
            forward.check([observe(control, seed, words)])
        assert operations.seen <= allowed  # another instruction's rows are copied into the bound buffer


def test_a_captured_check_keeps_what_it_reads(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph keeps nothing alive: memory that is freed goes to other tensors, and both write to it."""
    read: list[weakref.ref[Tensor]] = []

    def capture(launch: Callable[[], None], device: torch.device) -> SimpleNamespace:
        launch()
        return SimpleNamespace(replay=lambda: None)  # forgets what it captured

    def allocate(signature: Signature, batch: int, device: torch.device) -> Buffers:
        made = real(signature, batch, CPU)
        read.extend(weakref.ref(tensor) for tensor in made.inputs.values())
        return made

    real = Buffers.allocate
    monkeypatch.setattr(check, "capture", capture)
    monkeypatch.setattr(check, "_pinned", torch.zeros_like)
    monkeypatch.setattr(Buffers, "allocate", allocate)
    session = GraphSession(bundle.component("propose"), CPU)
    made = check._Buffers(session, 1, SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    gc.collect()
    assert read and all(tensor() is not None for tensor in read), made


def test_a_hidden_draft_is_a_backbone_pass_and_a_rejected_check_adds_the_head_alone(
    hidden: Bundle, observe: Callable[..., Observation]
) -> None:
    forward = forward_of(hidden)
    ran = counting(forward)
    seen = [observe(hidden.config.control, i, WORDS[i % 2]) for i in range(3)]
    guess = forward.check(seen)
    tokens = guess.tokens[[2, 0]].copy()
    found = forward.full([seen[2], seen[0]], tokens)
    assert ran == [3]
    expected = forward.full([seen[2], seen[0]], tokens)
    assert ran == [3, 2], "only what a check just before has computed is taken up again"
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.actions, expected.actions, atol=1e-5)
    forward.check(seen[:1])
    forward.full(seen[:2])
    assert ran == [3, 2, 1, 2]
    forward.check(seen[:1])
    seen[0].images[:] = seen[1].images  # a driver's one buffer, at its next query
    forward.begin(seen[:1])
    found = forward.full(seen[:1])
    assert ran == [3, 2, 1, 2, 1, 1]
    np.testing.assert_array_equal(found.tokens, forward.full(seen[:1]).tokens)


def test_a_conditioned_head_reads_its_condition(hidden: Bundle, observe: Callable[..., Observation]) -> None:
    forward, dims = forward_of(hidden), hidden.config.dims
    seen = [observe(hidden.config.control)]
    zeros = np.zeros((1, dims.T, dims.D, dims.C), np.int64)
    without = forward.full(seen).actions.copy()
    np.testing.assert_array_equal(forward.full(seen, zeros).actions, without)
    assert not np.array_equal(forward.full(seen, zeros + 3).actions, without)


@pytest.mark.parametrize("ask", ["begin", "full"])
def test_an_observation_that_does_not_fit_is_refused(
    bundle: Bundle, observe: Callable[..., Observation], ask: str
) -> None:
    forward, seen = forward_of(bundle), observe(bundle.config.control)
    with pytest.raises(UserError, match="proprio is float32"):
        getattr(forward, ask)([dataclasses.replace(seen, proprio=seen.proprio[:7])])
    with pytest.raises(UserError, match="images are uint8"):
        getattr(forward, ask)([dataclasses.replace(seen, images=seen.images[:1])])


def test_a_warm_up_leaves_nothing_to_be_made(bundle: Bundle, observe: Callable[..., Observation]) -> None:
    forward = forward_of(bundle)
    forward.warm_up(observe(bundle.config.control), batch=6)
    assert forward._vision is not None
    assert sorted(forward._vision._made) == [1, 2, 4, 6]
    assert forward.rows.cache_info().misses == 1
