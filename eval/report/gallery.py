"""Film strips of failed episodes, chosen evenly over the tasks."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.results import Episode
from rsd_trt.eval.statistics import counted

MOST_STRIPS = 12
MOST_BYTES = 1 << 20  # of a strip
JPEG = b"\xff\xd8\xff"  # how a JPEG file begins
PREFERRED = ("rsd", "baseline", "shadow", "random")  # shadow acts as the baseline


@dataclass(frozen=True)
class Strip:
    """A failed episode in a few frames."""

    caption: str
    jpeg: str  # base64
    video: str | None  # its path, where one was recorded


@dataclass(frozen=True)
class Gallery:
    """Strips of a run's failures, and a note on those that are not shown."""

    title: str
    strips: tuple[Strip, ...]
    note: str | None


def gallery(runs: Sequence[Run]) -> Gallery:
    """The failures of the first run that has any: rsd's before the baseline's. Files that are absent or no JPEG are
    left out, and the note says so."""
    ordered = sorted(runs, key=lambda run: PREFERRED.index(run.results.settings.of_bundle.mode))
    run = next((run for run in ordered if _failures(run)), None)
    if run is None:
        return Gallery("Failures", (), "No episode failed.")
    failures = _failures(run)
    usable = [episode for episode in failures if _is_strip(_file(run, episode, "failures", ".jpg"))]
    chosen = evenly(usable)
    title = f"Failures of {run.name}: {len(chosen)} of {len(failures)}"
    note = None
    if len(usable) < len(failures):
        folder = _file(run, failures[0], "failures", ".jpg").parent
        note = (
            f"{counted(len(failures) - len(usable), 'film strip')} of {len(failures)} cannot be shown: absent from "
            f"{folder}, or no JPEG. rsd-trt eval writes them beside the results file. To make them again: "
            f"{run.results.command} --fresh"
        )
    return Gallery(title, tuple(_strip(run, episode) for episode in chosen), note)


def evenly(episodes: Sequence[Episode], most: int = MOST_STRIPS) -> tuple[Episode, ...]:
    """At most `most` episodes: the first of every task, then the second of every task, and so on."""
    by_task: dict[int, list[Episode]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task_id, []).append(episode)
    rounds = zip_longest(*(by_task[task] for task in sorted(by_task)))
    return tuple(episode for one in rounds for episode in one if episode is not None)[:most]


def _failures(run: Run) -> list[Episode]:
    return [episode for episode in run.results.episodes if episode.error is None and not episode.success]


def _file(run: Run, episode: Episode, kind: str, ending: str) -> Path:
    """Where an evaluation leaves a picture or video of an episode: beside its results file."""
    settings = run.results.settings
    name = f"task{episode.task_id}_trial{episode.trial}{ending}"
    return run.path.parent / kind / f"{settings.suite}_{settings.mode}" / name


def _is_strip(path: Path) -> bool:
    try:
        if path.stat().st_size > MOST_BYTES:
            return False
        with path.open("rb") as stream:
            return stream.read(len(JPEG)) == JPEG
    except OSError:
        return False


def _strip(run: Run, episode: Episode) -> Strip:
    tasks = {task.task_id: task.task_description for task in run.results.task_results}
    video = _file(run, episode, "videos", "_failure.mp4")
    caption = (
        f"Task {episode.task_id}, trial {episode.trial}, {counted(episode.steps, 'step')}: {tasks[episode.task_id]}"
    )
    jpeg = base64.b64encode(_file(run, episode, "failures", ".jpg").read_bytes()).decode()
    return Strip(caption, jpeg, str(video) if video.is_file() else None)
