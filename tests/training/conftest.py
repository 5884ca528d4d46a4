"""Episodes as other people's data sets have them."""

from __future__ import annotations

import numpy as np
import pytest
from layouts import SIDE, Demo

from rsd_trt.bundle import Bundle


@pytest.fixture(scope="session")
def demos(bundle: Bundle) -> list[Demo]:
    """Four short episodes of two tasks; the frames are smooth, so that a video codec keeps them."""
    random, found = np.random.default_rng(1), []
    for i in range(4):
        count = 5 + i
        images = {}
        for camera in bundle.config.control.cameras:
            corners = random.integers(0, 256, (count, 2, 2, 3))
            images[camera] = np.kron(corners, np.ones((1, SIDE // 2, SIDE // 2, 1))).astype(np.uint8)
        state = random.uniform(-1, 1, (count, 8)).astype(np.float32)
        actions = random.uniform(-1, 1, (count, 7)).astype(np.float32)
        found.append(Demo(images, state, actions, f"put bowl {i % 2} away"))
    return found
