"""Pictures of an episode: a video that shows what the policy saw and what became of each query, and film strips."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsd_trt.errors import UserError, missing_extra
from rsd_trt.files import replacing
from rsd_trt.runtime.speculate import Route

FPS = 20  # the control rate: videos play in real time
VIEW = 512  # pixels a side of a camera's view in a video
BORDER = 10  # pixels
CAPTION = 96  # pixels below the views: three lines; a multiple of 16, as H.264 has it
FONT = 18  # pixels
STRIP_FRAMES = 6  # side by side

# The border says what became of the last query; the caption has the same as a word.
GREEN, AMBER, RED, BLUE = (46, 160, 67), (227, 160, 8), (218, 54, 51), (56, 112, 191)
WHITE, GREY = (235, 235, 235), (160, 160, 160)
CHECKED = {"accepted": GREEN, "partial": AMBER, "rejected": RED}

Colour = tuple[int, int, int]
Frame = NDArray[np.uint8]  # [height, width, 3]


@dataclass
class Film:
    """The frames of an episode, each with what was known of its queries by then."""

    task: str  # the instruction
    run: str  # what acts, as its files are named
    views: list[NDArray[np.uint8]] = field(default_factory=list)  # [cameras, S, S, 3] each, upright
    steps: list[int] = field(default_factory=list)  # at which each was seen
    answers: list[tuple[int, Route | None]] = field(default_factory=list)  # (index of its first frame, its route)
    outcome: str = ""  # what the last frame says

    def look(self, step: int, views: NDArray[np.uint8]) -> None:
        self.views.append(views)
        self.steps.append(step)

    def query(self, route: Route | None) -> None:
        """A query was answered from the last frame; None: by a script."""
        self.answers.append((max(0, len(self.views) - 1), route))

    def frames(self, perturbed: tuple[str, int] | None = None) -> Iterator[Frame]:
        """The views side by side, with a border and a caption; the last stays for a second. perturbed: what perturbed
        the scene, and before which step."""
        full, answers = 0, 0
        route: Route | None = None
        for i, (step, views) in enumerate(zip(self.steps, self.views, strict=True)):
            while answers < len(self.answers) and self.answers[answers][0] <= i:
                route = self.answers[answers][1]
                answers += 1
                full += route is not None and route not in ("accepted", "partial")
            told = [self.run, f"step {step}"]
            event = perturbed if perturbed is not None and step >= perturbed[1] else None
            told += [f"perturbed ({event[0]}) at step {event[1]}"] if event else []
            last = i == len(self.views) - 1
            ink = AMBER if event else GREY
            frame = _frame(views, self.task, [*told, self.outcome] if last else told, ink, route, full)
            yield from [frame] * (FPS if last else 1)

    def strip(self) -> NDArray[np.uint8]:
        """Up to `STRIP_FRAMES` of the first view side by side, evenly from the first step to the last."""
        wanted = np.linspace(0, self.steps[-1], min(STRIP_FRAMES, len(self.views)))
        nearest = np.abs(np.asarray(self.steps)[:, None] - wanted).argmin(axis=0)
        return np.concatenate([self.views[i][0] for i in nearest], axis=1)


def _frame(
    views: NDArray[np.uint8], task: str, told: Sequence[str], ink: Colour, route: Route | None, full: int
) -> Frame:
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("RGB", (VIEW * len(views), VIEW + CAPTION), (24, 24, 24))
    for i, view in enumerate(views):
        canvas.paste(Image.fromarray(view).resize((VIEW, VIEW), Image.Resampling.BICUBIC), (i * VIEW, 0))
    draw = ImageDraw.Draw(canvas)
    colour = BLUE if route is None else CHECKED.get(route, BLUE)
    draw.rectangle((0, 0, canvas.width - 1, VIEW - 1), outline=colour, width=BORDER)

    def write(x: int, line: int, text: str, ink: Colour) -> None:
        """As large as there is room for."""
        size = FONT * min(1.0, (canvas.width - x - BORDER) / ImageFont.load_default(FONT).getlength(text))
        draw.text((x, VIEW + 8 + 28 * line), text, ink, ImageFont.load_default(size))

    write(BORDER, 0, task, WHITE)
    write(BORDER, 1, "   ".join(told), ink)
    if route is not None:
        said = f"check: {route}" if route in CHECKED else f"full query: {route}".removesuffix(": full")
        write(BORDER, 2, f"full queries {full}", WHITE)
        write(BORDER + 160, 2, said, colour)
    return np.asarray(canvas)


def check_video_writer() -> None:
    """Raises UserError unless videos can be written."""
    try:
        import imageio_ffmpeg  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise missing_extra("pillow" if error.name == "PIL" else "imageio-ffmpeg", "libero") from None


def write_video(path: Path, frames: Iterable[Frame]) -> None:
    """An MP4 (H.264) at the control rate; frames [height, width, 3] uint8."""
    import imageio_ffmpeg

    frames = iter(frames)
    first = next(frames)
    height, width, _ = first.shape
    with replacing(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary), (width, height), fps=FPS, output_params=["-f", "mp4"], ffmpeg_log_level="error"
        )
        writer.send(None)
        for frame in chain([first], frames):
            writer.send(np.ascontiguousarray(frame))
        writer.close()


def write_beside(path: Path, videos: Sequence[Path]) -> None:
    """One video of several, side by side; the shorter ones stay at their last frame."""
    import imageio_ffmpeg

    inputs = [argument for video in videos for argument in ("-i", str(video))]
    held = "".join(f"[{i}]tpad=stop_mode=clone:stop_duration=60[v{i}];" for i in range(len(videos)))
    longest = max(imageio_ffmpeg.count_frames_and_secs(str(video))[0] for video in videos)
    stacked = held + "".join(f"[v{i}]" for i in range(len(videos))) + f"hstack=inputs={len(videos)}"
    with replacing(path) as temporary:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *inputs, "-filter_complex", stacked]
        command += ["-frames:v", str(longest), "-pix_fmt", "yuv420p", "-f", "mp4", str(temporary)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{path} cannot be written: {done.stderr.strip().splitlines()[-1:]}")


def write_strip(path: Path, strip: Frame) -> None:
    """A JPEG."""
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(strip).save(temporary, "JPEG", quality=80)
