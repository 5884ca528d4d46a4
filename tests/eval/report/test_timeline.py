"""Which episodes are shown, what their bars say, and what is said of film strips that are absent."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from synthetic import outcome, run

from rsd_trt.eval.report.runs import Run, pair_up
from rsd_trt.eval.report.timeline import MOST, MOST_BYTES, evenly, timeline_bars, timelines
from rsd_trt.eval.results import Episode, QueryRecord

JPEG = b"\xff\xd8\xff\xe0 a strip"


def strip(folder: Path, task: int, trial: int, data: bytes = JPEG, mode: str = "rsd") -> None:
    path = folder / "strips" / f"libero_spatial_{mode}" / f"task{task}_trial{trial}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def runs(folder: Path, *modes: str) -> list[Run]:
    """Runs of which every episode but task 0, trial 0 fails."""
    made = [run(mode, change=outcome((0, 0)), broken=((1, 1),)) for mode in modes]  # type: ignore[arg-type]
    return pair_up([(folder / f"{mode}.json", results) for mode, results in zip(modes, made, strict=True)])


def test_failures_and_successes_are_shown_with_their_frames(tmp_path: Path) -> None:
    """Those with frames first; an episode that ended in an error is neither."""
    strip(tmp_path, 2, 3)
    strip(tmp_path, 0, 0)
    strip(tmp_path, 1, 1)
    video = tmp_path / "videos" / "libero_spatial_rsd" / "task2_trial3_failure.mp4"
    video.parent.mkdir(parents=True)
    video.touch()
    found = timelines(runs(tmp_path, "rsd"))
    assert found.title == "4 of 11 episodes of rsd, n = 4"
    first, *_, last = found.shown
    assert re.match(r"Task 2, trial 3: failure after \d+ steps with \d+ full queries\. pick up", first.caption)
    assert last.caption.startswith("Task 0, trial 0: success after ")
    assert base64.b64decode(first.jpeg or "") == base64.b64decode(last.jpeg or "") == JPEG
    assert (first.video, last.video) == (str(video), None)
    assert found.note is not None and found.note.startswith(f"{tmp_path / 'strips'}")
    assert "has no film strip of 2 of them" in found.note


@pytest.mark.parametrize("data", [b"", b"<script>", JPEG + b"x" * MOST_BYTES])
def test_what_is_no_small_jpeg_is_not_embedded(tmp_path: Path, data: bytes) -> None:
    strip(tmp_path, 2, 3, data)
    assert not any(one.jpeg for one in timelines(runs(tmp_path, "rsd")).shown)


def test_a_bar_for_each_query_is_as_long_as_its_actions() -> None:
    def query(step: int, route: str, committed: int = 2) -> QueryRecord:
        checked = route in ("accepted", "rejected")
        return QueryRecord(step, route, committed, 1.0, checked, not checked or route == "rejected")  # type: ignore[arg-type]

    queries = (query(0, "start", 4), query(4, "accepted"), query(6, "accepted"), query(8, "rejected", 4))
    made = structs.replace(run("rsd").episodes[0], steps=10, queries=queries, perturbed_at=5)
    assert made.actions is not None
    made = structs.replace(made, actions=structs.replace(made.actions, closed=((3, 9),)))
    paths = dict(re.findall(r'<path class="(\w+)" d="([^"]+)"', timeline_bars(made)))
    assert {kind: re.findall(r"M(\d+) [\d.]+h(\d+)", path) for kind, path in paths.items()} == {
        "due": [("0", "4")],
        "accepted": [("4", "2"), ("6", "2")],
        "rejected": [("8", "2")],
        "gripper": [("3", "6")],
        "perturbed": [],
    }, "the episode ended within the last one"
    assert paths["perturbed"].startswith("M5 ")
    leaders = re.findall(r"L([\d.]+) ", timeline_bars(made, 3))
    assert leaders == ["0", "5", "10"], "the frames are of the first step to the last"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 49)), unique=True))
def test_episodes_are_chosen_evenly_over_the_tasks(keys: list[tuple[int, int]]) -> None:
    (one,) = pair_up([(Path("absent") / "r.json", run("rsd"))])
    chosen = evenly([Episode(task, trial, False, 1, 1.0, ()) for task, trial in keys], one)
    assert len(chosen) == min(MOST, len(keys))
    assert len({episode.task_id for episode in chosen}) == min(MOST, len({task for task, _ in keys}))
