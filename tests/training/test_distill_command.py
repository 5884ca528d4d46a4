"""`rsd-trt distill`: from recordings or a data set to a bundle that acts, and all that is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import rsd_trt
from layouts import Demo, write_libero, write_v21, write_v30
from made_without import made_without
from msgspec import structs
from safetensors.torch import load_file

from rsd_trt.bundle import Bundle, build_draft, copy_with
from rsd_trt.config import HiddenDraftConfig, RsdConfig, VisionDraftConfig
from rsd_trt.presets import initialise
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy

STEPS = ["--steps", "6", "--batch", "8", "--device", "cpu"]


def distilled(*arguments: object) -> dict[str, Any]:
    done = rsd_trt("distill", *arguments, *STEPS, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*arguments: object, code: int = 1) -> str:
    done = rsd_trt("distill", *arguments, *STEPS)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    message = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.output
    return message


def without(bundle: Path, out: Path, *parts: str) -> Path:
    """A copy of the bundle that lacks some parts."""
    return made_without(Path(shutil.copytree(bundle, out)), *parts)


def acts(bundle: Path, observe: Callable[..., Observation]) -> None:
    """The policy is whole: draft and main head say something of an observation."""
    policy = Policy.load(bundle, "shadow")
    (query,) = policy.act_batch([observe(policy.config.control)], [0])
    assert query.fault is None and query.draft_finite and query.chunk is not None
    assert query.token_agreement is not None


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    tiny_bundle: Path, recordings: Path, tmp_path: Path, observe: Callable[..., Observation]
) -> None:
    """The smoke run: no draft, recordings, SIGKILL in the middle of a step."""
    mine = without(tiny_bundle, tmp_path / "mine", "draft")
    whole = distilled(mine, recordings, "-o", tmp_path / "whole")
    code = """
import os, signal, sys
from rsd_trt.cli import main
from rsd_trt.training import distill, loop

distill.SAVE_EVERY = 0.0
update = loop.Loop.update

def killed(self, *given):
    update(self, *given)
    if self.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

