"""The summary's arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec import structs
from synthetic import settings

from rsd_trt.errors import UserError
from rsd_trt.eval.results import ActionStatistics, Episode, QueryRecord, RsdStats
from rsd_trt.eval.summary import summarise
from rsd_trt.runtime.chunk import Query

QUERIES = (
    QueryRecord(0, "start", 2, 10.0, checked=False, full_query=True, clipped=1),
    QueryRecord(2, "accepted", 2, 4.0, checked=True, full_query=False, prefix=3),
    QueryRecord(4, "partial", 1, 4.0, checked=True, full_query=False, prefix=1, token_agreement=(1.0, 0.5)),
    QueryRecord(5, "rejected", 1, 12.0, checked=True, full_query=True, token_agreement=(0.0, 0.5)),
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
    assert (found.queries, found.checks, found.full_queries, found.steps) == (8, 6, 4, 12)
    assert (found.unusable_drafts, found.clipped_steps) == (2, 2)
    assert (found.actions_per_query, found.steps_per_second) == (12 / 8, 3.0)
    assert found.routes == {"accepted": 2, "partial": 2, "rejected": 2, "start": 2}
    tasks = [(t.task_id, t.successes, t.episodes, t.errors) for t in found.task_results]
    assert tasks == [(0, 1, 2, 0), (3, 0, 0, 1)]
    assert [e.key for e in found.episodes] == [(0, 0), (0, 1), (3, 0)]


def test_a_record_of_a_query() -> None:
    query = Query(
        np.zeros((2, 7), np.float32), "rejected", True, prefix=0, score=math.inf, draft_finite=False, ms=1.23456
    )
    record = QueryRecord.of(query, 4, 3)
    assert (record.step, record.batch, record.committed, record.ms) == (4, 3, 2, 1.2346)
    assert record.unusable and record.prefix is None and record.score is None
    usable = QueryRecord.of(structs.replace(query, score=0.123456, draft_finite=True), 4, 3)
    assert (usable.unusable, usable.prefix, usable.score) == (False, 0, 0.12346)


@pytest.mark.parametrize("changes", [{"route": "rejected"}, {"route": "full"}, {"checked": False}])
def test_a_query_checks_or_asks_the_main_head(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match="full_query is false"):
        structs.replace(QUERIES[1], **changes)


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
    assert (found.gripper_switches, found.closed) == (2, ((1, 3),))
    assert ActionStatistics.of(actions[:3]).closed == ((1, 3),), "it ends closed"
    assert (found.histogram[0][0], found.histogram[0][15], found.histogram[0][19]) == (2, 1, 1)
    assert all(sum(column) == 4 for column in found.histogram)
