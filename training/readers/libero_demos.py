"""LIBERO's demonstrations: HDF5 files of robomimic's layout, one a task.

data                          attribute problem_info: JSON with language_instruction
data/demo_N/actions           [F, 7]
data/demo_N/obs/agentview_rgb, eye_in_hand_rgb    uint8 [F, R, R, 3], as the simulator renders them
data/demo_N/obs/ee_pos, ee_ori, gripper_states    [F, 3], [F, 3] axis-angle, [F, 2]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsd_trt.bundle import Bundle
from rsd_trt.config import PROPRIO_DIM
from rsd_trt.errors import UserError, missing_extra, reason, shown
from rsd_trt.training.sources import (
    HDF5,
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
    import h5py

CAMERAS = {"agentview_image": ("agentview_rgb",), "robot0_eye_in_hand_image": ("eye_in_hand_rgb",)}
STATES = (("ee_pos", "ee_ori", "gripper_states"), ("ee_states", "gripper_states"))


class LiberoSource:
    """All demonstrations of a file, or of a folder's files."""

    labelled = False
    tokens = False

    def __init__(self, path: Path, bundle: Bundle, names: Names) -> None:
        """Raises UserError: a file cannot be read, or lacks what the bundle needs."""
        self.path, self._bundle, self._names = path, bundle, names
        self.files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in HDF5)
        self._demos: list[tuple[Path, str, int]] = []
        self._cameras: list[str] = []
        self._state: tuple[str, ...] = ()
        self._instructions: dict[Path, str] = {}
        sizes = set()
        for file in self.files:
            with _opened(file) as data:
                self._instructions[file] = _instruction(data, file)
                for demo in sorted(data, key=_number):
                    sizes.add(self._check(file, data[demo]))
                    self._demos.append((file, demo, len(data[demo]["actions"])))
        if not self._demos:
            raise UserError(f"{path} has no demonstration")
        self.size = one_size(path, sizes)

    @property
    def facts(self) -> dict[str, str]:
        told = {"libero": str(self.path.resolve()), "cameras": ",".join(self._cameras), "turn": str(self._names.turn)}
        return told | {"state": ",".join(self._state)}

    @property
    def has_state(self) -> bool:
        return bool(self._state)

    @property
    def episodes(self) -> Sequence[Listed]:
        stamps = {file: stamp(file) for file in self.files}
        return [Listed(f"{file.stem}/{demo}", frames, stamps[file]) for file, demo, frames in self._demos]

    def read(self, index: int) -> Iterator[Frames]:
        file, demo, count = self._demos[index]
        with _opened(file) as data:
            seen = data[demo]["obs"]
            for part in in_parts(count):
                images = np.stack([turned(seen[name][part], self._names.turn) for name in self._cameras], axis=1)
                state = np.zeros((len(images), PROPRIO_DIM), np.float32)
                if self._state:
                    state = np.concatenate([seen[name][part] for name in self._state], axis=1).astype(np.float32)
                instructions = (self._instructions[file],) * len(images)
                yield Frames(images, in_convention(state, self._bundle), instructions)

    def _check(self, file: Path, demo: h5py.Group) -> int:
        """The side of a demonstration's frames; raises UserError where something is missing or of another shape."""
        if "obs" not in demo or "actions" not in demo:
            raise UserError(f"{file}: {demo.name} has {shown(sorted(demo))}, and no obs and actions")
        check_actions(file, demo["actions"].shape[-1])
        seen, count = demo["obs"], len(demo["actions"])
        shapes = {name: tuple(getattr(seen[name], "shape", ())) for name in seen}
        frames = [name for name, shape in shapes.items() if len(shape) == 4]
        vectors = {name: shape[1] for name, shape in shapes.items() if len(shape) == 2}
        cameras = cameras_of(self._bundle, self._names, CAMERAS, frames)
        state = state_of(self._bundle, self._names, STATES, vectors)
        if self._demos and (cameras, state) != (self._cameras, self._state):
            here, there = (", ".join((*x, *y)) for x, y in ((cameras, state), (self._cameras, self._state)))
            raise UserError(f"{file}: {demo.name} has {here}, and the demonstrations before it {there}")
        self._cameras, self._state = cameras, state
        for name in (*self._cameras, *self._state):
            if len(seen[name]) != count:
                raise UserError(f"{file}: {demo.name} has {count} actions, and {len(seen[name])} of {name}")
        sides = (check_frames(f"{file}: {name}", seen[name].shape, seen[name].dtype) for name in self._cameras)
        return one_size(file, sides)


@contextmanager
def _opened(file: Path) -> Iterator[h5py.Group]:
    """A file's group `data`."""
    try:
        import h5py
    except ImportError:
        raise missing_extra("h5py", "train") from None
    try:
        with h5py.File(file, "r") as opened:
            if "data" not in opened:
                raise UserError(f"{file} is no file of demonstrations: it has no group `data`")
            yield opened["data"]
    except (OSError, KeyError) as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from None


def _instruction(data: h5py.Group, file: Path) -> str:
    try:
        said = json.loads(data.attrs["problem_info"])["language_instruction"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: its attribute problem_info has no language_instruction") from None
    return ("".join(said) if isinstance(said, list) else str(said)).strip().strip('"')


def _number(demo: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", demo)
    return int(digits) if digits else -1, demo