loop.Loop.update = killed
main(sys.argv[1:])
"""
    arguments = ["distill", mine, recordings, "-o", tmp_path / "killed", *STEPS]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed").exists()
    assert torch.load(tmp_path / "killed.distill" / "draft.pt")["step"] == 3
    resumed = distilled(mine, recordings, "-o", tmp_path / "killed")
    assert resumed["steps"] == whole["steps"] == 6
    assert resumed["held_out"] == whole["held_out"]
    ours, theirs = (load_file(tmp_path / name / "draft.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = [json.loads(x) for x in (tmp_path / "killed.distill" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    acts(tmp_path / "whole", observe)


def test_what_is_told_and_written(tiny_bundle: Path, recordings: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    done = rsd_trt("distill", tiny_bundle, recordings, "-o", out, *STEPS)
    assert done.exit_code == 0, done.output
    for text in ("blind", "what the eyes add", "by step", "by task", "pick up bowl 1", "codec, the bundle's"):
        assert text in done.stdout
    assert "expected cost per action" in done.stdout and "open loop" in done.stdout
    assert f"next: rsd-trt eval {out} --mode shadow" in done.stdout
    assert "step 6: " in done.stderr and "held out: agreement" in done.stderr
    folder = tmp_path / "new.distill"
    report = json.loads((folder / "report.json").read_text())
    assert (report["episodes"], report["frames"], report["steps"]) == (5, 20, 6)
    held = report["held_out"]
    assert (held["episodes"], held["frames"]) == (2, 8)
    assert len(held["agreement"]) == len(held["blind"]) == 3 and len(held["by_step"]) == 8
    assert report["cost"]["check"] > 0 and report["cost"]["full"] > 0
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    made, before = Bundle.open(out), Bundle.open(tiny_bundle)
    assert made.config == structs.replace(before.config, name="new")
    changed = {name for name, digest in made.fingerprints.items() if before.fingerprints[name] != digest}
    assert changed == {"config.json", "draft.safetensors"}


DATA: dict[str, tuple[Callable[[Path, list[Demo]], Path], tuple[str, ...]]] = {
    "libero": (write_libero, ()),
    "v2.1": (write_v21, ("--turn",)),
    "v3.0": (write_v30, ("--turn",)),
}


@pytest.mark.parametrize("layout", DATA)
def test_a_data_set_is_labelled_and_distilled(
    layout: str, tiny_bundle: Path, demos: list[Demo], tmp_path: Path, observe: Callable[..., Observation]
) -> None:
    write, options = DATA[layout]
    data = write(tmp_path / "data", demos)
    mine = without(tiny_bundle, tmp_path / "mine", "draft")
    found = distilled(mine, data, "-o", tmp_path / "new", "--label-batch", 4, *options)
    assert (found["episodes"], found["frames"]) == (4, sum(len(demo.state) for demo in demos))
    assert found["label_rate"] > 0
    acts(tmp_path / "new", observe)


def test_labels_are_what_the_policy_says(
    tiny_bundle: Path, demos: list[Demo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of frames of the cameras' own size; and labelling that was stopped goes on with the next episode."""
    bundle = Bundle.open(tiny_bundle)
    control = structs.replace(bundle.config.control, camera_size=32, rotation="robosuite")
    mine = copy_with(bundle, structs.replace(bundle.config, control=control), tmp_path / "mine")
    data = write_libero(tmp_path / "data", demos)
    from rsd_trt.training.labels import Labeller

    label, calls = Labeller.__call__, []

    def stopping(self: Labeller, frames: Any) -> Any:
        calls.append(len(frames.state))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return label(self, frames)

    monkeypatch.setattr(Labeller, "__call__", stopping)
    assert "stopped" in refused(mine.path, data, "-o", tmp_path / "new")
    distilled(mine.path, data, "-o", tmp_path / "new")
    assert len(calls) == 5  # four episodes, and the third again
    policy = Policy.load(mine, "baseline")
    chunks = np.memmap(tmp_path / "new.distill" / "frames" / "chunk.bin", np.float32, "r").reshape(-1, 8, 7)
    by_task = sorted(demos, key=lambda demo: demo.task)
    frames = [(demo, i) for demo in by_task for i in range(len(demo.state))]
    for (demo, i), chunk in zip(frames, chunks, strict=True):
        images = np.stack([seen[i] for seen in demo.images.values()])
        (query,) = policy.act_batch([Observation(images, demo.state[i], demo.task)], [0])
        assert query.chunk is not None
        assert np.allclose(query.chunk, chunk, atol=1e-4)


def test_a_hidden_draft_gives_way_to_one_with_eyes(
    bundle: Bundle, record: Callable[..., Path], tmp_path: Path, observe: Callable[..., Observation]
) -> None:
    rsd = RsdConfig(rule="tokens", n_action_steps=2)
    config = structs.replace(bundle.config, draft=HiddenDraftConfig(width=16, mlp_width=32), rsd=rsd)
    old = copy_with(bundle, config, tmp_path / "old", {"draft": build_draft(config).state_dict()})
    found = distilled(old.path, record(old, tmp_path / "r"), "-o", tmp_path / "new", "--draft", "small")
    made = Bundle.open(tmp_path / "new")
    assert isinstance(made.config.draft, VisionDraftConfig) and made.config.draft == VisionDraftConfig()
    assert made.config.rsd == structs.replace(rsd, rule="first")
    assert found["draft"]["kind"] == "vision"
    acts(made.path, observe)


