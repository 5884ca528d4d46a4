"""`rsd-trt eval` and `compare` on real LIBERO episodes with an untrained bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command import rsd_trt
from made_without import made_without
from safetensors.torch import load_file

from rsd_trt.errors import UserError
from rsd_trt.eval.libero import run
from rsd_trt.eval.libero.perturb import PerturbSpec
from rsd_trt.eval.libero.simulator import initial_states
from rsd_trt.eval.libero.target import Displace
from rsd_trt.eval.read import read_run
from rsd_trt.eval.report.compare import compare
from rsd_trt.presets import initialise

EXPERT = ("--policy", "examples.reference_policy.scripted:act")
EPISODE = ("--tasks", "3", "--trials", "1", "--max-steps", "8", "--n-action-steps", "2")


@pytest.mark.slow
@pytest.mark.libero
def test_one_episode_in_each_mode(tiny_bundle: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden.safetensors"
    extra = {
        "random": ("--accept-rate", "0.5"),
        "shadow": ("--record-hidden", hidden),
    }
    for mode in ("baseline", "rsd", "random", "shadow"):
        arguments = ("--mode", mode, "--out", tmp_path, "--json", *extra.get(mode, ()))
        result = rsd_trt("eval", tiny_bundle, *arguments, *EPISODE)
        assert result.exit_code == 0, result.output
        summary = json.loads(result.stdout)
        assert summary == json.loads((tmp_path / f"libero_spatial_{mode}_results.json").read_text())
        assert (summary["total_episodes"], summary["errors"], summary["steps"]) == (1, 0, 8)
        assert summary["settings"]["protocol"] == "oft"
        assert summary["use_speculative_decoding"] == (mode == "rsd")
        assert sum(summary["routes"].values()) == summary["queries"]
    states = load_file(hidden)
    assert states["hidden"].shape == (summary["queries"], 32)
    for pair in (("baseline", "rsd"), ("random", "rsd")):
        result = rsd_trt("compare", *(tmp_path / f"libero_spatial_{mode}_results.json" for mode in pair), "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["pairs"] == 1


@pytest.mark.slow
@pytest.mark.libero
def test_two_simulators_give_what_one_gives(tiny_bundle: Path, tmp_path: Path) -> None:
    found = []
    for workers in (1, 2):
        options = ("--tasks", "0,4", "--trials", "2", "--max-steps", "6", "--workers", workers, "--out", tmp_path / "x")
        result = rsd_trt("eval", tiny_bundle, "--json", "--fresh", *options)
        assert result.exit_code == 0, result.output
        results = json.loads(result.stdout)
        assert (results["settings"]["timing"] == "single") == (results["query_ms"] is not None) == (workers == 1)
        for episode in results["episodes"]:
            del episode["seconds"], episode["run"], episode["others"]
            for query in episode["queries"]:
                del query["ms"]
        found.append(results["episodes"])
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.slow
@pytest.mark.libero
def test_the_shipped_policy_solves_its_task(tmp_path: Path) -> None:
    result = rsd_trt("eval", "--tasks", "0", "--trials", "1", "--n-action-steps", "8", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)
    assert results["settings"]["bundle"]["trained"]
    assert results["total_successes"] == 1


@pytest.mark.libero
@pytest.mark.slow
def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With OpenVLA-OFT's head as it is packed: alone."""
    head = made_without(initialise(tmp_path / "oft", "tiny", seed=0, head="oft-l1").path, "draft", "codec")
    arguments = ("eval", head, "--mode", "baseline", "--out", tmp_path, *EPISODE)
    first = rsd_trt(*arguments, "--video")
    assert first.exit_code == 0, first.output
    assert "UNTRAINED" in first.stdout
    videos = list((tmp_path / "videos" / "libero_spatial_baseline").iterdir())
    assert [video.name for video in videos] == ["task3_trial0_failure.mp4"]
    episodes = tmp_path / "libero_spatial_baseline_episodes.jsonl"
    before = episodes.read_text()
    again = rsd_trt(*arguments)
    assert again.exit_code == 0
    assert "1 of 1 were done already; to run them again: --fresh" in again.stdout
    assert episodes.read_text() == before
    refused = rsd_trt(*arguments, "--seed", 8)
    assert refused.exit_code == 1
    assert "seed is 7 there and 8 here" in refused.stderr
    monkeypatch.setattr(run, "initial_states", lambda *task: initial_states(*task) + 1)  # another suite of that name
    refused = rsd_trt(*arguments)
    assert refused.exit_code == 1
    assert "suite_sha256 is " in refused.stderr
    (tmp_path / "file").write_text("")
    assert "file is no folder. Choose another place" in rsd_trt(*arguments, "--out", tmp_path / "file").stderr


@pytest.mark.libero
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "10"), "libero_spatial has tasks 0..9, not 10"),
        (
            ("--trials", "51"),
            "libero_spatial has 50 initial states for task 0: 51 trials are too many. Use: --trials 50",
        ),
        (("--suite", "libero_goal", "--perturb", "0"), "--perturb displaces the bowl of libero_spatial"),
        (("--device", "cuda:9"), "device 'cuda:9' cannot be used"),
        (("--n-action-steps", "9"), "rsd.n_action_steps 9 is not in 1..8, the steps of a chunk"),
    ],
)
def test_bad_requests_are_one_line(tiny_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = rsd_trt("eval", tiny_bundle, "--out", tmp_path, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.libero
def test_the_expert_succeeds_perturbed_or_not(tmp_path: Path) -> None:
    found = {}
    for name, extra in (("calm", ()), ("perturbed", ("--perturb", "0"))):
        out = tmp_path / name
        arguments = ("eval", *EXPERT, "--out", out, "--tasks", "2", "--trials", "1", *extra)
        result = rsd_trt(*arguments, "--json")
        assert result.exit_code == 0, result.output
        found[name] = read_run(out / "libero_spatial_scripted.act_results.json")
        assert found[name].total_successes == 1
        assert (found[name].queries, found[name].avg_inference_time_ms, found[name].query_ms) == (0, None, None)
        assert not (out / "strips").exists()
        refused = rsd_trt(*arguments, "--perturb", "5")
        assert refused.exit_code == 1
        assert "perturb is" in refused.stderr
    (calm,), (perturbed,) = found["calm"].episodes, found["perturbed"].episodes
    drawn = PerturbSpec("displace", (0,)).draw(2, 0)
    assert isinstance(drawn, Displace)
    assert (calm.perturbed_at, calm.displacement) == (None, None)
    assert (perturbed.perturbed_at, perturbed.displacement in drawn.offsets) == (drawn.step, True)
    assert calm.actions != perturbed.actions
    with pytest.raises(UserError, match=r"cannot be compared: perturb is None and "):
        compare(found["calm"], found["perturbed"])


@pytest.mark.libero
def test_the_expert_knows_one_suite(tmp_path: Path) -> None:
    result = rsd_trt("eval", *EXPERT, "--suite", "libero_goal", "--out", tmp_path)
    assert result.exit_code == 1
    assert "scripted:act is written for libero_spatial, not for libero_goal" in result.stderr
    assert not list(tmp_path.iterdir())


def test_without_libero_the_install_line_is_told(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "libero", None)
    monkeypatch.setitem(sys.modules, "libero.libero", None)
    result = rsd_trt("eval", tiny_bundle, "--out", tmp_path)
    assert result.exit_code == 1
    assert "LIBERO is not installed. Install it: pip install 'rsd-trt[libero]'" in result.stderr
