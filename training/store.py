"""Frames with their labels on disk, as the training reads them: appended by whole episodes, read as memory maps.

    FOLDER/store.json       what lies there: `StoreFacts`
    FOLDER/episodes.jsonl   an episode a line: `StoredEpisode`
    FOLDER/images.bin       uint8 [F, cameras, S, S, 3], rotated, cropped and resized: what the draft's transformer sees
    FOLDER/state.bin        float32 [F, 8], the robot's own, not normalised
    FOLDER/word.bin         int32 [F], index into the episode's instructions
    FOLDER/chunk.bin        float32 [F, T, 7], the main head's, in environment units
    FOLDER/tokens.bin       uint8 [F, T, D, L], where the head gives tokens

The line is written last, so that an episode is there as a whole or not at all, however the process ends.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rsd_trt.config import ACTION_DIMS, PROPRIO_DIM, BackbonePrecision
from rsd_trt.errors import UserError, shown
from rsd_trt.files import explained, write_atomically
from rsd_trt.records import Natural, Positive, Record, differing, from_text, read_record, to_json, to_text, write_record
from rsd_trt.training.sources import Listed

FACTS = "store.json"
INDEX = "episodes.jsonl"
COLUMNS = ("images", "state", "word", "chunk", "tokens")

Array = NDArray[Any]


class StoreFacts(Record, frozen=True):
    """What a store holds. Another value of any field is another store."""

    source: dict[str, str]  # what the frames are read from, and how
    fingerprint: str  # of what makes the main head's chunks
    cameras: tuple[str, ...]
    side: Positive  # S
    steps: Positive  # T
    tokens: tuple[int, int] | None = None  # D, L
    precision: BackbonePrecision | None = None  # of the backbone that made the chunks; None: they came with the frames


class StoredEpisode(Record, frozen=True):
    """An episode of a store."""

    name: str
    frames: Natural  # with a label
    instructions: tuple[str, ...]
    seconds: float  # that labelling took
    stamp: str = ""  # of what it was read from: `Listed`
    initial_state: int | None = None  # `Listed`


@dataclass(frozen=True)
class Column:
    """One of a store's files."""

    shape: tuple[int, ...]  # of a frame's entry
    dtype: DTypeLike

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Store:
    """A store that is filled, and then read."""

    def __init__(self, folder: Path, facts: StoreFacts) -> None:
        """Goes on with what lies in the folder: what a killed process left of an episode is dropped.

        Raises:
            UserError: it holds something else, or cannot be read or written.
        """
        self.folder, self.facts = folder, facts
        cameras, side = len(facts.cameras), facts.side
        self.columns = {
            "images": Column((cameras, side, side, 3), np.uint8),
            "state": Column((PROPRIO_DIM,), np.float32),
            "word": Column((), np.int32),
            "chunk": Column((facts.steps, ACTION_DIMS), np.float32),
        }
        if facts.tokens is not None:
            self.columns["tokens"] = Column((facts.steps, *facts.tokens), np.uint8)
        self.episodes: list[StoredEpisode] = []
        self._index_bytes = 0  # of whole lines
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / FACTS).exists():
                self._resume()
            else:
                write_atomically(folder / INDEX, "")
                write_record(folder / FACTS, facts)

    def __len__(self) -> int:
        """Frames."""
        return sum(episode.frames for episode in self.episodes)

    @staticmethod
    def remove(folder: Path) -> None:
        """Removes the store that lies in the folder, and nothing else."""
        for name in (FACTS, INDEX, *(f"{key}.bin" for key in COLUMNS)):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    @property
    def frame_bytes(self) -> int:
        """What a frame takes on disk."""
        return sum(column.bytes for column in self.columns.values())

    def missing(self, episodes: Sequence[Listed]) -> list[int]:
        """Which of a source's episodes are not there yet.

        Raises:
            UserError: one that is there has changed in the source since, or is gone.
        """
        listed = {episode.name: episode.stamp for episode in episodes}
        for episode in self.episodes:
            if listed.get(episode.name) != episode.stamp:
                what = "has changed since it was read" if episode.name in listed else "is not in the data any more"
                raise UserError(f"{self.folder}: the episode {episode.name} {what}", "Start over: --fresh")
        there = {episode.name for episode in self.episodes}
        return [i for i, episode in enumerate(episodes) if episode.name not in there]

    def append(
        self, listed: Listed, instructions: tuple[str, ...], seconds: float, columns: Mapping[str, Array]
    ) -> None:
        """A whole episode; on the disk when this returns.

        Raises:
            UserError: it cannot be written: the store is as before.
        """
        frames = len(columns["state"])
        with explained(self.folder):
            for key, column in self.columns.items():
                values = np.ascontiguousarray(columns[key], column.dtype)
                assert values.shape == (frames, *column.shape), (key, values.shape)
                with self._file(key).open("r+b" if self._file(key).exists() else "wb") as stream:
                    stream.truncate(len(self) * column.bytes)  # what an append that failed left behind
                    stream.seek(len(self) * column.bytes)
                    stream.write(values.data)
                    stream.flush()
                    os.fsync(stream.fileno())
            episode = StoredEpisode(
                listed.name, frames, instructions, round(seconds, 3), listed.stamp, listed.initial_state
            )
            with (self.folder / INDEX).open("r+b") as stream:
                stream.truncate(self._index_bytes)
                stream.seek(self._index_bytes)
                stream.write(line := to_text(episode, indent=0).encode())
                stream.flush()
                os.fsync(stream.fileno())
        self._index_bytes += len(line)
        self.episodes.append(episode)
        self.__dict__.pop("maps", None)

    @cached_property
    def maps(self) -> dict[str, Array]:
        """Every column [F, ...], mapped into memory; not to be written to."""
        found: dict[str, Array] = {}
        for key, column in self.columns.items():
            found[key] = np.memmap(self._file(key), column.dtype, "r", shape=(len(self), *column.shape))
        return found

    @property
    def episode_of(self) -> NDArray[np.int64]:
        """[F], the index of each frame's episode."""
        counts = [episode.frames for episode in self.episodes]
        return np.repeat(np.arange(len(counts)), counts)

    @property
    def start_of(self) -> NDArray[np.int64]:
        """[F], the index of what each frame's episode began in: the first episode of that initial state of the task."""
        first: dict[tuple[str, int], int] = {}
        found = list(range(len(self.episodes)))
        for i, episode in enumerate(self.episodes):
            if episode.initial_state is not None and episode.instructions:
                found[i] = first.setdefault((episode.instructions[0], episode.initial_state), i)
        return np.array(found, np.int64)[self.episode_of]

    @property
    def instructions(self) -> tuple[str, ...]:
        """All that occur."""
        return tuple(dict.fromkeys(text for episode in self.episodes for text in episode.instructions))

    @property
    def instruction_of(self) -> NDArray[np.int64]:
        """[F], the index of each frame's instruction in `instructions`."""
        place = {text: i for i, text in enumerate(self.instructions)}
        words, out, first = self.maps["word"], np.zeros(len(self), np.int64), 0
        for episode in self.episodes:
            known = np.array([place[text] for text in episode.instructions])
            out[first : first + episode.frames] = known[words[first : first + episode.frames]]
            first += episode.frames
        return out

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.bin"

    def _resume(self) -> None:
        found = read_record(StoreFacts, self.folder / FACTS)
        for key, there, here in differing(to_json(found), to_json(self.facts)):
            raise UserError(
                f"{self.folder} holds frames of other data: {key} is {shown(there)} there, {shown(here)} here",
                "Start over: --fresh, or take another --work",
            )
        index = self.folder / INDEX
        lines = index.read_bytes()
        lines = lines[: lines.rfind(b"\n") + 1]  # a killed process may leave half a line
        self._index_bytes = len(lines)
        for number, line in enumerate(lines.splitlines(), start=1):
            self.episodes.append(from_text(StoredEpisode, line, f"{index}, line {number}"))
        for key, column in self.columns.items():
            file, wanted = self._file(key), len(self) * column.bytes
            size = file.stat().st_size if file.exists() else 0
            if size < wanted:
                raise UserError(f"{file} has {size} bytes, not {wanted}: it is damaged", "Start over: --fresh")
