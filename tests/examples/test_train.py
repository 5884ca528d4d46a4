"""The reference policy from made-up demonstrations: backbone and head, a resume, and the draft that is distilled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import rsd_trt

from examples.reference_policy import train
from examples.reference_policy.data import HELD_OUT_EVERY, Batches, load_demonstrations
from examples.reference_policy.demonstrate import model_images
from examples.reference_policy.fit_policy import build_model
from rsd_trt.bundle import Bundle
from rsd_trt.models.components import most_likely
from rsd_trt.presets import byte_tokenizer, preset
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.training.loop import METRICS, read_trained

CPU = torch.device("cpu")
CONFIG = preset("tiny", "tiny")
SMALL = ("--size", "tiny", "--device", "cpu", "--batch", "16", "--no-compile")


def test_chunks_follow_the_episode_and_repeat_its_last_action(demonstrations: Path) -> None:
    data = load_demonstrations(demonstrations, CPU)
    steps = CONFIG.dims.T
    every = torch.arange(len(data.row))
    chunks = data.chunks(every, steps)  # [F, T, A]
    begins = {int(end): 0 for end in data.end}
    for end in begins:
        begins[end] = max((other for other in begins if other < end), default=0)
    for frame in range(len(data.row)):
        row, end = int(data.row[frame]), int(data.end[frame])
        assert begins[end] <= row < end
        expected = [data.actions[min(row + t, end - 1)] for t in range(steps)]
        assert torch.equal(chunks[frame], torch.stack(expected))
    assert (data.row[data.end == data.end.max()].diff() == 2).all()


def test_episodes_are_held_out_whole(demonstrations: Path) -> None:
    data = load_demonstrations(demonstrations, CPU)
    batches = Batches(data, CONFIG, byte_tokenizer(), 0)
    assert 0 < len(batches.held_out) < len(data.row)
    assert not data.held_out[batches.draw(500)].any()
    assert HELD_OUT_EVERY == 20
    assert all(data.held_out[data.end == end].float().mean() in (0, 1) for end in data.end.unique())


def test_tasks_are_told_apart_by_their_prompts(demonstrations: Path) -> None:
    batches = Batches(load_demonstrations(demonstrations, CPU), CONFIG, byte_tokenizer(), 0)
    inputs = batches.inputs(torch.arange(len(batches.data.row)), augmented=False)
    assert torch.equal(inputs.tokens[0], batches.tokens[0])
    assert not torch.equal(inputs.tokens[0], inputs.tokens[-1])


@pytest.fixture(scope="module")
def run(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 20 steps, which was interrupted after 10."""
    folder = tmp_path_factory.mktemp("run")
    common = ["--data", str(demonstrations), "--work", str(folder), *SMALL]
    train.main([*common, "--steps", "10", "--bundle", str(folder / "early")])
    assert read_trained(folder, "policy").step == 10
    train.main([*common, "--steps", "20", "--warm-up", "5", "--bundle", str(folder / "bundle")])
    return folder


def test_a_resumed_run_learns_and_says_so(run: Path) -> None:
    assert read_trained(run, "policy").step == 20
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    report = json.loads((run / "training.json").read_text())
    assert len(report["held_out"]["ce"]) == len(report["held_out"]["error"]) == CONFIG.dims.L


def test_its_draft_is_distilled_from_the_same_demonstrations(run: Path, demonstrations: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    arguments = ["distill", run / "bundle", demonstrations, "-o", made, "--turn", "--live", "--steps", 2, "--batch", 8]
    done = rsd_trt(*arguments, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["episodes"], report["steps"], report["new_codec"]) == (6, 2, False)
    assert Bundle.open(made).components == ("draft", "head", "decoder", "propose", "predict")


@pytest.mark.slow
def test_several_processes_go_on_together(run: Path, demonstrations: Path, tmp_path: Path) -> None:
    work = shutil.copytree(run, tmp_path / "work", ignore=shutil.ignore_patterns("bundle", "early"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "examples.reference_policy.train", "--data", demonstrations, "--work", work, *SMALL]
    command = [*start, *program, "--steps", "22", "--bundle", work / "bundle"]
    subprocess.run([str(x) for x in command], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=240)
    assert read_trained(work, "policy").step == 22
    assert Bundle.open(work / "bundle").config.trained


def test_the_policy_says_what_the_training_saw(run: Path, demonstrations: Path) -> None:
    """Rotation, resizing, normalisation and prompt are the same on both ways."""
    bundle = Bundle.open(run / "bundle")
    assert bundle.config.trained and not bundle.has("draft")
    model = build_model(bundle.config, CPU, 0).eval()
    for part in ("backbone", "head"):
        getattr(model, part).load_state_dict(getattr(bundle, part)().state_dict())
    random = np.random.default_rng(0)
    control, size = bundle.config.control, bundle.config.backbone.image_size
    images = random.integers(0, 256, (2, control.camera_size, control.camera_size, 3), dtype=np.uint8)
    proprio = random.uniform(-1, 1, 8).astype(np.float32)
    policy = Policy.load(bundle, mode="baseline")
    policy.act(Observation(images, proprio, "pick up bowl 1"))
    tokens = policy._chunks[0].tokens
    assert tokens is not None
    data = load_demonstrations(demonstrations, CPU)
    data.images[-1] = torch.from_numpy(model_images(images, control, size))
    data.proprio[-1] = torch.from_numpy(proprio)
    batches = Batches(data, bundle.config, bundle.tokenizer(), 0)
    with torch.no_grad():
        logits = model(batches.inputs(torch.tensor([len(data.row) - 1]), augmented=False))[1]
    assert np.array_equal(tokens, most_likely(logits, bundle.config.dims)[0].numpy())
