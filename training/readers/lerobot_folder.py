"""LeRobot data sets, v2.1 and v3.0: a folder of parquet and mp4, read without the lerobot package.

v2.1: `meta/info.json`, `meta/episodes.jsonl`, `meta/tasks.jsonl`, and a parquet and a video file an episode.
v3.0: `meta/info.json`, `meta/tasks.parquet`, `meta/episodes/**.parquet`, and many episodes a file: an episode's rows
have its `episode_index`, its part of a video begins at its `from_timestamp`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from rsd_trt.bundle import Bundle
from rsd_trt.config import PROPRIO_DIM
from rsd_trt.errors import UserError, did_you_mean, missing_extra, reason, shown
from rsd_trt.files import read_bounded
from rsd_trt.records import Natural, Positive, from_json, parse
from rsd_trt.training.sources import (
    Frames,
    Listed,
    Names,
    cameras_of,
    check_actions,
    check_frames,
    in_convention,
    in_parts,
    one_size,
    stamp,
    state_of,
    turned,
)

if TYPE_CHECKING:
    import pyarrow as pa

VERSIONS = ("v2.1", "v3.0")
CAMERAS = {  # what published conversions of LIBERO call its cameras
    "agentview_image": (
        "observation.images.image",
        "observation.images.agentview_image",
        "observation.images.agentview",
        "observation.image",
        "image",
    ),
    "robot0_eye_in_hand_image": (
        "observation.images.image2",
        "observation.images.robot0_eye_in_hand_image",
        "observation.images.wrist_image",
        "observation.images.wrist",
        "wrist_image",
    ),
}
STATES = (("observation.state",), ("state",))
ACTIONS = ("action", "actions")

Row = dict[str, Any]


class Feature(msgspec.Struct, frozen=True):
    """What info.json says of a column, as far as it is read here."""

    dtype: str
    shape: tuple[Natural, ...] | None = None
    names: object = None  # a list of its numbers' names, or such lists by group

    @property
    def is_joints(self) -> bool:
        """Whether its numbers are joint angles, by their names."""
        groups = self.names.values() if isinstance(self.names, dict) else [self.names]
        names = [name for group in groups if isinstance(group, list) for name in group]
        return any(str(name).lower().startswith("joint") for name in names)


class Info(msgspec.Struct, frozen=True):
    """`meta/info.json`."""

    features: dict[str, Feature]
    data_path: str
    video_path: str | None = None
    fps: Annotated[float, Meta(gt=0)] = 10.0
    chunks_size: Positive = 1000


class Task(msgspec.Struct, frozen=True):
    """A task of `meta/`."""

    task_index: Natural
    task: str


class Length(msgspec.Struct, frozen=True):
    """An episode of `meta/`."""

    episode_index: Natural
    length: Natural


class FilePlace(msgspec.Struct, frozen=True):
    """Which file something of an episode lies in, and the s at which it begins there."""

    chunk_index: Natural
    file_index: Natural
    from_timestamp: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where an episode lies."""

    index: int
    frames: int
    data: Path
    videos: dict[str, tuple[Path, float]]  # file, and s at which the episode begins in it; by camera


