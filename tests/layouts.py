"""Other people's data sets, written in their documented layouts: LIBERO's demonstrations, LeRobot v2.1 and v3.0."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

SIDE = 32  # pixels
FPS = 10


@dataclass(frozen=True)
class Demo:
    """An episode of a data set. images: as the simulator renders them."""

    images: dict[str, NDArray[np.uint8]]  # [F, SIDE, SIDE, 3] by the bundle's camera
    state: NDArray[np.float32]  # [F, 8]
    actions: NDArray[np.float32]  # [F, 7]
    task: str


def write_libero(folder: Path, demos: list[Demo], actions: int = 7) -> Path:
    """LIBERO's layout: a file a task."""
    h5py = pytest.importorskip("h5py")
    folder.mkdir(parents=True)
    for task in sorted({demo.task for demo in demos}):
        with h5py.File(folder / f"{task.replace(' ', '_')}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": f'"{task}"'})
            for number, demo in enumerate(demo for demo in demos if demo.task == task):
                group = data.create_group(f"demo_{number}")
                group["actions"] = np.zeros((len(demo.actions), actions)) + demo.actions[:, :1]
                seen = group.create_group("obs")
                seen["agentview_rgb"], seen["eye_in_hand_rgb"] = demo.images.values()
                seen["ee_pos"], seen["ee_ori"] = demo.state[:, :3], demo.state[:, 3:6]
                seen["gripper_states"], seen["joint_states"] = demo.state[:, 6:], demo.actions
    return folder


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """H.264, one key frame at every second frame, as LeRobot encodes."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2", "crf": "1"})
        stream.width, stream.height, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode())


NAMES = ("observation.images.image", "observation.images.image2")


def features(stored: str, state: int = 8) -> dict[str, object]:
    """Of info.json."""
    images = {
        name: {"dtype": stored, "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]} for name in NAMES
    }
    vectors = {
        "observation.state": {"dtype": "float32", "shape": [state]},
        "action": {"dtype": "float32", "shape": [7]},
    }
    numbers = {
        name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index", "task_index")
    }
    return {**images, **vectors, "timestamp": {"dtype": "float32", "shape": [1]}, **numbers}


def rows(demo: Demo, episode: int, first: int, task: int) -> dict[str, list[Any]]:
    count = len(demo.state)
    return {
        "observation.state": demo.state.tolist(),
        "action": demo.actions.tolist(),
        "timestamp": [i / FPS for i in range(count)],
        "frame_index": list(range(count)),
        "episode_index": [episode] * count,
        "index": list(range(first, first + count)),
        "task_index": [task] * count,
    }


def upright(demo: Demo) -> list[NDArray[np.uint8]]:
    """The frames by camera, as published conversions of LIBERO store them."""
    return [frames[:, ::-1, ::-1] for frames in demo.images.values()]


def write_v21(folder: Path, demos: list[Demo], stored: str = "video", **info: object) -> Path:
    """LeRobot v2.1: a parquet and a video file an episode. stored: `image` puts the frames into the parquet."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tasks = sorted({demo.task for demo in demos})
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    facts = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features(stored),
    }
    (folder / "meta" / "info.json").write_text(json.dumps(facts | info))
    lines = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
    (folder / "meta" / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"episode_index": i, "tasks": [demo.task], "length": len(demo.state)} for i, demo in enumerate(demos)]
    (folder / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = 0
    for i, demo in enumerate(demos):
        columns = rows(demo, i, first, tasks.index(demo.task))
        for name, frames in zip(NAMES, upright(demo), strict=True):
            if stored == "video":
                write_video(folder / "videos" / "chunk-000" / name / f"episode_{i:06d}.mp4", frames)
            else:
                columns[name] = [{"bytes": png(frame), "path": None} for frame in frames]
        pq.write_table(pa.table(columns), folder / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
        first += len(demo.state)
    return folder


def write_v30(folder: Path, demos: list[Demo]) -> Path:
    """LeRobot v3.0: all episodes in one parquet, and in one video a camera."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tasks = sorted({demo.task for demo in demos})
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    facts = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "chunks_size": 1000,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features("video"),
    }
    (folder / "meta" / "info.json").write_text(json.dumps(facts))
    named = {"task_index": list(range(len(tasks))), "__index_level_0__": tasks}
    pq.write_table(pa.table(named), folder / "meta" / "tasks.parquet")
    columns: dict[str, list[Any]] = {}
    episodes: list[dict[str, Any]] = []
    first = 0
    for i, demo in enumerate(demos):
        count = len(demo.state)
        for name, values in rows(demo, i, first, tasks.index(demo.task)).items():
            columns.setdefault(name, []).extend(values)
        row: dict[str, Any] = {"episode_index": i, "tasks": [demo.task], "length": count}
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        row |= {"dataset_from_index": first, "dataset_to_index": first + count}
        for name in NAMES:
            row |= {f"videos/{name}/chunk_index": 0, f"videos/{name}/file_index": 0}
            row |= {f"videos/{name}/from_timestamp": first / FPS, f"videos/{name}/to_timestamp": (first + count) / FPS}
        episodes.append(row)
        first += count
    pq.write_table(pa.table(columns), folder / "data" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.Table.from_pylist(episodes), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    for camera, name in enumerate(NAMES):
        frames = np.concatenate([upright(demo)[camera] for demo in demos])
        write_video(folder / "videos" / name / "chunk-000" / "file-000.mp4", frames)
    return folder


def png(frame: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(stream, "PNG")
    return stream.getvalue()
