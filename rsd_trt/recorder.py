"""Writes recordings: episodes in the format of `recordings`. Nothing here needs torch."""

from __future__ import annotations

import io
import logging
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ACTION_DIMS, PROPRIO_DIM, RECORD_GB
from rsd_trt.errors import UserError, missing_extra, shown
from rsd_trt.files import own, write_atomically, writing
from rsd_trt.recordings import EPISODES, FACTS, MOST_TOKEN, SUFFIX, Array, EpisodeFacts, Facts, check_facts
from rsd_trt.records import read_record, to_text, write_record

log = logging.getLogger(__name__)

QUALITY = 95  # of JPEG, without subsampling of colours: 8 kB a frame of 128 pixels, where raw it would be 49
ENCODERS = 2  # threads
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


class Recorder:
    """Writes recordings into a folder, which may hold earlier ones of the same bundle.

        recorder = Recorder(folder, Facts.of(bundle))
        episode = recorder.episode(task=3)
        episode.add(step, images, state, instruction, query.actions, query.chunk, query.tokens)
        episode.save("spatial_task3_trial0", success=True)    # or forget it: nothing was written

    Episodes may be open side by side. When `limit` is reached no more is written: that is said once in the log, and
    `full` is true from then on.
    """

    def __init__(self, folder: Path, facts: Facts, limit: float = RECORD_GB) -> None:
        """limit: GB that the folder may take.

        Raises:
            UserError: the folder holds other recordings, or cannot be written.
        """
        if find_spec("PIL") is None:
            raise missing_extra("pillow", "train")
        self.folder, self.facts, self.limit = folder, facts, limit
        self.saved = 0  # episodes, by this recorder
        self.full = False
        with writing(folder):
            if (folder / FACTS).exists():
                check_facts(folder, read_record(Facts, folder / FACTS), facts)
            else:
                (folder / EPISODES).mkdir(parents=True, exist_ok=True)
                write_record(folder / FACTS, facts)
            self._bytes = sum(file.stat().st_size for file in (folder / EPISODES).glob(f"*{SUFFIX}"))
        self._encoders = ThreadPoolExecutor(ENCODERS, "encode")

    def episode(self, task: int | None = None, initial_state: int | None = None) -> EpisodeRecorder:
        """A new episode, in memory until it is saved. initial_state: of the task's, where several episodes may begin in
        one: a draft is not measured on some of them and trained on others."""
        return EpisodeRecorder(self, task, initial_state)

    @property
    def at_limit(self) -> bool:
        """Whether there is no room for another episode like the largest in the folder."""
        sizes = [file.stat().st_size for file in (self.folder / EPISODES).glob(f"*{SUFFIX}")]
        return sum(sizes) + max(sizes, default=0) > self.limit * 1e9

    def has(self, name: str) -> bool:
        """Whether there is an episode of that name."""
        return (self.folder / EPISODES / f"{name}{SUFFIX}").exists()

    def write(self, name: str, data: bytes) -> bool:
        """An episode's file -> whether it was written: it is not, where the folder would get too large.

        Raises:
            UserError: it cannot be written.
        """
        if not NAME.fullmatch(name):
            raise UserError(f"an episode cannot be named {shown(name)}: letters, digits, '_', '-' and '.'")
        if self.full:
            return False
        path = self.folder / EPISODES / f"{name}{SUFFIX}"
        before = own(path).stat().st_size if path.exists() else 0
        if self._bytes - before + len(data) > self.limit * 1e9:
            self.full = True
            log.warning(
                "%s holds %.3g GB, and %g GB are the limit: nothing more is recorded",
                self.folder,
                self._bytes / 1e9,
                self.limit,
            )
            return False
        with writing(path):
            write_atomically(path, data)
        self._bytes += len(data) - before
        self.saved += 1
        return True

    def encode(self, images: NDArray[np.uint8]) -> Future[list[bytes]]:
        """Frames [cameras, S, S, 3] as JPEG files; they are copied before this returns."""
        return self._encoders.submit(_encoded, images.copy(), self.facts.size)


