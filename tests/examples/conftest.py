"""Made-up demonstrations that fit the tiny bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from examples.reference_policy.collect import FIRST_SEED, Settings, write_episode
from examples.reference_policy.demonstrate import SCENE_DIM, Demonstration
from rsd_trt.config import PROPRIO_DIM, Dims
from rsd_trt.presets import preset

EPISODES = (11, 7, 14)  # steps of each; the first one's seed is held out


@pytest.fixture(scope="session")
def demonstration() -> Callable[[int, int], Demonstration]:
    """demonstration(steps, seed) -> random frames at every second step."""

    def make(steps: int, seed: int) -> Demonstration:
        random = np.random.default_rng(seed)
        config = preset("tiny", "tiny")
        at = np.arange(1, steps, 2, dtype=np.int32)
        size, frames = config.backbone.image_size, len(at)
        actions = random.uniform(-1, 1, (steps, Dims().A)).astype(np.float32)
        actions[:, -1] = np.sign(actions[:, -1])
        return Demonstration(
            images=random.integers(0, 256, (frames, len(config.control.cameras), size, size, 3), dtype=np.uint8),
            proprio=random.uniform(-1, 1, (frames, PROPRIO_DIM)).astype(np.float32),
            scene=random.uniform(-0.3, 0.3, (frames, SCENE_DIM)).astype(np.float32),
            steps=at,
            actions=actions,
            success=True,
            displaced=False,
        )

    return make


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory, demonstration: Callable[..., Demonstration]) -> Path:
    """A folder with episodes of two tasks. Read only."""
    settings = Settings(tmp_path_factory.mktemp("data"))
    for task in range(2):
        for episode, steps in enumerate(EPISODES):
            seed = settings.seed(task, episode)
            found = demonstration(steps, seed)
            write_episode(settings.file(task, seed), task, seed, f"pick up bowl {task}", found)
    assert settings.seed(0, 0) == FIRST_SEED
    return settings.out
