"""The backbone's graphs: buffers and shapes, on the CPU: a captured graph is stood in for by the calls that made it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from msgspec import structs

from rsd_trt.bundle import Bundle
from rsd_trt.config import MODES, Mode
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.runtime import graph_backbone, session
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.forward import EagerBackbone, Forward
from rsd_trt.runtime.graph_backbone import GraphBackbone
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.session import GraphSession, Launch, Session
from rsd_trt.runtime.speculate import RandomAcceptance

CPU = torch.device("cpu")
WORDS = ("pick up the bowl", "put the bowl on the plate", "lift", "open the drawer of the cabinet")


class Captures:
    """Counts the captures, and refuses to let buffers be replaced between them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, launch: Launch, device: torch.device, pool: object = None) -> SimpleNamespace:
        self.count += 1
        launch()
        return SimpleNamespace(replay=lambda: torch.inference_mode()(launch)())


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    for module in (graph_backbone, session):
        monkeypatch.setattr(module, "capture", found)
    monkeypatch.setattr(graph_backbone, "pinned", lambda shape, dtype: torch.zeros(tuple(shape), dtype=dtype))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", threading.get_ident)
    return found


def policies(bundle: Bundle, mode: Mode, count: int, tail: Literal["captured", "launched"]) -> list[Policy]:
    """The eager policy and the one of graphs."""
    config = bundle.config
    preprocess = Preprocessor(config.control, config.backbone, bundle.tokenizer(), CPU)
    eager: list[Session] = [Launcher(bundle, "torch", CPU).open(name, "dynamic") for name in ("propose", "predict")]
    components = (bundle.component("propose"), bundle.component("predict"))
    sessions = [GraphSession(component, CPU) for component in components] if tail == "captured" else eager
    rule = RandomAcceptance(0.5, 0) if mode == "random" else None
    eager_backbone, fused = bundle.backbone(), FusedBackbone(bundle.backbone())
    forwards = (
        Forward(
            config, EagerBackbone(eager_backbone, preprocess), eager_backbone.llama.embed_tokens, *eager, preprocess
        ),
        Forward(config, GraphBackbone(fused, preprocess), fused.embed_tokens, *sessions, preprocess),
    )
    return [Policy(config, forward, mode, environments=count, rule=rule) for forward in forwards]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tail", ["captured", "launched"])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_acts_as_the_eager_forward(
    bundle: Bundle,
    observe: Callable[..., Observation],
    captures: Captures,
    mode: Mode,
    tail: Literal["captured", "launched"],
    batch: int,
) -> None:
    wide = structs.replace(bundle.config.rsd, tolerance=(1.0,) * 6)  # random drafts are accepted now and then
    bundle = dataclasses.replace(bundle, config=structs.replace(bundle.config, rsd=wide))
    check(policies(bundle, mode, batch, tail), observe, batch)
    assert captures.count <= (2 if batch == 1 else 8)  # for all queries together: backbone and main head, by size


def check(both: list[Policy], observe: Callable[..., Observation], batch: int) -> None:
    eager, graphs = both
    for step in range(6):
        seen = [observe(eager.config.control, 10 * step + env, WORDS[env]) for env in range(batch)]
        environments = range(batch)
        for expected, found in zip(*(policy.act_batch(seen, environments) for policy in (eager, graphs)), strict=True):
            assert (found.route, found.prefix, found.full_query) == (
                expected.route,
                expected.prefix,
                expected.full_query,
            )
            assert found.token_agreement == expected.token_agreement
            np.testing.assert_allclose(found.actions, expected.actions, atol=1e-5)


def test_a_smaller_batch_after_a_larger_one_reads_its_own(
    bundle: Bundle, observe: Callable[..., Observation], captures: Captures
) -> None:
    eager, graphs = policies(bundle, "baseline", 4, "captured")
    seen = [observe(bundle.config.control, env, WORDS[env]) for env in range(4)]
    for environments in ([0, 1, 2, 3], [2], [1, 3], [0, 2, 3]):
        batch = [seen[env] for env in environments]
        for expected, found in zip(*(policy.act_batch(batch, environments) for policy in (eager, graphs)), strict=True):
            np.testing.assert_allclose(found.actions, expected.actions, atol=1e-5)
    assert captures.count == 6  # backbone and main head: of a batch of one, of two, and of three and four