class LeRobotSource:
    """All episodes of a data set."""

    labelled = False
    tokens = False

    def __init__(self, folder: Path, bundle: Bundle, names: Names) -> None:
        """Raises UserError: it is of another version, damaged, or lacks what the bundle needs."""
        self.folder, self._bundle, self._names = folder, bundle, names
        about = folder / "meta" / "info.json"
        told = _json(about)
        version = str(told.get("codebase_version"))
        if version not in VERSIONS:
            raise UserError(
                f"{folder} is a LeRobot data set of version {shown(version)}{did_you_mean(version, VERSIONS)}",
                "Convert it with LeRobot's own scripts",
            )
        self._info = from_json(Info, told, str(about))
        features = self._info.features
        self._kinds = {name: feature.dtype for name, feature in features.items()}
        shapes = {name: feature.shape or () for name, feature in features.items()}
        seen = [name for name, kind in self._kinds.items() if kind in ("video", "image")]
        vectors = {name: shape[0] for name, shape in shapes.items() if len(shape) == 1 and name not in seen}
        action = next((name for name in ACTIONS if name in vectors), None)
        if action is None:
            raise UserError(f"{folder} has no feature named {' or '.join(ACTIONS)}")
        check_actions(folder, vectors[action])
        self._cameras = cameras_of(bundle, names, CAMERAS, seen)
        self._state = state_of(
            bundle, names, STATES, {name: width for name, width in vectors.items() if name != action}
        )
        joints = [name for name in self._state if features[name].is_joints]
        if joints and not names.state:
            raise UserError(
                f"{about}: {joints[0]} is of joints by its names, and not of the end effector",
                "Give: --state NAME,NAME,NAME",
            )
        self.size = one_size(folder, (_side(folder, name, shapes[name]) for name in self._cameras))
        self._tasks = self._read_tasks(version)
        self._places = list(self._v21() if version == "v2.1" else self._v30())
        if not self._places:
            raise UserError(f"{folder} has no episode")

    @property
    def facts(self) -> dict[str, str]:
        told = {
            "lerobot": str(self.folder.resolve()),
            "cameras": ",".join(self._cameras),
            "turn": str(self._names.turn),
        }
        return told | {"state": ",".join(self._state)}

    @property
    def has_state(self) -> bool:
        return bool(self._state)

    @property
    def episodes(self) -> Sequence[Listed]:
        meta = sorted(file for file in (self.folder / "meta").rglob("*") if file.is_file())
        found = []
        for place in self._places:
            files = (*meta, place.data, *(video for video, _ in place.videos.values()))
            found.append(Listed(f"episode_{place.index:06d}", place.frames, stamp(*files)))
        return found

    def read(self, index: int) -> Iterator[Frames]:
        place = self._places[index]
        stored = [name for name in self._cameras if self._kinds[name] == "image"]
        table = _rows(place.data, [*self._state, *stored, "task_index"], place.index)
        if len(table) != place.frames:
            raise UserError(f"{place.data}: episode {place.index} has {len(table)} rows, not {place.frames}")
        state = np.zeros((place.frames, PROPRIO_DIM), np.float32)
        if self._state:
            state = np.concatenate([_vectors(table[name], place, name) for name in self._state], axis=1)
        state = in_convention(state, self._bundle)
        numbers = table["task_index"].to_pylist()
        unknown = set(numbers) - self._tasks.keys()
        if unknown:
            raise UserError(f"{self.folder}: task_index {unknown.pop()} has no task in meta/")
        cameras = [
            _images(table[name].to_pylist(), place.data)
            if name in stored
            else _video(*place.videos[name], place.frames, self._info.fps)
            for name in self._cameras
        ]
        for part in in_parts(place.frames):
            count = part.stop - part.start
            images = []
            for name, frames in zip(self._cameras, cameras, strict=True):
                view = np.stack([next(frames) for _ in range(count)])
                side = check_frames(f"{self.folder}: {name}", view.shape, view.dtype)
                if side != self.size:
                    raise UserError(f"{self.folder}: {name} has frames of {side} pixels, info.json says {self.size}")
                images.append(turned(view, self._names.turn))
            instructions = tuple(self._tasks[number] for number in numbers[part])
            yield Frames(np.stack(images, axis=1), state[part], instructions)

    def _read_tasks(self, version: str) -> dict[int, str]:
        if version == "v2.1":
            file = self.folder / "meta" / "tasks.jsonl"
            rows = _json_lines(file)
        else:
            file = self.folder / "meta" / "tasks.parquet"
            rows = _table(file).to_pylist()
        # v3 writes pandas' index, which is the task's text, under a name that depends on pandas
        texts = ("task", "__index_level_0__", "index")
        named = (row | {"task": next((row[name] for name in texts if name in row), None)} for row in rows)
        tasks = (from_json(Task, row, str(file)) for row in named)
        return {task.task_index: task.task for task in tasks}

    def _v21(self) -> Iterator[Place]:
        file = self.folder / "meta" / "episodes.jsonl"
        for row in _json_lines(file):
            told = from_json(Length, row, str(file))
            index = told.episode_index
            place = {"episode_chunk": index // self._info.chunks_size, "episode_index": index}
            videos = {
                name: (self._file("video_path", place | {"video_key": name}), 0.0)
                for name in self._cameras
                if self._kinds[name] == "video"
            }
            yield Place(index, told.length, self._file("data_path", place), videos)

    def _v30(self) -> Iterator[Place]:
        for file in sorted((self.folder / "meta" / "episodes").rglob("*.parquet")):
            for row in _table(file).to_pylist():
                told = from_json(Length, row, str(file))
                videos = {}
                for name in self._cameras:
                    if self._kinds[name] == "video":
                        at = _place(row, f"videos/{name}/", file)
                        where = {"chunk_index": at.chunk_index, "file_index": at.file_index, "video_key": name}
                        videos[name] = (self._file("video_path", where), at.from_timestamp)
                at = _place(row, "data/", file)
                data = self._file("data_path", {"chunk_index": at.chunk_index, "file_index": at.file_index})
                yield Place(told.episode_index, told.length, data, videos)

    def _file(self, key: str, values: Mapping[str, object]) -> Path:
        """A path of info.json, filled in; it must lie in the folder."""
        try:
            path = self.folder / str(getattr(self._info, key)).format(**values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(f"{self.folder / 'meta' / 'info.json'}: {key} cannot be used: {reason(error)}") from None
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder)):
            raise UserError(f"{self.folder / 'meta' / 'info.json'}: {key} leads out of the folder: {shown(str(path))}")
        return path


