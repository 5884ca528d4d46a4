"""Reading replay.json: typed, checked, and found by the run's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec import structs
from synthetic import replay, run

from rsd_trt.errors import UserError
from rsd_trt.eval.profile.replay_record import ReplayRow, read_replay
from rsd_trt.records import to_json


def test_what_is_written_is_read(tmp_path: Path) -> None:
    timed, other = run("baseline", timing="batched"), run("rsd", timing="batched")
    record = replay((timed, 12.5, (12.0, 13.0)))
    path = tmp_path / "replay.json"
    path.write_text(json.dumps(to_json(record)))
    assert read_replay(path) == record
    row = record.row(timed.settings.run)
    assert row is not None and (row.ms_per_action, row.mode) == (12.5, "baseline")
    assert record.row(other.settings.run) is None


def test_a_run_is_timed_once(tmp_path: Path) -> None:
    timed = run("baseline")
    path = tmp_path / "replay.json"
    path.write_text(json.dumps(to_json(replay((timed, 12.5, None), (timed, 12.6, None)))))
    with pytest.raises(UserError, match=f"times run {timed.settings.run} twice. Replay again"):
        read_replay(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ms_per_action": 0.0}, "must be > 0"),
        ({"ms_per_action_interval": (3.0, 2.0)}, "two times, in order"),
        ({"ms_per_action_interval": (0.0, 2.0)}, "two times, in order"),
    ],
)
def test_times_are_times(changes: dict[str, object], message: str) -> None:
    (row,) = replay((run("baseline"), 12.5, None)).rows
    with pytest.raises(UserError, match=message):
        ReplayRow(**{**structs.asdict(row), **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "cannot be read"), ("[]", "not an object"), ('{"rows": []}', "the key command is missing")],
)
def test_another_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "replay.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_replay(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_replay(tmp_path / "none.json")
