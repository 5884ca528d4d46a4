"""How queries, actions and gaps are split up, on episodes written by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from synthetic import run

from rsd_trt.config import RsdConfig
from rsd_trt.eval.report.breakdown import (
    Phase,
    agreement_by_dimension,
    agreement_by_step,
    executed,
    full_query_share,
    gripper_switches,
    phases,
    route_times,
    share_outside,
)
from rsd_trt.eval.results import ActionStatistics, Episode, QueryRecord, Results

IN, OUT = 0.05, 0.2  # within and outside the tolerance of 0.1


def only(*queries: QueryRecord, steps: int = 20, **changes: object) -> Results:
    """A run of one episode."""

    def change(episode: Episode) -> Episode:
        return dataclasses.replace(episode, queries=queries, steps=steps)

    return run("rsd", tasks=(0,), trials=1, change=change, **changes)


def test_phases_are_deciles_of_the_steps() -> None:
    tested = [(0, "accepted"), (1, "partial"), (2, "rejected"), (19, "accepted"), (20, "accepted")]
    found = phases(only(*(QueryRecord(s, r, 1, 1.0, False) for s, r in tested)))  # type: ignore[arg-type]
    assert len(found) == 10
    assert found[0] == Phase(accepted=1, partial=1)
    assert found[1] == Phase(rejected=1)
    assert found[9] == Phase(accepted=2)
    assert sum(phase.tested for phase in found) == 5


def test_phases_leave_out_queries_without_a_live_plan_and_broken_episodes() -> None:
    assert sum(phase.tested for phase in phases(only(QueryRecord(0, "start", 1, 1.0, True)))) == 0
    broken = only(QueryRecord(0, "accepted", 1, 1.0, False), broken=((0, 0),))
    assert sum(phase.tested for phase in phases(broken)) == 0


def test_route_times_share_the_policy_time() -> None:
    routes = [("accepted", 1.0), ("accepted", 3.0), ("start", 4.0), ("gripper", 2.0)]
    found = route_times(only(*(QueryRecord(0, r, 1, ms, False) for r, ms in routes)))  # type: ignore[arg-type]
    assert [(part.group, part.ms, part.share) for part in found] == [
        ("accepted", (1.0, 3.0), 0.4),
        ("full query", (4.0, 2.0), 0.6),
    ]
    assert route_times(only()) == ()


def test_full_pass_share() -> None:
    assert (
        full_query_share(only(QueryRecord(0, "start", 1, 1.0, True), QueryRecord(1, "accepted", 1, 1.0, False))) == 0.5
    )
    assert full_query_share(only()) is None


def gaps(draft: list[float], main: list[float], gripper: tuple[float, float] = (0, 0)) -> QueryRecord:
    """A query whose first arm dimension has these gaps at the steps ahead."""
    rows = [tuple((x, 0.0, 0.0, 0.0, 0.0, 0.0, gripper[i]) for x in of) for i, of in enumerate((draft, main))]
    return QueryRecord(0, "accepted", 1, 1.0, True, draft_gap=rows[0], main_gap=rows[1])


def test_agreement_by_dimension() -> None:
    found = agreement_by_dimension(only(gaps([IN, OUT], [IN, IN]), gaps([0.1, IN], [OUT, IN], gripper=(1, 0))))
    assert found is not None
    assert found.draft == (0.75, 1, 1, 1, 1, 1, 0.5)
    assert found.main == (0.75, 1, 1, 1, 1, 1, 1)
    assert found.gap[0] == pytest.approx(0.075)
    assert found.n == (4,) * 7


def test_agreement_uses_the_runs_own_tolerance() -> None:
    tight = RsdConfig(draft_block=10, tolerance=(0.01,) * 6)
    found = agreement_by_dimension(only(gaps([IN], [0.0]), rsd=tight))
    assert found is not None
    assert (found.draft[0], found.main[0]) == (0, 1)


def test_agreement_by_step_needs_every_dimension() -> None:
    found = agreement_by_step(only(gaps([IN, OUT], [IN, IN]), gaps([IN], [IN], gripper=(1, 0)), gaps([], [])))
    assert found is not None
    assert found.draft == (0.5, 0)
    assert found.main == (1, 1)
    assert found.n == (2, 1)
    assert found.gap == pytest.approx((IN, OUT))


@pytest.mark.parametrize("of", [agreement_by_dimension, agreement_by_step])
def test_no_agreement_without_shadow_data(of: Callable[[Results], object]) -> None:
    assert of(only(QueryRecord(0, "accepted", 1, 1.0, False))) is None
    assert of(only(gaps([], []))) is None


def test_executed_actions_are_those_of_all_episodes() -> None:
    random = np.random.default_rng(0)
    actions = {trial: random.uniform(-1, 1, (5 + trial, 7)).astype(np.float32) for trial in range(3)}

    def change(episode: Episode) -> Episode:
        mine = actions[episode.trial]
        return dataclasses.replace(episode, actions=ActionStatistics.of(mine), steps=len(mine))

    found = executed(run("rsd", tasks=(0,), trials=3, change=change))
    together = np.concatenate(list(actions.values()))
    whole = ActionStatistics.of(together)
    assert found is not None
    assert found.steps == len(together)
    assert (found.minimum, found.maximum, found.histogram) == (whole.minimum, whole.maximum, whole.histogram)
    assert found.mean == pytest.approx(whole.mean, abs=1e-4)


def test_executed_actions_may_be_absent() -> None:
    assert executed(run("rsd", change=lambda episode: dataclasses.replace(episode, actions=None))) is None


def test_share_outside_counts_whole_bins_only() -> None:
    histogram = [1] * 20  # 0.1 wide
    assert share_outside(histogram, -1, 1) == 0
    assert share_outside(histogram, -0.5, 0.5) == 0.5
    assert share_outside(histogram, -0.45, 0.45) == 0.5
    assert share_outside([0] * 20, -0.5, 0.5) == 0


def test_gripper_switches_by_outcome() -> None:
    assert gripper_switches(run("rsd", success=0.5), success=True) == 2
    assert gripper_switches(run("rsd", success=2.0), success=False) is None