def test_a_threshold_of_likelihoods_is_the_new_drafts(
    bundle: Bundle, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a GPU that is full when the costs are measured takes neither bundle nor report away."""

    def full(*given: object) -> None:
        report = json.loads((tmp_path / "new.distill" / "report.json").read_text())
        raise torch.OutOfMemoryError(f"after {report['steps']} steps")

    monkeypatch.setattr("rsd_trt.training.outcome.costs", full)
    rsd = RsdConfig(rule="likelihood", threshold=-0.001, by_age=(1.0, 2.0))
    mine = copy_with(bundle, structs.replace(bundle.config, rsd=rsd), tmp_path / "mine")
    found = distilled(mine.path, recordings, "-o", tmp_path / "new")
    assert found["cost"]["reason"] == "after 6 steps"
    threshold = found["held_out"]["likelihood"]
    assert -5 < threshold < -1  # after 6 steps: chance is -log(7)
    assert Bundle.open(tmp_path / "new").config.rsd == structs.replace(rsd, threshold=threshold, by_age=())


def test_a_main_head_without_tokens_gets_a_draft_and_a_codec(
    record: Callable[..., Path], demos: list[Demo], tmp_path: Path, observe: Callable[..., Observation]
) -> None:
    """OpenVLA-OFT's head, from recordings and from a data set that it labels."""
    made = initialise(tmp_path / "oft", "tiny", seed=0, head="oft-l1").path
    mine = without(made, tmp_path / "mine", *(part for part in ("codec", "draft") if Bundle.open(made).has(part)))
    recorded = record(Bundle.open(mine), tmp_path / "r")
    found = distilled(mine, recorded, "-o", tmp_path / "new")
    assert found["new_codec"] and len(found["codec"]["largest"]) == 8
    assert found["codec"]["largest"][-1] < 0.01 < found["codec"]["largest"][0]
    assert Bundle.open(tmp_path / "new").has("codec")
    policy = Policy.load(tmp_path / "new", "shadow")
    for seed in range(2):
        (query,) = policy.act_batch([observe(policy.config.control, seed)], [0])
        assert query.fault is None and query.draft_finite and query.chunk is not None
    again = distilled(tmp_path / "new", recorded, "-o", tmp_path / "again")  # the codec makes no chunk of that head
    assert not again["new_codec"] and again["codec"] == found["codec"]
    labelled = distilled(mine, write_libero(tmp_path / "data", demos), "-o", tmp_path / "from_data")
    assert labelled["new_codec"] and labelled["label_rate"] > 0
    assert "--live is of heads that give tokens, not of oft-l1" in refused(
        mine, recorded, "-o", tmp_path / "live", "--live"
    )


def test_the_main_model_can_label_every_batch(tiny_bundle: Path, recordings: Path, tmp_path: Path) -> None:
    plain = distilled(tiny_bundle, recordings, "-o", tmp_path / "plain")
    live = distilled(tiny_bundle, recordings, "-o", tmp_path / "live", "--live")
    assert live["steps"] == plain["steps"]
    ours, theirs = (load_file(tmp_path / name / "draft.safetensors") for name in ("live", "plain"))
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    message = refused(tiny_bundle, recordings, "-o", tmp_path / "small", "--live", "--draft", "small")
    assert "--live needs a draft that sees what the backbone does: 128 pixels a side, the backbone has 32" in message


def test_what_cannot_be_distilled_is_one_line(
    tiny_bundle: Path, bundle: Bundle, recordings: Path, record: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "new"
    few = record(bundle, tmp_path / "few", episodes=3)
    assert "has 3 episodes: 4 are the least, so that 2 can be held out. Record more" in refused(
        tiny_bundle, few, "-o", out
    )
    control = structs.replace(bundle.config.control, rotate_images=False)
    other = copy_with(bundle, structs.replace(bundle.config, control=control), tmp_path / "other")
    assert "is of bundle 'tiny'" in refused(other.path, recordings, "-o", out)
    dims = structs.replace(bundle.config.dims, T=4)
    shorter = copy_with(bundle, structs.replace(bundle.config, dims=dims), tmp_path / "shorter")
    assert ": chunk is 8 there, and 4 here. Use another folder" in refused(shorter.path, recordings, "-o", out)
    for part in ("head", "codec", "backbone"):  # tokens of a head say nothing without their codec
        lacking = without(tiny_bundle, tmp_path / f"without_{part}", part)
        assert f"has no {part}: there is nobody to learn from" in refused(lacking, recordings, "-o", out)
    assert "exists. Choose another path" in refused(tiny_bundle, recordings, "-o", recordings)
    assert "--camera x is not BUNDLE'S=DATA SET'S" in refused(tiny_bundle, recordings, "-o", out, "--camera", "x")
    assert "Missing option '-o'" in refused(tiny_bundle, recordings, code=2)
    assert "is no bundle" in refused(recordings, recordings, "-o", out)
    assert "holds other files" in refused(tiny_bundle, recordings, "-o", out, "--work", tiny_bundle)
    linked = without(tiny_bundle, tmp_path / "linked")
    (linked / "hidden_states.safetensors").symlink_to("elsewhere")  # said before the training, not after it
    assert "hidden_states.safetensors is a symbolic link" in refused(linked, recordings, "-o", out)
    assert not out.exists() and not (tmp_path / "new.distill").exists()


def test_another_training_does_not_go_on_from_this_one(tiny_bundle: Path, recordings: Path, tmp_path: Path) -> None:
    work = ("--work", tmp_path / "work")
    recordings = Path(shutil.copytree(recordings, tmp_path / "recordings"))
    distilled(tiny_bundle, recordings, "-o", tmp_path / "one", *work)
    episode = recordings / "episodes" / "task0_2.safetensors"
    kept = episode.stat().st_mtime_ns
    os.utime(episode, (0, 0))  # recorded anew
    message = refused(tiny_bundle, recordings, "-o", tmp_path / "two", *work)
    assert "the episode task0_2 has changed since it was read. Start over: --fresh" in message
    episode.rename(tmp_path / "aside")
    message = refused(tiny_bundle, recordings, "-o", tmp_path / "two", *work)
    assert "the episode task0_2 is not in the data any more. Start over: --fresh" in message
    (tmp_path / "aside").rename(episode)
    os.utime(episode, ns=(kept, kept))
    message = refused(tiny_bundle, recordings, "-o", tmp_path / "two", *work, "--lr", 0.01)
    assert "learning_rate is 0.001 there, 0.01 here. Start over: --fresh" in message
    message = refused(tiny_bundle, recordings, "-o", tmp_path / "two", *work, "--draft", "small")
    assert "holds frames of other data: side is 32 there, 128 here. Start over: --fresh" in message
    note, keepsake = tmp_path / "work" / "note.txt", tmp_path / "work" / "frames" / "photo.png"
    note.touch(), keepsake.touch()
    found = distilled(tiny_bundle, recordings, "-o", tmp_path / "two", *work, "--lr", 0.01, "--fresh")
    assert found["steps"] == 6
    assert note.exists() and keepsake.exists()  # only what a distillation writes is removed
    shutil.rmtree(tmp_path / "work" / "frames")  # which is allowed
    assert distilled(tiny_bundle, recordings, "-o", tmp_path / "three", *work, "--lr", 0.01)["steps"] == 6


@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=["goes on", "fresh"])
def test_a_folder_of_somebody_else_is_left_alone(
    fresh: tuple[str, ...], tiny_bundle: Path, recordings: Path, tmp_path: Path
) -> None:
    work = tmp_path / "holiday"
    (work / "frames").mkdir(parents=True)
    for name in ("frames/1.png", "report.json", "training.json"):
        (work / name).write_text("{}")
    before = sorted(work.rglob("*"))
    assert "holds other files" in refused(tiny_bundle, recordings, "-o", tmp_path / "new", "--work", work, *fresh)
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("where", ["rsd_trt.training.store.os.fsync", "rsd_trt.bundle.shutil.copyfile"])
def test_a_full_disk_is_one_line_and_leaves_no_bundle(
    where: str, tiny_bundle: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        assert "No space left on device" in refused(tiny_bundle, recordings, "-o", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    distilled(tiny_bundle, recordings, "-o", tmp_path / "new")
