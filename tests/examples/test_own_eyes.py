"""The distillation of a draft with eyes of its own, on made-up demonstrations; training on several devices; parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.reference_policy import fit_vision_draft, train
from examples.reference_policy.fit_vision_draft import TINY, fitted
from examples.reference_policy.measure_draft import _auc
from examples.reference_policy.parts import join, split
from rsd_trt.config import Dims
from rsd_trt.models.vision_draft import VisionDraft
from rsd_trt.presets import preset
from rsd_trt.records import to_json
from rsd_trt.training.loop import read_trained

CHUNK = 4
COMMON = ["--size", "tiny", "--chunk", str(CHUNK), "--device", "cpu", "--batch", "8", "--no-compile"]


@pytest.fixture(scope="module")
def run(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: main after 2 steps, the draft after 3."""
    folder = tmp_path_factory.mktemp("run")
    common = ["--data", str(demonstrations), "--run", str(folder), *COMMON]
    train.main(["policy", *common, "--steps", "2"])
    fit_vision_draft.main(["all", *common, "--rotation", "shortest", "--steps", "3"])
    return folder


def test_what_is_stored_is_a_draft_of_its_configuration(run: Path) -> None:
    stored = load_file(run / "vision_draft.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert json.loads((run / "vision_draft.json").read_text()) == to_json(TINY)
    config = preset("tiny", "tiny")
    draft = VisionDraft(TINY, Dims(T=CHUNK), config.control, config.hidden)
    draft.load_state_dict(stored)
    assert read_trained(run, "vision_draft").step == 3


def test_the_report_says_what_the_eyes_contribute(run: Path) -> None:
    report = json.loads((run / "vision_draft_report.json").read_text())
    assert report["frames"] > 0
    for name in ("agreement", "blind", "hidden"):
        assert all(0 <= share <= 1 for share in report[name])
    assert len(report["accuracy"]) == Dims().C
    assert len(report["by_step"]) == CHUNK
    stale = report["stale"]
    assert stale["pairs"] > 0 and stale["stale_by_age"].keys() == {"2"}  # frames are two steps apart, T is 4
    assert {"likelihood", "first", "path", "likelihood_blind", "oracle_path"} <= stale.keys()


@pytest.mark.parametrize(
    ("positive", "negative", "area", "hits"),
    [
        ([2.0, 3.0], [0.0, 1.0], 1.0, 1.0),
        ([0.0, 1.0], [2.0, 3.0], 0.0, 0.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5, 0.0),
        ([0.0, 2.0], [1.0] * 10, 0.5, 0.5),
    ],
)
def test_area_under_the_curve(positive: list[float], negative: list[float], area: float, hits: float) -> None:
    assert _auc(torch.tensor(positive), torch.tensor(negative)) == {"auc": area, "hits": hits}
    assert _auc(torch.tensor([]), torch.tensor(negative)) is None


def test_images_fit_the_drafts_side() -> None:
    images = torch.rand(1, 2, 32, 32, 3) * 255
    assert fitted(images, 32) is images
    assert fitted(images, 16).shape == (1, 2, 16, 16, 3)
    torch.testing.assert_close(fitted(images, 16).mean(), images.mean(), rtol=0.05, atol=1.0)


def test_parts_are_small_and_come_back_as_they_were(tmp_path: Path) -> None:
    source = tmp_path / "run"
    (source / "bundle").mkdir(parents=True)
    tensors = {f"layer.{i}": torch.randn(100, 10).half() for i in range(7)}
    save_file(tensors, source / "bundle" / "head.safetensors")
    save_file({"a": torch.ones(3)}, source / "draft.safetensors")
    (source / "bundle" / "config.json").write_text("{}")
    written = split(source, tmp_path / "parts", limit=5000)
    assert len(written) == 1 + 4 and all(file.stat().st_size < 6000 for file in written)
    join(tmp_path / "parts", tmp_path / "back")
    back = load_file(tmp_path / "back" / "bundle" / "head.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert (tmp_path / "back" / "bundle" / "config.json").read_text() == "{}"


def test_processes_average_their_gradients(demonstrations: Path, tmp_path: Path) -> None:
    code = f"""
import os, sys
from examples.reference_policy import train
train.main(["policy", "--data", {str(demonstrations)!r}, "--run", sys.argv[1], "--steps", "3", *{COMMON!r}])
"""
    common = {"WORLD_SIZE": "2", "RENDEZVOUS": str(tmp_path / "meet"), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ | common | {"RANK": str(i)})
        for i in range(2)
    ]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    assert read_trained(tmp_path, "policy").step == 3
