"""The proof that the backbone is right: what is equal passes, and an error of a weight or a pixel does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from timm_double import TimmDouble
from torch import Tensor, nn

from rsd_trt.bundle import Bundle, save
from rsd_trt.config import Dims
from rsd_trt.errors import Unavailable, UserError
from rsd_trt.eval.verify import backbone, fp8_sensitivity, oracle
from rsd_trt.eval.verify.backbone import (
    LIMITS,
    ORACLE,
    Answers,
    BackboneParity,
    compare,
    exact_float32,
    verify_backbone,
    worst,
)
from rsd_trt.eval.verify.backbone_result import NO_LIMIT, Limit
from rsd_trt.eval.verify.components import NotMeasured, to_json
from rsd_trt.eval.verify.scenes import INSTRUCTIONS, random_observations
from rsd_trt.initialise import byte_tokenizer
from rsd_trt.models.backbone import Backbone
from rsd_trt.models.codec import Codec
from rsd_trt.models.draft import DraftModel
from rsd_trt.models.fast.products import PRODUCTS, every_product
from rsd_trt.models.head import build_head
from rsd_trt.presets import preset
from rsd_trt.runtime.preprocess import Preprocessor

CPU = torch.device("cpu")
NAN = float("nan")


@pytest.fixture(autouse=True)
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("timm") is None:
        monkeypatch.setattr(oracle, "timm_tower", TimmDouble)


def run(bundle: Bundle, precisions: tuple[str, ...] = ("bundle",)) -> list[BackboneParity | NotMeasured]:
    seen = random_observations(bundle.config.control, 3)
    return list(verify_backbone(bundle, ["eager"], precisions, CPU, seen))  # type: ignore[arg-type]


def test_what_is_equal_passes(bundle: Bundle) -> None:
    results = run(bundle, ("bundle", "bf16"))
    rows = [(r.component, r.backend, r.precision, r.batch, r.reference) for r in results]  # type: ignore[union-attr]
    parts = [("towers.0", "timm"), ("towers.1", "timm"), ("language", "transformers")]
    exact, half = f"{ORACLE} float32", f"{ORACLE} bfloat16"
    assert rows == [
        ("preprocessing", "eager", "float32", "1", "PIL"),
        *((part, "eager", "float32", "1", f"{name} float32") for part, name in parts),
        *((part, "eager", "bfloat16", "1", f"{name} bfloat16") for part, name in parts),
        ("backbone", ORACLE, "bfloat16", "1", exact),
        *(("backbone", "eager", "float32", batch, exact) for batch in ("1", "dynamic")),
        *(("backbone", "eager", "bfloat16", batch, ref) for batch in ("1", "dynamic") for ref in (exact, half)),
    ]
    for result in results:
        assert isinstance(result, BackboneParity)
        assert result.exceeded == (), result
        assert result.rows == 3
        assert to_json(result)["status"] == "passed"
        assert (result.flips is not None) == (result.component == "backbone")


@pytest.mark.parametrize(
    ("weight", "components"),
    [
        ("vision_backbone.featurizer.blocks.1.mlp.fc1.weight", {"towers.0", "backbone"}),
        ("vision_backbone.fused_featurizer.pos_embed", {"towers.1", "backbone"}),
        ("projector.fc1.weight", {"backbone"}),
        ("proprio_projector.fc2.weight", {"backbone"}),
        ("language_model.model.layers.2.mlp.up_proj.weight", {"language", "backbone"}),
        ("language_model.model.norm.weight", {"language", "backbone"}),
    ],
)
def test_an_error_of_a_weight_fails(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, weight: str, components: set[str]
) -> None:
    original = bundle.backbone

    def wrong(self: Bundle, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Backbone:
        backbone = original(device, dtype)
        backbone.get_parameter(weight).mul_(1.1)
        return backbone

    monkeypatch.setattr(backbone, "Oracle", lambda _: oracle.Oracle(original()))
    monkeypatch.setattr(Bundle, "backbone", wrong)
    failed = {r.component for r in run(bundle) if to_json(r)["status"] == "failed"}
    assert failed == components


def test_a_wrong_pixel_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Preprocessor.pixels

    def shifted(self: Preprocessor, images: Tensor) -> Tensor:
        return real(self, images.roll(1, 2))

    monkeypatch.setattr(Preprocessor, "pixels", shifted)
    failed = {r.component for r in run(bundle) if to_json(r)["status"] == "failed"}
    assert failed == {"preprocessing"}  # the oracle is shown the same pixels


def test_without_timm_the_reference_is_eager_and_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> nn.Module:
        raise Unavailable("timm is not installed")

    monkeypatch.setattr(oracle, "timm_tower", absent)
    results = run(bundle)
    assert [r.component for r in results if isinstance(r, NotMeasured)] == ["towers", "language"]
    whole = [r for r in results if isinstance(r, BackboneParity) and r.component == "backbone"]
    assert {r.reference for r in whole} == {"eager float32"}
    assert not any(r.exceeded for r in whole)


def test_what_cannot_run_here_is_not_measured(bundle: Bundle) -> None:
    seen = random_observations(bundle.config.control, 1)
    results = list(verify_backbone(bundle, ["eager", "graph"], ["fp8"], CPU, seen))
    missing = [r for r in results if isinstance(r, NotMeasured)]
    assert [(r.backend, r.precision) for r in missing] == [("graph", "fp8")]
    assert to_json(missing[0])["status"] == "not measured"
    assert not [r for r in results if isinstance(r, BackboneParity) and r.backend == "eager" and r.precision == "fp8"]


def answers(rows: int = 4) -> Answers:
    dims, generator = Dims(), torch.Generator().manual_seed(0)
    tokens = torch.zeros(rows, dims.T, dims.D, dims.L, dtype=torch.int64)
    states = torch.randn(2, rows, 16, generator=generator)
    return Answers(states[0], states[1], tokens[..., : dims.C], tokens, torch.zeros(rows, dims.T, dims.A))


def test_what_the_robot_would_feel_is_counted() -> None:
    expected, config = answers(), preset("tiny", "tiny")
    found = dataclasses.replace(expected, tokens=expected.tokens.clone(), actions=expected.actions.clone())
    found.tokens[0, ..., 6] = 1
    found.actions[1, 2, 0] = config.rsd.tolerance[0] * 2
    result = compare("graph", "bfloat16", "1", "x", expected, found, config, LIMITS["bfloat16"])
    assert result.flips == (0, 0, 0, 0, 0, 0, 0.25, 0)
    assert result.draft_flips == (0, 0, 0)
    assert result.steps_apart == pytest.approx(1 / (4 * Dims.T))
    assert result.action_max_abs == pytest.approx(config.rsd.tolerance[0] * 2)


@pytest.mark.parametrize("name", ["early", "final"])
def test_a_state_that_is_not_finite_fails(name: str) -> None:
    expected = answers()
    state = getattr(expected, name).clone()
    state[0, 0] = NAN
    found = dataclasses.replace(expected, **{name: state})
    assert compare("x", "fp8", "1", "x", expected, found, preset("tiny", "tiny"), LIMITS["fp8"]).exceeded


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
    real = backbone.compare

    def kept(backend: str, arithmetic: Any, batch: Any, reference: str, *rest: Any) -> BackboneParity:
        if rest[-1] != NO_LIMIT:
            limits[reference] = rest[-1]
        return real(backend, arithmetic, batch, reference, *rest)

    monkeypatch.setattr(backbone, "compare", kept)
    rows = list(verify_backbone(bundle, ["eager"], ["bf16"], CPU, random_observations(bundle.config.control, 2)))
    rounding = next(row for row in rows if isinstance(row, BackboneParity) and row.component == "backbone")
    assert [name.split()[-1] for name in limits] == ["float32", "bfloat16"]
    assert [limit.cosine for limit in limits.values()] == [1 - n * (1 - rounding.cosine) for n in (2, 3)]


def test_noise_is_seeded_and_prompts_have_several_lengths(bundle: Bundle) -> None:
    control = bundle.config.control
    first, second = random_observations(control, 8), random_observations(control, 8)
    assert all((a.images == b.images).all() for a, b in zip(first, second, strict=True))
    assert len({len(x.instruction) for x in first}) == len(INSTRUCTIONS)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny backbone whose widths are multiples of 16."""
    config = preset("tiny", "wide")
    language = dataclasses.replace(config.backbone.language, intermediate=96)
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, language=language))
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("wide") / "wide"
    parts = {
        "backbone": Backbone(config.backbone),
        "draft": DraftModel(config.draft, config.dims, config.hidden),
        "head": build_head(config.head, config.dims, config.hidden),
        "codec": Codec(config.codec, config.dims),
    }
    return save(path, config, parts, byte_tokenizer())


