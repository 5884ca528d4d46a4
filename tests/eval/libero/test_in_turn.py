"""Two modes in one command: they take turns on one model, and give what they give apart."""

from __future__ import annotations

import json
from pathlib import Path

import doubles
import pytest
from click.testing import Result
from command import rsd_trt

from rsd_trt.eval.libero import run
from rsd_trt.eval.results import Settings
from rsd_trt.runtime.policy import Policy

OPTIONS = ("--tasks", "0,1", "--trials", "2", "--max-steps", "10", "--n-action-steps", "2")


@pytest.fixture(autouse=True)
def worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Simulator", doubles.world)
    monkeypatch.setattr(run, "_tasks", lambda request: ({task: f"task {task}" for task in request.tasks}, "0" * 64))


def evaluate(bundle: Path, out: Path, mode: str, *options: object) -> Result:
    arguments = ["eval", bundle, "--mode", mode, "--out", out, "--json", *OPTIONS, *options]
    result = rsd_trt(*arguments)
    assert result.exit_code == 0, result.output
    return result


def episodes(out: Path, mode: str) -> list[tuple[int, int]]:
    """(task, trial) of the run's episodes in the order in which they finished."""
    log = (out / f"libero_spatial_{mode}_episodes.jsonl").read_text().splitlines()
    return [(episode["task_id"], episode["trial"]) for episode in map(json.loads, log)]


def untimed(out: Path, mode: str) -> dict[str, object]:
    """A run's results without what the clock and the command put into them."""
    results = json.loads((out / f"libero_spatial_{mode}_results.json").read_text())
    for name in ("throughput", "command", "query_ms", "avg_inference_time_ms", "steps_per_second", "clock"):
        results.pop(name, None)
    for episode in results["episodes"]:
        del episode["seconds"], episode["others"]
        for query in episode["queries"]:
            del query["ms"]
    return results  # type: ignore[no-any-return]


@pytest.mark.parametrize("workers", [1, 2])
def test_together_they_give_what_they_give_apart(workers: int, tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--workers", workers, "--tolerance", 0.4)
    both = evaluate(tiny_bundle, tmp_path / "both", "baseline,rsd", *options)
    evaluate(tiny_bundle, tmp_path / "apart", "baseline", "--workers", workers)
    evaluate(tiny_bundle, tmp_path / "apart", "rsd", *options)
    for mode in ("baseline", "rsd"):
        assert untimed(tmp_path / "both", mode) == untimed(tmp_path / "apart", mode)
    assert [one["settings"]["bundle"]["mode"] for one in json.loads(both.stdout)] == ["baseline", "rsd"]


def test_they_take_turns_on_one_model(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str | None, int, int]] = []
    loads: list[str] = []
    load, append = Policy.load, run.EpisodeLog.append

    def told(log: run.EpisodeLog, episode: run.Episode) -> None:
        settings: Settings = log.settings
        order.append((settings.mode, episode.task_id, episode.trial))
        append(log, episode)

    monkeypatch.setattr(run.EpisodeLog, "append", told)
    monkeypatch.setattr(Policy, "load", lambda *a, **k: (loads.append("loaded"), load(*a, **k))[1])
    evaluate(tiny_bundle, tmp_path, "baseline,rsd")
    assert loads == ["loaded"]
    modes = ("baseline", "rsd", "rsd", "baseline")  # the next trial the other way round: linear drift cancels
    assert order == [(mode, task, i // 2) for task in (0, 1) for i, mode in enumerate(modes)]


def test_each_goes_on_where_it_was(tiny_bundle: Path, tmp_path: Path) -> None:
    evaluate(tiny_bundle, tmp_path / "whole", "baseline,rsd")
    evaluate(tiny_bundle, tmp_path, "baseline,rsd")
    log = tmp_path / "libero_spatial_rsd_episodes.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:1]))
    before = (tmp_path / "libero_spatial_baseline_episodes.jsonl").read_text()
    evaluate(tiny_bundle, tmp_path, "baseline,rsd")
    assert (tmp_path / "libero_spatial_baseline_episodes.jsonl").read_text() == before
    assert sorted(episodes(tmp_path, "rsd")) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for mode in ("baseline", "rsd"):
        assert untimed(tmp_path, mode) == untimed(tmp_path / "whole", mode)
