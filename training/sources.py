"""Where frames come from: recordings of the policy itself, or other people's data sets, which a reader each opens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rsd_trt.bundle import Bundle
from rsd_trt.config import ACTION_DIMS, PROPRIO_DIM
from rsd_trt.errors import UserError, did_you_mean
from rsd_trt.files import explained
from rsd_trt.recordings import FACTS as RECORDINGS
from rsd_trt.runtime.speculate import Actions, Tokens

PART = 256  # frames that are in memory at once
HDF5 = (".hdf5", ".h5")
TINY_TURN = 1e-9  # rad


@dataclass(frozen=True)
class Frames:
    """Consecutive frames of an episode.

    images [F, cameras, R, R, 3] uint8, turned as the bundle's cameras give them; state [F, 8] in the bundle's rotation
    convention, zeros where the data set has none and the bundle reads none; chunk [F, T, 7] of the main head and
    tokens [F, T, D, L], where they are known.
    """

    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    instructions: tuple[str, ...]  # of each frame
    chunk: Actions | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Names:
    """What the data set calls what the bundle reads.

    cameras: the data set's name by the bundle's. state: names whose values make the 8 numbers, in order. Empty: the
    usual names. turn: the frames are stored rotated by 180 degrees against what the bundle's cameras give.
    """

    cameras: Mapping[str, str] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    turn: bool = False


class Listed(NamedTuple):
    """An episode, before it is read."""

    name: str
    frames: int  # the most that it may have
    stamp: str  # of the files that it is read from: with another one it has changed
    initial_state: int | None = None  # of the task's: which one it began in; None: one of its own


class Source(Protocol):
    """Episodes of frames.

    facts: what tells it from others. size: R, pixels a side. labelled: whether it knows the main head's chunks; tokens:
    and their tokens. has_state: whether it knows the robot's own.
    """

    @property
    def facts(self) -> dict[str, str]: ...
    @property
    def size(self) -> int: ...
    @property
    def labelled(self) -> bool: ...
    @property
    def tokens(self) -> bool: ...
    @property
    def has_state(self) -> bool: ...
    @property
    def episodes(self) -> Sequence[Listed]: ...
    def read(self, index: int) -> Iterator[Frames]:
        """The frames of an episode, in parts.

        Raises:
            UserError: they are damaged or not what the bundle takes.
        """
        ...


def open_source(path: Path, bundle: Bundle, names: Names) -> Source:
    """The reader of what lies at `path`.

    Raises:
        UserError: nothing that is known lies there, or it does not fit the bundle.
    """
    if (path / RECORDINGS).exists():
        from rsd_trt.training.readers.recorded import RecordedSource

        if names != Names():
            raise UserError(
                f"{path} holds recordings, whose names are the bundle's", "Leave out: --camera, --state, --turn"
            )
        return RecordedSource(path, bundle)
    if (path / "meta" / "info.json").exists():
        from rsd_trt.training.readers.lerobot_folder import LeRobotSource

        return LeRobotSource(path, bundle, names)
    if path.suffix in HDF5 or (path.is_dir() and any(file.suffix in HDF5 for file in path.iterdir())):
        from rsd_trt.training.readers.libero_demos import LiberoSource

        return LiberoSource(path, bundle, names)
    if not path.exists():
        raise UserError(f"there is no {path}", "Make recordings: rsd-trt eval --record")
    raise UserError(
        f"{path} is neither recordings (with {RECORDINGS}), nor a LeRobot folder (with meta/info.json), nor LIBERO's "
        "HDF5 demonstrations"
    )


def stamp(*files: Path) -> str:
    """Names, sizes and times of modification, as a digest.

    Raises:
        UserError: there is no such file.
    """
    found = hashlib.sha256()
    for file in files:
        with explained(file):
            told = file.stat()
        found.update(f"{file.name} {told.st_size} {told.st_mtime_ns}\n".encode())
    return found.hexdigest()


def cameras_of(bundle: Bundle, names: Names, usual: Mapping[str, Sequence[str]], there: Sequence[str]) -> list[str]:
    """What the data set calls each of the bundle's cameras.

    usual: what data sets of the kind call LIBERO's cameras. there: the names that the data set has.

    Raises:
        UserError: a name that the bundle or the data set does not have, or a camera for which there is none.
    """
    wanted = bundle.config.control.cameras
    for camera in names.cameras:
        if camera not in wanted:
            raise UserError(f"--camera {camera}: the bundle has no such camera{did_you_mean(camera, wanted)}")
    found = []
    for camera in wanted:
        given = names.cameras.get(camera)
        if given is not None and given not in there:
            raise UserError(f"--camera {camera}={given}: the data set has no {given}{did_you_mean(given, there)}")
        name = given or next((name for name in usual.get(camera, ()) if name in there), None)
        if name is None:
            options = ", ".join(sorted(there)) or "none"
            raise UserError(
                f"the data set's frames for {camera} are not known (it has: {options})", f"Give: --camera {camera}=NAME"
            )
        found.append(name)
    return found


def state_of(bundle: Bundle, names: Names, usual: Sequence[Sequence[str]], there: Mapping[str, int]) -> tuple[str, ...]:
    """What the data set calls the parts of the robot's state; empty where it has none and the bundle reads none.

    usual: names of data sets of the kind. there: the width of each vector that the data set has.

    Raises:
        UserError: a name that it does not have, widths that do not make 8, or nothing where the bundle reads a state.
    """
    for name in names.state:
        if name not in there:
            raise UserError(f"--state {name}: the data set has no {name}{did_you_mean(name, there)}")
    chosen = names.state or next((tuple(option) for option in usual if set(option) <= set(there)), ())
    width = sum(there[name] for name in chosen)
    if chosen and width == PROPRIO_DIM:
        return chosen
    if not bundle.config.backbone.proprio and not names.state:
        return ()
    described = ", ".join(f"{name} [{size}]" for name, size in sorted(there.items())) or "no vector"
    raise UserError(
        f"{bundle.config.name} reads the robot's state, {PROPRIO_DIM} numbers (end-effector position, axis-angle, "
        f"gripper joints); {', '.join(chosen) or 'what is known of the data set'} has {width} (it has: {described})",
        "Give: --state NAME or --state NAME,NAME,NAME",
    )


def check_actions(where: Path, width: int) -> None:
    """Raises UserError for another action space than 6 deltas of the arm and one gripper."""
    if width != ACTION_DIMS:
        raise UserError(
            f"{where} has actions of {width} numbers: only end-effector deltas with one gripper, {ACTION_DIMS} "
            "numbers, are supported"
        )


def turned(images: NDArray[np.uint8], turn: bool) -> NDArray[np.uint8]:
    """Frames [F, R, R, 3], rotated by 180 degrees where `turn`."""
    return images[:, ::-1, ::-1] if turn else images


def in_convention(state: NDArray[np.float32], bundle: Bundle) -> NDArray[np.float32]:
    """A data set's state [F, 8], whose axis-angle is of the quaternion as it is (robosuite's), in the bundle's
    convention: `shortest` takes the other of two equal rotations where the angle is beyond half a turn."""
    if bundle.config.control.rotation == "robosuite":
        return state
    out = state.copy()
    angle = np.linalg.norm(out[:, 3:6], axis=1, keepdims=True)
    out[:, 3:6] *= np.where(angle > np.pi, 1 - 2 * np.pi / np.maximum(angle, TINY_TURN), 1)
    return out


def in_parts(count: int) -> Iterator[slice]:
    """0..count in slices of at most `PART`."""
    return (slice(first, min(first + PART, count)) for first in range(0, count, PART))


def one_size(where: Path, sides: Iterable[int]) -> int:
    """The side of all frames.

    Raises:
        UserError: there is more than one.
    """
    first, *others = sorted(set(sides))
    if others:
        raise UserError(f"{where}: frames of {' and '.join(map(str, [first, *others]))} pixels side by side")
    return first


def check_frames(where: str, shape: Sequence[int], dtype: object) -> int:
    """The side of square frames [F, R, R, 3].

    Raises:
        UserError: they are of another shape or type.
    """
    if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or str(dtype) != "uint8":
        raise UserError(f"{where}: frames are {dtype} {list(shape)}, not uint8 [F, R, R, 3]: square and RGB")
    return int(shape[1])
