"""The expert in the place of a bundle: `rsd-trt eval --policy expert`. Nothing here needs torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from examples.reference_policy import expert
from rsd_trt.eval.libero.perturb import SUITE
from rsd_trt.eval.libero.request import Scripted

if TYPE_CHECKING:
    from rsd_trt.eval.libero.simulator import Simulator


def act(simulator: Simulator) -> NDArray[np.float32]:
    """The expert's one action [1, A] in the simulator's scene."""
    return expert.expert_action(expert.scene_state(simulator.raw, simulator.physics))[None]


def scripted_expert() -> Scripted:
    """The expert, with the sha256 of its source."""
    return Scripted("expert", SUITE, act, hashlib.sha256(Path(expert.__file__).read_bytes()).hexdigest())
