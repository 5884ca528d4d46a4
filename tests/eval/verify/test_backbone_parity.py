"""The proof that the backbone is right: what is equal passes, and an error of a weight or a pixel does not."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from timm_double import TimmDouble
from torch import Tensor, nn

from rsd_trt.bundle import Bundle
from rsd_trt.config import Dims
from rsd_trt.errors import Unavailable
from rsd_trt.eval.verify import backbone, oracle
from rsd_trt.eval.verify.backbone import (
    LIMITS,
    NO_LIMIT,
    ORACLE,
    Answers,
    BackboneRequest,
    exact_float32,
    verify_backbone,
    whole_parity,
)
from rsd_trt.eval.verify.inputs import INSTRUCTIONS, random_observations
from rsd_trt.eval.verify.result import BackboneParity, Limit, NotMeasured, worst
from rsd_trt.models.backbone import Backbone
from rsd_trt.presets import preset
from rsd_trt.runtime.preprocess import Preprocessor

CPU = torch.device("cpu")
NAN = float("nan")


@pytest.fixture(autouse=True)
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("timm") is None:
        monkeypatch.setattr(oracle, "timm_tower", TimmDouble)


def run(
    bundle: Bundle, precisions: tuple[str, ...] = ("bundle",), kinds: tuple[str, ...] = ("eager",), count: int = 32
) -> list[BackboneParity | NotMeasured]:
    request = BackboneRequest(kinds, precisions, CPU)  # type: ignore[arg-type]
    return list(verify_backbone(bundle, request, random_observations(bundle.config.control, count)))


def test_what_is_equal_passes(bundle: Bundle) -> None:
    results = run(bundle, ("bundle", "bf16"))
    rows = [(r.component, r.backend, r.precision, r.batch, r.reference) for r in results]  # type: ignore[union-attr]
    parts = [("towers.0", "timm"), ("towers.1", "timm"), ("language", "transformers")]
    exact, half = f"{ORACLE} fp32", f"{ORACLE} bf16"
    assert rows == [
        ("preprocessing", "eager", "fp32", "1", "PIL"),
        *((part, "eager", "fp32", "1", f"{name} fp32") for part, name in parts),
        *((part, "eager", "bf16", "1", f"{name} bf16") for part, name in parts),
        ("backbone", ORACLE, "bf16", "1", exact),
        *(("backbone", "eager", "fp32", batch, exact) for batch in ("1", "dynamic")),
        *(("backbone", "eager", "bf16", batch, ref) for batch in ("1", "dynamic") for ref in (exact, half)),
    ]
    for result in results:
        assert isinstance(result, BackboneParity)
        assert (result.exceeded, result.status, result.inputs) == ((), "passed", 32), result
        assert (result.token_mismatch is not None) == (result.component == "backbone")


@pytest.mark.parametrize(
    ("weight", "factor", "components"),
    [
        ("vision_backbone.featurizer.blocks.1.mlp.fc1.weight", 1.1, {"towers.0", "backbone"}),
        ("vision_backbone.fused_featurizer.pos_embed", 2, {"towers.1", "backbone"}),
        ("projector.fc1.weight", 1.1, {"backbone"}),
        ("proprio_projector.fc2.weight", 2, {"backbone"}),
        ("language_model.model.layers.2.mlp.up_proj.weight", 1.1, {"language", "backbone"}),
        ("language_model.model.norm.weight", 1.1, {"language", "backbone"}),
    ],
)
def test_an_error_of_a_weight_fails(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, weight: str, factor: float, components: set[str]
) -> None:
    original = bundle.backbone

    def wrong(self: Bundle, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Backbone:
        backbone = original(device, dtype)
        backbone.get_parameter(weight).mul_(factor)
        return backbone

    monkeypatch.setattr(backbone, "Oracle", lambda _: oracle.Oracle(original()))
    monkeypatch.setattr(Bundle, "backbone", wrong)
    failed = {r.component for r in run(bundle) if r.status == "failed"}
    assert failed == components


def test_a_wrong_pixel_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Preprocessor.pixels

    def shifted(self: Preprocessor, images: Tensor) -> Tensor:
        return real(self, images.roll(1, 2))

    monkeypatch.setattr(Preprocessor, "pixels", shifted)
    failed = {r.component for r in run(bundle) if r.status == "failed"}
    assert failed == {"preprocessing"}  # the oracle is shown the same pixels


def test_without_timm_the_reference_is_eager_and_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> nn.Module:
        raise Unavailable("timm is not installed")

    monkeypatch.setattr(oracle, "timm_tower", absent)
    results = run(bundle)
    assert [r.component for r in results if isinstance(r, NotMeasured)] == ["towers", "language", "backbone"]
    whole = [r for r in results if isinstance(r, BackboneParity) and r.component == "backbone"]
    assert {r.reference for r in whole} == {"eager fp32"}
    assert not any(r.exceeded for r in whole)


def test_what_cannot_run_here_is_not_measured(bundle: Bundle) -> None:
    results = run(bundle, ("fp8",), ("eager", "graph"), count=1)
    missing = [r for r in results if isinstance(r, NotMeasured)]
    assert [(r.backend, r.precision, r.status) for r in missing] == [
        (kind, "fp8", "not measured") for kind in ("eager", "graph")
    ]


def answers(count: int = 4) -> Answers:
    dims, generator = Dims(), torch.Generator().manual_seed(0)
    tokens = torch.zeros(count, dims.T, dims.D, dims.L, dtype=torch.int64)
    return Answers(torch.randn(count, 16, generator=generator), tokens, torch.zeros(count, dims.T, dims.A))


def test_what_the_robot_would_feel_is_counted() -> None:
    expected, config = answers(), preset("tiny", "tiny")
    found = dataclasses.replace(expected, tokens=expected.tokens.clone(), actions=expected.actions.clone())
    found.tokens[0, ..., 6] = 1
    found.actions[1, 2, 0] = config.rsd.tolerance[0] * 2
    result = whole_parity("graph", "bf16", "1", "x", expected, found, config, LIMITS["bf16"])
    assert result.token_mismatch == (0, 0, 0, 0, 0, 0, 0.25, 0)
    assert result.steps_beyond_tolerance == pytest.approx(1 / (4 * Dims().T))
    assert result.action_max_abs == pytest.approx(config.rsd.tolerance[0] * 2)


@pytest.mark.parametrize(
    ("count", "tokens", "steps", "exceeded"),
    [
        (64, 0, 0, ""),
        (31, 0, 0, ""),
        (29, 0, 0, "tokens that differ: up to 0.103% > 0.1%"),  # none of 3,712
        (64, 4, 0, "tokens that differ: up to 0.125% > 0.1%"),  # 4 of 8,192, the point estimate being half the limit
        (64, 0, 5, "steps that differ: up to 2.265% > 2.0%"),  # 5 of 512
        (2, 0, 0, "tokens that differ: up to 1.478% > 0.1%; steps that differ: up to 19.361% > 2.0%"),
    ],
)
def test_tokens_and_steps_are_judged_by_their_intervals(count: int, tokens: int, steps: int, exceeded: str) -> None:
    """A point estimate passes nothing: of few inputs nothing is shown."""
    expected, config = answers(count), preset("tiny", "tiny")
    found = dataclasses.replace(expected, tokens=expected.tokens.clone(), actions=expected.actions.clone())
    for i in range(tokens):
        found.tokens[i, 0, 0, 2] = 1
    for i in range(steps):
        found.actions[i, 0, 0] = 1
    result = whole_parity("graph", "fp32", "1", "x", expected, found, config, LIMITS["fp32"])
    assert "; ".join(result.exceeded) == exceeded
    assert result.status == ("failed" if exceeded else "passed")


def test_a_state_that_is_not_finite_fails() -> None:
    expected = answers()
    state = expected.final.clone()
    state[0, 0] = NAN
    found = dataclasses.replace(expected, final=state)
    assert whole_parity("x", "fp8", "1", "x", expected, found, preset("tiny", "tiny"), LIMITS["fp8"]).exceeded


def test_errors_are_the_worst_of_all_inputs() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert worst([(x, x), (torch.tensor([[1.0, 1.0]]), x[:1])]) == pytest.approx((1, 0.5**0.5))


def test_tf32_is_off_while_it_is_compared_and_as_it_was_after() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with exact_float32():
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, False)
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_what_is_rounded_may_be_some_times_as_far_as_rounding_leads(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the reference in either arithmetic, whatever the fixed limit of a part in bfloat16."""
    limits: dict[str, Limit] = {}
    real = backbone.whole_parity

    def kept(backend: str, arithmetic: Any, batch: Any, reference: str, *rest: Any) -> BackboneParity:
        if rest[-1] != NO_LIMIT:
            limits[reference] = rest[-1]
        return real(backend, arithmetic, batch, reference, *rest)

    monkeypatch.setattr(backbone, "whole_parity", kept)
    rows = run(bundle, ("bf16",), count=2)
    rounding = next(row for row in rows if isinstance(row, BackboneParity) and row.component == "backbone")
    assert [name.split()[-1] for name in limits] == ["fp32", "bf16"]
    assert [limit.cosine for limit in limits.values()] == [1 - n * (1 - rounding.cosine) for n in (2, 3)]


def test_noise_is_seeded_and_prompts_have_several_lengths(bundle: Bundle) -> None:
    control = bundle.config.control
    first, second = random_observations(control, 8), random_observations(control, 8)
    assert all((a.images == b.images).all() for a, b in zip(first, second, strict=True))
    assert len({len(x.instruction) for x in first}) == len(INSTRUCTIONS)
