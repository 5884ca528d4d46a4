"""The displacement of the target: what is drawn, and what becomes of it in the real simulator."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from rsd_trt.config import ControlConfig
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.perturb import CLEARANCE, DISPLACEMENT, STEPS, STIRRED, TARGET, check_target, draw
from rsd_trt.eval.libero.simulator import IDLE, Simulator

NOTHING = np.array(IDLE, np.float32)
KEYS = [(seed, task, trial) for seed in range(3) for task in range(4) for trial in range(5)]


def test_drawn_from_the_key_alone() -> None:
    drawn = [draw(*key) for key in KEYS]
    np.random.seed(1)
    assert [draw(*key) for key in reversed(KEYS)][::-1] == drawn
    assert len({perturbation.offsets for perturbation in drawn}) == len(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_drawn_in_range(key: tuple[int, int, int]) -> None:
    perturbation = draw(*key)
    assert STEPS[0] <= perturbation.step < STEPS[1]
    lengths = [np.hypot(*offset) for offset in perturbation.offsets]
    assert DISPLACEMENT[0] <= min(lengths) and max(lengths) <= DISPLACEMENT[1]


def test_golden_draw() -> None:
    """Episodes of one seed are paired over years: the draw of a key must not change."""
    perturbation = draw(0, 3, 7)
    assert perturbation.step == 14
    assert perturbation.offsets[0] == pytest.approx((-0.004690, -0.042514), abs=1e-6)


def test_other_suites_have_no_target() -> None:
    with pytest.raises(UserError, match="it has no target for libero_goal"):
        check_target("libero_goal")


@pytest.mark.libero
def test_the_target_rests_where_it_was_put_and_the_next_observation_shows_it() -> None:
    """On a cookie box, from which it could topple."""
    with closing(Simulator("libero_spatial", 3, ControlConfig(camera_size=32))) as simulator:

        def target() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            return np.array(simulator.physics.data.get_joint_qpos(f"{TARGET}_joint0"))

        simulator.reset(7)
        before, seen = target(), simulator.raw[f"{TARGET}_pos"].copy()
        image = simulator.observation().images[0].copy()
        edge = ((0.0, 0.9),)  # off the box
        assert simulator.displace(edge) is None
        assert np.array_equal(target(), before)
        offset = simulator.displace(draw(0, 3, 7).offsets)
        assert offset is not None
        assert (target() - before)[:2] == pytest.approx(offset, abs=1e-9)
        simulator.step(NOTHING, render=True)
        assert (simulator.raw[f"{TARGET}_pos"] - seen)[:2] == pytest.approx(offset, abs=1e-3)
        assert not np.array_equal(simulator.observation().images[0], image)
        for _ in range(20):
            simulator.step(NOTHING, render=False)
        assert np.linalg.norm((target() - before)[:3] - (*offset, 0.0)) < STIRRED


@pytest.mark.libero
def test_a_target_that_the_hand_is_at_is_left_alone() -> None:
    with closing(Simulator("libero_spatial", 2, ControlConfig(camera_size=32))) as simulator:
        simulator.reset(0, render=False)
        candidates = draw(0, 2, 0).offsets
        joint = f"{TARGET}_joint0"
        place = simulator.physics.data.get_joint_qpos(joint).copy()
        place[:3] = simulator.raw["robot0_eef_pos"] - (0, 0, CLEARANCE / 2)
        simulator.physics.data.set_joint_qpos(joint, place)
        simulator.physics.forward()
        assert simulator.displace(candidates) is None
