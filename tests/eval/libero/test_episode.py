"""The episode loop on doubles: when it renders, when it ends, and the pictures that it leaves."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from doubles import World
from numpy.typing import NDArray
from PIL import Image

from rsd_trt.config import Dims
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.course import Event
from rsd_trt.eval.libero.episode import Answer, Assignment, Finished, run_episode
from rsd_trt.eval.libero.film import BLUE, CAPTION, CHECKED, FPS, VIEW, Film, write_beside, write_video
from rsd_trt.eval.libero.target import Displace


class Until(World):
    """Solved at step `solved_at`."""

    solved_at = 10**6

    def step(self, action: NDArray[np.float32], render: bool) -> bool:
        super().step(action, render)
        return len(self.rendered) == self.solved_at


def run(
    simulator: World,
    max_steps: int = 10,
    strips: Path | None = None,
    videos: Path | None = None,
    perturbation: Displace | None = None,
    looks: bool = True,
) -> tuple[Finished, list[int]]:
    asked: list[int] = []

    def act(_: World, step: int) -> Answer:
        asked.append(step)
        return Answer(np.full((4, Dims().A), step, np.float32), "accepted" if step else "start")

    return run_episode(simulator, Assignment(0, 0, max_steps, strips, videos, perturbation), act, looks), asked


def test_renders_only_before_queries() -> None:
    simulator = Until(0)
    finished, asked = run(simulator)
    assert simulator.rendered == [False, False, False, True, False, False, False, True, False, True]
    assert (finished.success, asked) == (False, [0, 4, 8])
    assert finished.actions[:, 0].tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert finished.seconds > 0


def test_renders_nothing_for_who_does_not_look() -> None:
    simulator = Until(0)
    run(simulator, looks=False)
    assert not any(simulator.rendered)


@pytest.mark.parametrize("step", [0, 6])
def test_the_target_is_displaced_once_before_its_step(step: int) -> None:
    """In the middle of a chunk, too; by the first candidate that there is room for."""
    simulator = Until(0)
    finished, _ = run(simulator, perturbation=Displace(step, ((-0.03, 0.0), (0.02, 0.01), (0.04, 0.0))))
    assert simulator.displaced == [(step, (0.02, 0.01))]
    assert finished.event == Event("displace", step, (0.02, 0.01))


@pytest.mark.parametrize("perturbation", [None, Displace(10, ((0.02, 0.0),)), Displace(2, ((-0.02, 0.0),))])
def test_nothing_is_displaced(perturbation: Displace | None) -> None:
    """Nothing is asked for, the episode ends before, there is no room."""
    simulator = Until(0)
    finished, _ = run(simulator, perturbation=perturbation)
    assert (simulator.displaced, finished.event) == ([], None)


def test_success_ends_the_episode_inside_a_chunk() -> None:
    simulator = Until(0)
    simulator.solved_at = 6
    finished, _ = run(simulator)
    assert (finished.success, finished.actions.shape) == (True, (6, Dims().A))
    assert len(simulator.rendered) == 6


def test_failures_and_successes_leave_film_strips(tmp_path: Path) -> None:
    """Of the frames nearest to evenly spaced steps, from the first to the last."""
    run(Until(0), max_steps=40, strips=tmp_path)
    with Image.open(tmp_path / "task0_trial0.jpg") as strip:
        assert strip.size == (6 * 8, 8)
        shades = [int(strip.getpixel((8 * i + 4, 4))[0]) for i in range(6)]  # type: ignore[index]
        assert shades == pytest.approx([0, 8, 16, 24, 32, 40], abs=4)
    solved = Until(0)
    solved.solved_at = 3
    run(solved, strips=tmp_path / "won")
    with Image.open(tmp_path / "won" / "task0_trial0.jpg") as strip:
        assert strip.size == (2 * 8, 8), "a short episode has a short strip"


def test_a_video_renders_every_step(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    simulator = Until(0, side=64)
    simulator.solved_at = 5
    run(simulator, videos=tmp_path)
    assert simulator.rendered == [True] * 5
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "task0_trial0_success.mp4"))
    assert next(reader)["size"] == (VIEW, VIEW + CAPTION)
    assert sum(1 for _ in reader) == 5 + FPS, "the last of six frames stays for a second"


def test_the_border_says_what_became_of_the_query() -> None:
    """From the frame that a query was answered from until the next one."""
    film = Film("pick it up", "libero_spatial_rsd", outcome="success")
    routes = {0: "start", 2: "accepted", 3: "rejected"}
    for step in range(5):
        film.look(step, np.full((2, 8, 8, 3), 255, np.uint8))
        if step in routes:
            film.query(routes[step])  # type: ignore[arg-type]
    frames = list(film.frames())
    assert len(frames) == 4 + FPS
    frames = frames[:5]
    assert {frame.shape for frame in frames} == {(VIEW + CAPTION, 2 * VIEW, 3)}
    borders = [tuple(frame[VIEW // 2, 2].tolist()) for frame in frames]
    assert borders == [BLUE, BLUE, CHECKED["accepted"], CHECKED["rejected"], CHECKED["rejected"]]
    counts = [frame[VIEW + 64 :, :160] for frame in frames]  # "full queries N"
    assert [np.array_equal(*pair) for pair in pairwise(counts)] == [True, True, False, True]
    moved = list(film.frames(("late", 2)))[:5]
    assert [np.array_equal(*pair) for pair in zip(frames, moved, strict=True)] == [True, True, False, False, False]


def test_videos_stand_side_by_side_until_the_longest_ends(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    for name, count in (("a", 4), ("b", 9)):
        write_video(tmp_path / f"{name}.mp4", [np.full((64, 96, 3), 90, np.uint8)] * count)
    write_beside(tmp_path / "c.mp4", [tmp_path / "a.mp4", tmp_path / "b.mp4"])
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "c.mp4"))
    assert next(reader)["size"] == (192, 64)
    assert sum(1 for _ in reader) == 9


def test_write_video_makes_h264(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = [np.full((64, 64, 3), i * 10, np.uint8) for i in range(20)]
    path = tmp_path / "a" / "video.mp4"
    write_video(path, frames)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert (meta["codec"], meta["size"], meta["fps"]) == ("h264", (64, 64), 20.0)
    assert sum(1 for _ in reader) == 20
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run(Until(0), strips=tmp_path / "file" / "strips")
