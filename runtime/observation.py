"""What a policy is given. It stands alone: the simulator's processes import it, and do without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import PROPRIO_DIM, ControlConfig
from rsd_trt.errors import UserError

LARGEST = float(np.finfo(np.float32).max)  # of a state, as the bundle reads it


@dataclass(frozen=True)
class Observation:
    """What a robot sees at one moment.

    images [cameras, S, S, 3] uint8 RGB as the simulator gives them (not rotated), in the order of
    `control.cameras`; proprio [8] float32: end-effector position (m), axis-angle (rad), gripper joints (m);
    instruction: the task in plain words. A bundle that does not read the state (`Policy.reads_state`) needs no proprio.
    """

    images: NDArray[np.uint8]
    proprio: NDArray[np.float32] | None = None
    instruction: str = None  # type: ignore[assignment]  # it is refused where it is missing

    def check(self, control: ControlConfig, reads_state: bool, otherwise: str = "") -> None:
        """Raises UserError unless images, proprio (where it is read) and instruction are what `control` states.
        otherwise: what would do in the place of such frames, for the message."""
        images, side = self.images, control.camera_size
        shape = (len(control.cameras), side, side, 3)
        if not isinstance(images, np.ndarray) or images.shape != shape or images.dtype != np.uint8:
            raise UserError(
                f"images are {described(images)}, the bundle takes uint8 {list(shape)} ({', '.join(control.cameras)})",
                f"Give RGB frames of {side} x {side}, a camera each{otherwise}",
            )
        if reads_state:
            state = self.proprio
            if state is None:
                raise UserError(
                    f"the observation has no proprio, the bundle reads float32 [{PROPRIO_DIM}]",
                    "Give position (m), axis-angle (rad) and gripper joints (m) of the hand",
                )
            if not isinstance(state, np.ndarray) or state.shape != (PROPRIO_DIM,) or state.dtype.kind not in "fiu":
                raise UserError(f"proprio is {described(state)}, the bundle takes float32 [{PROPRIO_DIM}]")
            finite = [-LARGEST <= x <= LARGEST for x in state.tolist()]  # NaN is not, either
            if not all(finite):
                raise UserError(f"proprio[{finite.index(False)}] is not finite as float32: {state.tolist()}")
        if self.instruction is None:
            raise UserError("the observation has no instruction", "Give the task in plain words: instruction='...'")
        if not isinstance(self.instruction, str):
            raise UserError(f"instruction is of type {type(self.instruction).__name__}, not a string")


def described(value: object) -> str:
    """`uint8 [2, 256, 256, 3]`; what is no array, by its type."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
