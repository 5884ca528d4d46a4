"""Frames and labels on disk: whole episodes, whatever kills the process."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from msgspec import structs

from rsd_trt.errors import UserError
from rsd_trt.models.vision_draft import Resize
from rsd_trt.training import store as module
from rsd_trt.training.labels import Labeller, fill
from rsd_trt.training.sources import Frames, Listed
from rsd_trt.training.store import Array, Store, StoreFacts

FACTS = StoreFacts({"recordings": "/r"}, "f" * 64, ("a", "b"), side=4, steps=3, tokens=(2, 5))


def columns(frames: int, seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "images": random.integers(0, 256, (frames, 2, 4, 4, 3), dtype=np.uint8),
        "state": random.normal(size=(frames, 8)).astype(np.float32),
        "word": np.arange(frames, dtype=np.int32) % 2,
        "chunk": random.normal(size=(frames, 3, 7)).astype(np.float32),
        "tokens": random.integers(0, 7, (frames, 3, 2, 5), dtype=np.uint8),
    }


A, NOTHING, B, C = (Listed(name, 1, "") for name in ("a", "nothing", "b", "c"))


def filled(folder: Path) -> Store:
    store = Store(folder, FACTS)
    store.append(A, ("one", "two"), 1.0, columns(3, 0))
    store.append(NOTHING, (), 0.0, columns(0, 0))
    store.append(B, ("two", "three"), 2.0, columns(2, 1))
    return store


def test_what_is_appended_is_mapped(tmp_path: Path) -> None:
    filled(tmp_path)
    store = Store(tmp_path, FACTS)
    for name, values in columns(3, 0).items():
        assert np.array_equal(store.maps[name][:3], values)
        assert np.array_equal(store.maps[name][3:], columns(2, 1)[name])
    assert isinstance(store.maps["images"], np.memmap)
    assert store.episode_of.tolist() == [0, 0, 0, 2, 2]
    assert [store.instructions[i] for i in store.instruction_of] == ["one", "two", "one", "two", "three"]
    assert store.missing([A, C, NOTHING, B]) == [1]
    with pytest.raises(UserError, match="the episode b is not in the data any more"):
        store.missing([A, C, NOTHING])


def half_a_line(folder: Path) -> None:
    with (folder / "episodes.jsonl").open("a") as stream:
        stream.write('{"name": "c", "fra')


def no_line(folder: Path) -> None:
    with (folder / "images.bin").open("ab") as stream:
        stream.write(b"x" * 50)


@pytest.mark.parametrize("kill", [half_a_line, no_line])
def test_what_a_killed_process_left_is_dropped(kill: Callable[[Path], None], tmp_path: Path) -> None:
    filled(tmp_path)
    kill(tmp_path)
    store = Store(tmp_path, FACTS)
    assert [episode.name for episode in store.episodes] == ["a", "nothing", "b"]
    store.append(C, ("one", "two"), 0.0, columns(4, 2))
    again = Store(tmp_path, FACTS)
    assert [episode.frames for episode in again.episodes] == [3, 0, 2, 4]
    assert np.array_equal(again.maps["images"][5:], columns(4, 2)["images"])


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = filled(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            store.append(C, ("one",), 0.0, columns(4, 2))
    store.append(C, ("one", "two"), 0.0, columns(1, 3))
    assert np.array_equal(Store(tmp_path, FACTS).maps["chunk"][5:], columns(1, 3)["chunk"])


def test_other_frames_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(UserError, match=r"side is 4 there, 8 here\. Start over: --fresh"):
        Store(tmp_path, structs.replace(FACTS, side=8))
    with pytest.raises(UserError, match=r"precision is None there, 'fp32' here"):
        Store(tmp_path, structs.replace(FACTS, precision="fp32"))
    (tmp_path / "state.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"state\.bin has 0 bytes, not 160: it is damaged"):
        Store(tmp_path, FACTS)


class Given:
    """A source of one episode, in parts of 3 frames and 2."""

    size, labelled, tokens, has_state = 4, False, False, True

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}
        self.episodes = [Listed("a", 5, "")]

    def read(self, index: int) -> Iterator[Frames]:
        state = np.zeros((5, 8), np.float32)
        state[4, 2] = np.nan
        for part in (slice(0, 3), slice(3, 5)):
            count = part.stop - part.start
            yield Frames(np.zeros((count, 2, 4, 4, 3), np.uint8), state[part], ("one",) * count)


def label(broken: int | None, frames: Frames) -> Frames:
    """A main head of chunks, of which that of a frame of the first part is broken."""
    chunk = np.zeros((len(frames.state), 3, 7), np.float32)
    if broken is not None and len(chunk) == 3:
        chunk[broken] = np.nan
    return replace(frames, chunk=chunk)


@pytest.mark.parametrize(("broken", "what"), [(None, "the state of frame 4"), (1, "the main head's chunk of frame 1")])
def test_what_is_not_finite_is_named_by_episode_and_frame(broken: int | None, what: str, tmp_path: Path) -> None:
    store = Store(tmp_path, structs.replace(FACTS, tokens=None))
    labeller = cast(Labeller, partial(label, broken))
    with pytest.raises(UserError, match=f"^a: {what} is not finite"):
        fill(store, Given(), labeller, Resize(4, 4, True, 1.0), 7, lambda *_: None)
    assert not store.episodes


def test_a_token_that_no_byte_holds_is_refused(tmp_path: Path) -> None:
    def labeller(frames: Frames) -> Frames:
        return replace(label(None, frames), tokens=np.full((len(frames.state), 3, 2, 5), 300))

    with pytest.raises(UserError, match=r"^a has the token 300, and the codec 1024 levels"):
        fill(Store(tmp_path, FACTS), Given(), cast(Labeller, labeller), Resize(4, 4, True, 1.0), 1024, lambda *_: None)
