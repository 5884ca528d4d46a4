"""The study of fp8: each choice of products, and what none can be made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from msgspec import structs

from examples.reference_policy.studies import fp8_sensitivity
from examples.reference_policy.studies.fp8_sensitivity import sensitivity
from rsd_trt.bundle import Bundle, build, save
from rsd_trt.config import PARTS
from rsd_trt.errors import UserError
from rsd_trt.eval.verify.inputs import random_observations
from rsd_trt.models.fast.products import PRODUCTS, every_product
from rsd_trt.presets import byte_tokenizer, preset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny backbone whose widths are multiples of 16."""
    config = preset("tiny", "wide")
    language = structs.replace(config.backbone.language, intermediate=96)
    config = structs.replace(config, backbone=structs.replace(config.backbone, language=language))
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("wide") / "wide"
    parts = {part: build(config, part) for part in PARTS}
    return save(path, config, parts, byte_tokenizer())


def test_the_loss_of_each_product_in_fp8(wide: Bundle) -> None:
    seen = random_observations(wide.config.control, 2)
    found = {row.what: row for row in sensitivity(wide, CPU, seen)}
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
    for row in found.values():
        assert all(0 <= x <= 1 for x in (row.token_mismatch, row.steps_beyond_tolerance))
    assert found["all"].action_mean_abs > 0


def test_widths_that_e4m3_cannot_take(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="intermediate 88"):
        list(sensitivity(bundle, CPU, random_observations(bundle.config.control, 1)))


def test_it_prints_a_record(wide: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fp8_sensitivity.py", str(wide.path), "-n", "1", "--device", "cpu"])
    fp8_sensitivity.main()
    record = json.loads(capsys.readouterr().out)
    assert record["command"].endswith("fp8_sensitivity " + str(wide.path) + " -n 1 --device cpu")
    assert (record["bundle_sha256"], record["rows"][0]["what"]) == (wide.fingerprint, "all")
