"""Other people's data sets, in their documented layouts: frames, states, tasks, and one line for what does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from layouts import NAMES, Demo, write_libero, write_v21, write_v30
from msgspec import structs

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.recorder import Recorder
from rsd_trt.recordings import Facts
from rsd_trt.training.sources import Names, Source, in_convention, open_source

LAYOUTS: dict[str, Callable[[Path, list[Demo]], Path]] = {
    "libero": write_libero,
    "v2.1": write_v21,
    "v2.1 images": lambda folder, demos: write_v21(folder, demos, "image"),
    "v3.0": write_v30,
}


def robosuite(bundle: Bundle) -> Bundle:
    """The bundle in the convention that data sets have."""
    control = structs.replace(bundle.config.control, rotation="robosuite")
    return replace(bundle, config=structs.replace(bundle.config, control=control))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_set_is_read(layout: str, bundle: Bundle, demos: list[Demo], tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path / "data", demos)
    source: Source = open_source(path, robosuite(bundle), Names(turn=layout != "libero"))
    assert (source.size, source.labelled, source.has_state) == (32, False, True)
    by_task = sorted(demos, key=lambda demo: demo.task) if layout == "libero" else demos
    assert [episode.frames for episode in source.episodes] == [len(demo.state) for demo in by_task]
    for i, demo in enumerate(by_task):
        (part,) = source.read(i)
        assert set(part.instructions) == {demo.task}
        assert np.allclose(part.state, demo.state)
        expected = np.stack(list(demo.images.values()), axis=1).astype(float)
        exact = layout in ("libero", "v2.1 images")
        assert np.abs(part.images - expected).max() <= (0 if exact else 30)
        assert np.abs(part.images - expected).mean() < 4
    before = [episode.stamp for episode in source.episodes]
    for file in path.rglob("*"):
        os.utime(file, (0, 0))
    assert all(a != episode.stamp for a, episode in zip(before, source.episodes, strict=True))


def test_long_episodes_come_in_parts(
    bundle: Bundle, demos: list[Demo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rsd_trt.training.sources.PART", 3)
    for layout in ("libero", "v3.0"):
        source = open_source(LAYOUTS[layout](tmp_path / layout, demos), bundle, Names())
        parts = [len(part.state) for part in source.read(1)]
        assert sum(parts) == source.episodes[1][1] > 3 and parts[:2] == [3, 3]


def test_axis_angles_are_brought_into_the_bundles_convention(bundle: Bundle) -> None:
    angle, axis = 3.46, np.array([1.0, 0.0, 0.0])
    state = np.zeros((2, 8), np.float32)
    state[0, 3:6], state[1, 3:6] = angle * axis, 1.2 * axis
    found = in_convention(state, bundle)
    assert bundle.config.control.rotation == "shortest"
    assert np.allclose(found[0, 3:6], (angle - 2 * np.pi) * axis, atol=1e-5)
    assert np.allclose(found[1], state[1])
    assert np.array_equal(in_convention(state, robosuite(bundle)), state)


def test_names_are_mapped(bundle: Bundle, demos: list[Demo], tmp_path: Path) -> None:
    cameras = dict(zip(bundle.config.control.cameras, reversed(NAMES), strict=True))
    source = open_source(
        write_v21(tmp_path / "d", demos), robosuite(bundle), Names(cameras, ("observation.state",), True)
    )
    (part,) = source.read(0)
    swapped = np.stack(list(reversed(demos[0].images.values())), axis=1).astype(float)
    assert np.abs(part.images - swapped).mean() < 4
    assert source.facts["cameras"] == ",".join(reversed(NAMES))


UNFIT: dict[str, tuple[str, Names]] = {
    "--camera agentview: the bundle has no such camera; did you mean 'agentview_image'?": (
        "libero",
        Names({"agentview": "agentview_rgb"}),
    ),
    "the data set has no agentview_rbg; did you mean 'agentview_rgb'?": (
        "libero",
        Names({"agentview_image": "agentview_rbg"}),
    ),
    "--state ee_poss: the data set has no ee_poss; did you mean 'ee_pos'?": ("libero", Names(state=("ee_poss",))),
    "8 numbers (end-effector position, axis-angle, gripper joints); ee_pos has 3 (it has: ee_ori [3]": (
        "libero",
        Names(state=("ee_pos",)),
    ),
    "the data set has no observation.images.imag; did you mean 'observation.images.image'?": (
        "v3.0",
        Names({"agentview_image": "observation.images.imag"}),
    ),
}


@pytest.mark.parametrize("message", UNFIT)
def test_names_that_do_not_fit_are_one_line(message: str, bundle: Bundle, demos: list[Demo], tmp_path: Path) -> None:
    layout, names = UNFIT[message]
    path = LAYOUTS[layout](tmp_path / "d", demos)
    with pytest.raises(UserError) as error:
        open_source(path, bundle, names)
    assert message in str(error.value)


def other_features(folder: Path, demos: list[Demo], **changes: object) -> Path:
    write_v21(folder, demos)
    info = folder / "meta" / "info.json"
    facts = json.loads(info.read_text())
    facts["features"] |= changes
    info.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))
    return folder


def other_lines(folder: Path, demos: list[Demo], lines: str) -> Path:
    (write_v21(folder, demos) / "meta" / "episodes.jsonl").write_text(lines)
    return folder


DAMAGED: dict[str, Callable[[Path, list[Demo]], Path]] = {
    "has actions of 14 numbers: only end-effector deltas with one gripper": lambda folder, demos: write_libero(
        folder, demos, actions=14
    ),
    "of version 'v2.0'": lambda folder, demos: write_v21(folder, demos, codebase_version="v2.0"),
    "data_path leads out of the folder": lambda folder, demos: write_v21(
        folder, demos, data_path="../../{episode_index}"
    ),
    "data_path cannot be used": lambda folder, demos: write_v21(folder, demos, data_path="{nosuch}"),
    "features is None, not an object": lambda folder, demos: write_v21(folder, demos, features=None),
    "features.... is {": lambda folder, demos: other_features(folder, demos, action={"dtype": "float32", "shape": "7"}),
    "chunks_size is 0, which must be >= 1": lambda folder, demos: write_v21(folder, demos, chunks_size=0),
    "episodes.jsonl: the key length is missing": lambda folder, demos: other_lines(
        folder, demos, '{"episode_index": 0}'
    ),
    "episodes.jsonl: a line is no JSON object": lambda folder, demos: other_lines(folder, demos, "[]"),
    "is of joints by its names": lambda folder, demos: other_features(
        folder,
        demos,
        **{"observation.state": {"dtype": "float32", "shape": [8], "names": {"motors": ["joint_0", "gripper"]}}},
    ),
    "has actions of 8 numbers": lambda folder, demos: other_features(
        folder, demos, action={"dtype": "float32", "shape": [8]}
    ),
    "square and RGB": lambda folder, demos: other_features(
        folder, demos, **{NAMES[0]: {"dtype": "video", "shape": [32, 48, 3]}}
    ),
    "frames of 32 and 48 pixels side by side": lambda folder, demos: other_features(
        folder, demos, **{NAMES[0]: {"dtype": "video", "shape": [48, 48, 3]}}
    ),
    "the data set's frames for agentview_image are not known (it has: left, ": lambda folder, demos: other_features(
        folder,
        demos,
        **{NAMES[0]: {"dtype": "float32", "shape": [3]}, "left": {"dtype": "video", "shape": [32, 32, 3]}},
    ),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_data_that_does_not_fit_is_one_line(message: str, bundle: Bundle, demos: list[Demo], tmp_path: Path) -> None:
    path = DAMAGED[message](tmp_path / "d", demos)
    with pytest.raises(UserError) as error:
        open_source(path, bundle, Names())
    assert message in str(error.value) and "\n" not in str(error.value)


def cut_video(folder: Path) -> None:
    video = next((folder / "videos").rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])


def cut_rows(folder: Path) -> None:
    import pyarrow.parquet as pq

    file = next((folder / "data").rglob("*.parquet"))
    pq.write_table(pq.read_table(file).slice(0, 3), file)


def ragged_state(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = next((folder / "data").rglob("*.parquet"))
    columns = pq.read_table(file).to_pydict()
    columns["observation.state"][2] = [0.0] * 4
    pq.write_table(pa.table(columns), file)


def no_task(folder: Path) -> None:
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 7, "task": "x"}\n')


BROKEN: dict[str, Callable[[Path], None]] = {
    "cannot be decoded": cut_video,
    "has 3 rows, not 5": cut_rows,
    "observation.state of episode 0 is no table of numbers": ragged_state,
    "task_index 0 has no task in meta/": no_task,
    "cannot be read: ": lambda folder: next((folder / "data").rglob("*.parquet")).unlink(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_is_one_line(message: str, bundle: Bundle, demos: list[Demo], tmp_path: Path) -> None:
    folder = write_v21(tmp_path / "d", demos[:1])
    BROKEN[message](folder)
    with pytest.raises(UserError) as error:
        list(open_source(folder, bundle, Names()).read(0))
    assert message in str(error.value)


@pytest.mark.parametrize("known", [(True, False), (False, True)])
def test_states_are_known_of_all_episodes_or_of_none(known: tuple[bool, ...], bundle: Bundle, tmp_path: Path) -> None:
    facts = Facts.of(bundle, 16)
    recorder = Recorder(tmp_path, facts)
    chunk = np.zeros((facts.chunk, 7), np.float32)
    for i, there in enumerate(known):
        episode = recorder.episode()
        state = np.zeros(8, np.float32) if there else None
        episode.add(0, np.zeros((2, 16, 16, 3), np.uint8), state, "x", chunk[:1], chunk)
        episode.save(f"e{i}")
    with pytest.raises(UserError, match=f"states of e{known.index(False)} are not known, those of other episodes are"):
        open_source(tmp_path, bundle, Names())


def test_demonstrations_of_different_names_are_one_line(bundle: Bundle, demos: list[Demo], tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    backbone = structs.replace(bundle.config.backbone, proprio=False)  # else the states are missed first
    stateless = replace(bundle, config=structs.replace(bundle.config, backbone=backbone))
    file = sorted(write_libero(tmp_path / "d", demos).iterdir())[1]
    with h5py.File(file, "a") as opened:
        del opened["data/demo_0/obs/gripper_states"]
    with pytest.raises(UserError, match=r"demo_0 has agentview_rgb, eye_in_hand_rgb, and the demonstrations before it"):
        open_source(tmp_path / "d", stateless, Names())


def test_what_is_no_data_is_one_line(bundle: Bundle, recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*nosuch"):
        open_source(tmp_path / "nosuch", bundle, Names())
    with pytest.raises(UserError, match=r"is neither recordings .*, nor a LeRobot folder .*, nor LIBERO's"):
        open_source(tmp_path, bundle, Names())
    with pytest.raises(UserError, match=r"whose names are the bundle's\. Leave out: --camera, --state, --turn"):
        open_source(recordings, bundle, Names(turn=True))
    (tmp_path / "x.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match=r"x\.hdf5 cannot be read"):
        open_source(tmp_path / "x.hdf5", bundle, Names())
