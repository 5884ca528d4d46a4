"""The episodes' file: appended, resumed, refused, and never left half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic import settings

from rsd_trt.errors import UserError
from rsd_trt.eval.libero.episode_log import EpisodeLog
from rsd_trt.eval.results import Episode, QueryRecord

SETTINGS = settings()
NAME = "libero_spatial_rsd"
QUERY = QueryRecord(
    step=0, route="start", committed=2, ms=10.0, checked=False, full_query=True, token_agreement=(1.0, 0.5)
)


def episode(task: int, trial: int, success: bool = False, error: str | None = None) -> Episode:
    return Episode(task, trial, success, 6, 2.0, (QUERY,), error=error, run=SETTINGS.run)


def open_log(folder: Path, fresh: bool = False, **changes: object) -> EpisodeLog:
    return EpisodeLog(folder, NAME, settings(**changes), fresh)  # type: ignore[arg-type]


def test_a_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(episode(0, 0))
    log.append(episode(0, 1, success=True))
    again = open_log(tmp_path)
    assert again.read() == [episode(0, 0), episode(0, 1, success=True)]
    assert (again.lacks(0, 1), again.lacks(0, 2)) == (False, True)
    again.append(episode(0, 2, error="the GL context is lost"))
    assert again.lacks(0, 2) and len(again.done) == 2
    again.append(episode(0, 2))
    assert open_log(tmp_path).read()[2] == episode(0, 2)


def test_every_line_is_an_episode_with_the_name_of_its_run(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(episode(0, 0))
    log.append(episode(0, 1))
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(line["task_id"], line["trial"], line["run"]) for line in lines] == [
        (0, 0, SETTINGS.run),
        (0, 1, SETTINGS.run),
    ]
    assert json.loads((tmp_path / f"{NAME}_settings.json").read_text())["suite"] == "libero_spatial"


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_half_a_line_is_dropped(tmp_path: Path, cut: int) -> None:
    log = open_log(tmp_path)
    log.append(episode(0, 0))
    whole = log.path.read_bytes()
    log.append(episode(0, 1))
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    assert open_log(tmp_path).read() == [episode(0, 0)]
    assert log.path.read_bytes() == whole


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)
    log.append(episode(0, 0))
    whole = log.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("os.fsync", full)
        log.append(episode(0, 1))
    assert log.path.read_bytes() == whole
    log.append(episode(0, 1))
    assert len(open_log(tmp_path).done) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 8}, "seed is 7 there and 8 here"),
        ({"timing": "batched"}, "timing is 'single' there and 'batched' here"),
        ({"device": "cpu", "backend": "torch"}, "backend is 'ort' there and 'torch' here, device is 'cuda' there"),
    ],
)
def test_another_run_is_refused_with_both_values(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    open_log(tmp_path).append(episode(0, 0))
    with pytest.raises(UserError, match=message):
        open_log(tmp_path, **changes)
    assert len(open_log(tmp_path).done) == 1
    assert not open_log(tmp_path, fresh=True, **changes).read()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 cannot be read"),
        ("[1]", "line 2: the top level is"),
        ("\udcff", "line 2 cannot be read"),
        ("[" * 100_000, "line 2 cannot be read"),
        ('{"task_id": 1}', "line 2: the key trial is missing"),
        ('{"task_idd": 1}', "unknown key task_idd; did you mean 'task_id'"),
    ],
)
def test_damaged_lines_are_refused_and_kept(tmp_path: Path, line: str, message: str) -> None:
    log = open_log(tmp_path)
    log.append(episode(0, 0))
    damaged = log.path.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n"
    log.path.write_bytes(damaged)
    with pytest.raises(UserError, match=message) as caught:
        open_log(tmp_path)
    assert "\n" not in str(caught.value)
    assert log.path.read_bytes() == damaged


def test_lines_of_another_run_are_refused(tmp_path: Path) -> None:
    log = open_log(tmp_path / "a")
    log.append(episode(0, 0))
    other = open_log(tmp_path / "b", seed=8)
    other.append(episode(0, 1))
    log.path.write_bytes(log.path.read_bytes() + other.path.read_bytes())
    message = f"line 2 is of run {other.settings.run}, not {log.settings.run}: runs are mixed"
    with pytest.raises(UserError, match=message):
        open_log(tmp_path / "a")


def test_an_episode_twice_is_refused(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(episode(0, 0))
    log.path.write_bytes(log.path.read_bytes() * 2)
    with pytest.raises(UserError, match="line 2 holds task 0, trial 0 again after line 1"):
        open_log(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_damaged_settings_are_refused(tmp_path: Path, text: str) -> None:
    open_log(tmp_path)
    (tmp_path / f"{NAME}_settings.json").write_text(text)
    with pytest.raises(UserError, match=r"_settings\.json"):
        open_log(tmp_path)


def test_episodes_without_settings_are_refused(tmp_path: Path) -> None:
    open_log(tmp_path).append(episode(0, 0))
    (tmp_path / f"{NAME}_settings.json").unlink()
    with pytest.raises(UserError, match="has no libero_spatial_rsd_settings"):
        open_log(tmp_path)