def test_the_loss_of_each_product_in_fp8(wide: Bundle) -> None:
    seen = random_observations(wide.config.control, 2)
    rows: Iterator[fp8_sensitivity.Sensitivity] = fp8_sensitivity.sensitivity(wide, CPU, seen)
    found = {row.what: row for row in rows}
    blocks = wide.config.backbone.language.blocks
    assert set(found) == {
        "all",
        "the MLPs",
        *(f"only {name}" for name in PRODUCTS),
        *(f"all but {name}" for name in PRODUCTS),
        *(f"all but blocks < {n}" for n in range(1, blocks - 1)),
        *(f"block {i}" for i in range(blocks - 1)),
    }
    assert found["all"].products == len(every_product(blocks)) == len(PRODUCTS) * (blocks - 1)
    assert found["the MLPs"].products == 2 * (blocks - 1)
    assert all(0.99 < row.cosine <= row.mean_cosine < 1 for row in found.values())
    assert found["all"].cosine == min(row.cosine for row in found.values())
    assert all(
        0 <= row.draft_flips <= 1 and 0 <= row.flips <= 1 and 0 <= row.steps_apart <= 1 for row in found.values()
    )
    assert found["all"].action_mean_abs > 0 == found["block 1"].draft_flips
    assert found["block 0"].early_cosine < found["block 1"].early_cosine == pytest.approx(1)  # the draft reads block 1


def test_widths_that_e4m3_cannot_take(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="intermediate 88"):
        list(fp8_sensitivity.sensitivity(bundle, CPU, random_observations(bundle.config.control, 1)))