def _place(row: Row, begin: str, file: Path) -> FilePlace:
    """What an episode's row says in the columns whose names begin like that."""
    told = {name.removeprefix(begin): value for name, value in row.items() if name.startswith(begin)}
    return from_json(FilePlace, told, f"{file}: {begin}")


def _vectors(column: pa.ChunkedArray, place: Place, name: str) -> NDArray[np.float32]:
    """A column's vectors [F, n]."""
    try:
        return np.array(column.to_pylist(), np.float32).reshape(place.frames, -1)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{place.data}: {name} of episode {place.index} is no table of numbers: {reason(error)}"
        ) from None


def _side(folder: Path, name: str, shape: tuple[int, ...]) -> int:
    """Of a feature [R, R, 3] or [3, R, R]."""
    if len(shape) == 3 and shape[0] == 3 != shape[2]:
        shape = (*shape[1:], 3)
    return check_frames(f"{folder}: {name}", (1, *shape), "uint8")


def _json(path: Path) -> Row:
    try:
        found = parse(read_bounded(path), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object")
    return found


def _json_lines(path: Path) -> list[Row]:
    try:
        found = [json.loads(line) for line in read_bounded(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if not all(isinstance(row, dict) for row in found):
        raise UserError(f"{path}: a line is no JSON object")
    return found


def _table(path: Path, columns: Sequence[str] | None = None, episode: int | None = None) -> pa.Table:
    """A parquet file, or an episode's rows of it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise missing_extra("pyarrow", "train") from None
    chosen = None if episode is None else [("episode_index", "=", episode)]
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns), filters=chosen)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None


def _rows(path: Path, columns: Sequence[str], episode: int) -> pa.Table:
    table = _table(path, columns, episode)
    for name in columns:
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name}{did_you_mean(name, table.column_names)}")
    return table


def _images(cells: Sequence[Row | None], where: Path) -> Iterator[NDArray[np.uint8]]:
    """Frames that are stored in the table, as files."""
    from PIL import Image

    for cell in cells:
        if not isinstance(cell, dict):
            raise UserError(f"{where}: a frame is {shown(cell)}, and no file")
        data = cell.get("bytes")
        try:
            source = io.BytesIO(data) if data is not None else where.parent / str(cell.get("path"))
            with Image.open(source) as image:
                yield np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: a frame cannot be decoded: {reason(error)}") from None


def _video(path: Path, begin: float, frames: int, fps: float) -> Iterator[NDArray[np.uint8]]:
    """An episode's frames of a video: so many, from `begin` (s) on."""
    try:
        import av
    except ImportError:
        raise missing_extra("av", "train") from None
    count = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if begin:
                container.seek(int(begin / stream.time_base), stream=stream)  # to the key frame before it
            for frame in container.decode(stream):
                if frame.time is not None and frame.time < begin - 0.5 / fps:
                    continue
                yield frame.to_ndarray(format="rgb24")
                count += 1
                if count == frames:
                    return
    except (OSError, av.FFmpegError, IndexError) as error:
        raise UserError(f"{path} cannot be decoded: {reason(error)}") from None
    raise UserError(f"{path} has {count} frames of an episode from {begin:g} s on, not {frames}")
