"""How queries, actions and gaps are split up, on episodes written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs
from synthetic import TRAINING, run

from rsd_trt.config import RsdConfig
from rsd_trt.eval.report.breakdown import GROUPS, Breakdown, Decisions, Gripper, Layer, breakdown, share_outside
from rsd_trt.eval.results import ActionStatistics, Episode, QueryRecord, Results
from rsd_trt.runtime.speculate import Checks

IN, OUT = 0.05, 0.4  # within and outside the tolerance of 0.2


def only(*queries: QueryRecord, steps: int = 20, **changes: object) -> Results:
    """A run of one episode."""

    def change(episode: Episode) -> Episode:
        return structs.replace(episode, queries=queries, steps=steps)

    return run("rsd", tasks=(0,), trials=1, change=change, **changes)


def query(step: int, route: str, ms: float = 1.0, **changes: object) -> QueryRecord:
    return QueryRecord(step, route, 1, ms, checked=route in GROUPS, full_query=True, **changes)  # type: ignore[arg-type]


def of(*queries: QueryRecord, **changes: object) -> Breakdown:
    return breakdown(only(*queries, **changes))


def test_phases_are_deciles_of_the_steps() -> None:
    tested = [(0, "accepted"), (1, "partial"), (2, "rejected"), (19, "accepted"), (20, "accepted")]
    found = of(*(query(s, r) for s, r in tested)).phases  # type: ignore[arg-type]
    assert len(found) == 10
    assert found[0] == Checks(accepted=1, partial=1)
    assert found[1] == Checks(rejected=1)
    assert found[9] == Checks(accepted=2)
    assert sum(phase.tested for phase in found) == 5


def test_phases_leave_out_queries_without_a_chunk_and_broken_episodes() -> None:
    assert sum(phase.tested for phase in of(query(0, "start")).phases) == 0
    broken = of(query(0, "accepted"), broken=((0, 0),))
    assert sum(phase.tested for phase in broken.phases) == 0


def test_route_times_share_the_policy_time() -> None:
    routes = [("accepted", 1.0), ("accepted", 3.0), ("start", 4.0), ("gripper", 2.0)]
    found = of(*(query(0, r, ms=ms) for r, ms in routes)).routes  # type: ignore[arg-type]
    assert [(part.group, part.queries, part.ms["p50"], part.share) for part in found] == [
        ("accepted", 2, 2.0, 0.4),
        ("full query", 2, 3.0, 0.6),
    ]
    assert of().routes == ()


def gaps(draft: list[float], main: list[float], gripper: tuple[float, float] = (0, 0)) -> QueryRecord:
    """A query whose first arm dimension has these gaps at the steps ahead."""
    rows = [tuple((x, 0.0, 0.0, 0.0, 0.0, 0.0, gripper[i]) for x in of) for i, of in enumerate((draft, main))]
    return query(0, "accepted", prefix=1, draft_gap=rows[0], main_gap=rows[1])


def test_agreement_by_dimension() -> None:
    found = of(gaps([IN, OUT], [IN, IN]), gaps([0.1, IN], [OUT, IN], gripper=(1, 0))).by_dimension
    assert found is not None
    assert found.draft == (0.75, 1, 1, 1, 1, 1, 0.5)
    assert found.main == (0.75, 1, 1, 1, 1, 1, 1)
    assert found.gap[0] == pytest.approx(0.075)
    assert found.n == (4,) * 7


def test_agreement_uses_the_runs_own_tolerance() -> None:
    found = of(gaps([IN], [0.0]), rsd=RsdConfig(tolerance=(0.01,) * 6)).by_dimension
    assert found is not None
    assert (found.draft[0], found.main[0]) == (0, 1)


def test_agreement_by_step_needs_every_dimension() -> None:
    found = of(gaps([IN, OUT], [IN, IN]), gaps([IN], [IN], gripper=(1, 0)), gaps([], [])).by_step
    assert found is not None
    assert found.draft == (0.5, 0)
    assert found.main == (1, 1)
    assert found.n == (2, 1)
    assert found.gap == pytest.approx((IN, OUT))


@pytest.mark.parametrize("query", [query(0, "accepted"), gaps([], [])])
def test_no_agreement_without_shadow_data(query: QueryRecord) -> None:
    assert (of(query).by_dimension, of(query).by_step) == (None, None)


@pytest.mark.parametrize(
    ("main", "route", "decision"),
    [
        ([IN, IN, IN], "accepted", Decisions(true_accept=1)),
        ([IN, OUT, IN], "accepted", Decisions(false_accept=1)),
        ([IN, IN, OUT], "rejected", Decisions(false_reject=1)),
        ([IN, OUT, IN], "rejected", Decisions(true_reject=1)),
        ([IN], "rejected", Decisions(false_reject=1)),  # of all that was left
        ([OUT], "rejected", Decisions(true_reject=1)),
    ],
)
def test_decisions_are_judged_by_mains_new_chunk(main: list[float], route: str, decision: Decisions) -> None:
    """An accepted check commits two steps, and main has to confirm both."""
    made = structs.replace(gaps(main, main), route=route, prefix=2 if route == "accepted" else 0)
    assert of(made, rsd=RsdConfig(rule="first", check_steps=2)).decisions == decision
    assert of(query(0, "accepted")).decisions is None


def test_a_rule_of_prefixes_wants_one_step() -> None:
    made = structs.replace(gaps([IN, OUT], [IN, OUT]), route="rejected", prefix=0)
    assert of(made, rsd=RsdConfig(rule="actions")).decisions == Decisions(false_reject=1)


def test_a_layer_near_chance_is_odd() -> None:
    found = of(query(0, "rejected", token_agreement=(0.9, 1 / 7 + 0.04))).layers
    assert found == (Layer(0.9, 1 / 7, "ok"), Layer(1 / 7 + 0.04, 1 / 7, "odd: chance"))
    assert breakdown(run("baseline")).layers == ()


def executed(*actions: np.ndarray, **changes: object) -> Breakdown:  # type: ignore[type-arg]
    """Of episodes that executed these actions [n, A] each."""

    def change(episode: Episode) -> Episode:
        mine = actions[episode.trial].astype(np.float32)
        return structs.replace(episode, actions=ActionStatistics.of(mine), steps=len(mine))

    return breakdown(run("rsd", tasks=(0,), trials=len(actions), change=change, **changes))


def test_executed_actions_are_those_of_all_episodes() -> None:
    random = np.random.default_rng(0)
    actions = [random.uniform(-1, 1, (5 + trial, 7)) for trial in range(3)]
    found = executed(*actions)
    whole = ActionStatistics.of(np.concatenate(actions).astype(np.float32))
    assert found.action_steps == 18
    for i, one in enumerate(found.actions):
        assert (one.minimum, one.maximum, one.histogram) == (whole.minimum[i], whole.maximum[i], whole.histogram[i])
        assert one.mean == pytest.approx(whole.mean[i], abs=1e-4)
        assert one.training == (TRAINING.q01[i], TRAINING.q99[i])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.7, 0.9, "ok"), (-0.95, 0.9, "odd: outside"), (0.0, 0.3, "odd: narrow"), (-0.74, 0.2, "odd: biased")],
)
def test_executed_actions_are_judged_by_the_training_data(low: float, high: float, verdict: str) -> None:
    column = np.where(np.arange(100) < 60, low, high)[:, None]
    found = executed(np.repeat(column, 7, axis=1) * np.eye(7)[0])
    assert found.actions[0].verdict == verdict
    assert found.actions[-1].verdict == "ok", "a gripper has no range"


def test_actions_without_statistics_are_not_judged() -> None:
    assert breakdown(run("rsd", change=lambda episode: structs.replace(episode, actions=None))).actions == ()
    found = executed(np.zeros((3, 7)), training_actions=None)
    assert {(one.training, one.outside, one.verdict) for one in found.actions} == {(None, None, "not measured")}


def test_share_outside_counts_whole_bins_only() -> None:
    histogram = [1] * 20  # 0.1 wide
    assert share_outside(histogram, -1, 1) == 0
    assert share_outside(histogram, -0.5, 0.5) == 0.5
    assert share_outside(histogram, -0.45, 0.45) == 0.5
    assert share_outside([0] * 20, -0.5, 0.5) == 0


@pytest.mark.parametrize(("switches", "verdict"), [(0, "odd: hardly ever closes"), (2, "ok"), (11, "odd: chatters")])
def test_the_gripper_is_judged_by_the_failed_episodes(switches: int, verdict: str) -> None:
    def change(episode: Episode) -> Episode:
        assert episode.actions is not None
        if episode.success:
            return episode
        return structs.replace(episode, actions=structs.replace(episode.actions, gripper_switches=switches))

    assert breakdown(run("rsd", success=0.5, change=change)).gripper == Gripper(2, switches, verdict)  # type: ignore[arg-type]
    assert breakdown(run("rsd", success=2.0)).gripper == Gripper(2, None, "not measured")


@pytest.mark.parametrize(("mse", "verdict"), [(1e-6, "ok"), (2e-4, "odd: lossy")])
def test_the_codec_is_judged_by_its_round_trip(mse: float, verdict: str) -> None:
    found = breakdown(run("rsd", codec_mse=mse))
    assert (found.codec_rms, found.codec_verdict) == (pytest.approx(mse**0.5), verdict)
