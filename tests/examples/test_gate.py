"""The study of a gate head: which pairs there are and what they are labelled, and its AUC."""

from __future__ import annotations

import numpy as np
import pytest

from examples.reference_policy.studies.gate import auc, told
from examples.reference_policy.studies.pairs import HELD_OUT, RULES, Frame, judged, plan
from rsd_trt.config import ARM_DIMS, Dims, RsdConfig
from rsd_trt.eval.report import calibrate

DIMS = Dims(T=8)
RSD = RsdConfig(rule="first", tolerance=(0.2,) * ARM_DIMS, n_action_steps=4, check_steps=2)


def frame(main: float, guess: float, closes_at: int = DIMS.T) -> Frame:
    """Main and draft move evenly; main closes the gripper at a step."""
    chunk, guessed = (np.full((DIMS.T, DIMS.A), x, np.float32) for x in (main, guess))
    chunk[:, ARM_DIMS] = guessed[:, ARM_DIMS] = -1
    chunk[closes_at:, ARM_DIMS] = 1
    tokens, logits = np.zeros((DIMS.T, DIMS.D, DIMS.L), np.int64), np.zeros((DIMS.T, DIMS.D, DIMS.K), np.float32)
    return Frame(np.zeros(3, np.float32), chunk, tokens, guessed, tokens[..., : DIMS.C], logits)


@pytest.mark.parametrize(("now", "other"), [(0.15, False), (0.25, True)])
def test_a_pair_is_labelled_by_main_and_scored_by_the_draft(now: float, other: bool) -> None:
    pair = judged(frame(0.0, 0.05), frame(now, 0.5), 4, RSD)
    assert pair is not None and pair.other is other
    unlikely = np.log(DIMS.K)
    expected = [[2.5, 2.5, 5.0, unlikely], [0.25, 0.25, 0.5, unlikely]]  # of fresh frames, and blind
    assert len(RULES) == 4 and np.allclose(pair.deviations, expected, atol=1e-3)


def test_a_gripper_that_is_to_switch_is_no_pair_and_one_that_main_switches_is_other() -> None:
    open_, closing = frame(0.0, 0.0), frame(0.0, 0.0, closes_at=1)
    assert judged(frame(0.0, 0.0, closes_at=4), open_, 4, RSD) is None
    for age, other in ((4, True), (7, False)):  # of the last step, the next one alone counts
        pair = judged(open_, closing, age, RSD)
        assert pair is not None and pair.other is other
        assert np.isfinite(pair.features).all()


def test_the_auc_is_that_of_calibrate_and_within_states_whoever_is_blind_is_at_chance() -> None:
    random = np.random.default_rng(0)
    episodes, other = random.integers(0, 12, 300), random.random(300) < 0.4
    scores = random.integers(0, 6, 300) + 2.0 * other
    scores[:20] = np.inf
    same = calibrate.auc([calibrate.Check(score, not of) for score, of in zip(scores, other, strict=True)])
    value, low, high = told(auc(scores, other, episodes))
    assert value == pytest.approx(same, abs=1e-4) and low is not None and high is not None and low < value < high
    states = np.arange(300) // 5
    assert told(auc(states * 1.0, other, states // 5, states)) == [0.5, 0.5, 0.5]


def test_nothing_is_both_trained_on_and_held_out() -> None:
    jobs = plan(40)
    assert len({job.key for job in jobs if job.condition != "none"}) == sum(job.condition != "none" for job in jobs)
    assert all((job.seed >= 601) == (job.trial >= HELD_OUT) for job in jobs)
