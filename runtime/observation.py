"""What a policy is given. It stands alone: the simulator's processes import it, and do without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
