"""Episodes as timelines: what became of each query, the gripper, and the frames that were kept."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rsd_trt.eval.libero.film import STRIP_FRAMES
from rsd_trt.eval.report.answer import best_of
from rsd_trt.eval.report.breakdown import group
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.results import Episode
from rsd_trt.eval.statistics import counted

MOST = 3  # failures, and successes
MOST_BYTES = 1 << 20  # of a strip
JPEG = b"\xff\xd8\xff"  # how a JPEG file begins
KINDS = {"accepted": "accepted", "partial": "partial", "rejected": "rejected", "full query": "due"}
HEIGHTS = {"accepted": 9, "partial": 9, "rejected": 18, "due": 18}  # px: a full query is tall
LEADERS, LANE = 12, 4  # px: from the frames to their steps, and of the gripper


@dataclass(frozen=True)
class Timeline:
    """An episode."""

    caption: str
    bars: str  # an SVG element
    jpeg: str | None  # base64, of its frames
    video: str | None  # its path, where one was recorded

    def __html__(self) -> str:
        caption = html.escape(self.caption)
        frames = f'<img src="data:image/jpeg;base64,{self.jpeg}" alt="Frames. {caption}">' if self.jpeg else ""
        video = f"<br>Video: <code>{html.escape(self.video)}</code>" if self.video else ""
        return f'<figure class="timeline">{frames}{self.bars}<figcaption>{caption}{video}</figcaption></figure>'


@dataclass(frozen=True)
class Timelines:
    """Some episodes of a run, and a note on film strips that are absent."""

    title: str
    shown: tuple[Timeline, ...]
    note: str | None


def timelines(runs: Sequence[Run]) -> Timelines:
    """Failures and successes of the run that stands for all, those with a film strip before others. Files that are
    absent or no JPEG are left out, and the note says so."""
    run = best_of(runs)
    done = [episode for episode in run.results.episodes if episode.error is None]
    chosen = [e for success in (False, True) for e in evenly((e for e in done if e.success is success), run)]
    absent = sum(not _is_strip(_file(run, episode, "strips", ".jpg")) for episode in chosen)
    folder = _file(run, done[0], "strips", "").parent if done else ""
    return Timelines(
        f"{len(chosen)} of {counted(len(done), 'episode')} of {run.name}",
        tuple(_timeline(run, episode) for episode in chosen),
        f"{folder} has no film strip of {absent} of them. rsd-trt eval writes one for each episode."
        if absent
        else None,
    )


def evenly(episodes: Iterable[Episode], run: Run) -> tuple[Episode, ...]:
    """At most `MOST` episodes: the first of every task, then the second of every task, and so on; those with a film
    strip first."""
    by_task: dict[int, list[Episode]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task_id, []).append(episode)
    rounds = zip_longest(*(by_task[task] for task in sorted(by_task)))
    ordered = [episode for one in rounds for episode in one if episode is not None]
    return tuple(sorted(ordered, key=lambda e: not _is_strip(_file(run, e, "strips", ".jpg")))[:MOST])


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


def _timeline(run: Run, episode: Episode) -> Timeline:
    tasks = {task.task_id: task.task_description for task in run.results.task_results}
    outcome = "success" if episode.success else "failure"
    strip, video = _file(run, episode, "strips", ".jpg"), _file(run, episode, "videos", f"_{outcome}.mp4")
    jpeg = base64.b64encode(strip.read_bytes()).decode() if _is_strip(strip) else None
    full = sum(query.full_query for query in episode.queries)
    caption = (
        f"Task {episode.task_id}, trial {episode.trial}: {outcome} after {counted(episode.steps, 'step')} with "
        f"{full} full queries. {tasks[episode.task_id]}."
    )
    bars = timeline_bars(episode, min(STRIP_FRAMES, len(episode.queries) + 1) if jpeg else 0)
    return Timeline(caption, bars, jpeg, str(video) if video.is_file() else None)


def timeline_bars(episode: Episode, frames: int = 0) -> str:
    """An SVG element, a unit wide for each step. frames: above it, the first and the last of them of the first and the
    last step."""
    steps, top = max(1, episode.steps), LEADERS if frames else 0
    base = top + max(HEIGHTS.values())
    paths: dict[str, str] = {}
    for query in episode.queries:
        kind, width = KINDS[group(query)], min(query.committed, steps - query.step)
        height = HEIGHTS[kind]
        paths[kind] = paths.get(kind, "") + f"M{query.step} {base - height}h{width}v{height}h-{width}z"
    for start, end in episode.actions.closed or () if episode.actions is not None else ():
        paths["gripper"] = paths.get("gripper", "") + f"M{start} {base + 2}h{end - start}v{LANE}h-{end - start}z"
    if episode.perturbed_at is not None:
        paths["perturbed"] = f"M{episode.perturbed_at} {top}V{base + 2 + LANE}"
    if frames > 1:
        ends = ((steps * (i + 0.5) / frames, steps * i / (frames - 1)) for i in range(frames))
        paths["leaders"] = "".join(f"M{at:g} 0L{step:g} {LEADERS}" for at, step in ends)
    height = base + 2 + LANE
    drawn = "".join(f'<path class="{kind}" d="{path}"/>' for kind, path in paths.items())
    shape = f'viewBox="0 0 {steps} {height}" height="{height}" preserveAspectRatio="none"'
    return f'<svg class="bars" {shape} role="img" aria-label="queries over the steps">{drawn}</svg>'
