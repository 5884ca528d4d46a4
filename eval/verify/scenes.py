"""Observations to try a policy on: seeded noise, or what the robot sees first on LIBERO."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rsd_trt.config import PROPRIO_DIM, ControlConfig
from rsd_trt.runtime.observation import Observation

TRIALS = 5  # of each task
INSTRUCTIONS = (  # two, as every length of prompt is captured and compiled for itself
    "pick up the bowl",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
)


def random_observations(control: ControlConfig, count: int) -> list[Observation]:
    """Seeded noise for every camera, under a short instruction and a long one in turn."""
    random, side = np.random.default_rng(0), control.camera_size
    return [
        Observation(
            images=random.integers(0, 256, (len(control.cameras), side, side, 3), dtype=np.uint8),
            proprio=random.uniform(-1, 1, PROPRIO_DIM).astype(np.float32),
            instruction=INSTRUCTIONS[i % len(INSTRUCTIONS)],
        )
        for i in range(count)
    ]


def libero_observations(suite: str, control: ControlConfig) -> Iterator[Observation]:
    """What the robot sees first in the first trials of every task of a suite.

    Raises:
        UserError: LIBERO is not installed, or cannot render here.
    """
    from rsd_trt.eval.libero.simulator import Simulator, open_suite

    for task in range(open_suite(suite).n_tasks):
        simulator = Simulator(suite, task, control)
        for trial in range(TRIALS):
            simulator.reset(trial)
            yield simulator.observation()
        simulator.close()
