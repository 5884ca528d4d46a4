"""Episode files: appended, resumed, refused; and the summary's arithmetic."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rsd_trt.config import Dims
from rsd_trt.errors import UserError
from rsd_trt.eval.results import Episode, EpisodeLog, Json, QueryRecord, summarise, write_atomically

SETTINGS: Json = {"suite": "libero_spatial", "mode": "rsd", "trained": False, "seed": 7, "versions": {"torch": "1"}}


def episode(task: int, trial: int, success: bool = False, error: str | None = None) -> Episode:
    queries = (
        QueryRecord(step=0, route="start", committed=2, ms=10.0, full_pass=True, prefix=2, token_agreement=(1.0, 0.5)),
        QueryRecord(step=2, route="accepted", committed=2, ms=4.0, full_pass=False, prefix=3),
        QueryRecord(step=4, route="partial", committed=1, ms=4.0, full_pass=False, prefix=1),
        QueryRecord(
            step=5, route="rejected", committed=1, ms=12.0, full_pass=True, prefix=0, token_agreement=(0.0, 0.5)
        ),
    )
    return Episode(task, trial, success, steps=6, seconds=2.0, queries=queries, error=error)


def test_log_resumes_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "run" / "episodes.jsonl"
    log = EpisodeLog(path, SETTINGS, fresh=False)
    log.append(episode(0, 0))
    log.append(episode(0, 1, success=True))
    again = EpisodeLog(path, SETTINGS, fresh=False)
    assert again.episodes == log.episodes
    assert (again.lacks(0, 1), again.lacks(0, 2)) == (False, True)
    again.append(episode(0, 2, error="the GL context is lost"))
    assert again.lacks(0, 2)
    assert again.episodes[0, 1] == episode(0, 1, success=True)


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    EpisodeLog(path, SETTINGS, fresh=False).append(episode(0, 0))
    whole = path.read_text()
    path.write_text(whole + '{"task_id": 0, "tri')
    assert list(EpisodeLog(path, SETTINGS, fresh=False).episodes) == [(0, 0)]
    assert path.read_text() == whole


def test_other_settings_are_refused_with_both(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    EpisodeLog(path, SETTINGS, fresh=False).append(episode(0, 0))
    with pytest.raises(UserError, match=r"versions.torch is '1' there and '2' here"):
        EpisodeLog(path, {**SETTINGS, "versions": {"torch": "2"}}, fresh=False)
    with pytest.raises(UserError, match="seed is 7 there and 8 here"):
        EpisodeLog(path, {**SETTINGS, "seed": 8}, fresh=False)
    assert not EpisodeLog(path, {**SETTINGS, "seed": 8}, fresh=True).episodes


@pytest.mark.parametrize("text", ["", "not json\n", "[1]\n", "\udcff\n", "{}\n{}\n", '{"a": 1}\n{"task_id": 1}\n'])
def test_foreign_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"episodes\.jsonl"):
        EpisodeLog(path, SETTINGS, fresh=False)
    assert path.read_bytes() == text.encode("utf-8", "surrogateescape")


def test_summary() -> None:
    episodes = [episode(0, 0, success=True), episode(0, 1), episode(3, 0, error="boom")]
    summary = summarise(SETTINGS, episodes, {0: "lift", 3: "push"}, Dims())
    assert summary["total_episodes"] == 2
    assert summary["total_successes"] == 1
    assert summary["final_success_rate"] == 0.5
    assert summary["errors"] == 1
    assert summary["avg_inference_time_ms"] == 2 * 30 / 12
    assert summary["rsd_stats"] == {
        "draft_acceptance_rate": 1 / 3,
        "partial_acceptance_rate": 1 / 3,
        "full_rejection_rate": 1 / 3,
    }
    assert summary["token_agreement"] == [0.5, 0.5]
    assert summary["token_agreement_chance"] == 1 / 7
    assert summary["queries"] == 8
    assert summary["full_passes"] == 4
    assert summary["actions_per_query"] == 12 / 8
    tasks = summary["task_results"]
    assert isinstance(tasks, list)
    assert [(t["task_id"], t["successes"], t["episodes"], t["errors"]) for t in tasks] == [(0, 1, 2, 0), (3, 0, 0, 1)]
    json.dumps(summary)


def test_summary_of_nothing() -> None:
    summary = summarise(SETTINGS, [], {0: "lift"}, Dims())
    assert summary["final_success_rate"] is None
    assert summary["query_ms"] is None


def test_write_atomically_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_episode_survives_json() -> None:
    from rsd_trt.jsonio import from_json

    stored = json.loads(json.dumps(dataclasses.asdict(episode(1, 2, error="x"))))
    assert from_json(Episode, stored, "file") == episode(1, 2, error="x")
