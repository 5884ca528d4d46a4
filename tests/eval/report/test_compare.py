"""Which runs may be compared, on which episodes, and what the comparison says."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from synthetic import outcome, run, settings

from rsd_trt.config import ControlConfig
from rsd_trt.errors import UserError
from rsd_trt.eval.report.compare import SAME, Endpoint, compare, differences, needed
from rsd_trt.eval.report.cost import Price
from rsd_trt.eval.results import Episode
from rsd_trt.records import to_json

KEYS = [(task, trial) for task in range(3) for trial in range(4)]
ALL = 220  # steps: the endpoint is plain success
PRICE = Price(0.2, 2.0, "ms", "made up")


def test_success_is_paired_and_tested_with_mcnemar() -> None:
    a = run("baseline", change=outcome(*KEYS[:8]))
    b = run("rsd", change=outcome(*KEYS[1:8], *KEYS[9:12]))
    found = compare(a, b, within=ALL)
    assert found.names == ("baseline", "rsd")
    assert (found.pairs, found.left_out) == (12, 0)
    assert found.success == found.reached == (8 / 12, 10 / 12)
    assert found.points == pytest.approx(100 / 6)
    assert found.points_interval is not None and found.points_interval[0] < found.points < found.points_interval[1]
    assert (found.mcnemar.gained, found.mcnemar.lost, found.mcnemar.p) == (3, 1, 0.625)


def test_the_endpoint_is_success_within_some_steps() -> None:
    def at(steps: int, success: bool = True) -> Episode:
        return Episode(0, 0, success, steps, 1.0, ())

    early = Endpoint.of(settings())
    assert early.within == 100  # of libero_spatial
    assert [early.reached(e) for e in (at(100), at(101), at(50, success=False))] == [True, False, False]
    assert [early.steps(e) for e in (at(60), at(101), at(50, success=False))] == [60, 100, 100]
    assert Endpoint.of(settings(suite="libero_10")).within == Endpoint.of(settings(), 999).within == 220

    def late(episode: Episode) -> Episode:
        return structs.replace(episode, success=True, steps=120)

    found = compare(run("baseline", success=2.0), run("rsd", change=late))
    assert found.success[1] == 1.0
    assert found.reached[1] == 0.0
    assert (found.within, found.steps[1]) == (100, 100.0)
    assert found.steps[0] < 100


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [(8, 9, "above"), (9, 8, "below"), (9, 9, "not shown")],
)
def test_a_difference_is_told_where_both_tests_show_it(before: int, after: int, difference: str) -> None:
    """Of as many trials of each task."""
    many = {"tasks": tuple(range(10)), "trials": 10}
    a, b = (
        run(mode, change=outcome(*((task, trial) for task in range(10) for trial in range(won))), **many)  # type: ignore[arg-type]
        for mode, won in (("baseline", before), ("rsd", after))
    )
    found = compare(a, b, within=ALL)
    assert (found.difference, found.provable_loss) == (difference, 6)
    assert found.by_task == (after - before,) * 10


def test_a_difference_of_one_task_is_not_told() -> None:
    """McNemar's test alone would show it; what would show it by task needs more tasks, whatever the episodes."""
    many = {"tasks": (0, 1), "trials": 10}
    won = [(0, trial) for trial in range(10)]
    a, b = run("baseline", change=outcome(), **many), run("rsd", change=outcome(*won), **many)  # type: ignore[arg-type]
    found = compare(a, b, within=ALL)
    assert found.mcnemar.p < 0.01 < found.by_task_p
    assert found.difference == "not shown"
    lacking = needed(found, found.mcnemar.p, found.by_task_p)
    assert lacking is not None and lacking.tasks >= 12 and lacking.episodes == 10 * lacking.tasks
    same = compare(a, run("rsd", change=outcome(), **many), within=ALL)  # type: ignore[arg-type]
    assert needed(same, 1.0, 1.0) is None


def test_trials_that_share_an_initial_state_are_one_sample() -> None:
    """Six states that are gained, each in both of its trials, are six and not twelve: 2 / 2^6, not 2 / 2^12."""
    many = {"tasks": (0, 1), "trials": 6, "perturb": "late:7+8"}
    won = [(task, trial) for task in (0, 1) for trial in range(6)]
    found = compare(run("baseline", change=outcome(), **many), run("rsd", change=outcome(*won), **many), within=ALL)  # type: ignore[arg-type]
    assert (found.mcnemar.gained, found.mcnemar.lost) == (12, 0)
    assert found.mcnemar.p == pytest.approx(2 / 2**6, abs=0.005)
    assert found.points == 100.0


def test_few_episodes_show_nothing() -> None:
    found = compare(run("baseline", tasks=(0,)), run("rsd", tasks=(0,)))
    assert (found.difference, found.provable_loss, found.points_interval) == ("not shown", None, None)
    assert found.speedup is not None and found.speedup.interval is None


