"""The expert in a bundle's place: `rsd-trt eval --policy examples.reference_policy.scripted:act`. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from examples.reference_policy import expert
from rsd_trt.eval.libero.target import SUITE

if TYPE_CHECKING:
    from rsd_trt.eval.libero.simulator import Simulator

SUITES = (SUITE,)


def act(simulator: Simulator) -> NDArray[np.float32]:
    """The expert's one action [1, A] in the simulator's scene."""
    return expert.expert_action(expert.scene_state(simulator.raw, simulator.physics))[None]
