"""The summary's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import settings

from rsd_trt.eval.results import ActionStatistics, Episode, QueryRecord, RsdStats
from rsd_trt.eval.summary import summarise

QUERIES = (
    QueryRecord(step=0, route="start", committed=2, ms=10.0, full_query=True, prefix=2, token_agreement=(1.0, 0.5)),
    QueryRecord(step=2, route="accepted", committed=2, ms=4.0, full_query=False, prefix=3),
    QueryRecord(step=4, route="partial", committed=1, ms=4.0, full_query=False, prefix=1, judgement="true_accept"),
    QueryRecord(step=5, route="rejected", committed=1, ms=12.0, full_query=True, prefix=0, token_agreement=(0.0, 0.5)),
)


def episode(task: int, trial: int, success: bool = False, error: str | None = None) -> Episode:
    return Episode(task, trial, success, 6, 2.0, QUERIES, error=error)


EPISODES = [episode(3, 0, error="boom"), episode(0, 1), episode(0, 0, success=True)]


def test_figures_are_over_episodes_without_errors() -> None:
    found = summarise(settings(), EPISODES, {0: "lift", 3: "push"}, 1e-7, "rsd-trt eval")
    assert (found.total_episodes, found.total_successes, found.final_success_rate, found.errors) == (2, 1, 0.5, 1)
    assert found.avg_inference_time_ms == 2 * 30 / 12
    assert found.rsd_stats == RsdStats(1 / 3, 1 / 3, 1 / 3)
    assert found.token_agreement == (0.5, 0.5)
    assert found.token_agreement_chance == 1 / 7
    assert (found.queries, found.full_queries, found.steps) == (8, 4, 12)
    assert (found.actions_per_query, found.steps_per_second) == (12 / 8, 3.0)
    assert found.routes == {"accepted": 2, "partial": 2, "rejected": 2, "start": 2}
    assert found.judgements == {"true_accept": 2}
    tasks = [(t.task_id, t.successes, t.episodes, t.errors) for t in found.task_results]
    assert tasks == [(0, 1, 2, 0), (3, 0, 0, 1)]
    assert [e.key for e in found.episodes] == [(0, 0), (0, 1), (3, 0)]


def test_batched_times_are_not_a_policys_speed() -> None:
    found = summarise(settings(timing="batched"), EPISODES, {0: "lift", 3: "push"}, 1e-7, "rsd-trt eval")
    assert found.avg_inference_time_ms is None
    assert found.query_ms is None
    assert found.steps_per_second is None
    assert found.rsd_stats == RsdStats(1 / 3, 1 / 3, 1 / 3)


def test_a_run_of_nothing() -> None:
    found = summarise(settings(), [], {0: "lift"}, 0.0, "rsd-trt eval")
    assert found.final_success_rate is None
    assert found.query_ms is None
    assert found.rsd_stats == RsdStats(None, None, None)


def test_action_statistics() -> None:
    actions = np.zeros((4, 7), np.float32)
    actions[:, 0] = (-1.0, -0.95, 0.5, 3.0)
    actions[:, 6] = (-1, 1, 1, -1)
    found = ActionStatistics.of(actions)
    assert (found.minimum[0], found.maximum[0], found.mean[0]) == (-1.0, 3.0, pytest.approx(0.3875))
    assert found.gripper_switches == 2
    assert (found.histogram[0][0], found.histogram[0][15], found.histogram[0][19]) == (2, 1, 1)
    assert all(sum(column) == 4 for column in found.histogram)