@hypothesis.settings(max_examples=25, deadline=None)
@given(st.sets(st.sampled_from(KEYS)), st.sets(st.sampled_from(KEYS)))
def test_the_difference_is_that_of_the_discordant_pairs(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> None:
    found = compare(run("baseline", change=outcome(*a)), run("rsd", change=outcome(*b)), within=ALL)
    assert found.points / 100 * found.pairs == pytest.approx(found.mcnemar.gained - found.mcnemar.lost)
    assert (found.mcnemar.gained, found.mcnemar.lost) == (len(b - a), len(a - b))


def test_episodes_with_an_error_in_either_run_are_left_out() -> None:
    found = compare(run("baseline", broken=((0, 0), (0, 1))), run("rsd", broken=((0, 1), (2, 3))))
    assert (found.pairs, found.left_out) == (9, 3)


def test_cost_is_counts_times_medians_over_the_pairs() -> None:
    a, b = run("baseline", broken=((0, 0),)), run("rsd")
    found = compare(a, b, PRICE)
    mine = [episode for episode in b.episodes if episode.key != (0, 0)]
    queries = [query for episode in mine for query in episode.queries]
    total = 0.2 * sum(q.checked for q in queries) + 2.0 * sum(q.full_query for q in queries)
    assert found.cost is not None and found.speedup is not None and found.speedup.interval is not None
    assert found.cost[1] == pytest.approx(total / sum(episode.steps for episode in mine))
    assert found.speedup.value == pytest.approx(found.cost[0] / found.cost[1])
    assert found.speedup.interval[0] < found.speedup.value < found.speedup.interval[1]
    assert found.cost_unit == "ms"
    assert compare(run("baseline", timing="batched"), run("rsd", timing="batched"), PRICE).cost is not None


@pytest.mark.parametrize("runs", [("baseline", "shadow"), ("idle", "idle")])
def test_where_there_is_no_cost(runs: tuple[str, str]) -> None:
    """Shadow mode computes all that rsd would save; or no action was executed."""

    def idle(episode: Episode) -> Episode:
        return structs.replace(episode, steps=0, queries=())

    made = [run("baseline" if i == 0 else "rsd", change=idle) if m == "idle" else run(m) for i, m in enumerate(runs)]  # type: ignore[arg-type]
    found = compare(made[0], made[1])
    assert (found.cost, found.speedup) == (None, None)


def test_another_machine_is_told() -> None:
    found = compare(run("baseline"), run("rsd", hardware={"cpu": "made-up processor", "gpu": "another"}))
    assert "hardware.gpu is 'made-up GPU' and 'another'" in found.other_hardware
    assert compare(run("baseline"), run("rsd")).other_hardware == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "trt"}, "backend is 'ort' and 'trt'"),
        ({"protocol": "original"}, "protocol is 'oft' and 'original'"),
        ({"max_steps": 9}, "max_steps is 220 and 9"),
        ({"trials": 3}, "trials is 4 and 3"),
        ({"tasks": (0, 1)}, r"tasks is \[0, 1, 2\] and \[0, 1\]"),
        ({"perturb": "late:0"}, "perturb is None and 'late:0'"),
        ({"policy_sha256": "ff"}, "policy_sha256 is '3f2a.*' and 'ff'"),
        ({"versions": {**settings().versions, "torch": "3"}}, "versions.torch is '2.13.0' and '3'$"),
        ({"control": ControlConfig(rotate_images=False)}, "control.rotate_images is True and False"),
        ({"suite": "libero_goal", "seed": 8}, "suite is .*; seed is 7 and 8"),
    ],
)
def test_other_conditions_are_refused_with_both_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"these runs cannot be compared: {message}"):
        compare(run("baseline"), run("rsd", **changes))


def test_packages_that_run_exports_differ_only_where_exports_run() -> None:
    other = {"versions": {**settings().versions, "onnxruntime": "9", "tensorrt-lean": "9"}}
    assert any("versions.onnxruntime" in line for line in differences(settings("baseline"), settings("rsd", **other)))
    graphs = {"backend": "graph"}
    assert differences(settings("baseline", **graphs), settings("rsd", **graphs, **other)) == []


def test_a_run_is_not_compared_with_itself() -> None:
    with pytest.raises(UserError, match=r"both are run [0-9a-f]{12}"):
        compare(run("rsd"), run("rsd"))


def test_mode_rule_steps_and_timing_may_differ() -> None:
    other = structs.replace(settings("rsd").of_bundle.rsd, refresh=3)
    assert differences(settings("baseline"), settings("rsd", timing="batched", rsd=other, n_action_steps=1)) == []


def test_runs_that_share_no_whole_episode_are_refused() -> None:
    with pytest.raises(UserError, match="no episode ended without an error in both"):
        compare(run("baseline", broken=tuple(KEYS[:6])), run("rsd", broken=tuple(KEYS[6:])))


def test_settings_that_must_be_equal_exist() -> None:
    assert set(SAME) < set(to_json(settings())) | set(to_json(settings().bundle))
