"""One episode of a policy in LIBERO, by the published protocol."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsd_trt.errors import UserError, missing_extra
from rsd_trt.eval.results import Episode, QueryRecord
from rsd_trt.eval.simulator import Simulator
from rsd_trt.runtime.policy import Policy

log = logging.getLogger(__name__)

VIDEO_FPS = 20  # the control rate: videos play in real time


def run_episode(
    policy: Policy,
    simulator: Simulator,
    task: int,
    trial: int,
    max_steps: int,
    frames: list[NDArray[np.uint8]] | None = None,
) -> Episode:
    """One trial: success when the environment says so within `max_steps`.

    Images are rendered for the steps at which the policy is queried, or for all when `frames` collects them.
    An exception of the simulator or a fault of the policy makes the episode an error, not a failure.
    """
    started = time.perf_counter()
    queries: list[QueryRecord] = []
    step, success, error = 0, False, None
    try:
        policy.reset()
        simulator.reset(trial)
        if frames is not None:
            frames.append(simulator.frame())
        while step < max_steps and not success and error is None:
            query = policy.act_batch([simulator.observation()], [0])[0]
            queries.append(QueryRecord.of(query, step))
            error = query.fault
            actions = query.actions[: max_steps - step]
            for i, action in enumerate(actions):
                success = simulator.step(action, render=i == len(actions) - 1 or frames is not None)
                step += 1
                if frames is not None:
                    frames.append(simulator.frame())
                if success:
                    break
    except UserError:
        raise
    except Exception as exception:  # whatever breaks inside the simulator costs this episode, not the run
        log.exception("task %d, trial %d broke", task, trial)
        error = f"{type(exception).__name__}: {exception}"
    return Episode(task, trial, success, step, time.perf_counter() - started, tuple(queries), error)


def check_video_writer() -> None:
    """Raises UserError unless videos can be written."""
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise missing_extra("imageio-ffmpeg", "libero") from None


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """An MP4 (H.264) at the control rate; frames [S, S, 3] uint8."""
    import imageio_ffmpeg

    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = frames[0].shape
    temporary = path.with_name(f".{path.name}")
    writer = imageio_ffmpeg.write_frames(
        str(temporary), (width, height), fps=VIDEO_FPS, output_params=["-f", "mp4"], ffmpeg_log_level="error"
    )
    writer.send(None)
    for frame in frames:
        writer.send(frame)
    writer.close()
    temporary.replace(path)
