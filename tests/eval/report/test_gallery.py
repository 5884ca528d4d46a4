"""Which failures are shown, and what is said of those that cannot be."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import outcome, run

from rsd_trt.eval.report.gallery import MOST_BYTES, MOST_STRIPS, evenly, gallery
from rsd_trt.eval.report.runs import Run, pair_up
from rsd_trt.eval.results import Episode

JPEG = b"\xff\xd8\xff\xe0 a strip"


def strip(folder: Path, task: int, trial: int, data: bytes = JPEG, mode: str = "rsd") -> None:
    path = folder / "failures" / f"libero_spatial_{mode}" / f"task{task}_trial{trial}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def runs(folder: Path, *modes: str) -> list[Run]:
    """Runs of which every episode but task 0, trial 0 fails."""
    made = [run(mode, change=outcome((0, 0)), broken=((1, 1),)) for mode in modes]  # type: ignore[arg-type]
    return pair_up([(folder / f"{mode}.json", results) for mode, results in zip(modes, made, strict=True)])


def test_strips_are_embedded_with_task_trial_and_steps(tmp_path: Path) -> None:
    strip(tmp_path, 2, 3)
    video = tmp_path / "videos" / "libero_spatial_rsd" / "task2_trial3_failure.mp4"
    video.parent.mkdir(parents=True)
    video.touch()
    found = gallery(runs(tmp_path, "rsd"))
    assert found.title == "Failures of rsd, n = 4: 1 of 10"
    (shown,) = found.strips
    assert shown.caption.startswith("Task 2, trial 3, ")
    assert " steps: pick up the black bowl from table center" in shown.caption
    assert base64.b64decode(shown.jpeg) == JPEG
    assert shown.video == str(video)


def test_absent_strips_are_told_with_the_command(tmp_path: Path) -> None:
    found = gallery(runs(tmp_path, "rsd"))
    assert found.strips == ()
    assert found.note is not None
    assert found.note.startswith("10 film strips of 10 cannot be shown: absent from ")
    assert str(tmp_path / "failures" / "libero_spatial_rsd") in found.note
    assert found.note.endswith("rsd-trt eval bundles/made-up --mode rsd --trials 4 --fresh")


@pytest.mark.parametrize("data", [b"", b"<script>", JPEG + b"x" * MOST_BYTES])
def test_what_is_no_small_jpeg_is_not_embedded(tmp_path: Path, data: bytes) -> None:
    strip(tmp_path, 2, 3, data)
    assert gallery(runs(tmp_path, "rsd")).strips == ()


def test_successes_and_errors_are_not_failures(tmp_path: Path) -> None:
    strip(tmp_path, 0, 0)
    strip(tmp_path, 1, 1)
    assert gallery(runs(tmp_path, "rsd")).strips == ()
    won = pair_up([(tmp_path / "r.json", run("rsd", success=2.0))])
    assert gallery(won).note == "No episode failed."


def test_rsds_failures_go_before_the_baselines(tmp_path: Path) -> None:
    assert gallery(runs(tmp_path, "baseline", "rsd", "shadow")).title.startswith("Failures of rsd")
    assert gallery(runs(tmp_path, "shadow", "baseline")).title.startswith("Failures of open loop")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 49)), unique=True))
def test_at_most_twelve_evenly_over_the_tasks(keys: list[tuple[int, int]]) -> None:
    episodes = [Episode(task, trial, False, 1, 1.0, ()) for task, trial in keys]
    chosen = evenly(episodes)
    assert len(chosen) == min(MOST_STRIPS, len(episodes))
    assert len({episode.key for episode in chosen}) == len(chosen)
    shown = {task: sum(e.task_id == task for e in chosen) for task, _ in keys}
    left = {task: sum(task == t for t, _ in keys) - shown[task] for task in shown}
    assert all(shown[a] >= shown[b] - 1 for a in shown if left[a] for b in shown)
