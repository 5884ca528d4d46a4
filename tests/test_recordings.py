"""Recordings: what goes in comes out, whole episodes only, and one line for what does not fit."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from rsd_trt.bundle import Bundle, copy_with
from rsd_trt.config import Limits, WeightFile, WeightsFolder
from rsd_trt.errors import UserError
from rsd_trt.recorder import Recorder
from rsd_trt.recordings import EpisodeFacts, Facts, Recordings, main_fingerprint
from rsd_trt.records import to_text

SIZE = 16
Query = dict[str, Any]


@pytest.fixture
def facts(bundle: Bundle) -> Facts:
    return Facts.of(bundle, SIZE)


def smooth(seed: int, cameras: int, side: int) -> NDArray[np.uint8]:
    """Frames that survive a JPEG."""
    corners = np.random.default_rng(seed).integers(0, 256, (cameras, 2, 2, 3))
    t = np.linspace(0, 1, side)
    rows = corners[:, :1] * (1 - t)[None, :, None, None] + corners[:, 1:] * t[None, :, None, None]
    return (rows[:, :, :1] * (1 - t)[:, None] + rows[:, :, 1:] * t[:, None]).round().astype(np.uint8)


def query(facts: Facts, step: int, asked: bool = True, **others: Any) -> Query:
    random = np.random.default_rng(step)
    given: Query = {
        "step": step,
        "images": smooth(step, len(facts.cameras), 2 * facts.size),
        "state": random.uniform(-1, 1, 8).astype(np.float32),
        "instruction": "pick up the bowl",
        "actions": random.uniform(-1, 1, (2, 7)).astype(np.float32),
        "chunk": random.uniform(-1, 1, (facts.chunk, 7)).astype(np.float32) if asked else None,
        "tokens": random.integers(0, 7, (facts.chunk, 16, 8)) if asked else None,
    }
    return given | others


def recorded(folder: Path, facts: Facts, queries: int = 3, name: str = "a", limit: float = 1.0) -> Recorder:
    recorder = Recorder(folder, facts, limit)
    episode = recorder.episode(task=1, initial_state=4)
    for i in range(queries):
        episode.add(**query(facts, 2 * i, asked=i != 1))
    episode.save(name, success=True, steps=2 * queries - 1)
    return recorder


def test_what_was_recorded_is_read(facts: Facts, tmp_path: Path) -> None:
    recorded(tmp_path, facts)
    found = Recordings(tmp_path)
    (episode,) = found.episodes
    assert (len(found), episode.name, found.facts) == (3, "a", facts)
    assert episode.facts == EpisodeFacts(("pick up the bowl",), 1, True, 5, 4)
    arrays = episode.read()
    for i in range(3):
        given = query(facts, 2 * i)
        assert arrays["step"][i] == 2 * i
        assert np.array_equal(arrays["state"][i], given["state"])
        assert np.array_equal(arrays["actions"][2 * i : 2 * i + 2], given["actions"])
        if i != 1:
            assert np.array_equal(arrays["chunk"][i], given["chunk"])
            assert np.array_equal(arrays["tokens"][i], given["tokens"])
        halved = given["images"].reshape(len(facts.cameras), SIZE, 2, SIZE, 2, 3).mean((2, 4))
        assert np.abs(episode.frames()[i] - halved).mean() < 2
    assert np.isnan(arrays["chunk"][1]).all()
    assert np.array_equal(episode.frames(1, 2), episode.frames()[1:2])
    assert episode.read("step").keys() == {"step"}


def test_only_whole_episodes_are_there(facts: Facts, tmp_path: Path) -> None:
    recorder = recorded(tmp_path, facts)
    forgotten = recorder.episode()
    forgotten.add(**query(facts, 0))
    assert not recorder.episode().save("without_a_query")
    assert [episode.name for episode in Recordings(tmp_path).episodes] == ["a"]
    recorded(tmp_path, facts, queries=2, name="a")  # the same episode, made again
    recorded(tmp_path, facts, queries=1, name="b")
    assert [len(episode) for episode in Recordings(tmp_path).episodes] == [2, 1]


def test_the_limit_ends_the_recording_and_says_so_once(
    facts: Facts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = (recorded(tmp_path, facts).folder / "episodes" / "a.safetensors").stat().st_size
    with caplog.at_level(logging.WARNING):
        recorder = recorded(tmp_path, facts, name="b", limit=1.5 * size / 1e9)
        assert recorder.full and not recorder.has("b") and recorder.has("a")
        assert Recorder(tmp_path, facts, 1.5 * size / 1e9).at_limit and not Recorder(tmp_path, facts).at_limit
        episode = recorder.episode()
        episode.add(**query(facts, 0))
        assert not episode.save("c")
    assert [record.message for record in caplog.records if "nothing more is recorded" in record.message] == [
        f"{tmp_path} holds {size / 1e9:.3g} GB, and {1.5 * size / 1e9:g} GB are the limit: nothing more is recorded"
    ]


def test_another_bundles_recordings_are_refused(bundle: Bundle, facts: Facts, tmp_path: Path) -> None:
    recorded(tmp_path / "r", facts)
    rsd = structs.replace(bundle.config.rsd, n_action_steps=1)
    checked_otherwise = copy_with(bundle, structs.replace(bundle.config, name="other", rsd=rsd), tmp_path / "same")
    (checked_otherwise.path / "draft.safetensors").unlink()
    Recordings(tmp_path / "r").check(Facts.of(checked_otherwise, 8))  # draft and rule make no chunk
    control = structs.replace(bundle.config.control, max_steps={}, settle_steps=5, hand_step=None, statistics="x")
    control = structs.replace(control, limits=Limits((-0.9,) * 7, (0.9,) * 7))
    driven_otherwise = replace(bundle, config=structs.replace(bundle.config, control=control))
    weights = [WeightsFolder(f"/{place}", (WeightFile("a", 1, "", sha),)) for place, sha in ("xx", "yx", "xy")]
    here, there, changed = (
        main_fingerprint(replace(bundle, config=structs.replace(bundle.config, backbone_weights=w))) for w in weights
    )
    assert here == there != changed  # it counts what they are, not where they lie
    Recordings(tmp_path / "r").check(Facts.of(driven_otherwise, 8))
    control = structs.replace(bundle.config.control, rotate_images=False)
    other = Facts.of(copy_with(bundle, structs.replace(bundle.config, control=control), tmp_path / "b"), SIZE)
    for refuse in (lambda: Recordings(tmp_path / "r").check(other), lambda: Recorder(tmp_path / "r", other)):
        with pytest.raises(UserError, match=r"is of bundle 'tiny' \(\w{12}\), not of tiny \(\w{12}\)\. Use the bundle"):
            refuse()
    with pytest.raises(UserError, match=r"chunk is 8 there, and 4 here"):
        Recordings(tmp_path / "r").check(structs.replace(facts, chunk=4))
    with pytest.raises(UserError, match="size is 16 there, and 8 here"):
        Recorder(tmp_path / "r", structs.replace(facts, size=8))
    with pytest.raises(UserError, match=r"the bundle's cameras have 256\. Use: --record-size 256"):
        Facts.of(bundle, 257)


def test_a_state_may_be_unknown(facts: Facts, tmp_path: Path) -> None:
    episode = Recorder(tmp_path, facts).episode()
    episode.add(**query(facts, 0, state=None))
    episode.save("a")
    assert np.isnan(Recordings(tmp_path).episodes[0].read("state")["state"]).all()


WRONG = {
    "uint8 [2, S, S, 3]": {"images": np.zeros((1, 32, 32, 3), np.uint8)},
    "frames of float32": {"images": np.zeros((2, 32, 32, 3), np.float32)},
    "S of at least 16": {"images": np.zeros((2, 8, 8, 3), np.uint8)},
    "state [7]": {"state": np.zeros(7, np.float32)},
    "state of step 4 is not finite": {"state": np.full(8, np.nan, np.float32)},
    "chunk of step 4 is not finite": {"chunk": np.full((8, 7), np.inf, np.float32)},
    "chunk [4, 7] cannot be recorded, it must be [8, 7]": {"chunk": np.zeros((4, 7), np.float32)},
    "tokens of step 4 cannot be recorded: 0 to 255, not 300": {"tokens": np.full((8, 16, 8), 300)},
    "actions [2, 6]": {"actions": np.zeros((2, 6), np.float32)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_not_recorded(message: str, facts: Facts, tmp_path: Path) -> None:
    episode = Recorder(tmp_path, facts).episode()
    with pytest.raises(UserError) as error:
        episode.add(**query(facts, 4, **WRONG[message]))
    assert message in str(error.value)
    assert len(episode) == 0


def changed(**others: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: tensors | others


DAMAGE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "the tensor state is missing": lambda t: {k: v for k, v in t.items() if k != "state"},
    "has an unknown tensor 'stat'; did you mean 'state'?": lambda t: t | {"stat": t["state"]},
    "chunk is [3, 4, 7], not [3, 8, 7]": lambda t: t | {"chunk": np.ascontiguousarray(t["chunk"][:, :4])},
    "state is F64, not F32": lambda t: t | {"state": t["state"].astype(np.float64)},
    "frame_end is [3, 1], not [3, 2]": lambda t: t | {"frame_end": np.ascontiguousarray(t["frame_end"][:, :1])},
    "state holds numbers that are not finite": lambda t: t | {"state": np.where(np.arange(8) == 2, np.inf, t["state"])},
    "the queries committed 2 actions, and there are 6": lambda t: t | {"committed": np.array([1, 0, 1], np.int32)},
    "chunk holds numbers that are not finite": lambda t: (
        t | {"chunk": np.where(np.arange(7) == 3, np.nan, t["chunk"]).astype(np.float32)}
    ),
    "an index beyond them": changed(instruction=np.ones(3, np.int32)),
    "does not fit the": lambda t: t | {"frame_end": t["frame_end"] + 10**6},
    "cannot be decoded": lambda t: t | {"frames": np.zeros_like(t["frames"])},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_episode_is_one_line(message: str, facts: Facts, tmp_path: Path) -> None:
    recorded(tmp_path, facts)
    file = tmp_path / "episodes" / "a.safetensors"
    metadata = {"episode": to_text(EpisodeFacts(("pick up the bowl",)), indent=0)}
    save_file(DAMAGE[message](load_file(file)), file, metadata)
    with pytest.raises(UserError) as error:
        (episode,) = Recordings(tmp_path).episodes
        episode.read()
        episode.frames()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_frames_of_another_size_are_one_line(facts: Facts, tmp_path: Path) -> None:
    recorded(tmp_path, facts)
    file = tmp_path / "recordings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": 8}))
    (episode,) = Recordings(tmp_path).episodes
    with pytest.raises(UserError, match="a frame of query 0 has 16x16 pixels, not 8x8"):
        episode.frames()


def test_a_file_that_is_cut_short_is_one_line(facts: Facts, tmp_path: Path) -> None:
    recorded(tmp_path, facts)
    file = tmp_path / "episodes" / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a\.safetensors cannot be read: .*\. Remove it, or record it anew"):
        Recordings(tmp_path)
    with pytest.raises(UserError, match="holds no recordings"):
        Recordings(tmp_path / "episodes")


def test_a_full_disk_leaves_nothing_half_written(facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = recorded(tmp_path, facts)
    episode = recorder.episode()
    episode.add(**query(facts, 0))
    monkeypatch.setattr("rsd_trt.recorder.write_atomically", full)
    with pytest.raises(UserError, match=r"b\.safetensors cannot be written: No space left on device"):
        episode.save("b")
    assert [episode.name for episode in Recordings(tmp_path).episodes] == ["a"]
