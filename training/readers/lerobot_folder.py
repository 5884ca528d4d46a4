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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsd_trt.bundle import Bundle
from rsd_trt.config import PROPRIO_DIM
from rsd_trt.errors import UserError, did_you_mean, missing_extra, reason, shown
from rsd_trt.files import read_bounded
from rsd_trt.records import parse
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
        self._info = _json(folder / "meta" / "info.json")
        version = str(self._info.get("codebase_version"))
        if version not in VERSIONS:
            raise UserError(
                f"{folder} is a LeRobot data set of version {shown(version)}{did_you_mean(version, VERSIONS)}",
                "Convert it with LeRobot's own scripts",
            )
        features = self._info.get("features")
        if not isinstance(features, dict):
            raise UserError(f"{folder / 'meta' / 'info.json'} has no features")
        self._kinds = {name: str(feature.get("dtype")) for name, feature in features.items()}
        shapes = {name: tuple(feature.get("shape") or ()) for name, feature in features.items()}
        seen = [name for name, kind in self._kinds.items() if kind in ("video", "image")]
        vectors = {name: int(shape[0]) for name, shape in shapes.items() if len(shape) == 1 and name not in seen}
        action = next((name for name in ACTIONS if name in vectors), None)
        if action is None:
            raise UserError(f"{folder} has no feature named {' or '.join(ACTIONS)}")
        check_actions(folder, vectors[action])
        self._cameras = cameras_of(bundle, names, CAMERAS, seen)
        self._state = state_of(
            bundle, names, STATES, {name: width for name, width in vectors.items() if name != action}
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
            parts = [np.array(table[name].to_pylist(), np.float32).reshape(place.frames, -1) for name in self._state]
            state = np.concatenate(parts, axis=1)
        state = in_convention(state, self._bundle)
        numbers = table["task_index"].to_pylist()
        unknown = set(numbers) - self._tasks.keys()
        if unknown:
            raise UserError(f"{self.folder}: task_index {min(unknown)} has no task in meta/")
        cameras = [
            _images(table[name].to_pylist(), place.data)
            if name in stored
            else _video(*place.videos[name], place.frames, float(self._info["fps"]))
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
            rows = _json_lines(self.folder / "meta" / "tasks.jsonl")
        else:
            rows = _table(self.folder / "meta" / "tasks.parquet").to_pylist()
        # v3 writes pandas' index, which is the task's text, under a name that depends on pandas
        texts = ("task", "__index_level_0__", "index")
        return {int(row["task_index"]): str(next(row[name] for name in texts if name in row)) for row in rows}

    def _v21(self) -> Iterator[Place]:
        per_chunk = int(self._info.get("chunks_size", 1000))
        for row in _json_lines(self.folder / "meta" / "episodes.jsonl"):
            index = int(row["episode_index"])
            place = {"episode_chunk": index // per_chunk, "episode_index": index}
            videos = {
                name: (self._file("video_path", place | {"video_key": name}), 0.0)
                for name in self._cameras
                if self._kinds[name] == "video"
            }
            yield Place(index, int(row["length"]), self._file("data_path", place), videos)

    def _v30(self) -> Iterator[Place]:
        for file in sorted((self.folder / "meta" / "episodes").rglob("*.parquet")):
            for row in _table(file).to_pylist():
                videos = {}
                for name in self._cameras:
                    if self._kinds[name] == "video":
                        where = {x: int(row[f"videos/{name}/{x}"]) for x in ("chunk_index", "file_index")}
                        video = self._file("video_path", where | {"video_key": name})
                        videos[name] = (video, float(row[f"videos/{name}/from_timestamp"]))
                data = {x: int(row[f"data/{x}"]) for x in ("chunk_index", "file_index")}
                yield Place(int(row["episode_index"]), int(row["length"]), self._file("data_path", data), videos)

    def _file(self, key: str, values: Mapping[str, int | str]) -> Path:
        """A path of info.json, filled in; it must lie in the folder."""
        try:
            path = self.folder / str(self._info[key]).format(**values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(f"{self.folder / 'meta' / 'info.json'}: {key} cannot be used: {reason(error)}") from None
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder)):
            raise UserError(f"{self.folder / 'meta' / 'info.json'}: {key} leads out of the folder: {shown(str(path))}")
        return path


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
        return [json.loads(line) for line in read_bounded(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None


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


def _images(cells: Sequence[Row], where: Path) -> Iterator[NDArray[np.uint8]]:
    """Frames that are stored in the table, as files."""
    from PIL import Image

    for cell in cells:
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