@dataclass
class EpisodeRecorder:
    """An episode that is being recorded: made by `Recorder.episode`."""

    recorder: Recorder
    task: int | None = None
    initial_state: int | None = None
    _queries: list[dict[str, Array]] = field(default_factory=list, repr=False)
    _frames: list[Future[list[bytes]]] = field(default_factory=list, repr=False)
    _instructions: dict[str, int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Queries so far."""
        return len(self._queries)

    def add(
        self,
        step: int,
        images: NDArray[np.uint8],
        state: NDArray[np.float32] | None,
        instruction: str,
        actions: NDArray[np.float32],
        chunk: NDArray[np.float32] | None = None,
        tokens: NDArray[np.int64] | None = None,
    ) -> None:
        """A query. images [cameras, S, S, 3] and state [8] as an `Observation` has them, None where it is not known;
        actions [n, 7]: what it committed; chunk [T, 7] and tokens [T, D, L] of the main head, where it was asked. Of an
        episode that the recorder is too full for nothing is kept.

        Raises:
            UserError: frames, state, actions or chunk of another shape or type, numbers that are not finite, or tokens
                that no byte holds.
        """
        if self.recorder.full:
            self._queries.clear()
            self._frames.clear()
            return
        facts = self.recorder.facts
        cameras, side = len(facts.cameras), images.shape[1] if images.ndim == 4 else 0
        if images.dtype != np.uint8 or images.shape != (cameras, side, side, 3) or side < facts.size:
            raise UserError(
                f"frames of {images.dtype} {list(images.shape)} cannot be recorded: uint8 [{cameras}, S, S, 3] with S "
                f"of at least {facts.size}"
            )
        nothing = np.full((facts.chunk, ACTION_DIMS), np.nan, np.float32)
        query: dict[str, Array] = {
            "step": np.array(step, np.int32),
            "instruction": np.array(self._instructions.setdefault(instruction, len(self._instructions)), np.int32),
            "state": np.full(PROPRIO_DIM, np.nan, np.float32) if state is None else np.array(state, np.float32),
            "chunk": nothing if chunk is None else np.array(chunk, np.float32),
            "actions": np.array(actions, np.float32),
        }
        shapes = {"state": (PROPRIO_DIM,), "chunk": nothing.shape, "actions": (len(actions), ACTION_DIMS)}
        for name, shape in shapes.items():
            value = query[name]
            if value.shape != shape:
                raise UserError(f"{name} {list(value.shape)} cannot be recorded, it must be {list(shape)}")
            unknown = (name == "chunk" and chunk is None) or (name == "state" and state is None)
            if not unknown and not np.isfinite(value).all():
                raise UserError(f"{name} of step {step} is not finite and cannot be recorded")
        if tokens is not None:
            if tokens.min() < 0 or tokens.max() > MOST_TOKEN:
                raise UserError(f"tokens of step {step} cannot be recorded: 0 to {MOST_TOKEN}, not {tokens.max()}")
            query["tokens"] = np.array(tokens, np.uint8)
        self._frames.append(self.recorder.encode(images))
        self._queries.append(query)

    def save(self, name: str, success: bool | None = None, steps: int | None = None) -> bool:
        """Writes the episode, in the place of an earlier one of that name -> whether it was: an episode without a query
        is not, nor one that is beyond the recorder's limit. steps: that were executed, where the last query's actions
        were not all.

        Raises:
            UserError: it cannot be written.
        """
        if not self._queries or self.recorder.full:
            return False
        from safetensors.numpy import save

        files = [encoded for future in self._frames for encoded in future.result()]
        stacked = {key: np.stack([q[key] for q in self._queries]) for key in ("step", "instruction", "state", "chunk")}
        tensors: dict[str, Array] = {
            **stacked,
            "frames": np.frombuffer(b"".join(files), np.uint8),
            "frame_end": np.cumsum([len(file) for file in files], dtype=np.int64).reshape(len(self._queries), -1),
            "actions": np.concatenate([query["actions"] for query in self._queries]),
            "committed": np.array([len(query["actions"]) for query in self._queries], np.int32),
        }
        given = [query["tokens"] for query in self._queries if "tokens" in query]
        if given:
            none = np.zeros_like(given[0])
            tensors["tokens"] = np.stack([query.get("tokens", none) for query in self._queries])
        facts = EpisodeFacts(tuple(self._instructions), self.task, success, steps, self.initial_state)
        return self.recorder.write(name, save(tensors, {"episode": to_text(facts, indent=0)}))


def _encoded(images: NDArray[np.uint8], size: int) -> list[bytes]:
    """Frames [cameras, S, S, 3] -> JPEG files of `size` pixels a side."""
    from PIL import Image

    files = []
    for frame in images:
        image = Image.fromarray(frame)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=QUALITY, subsampling=0)
        files.append(stream.getvalue())
    return files
