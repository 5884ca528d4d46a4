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
from rsd_trt.eval.report.compare import SAME, compare, differences, figures, moved
from rsd_trt.eval.results import Episode
from rsd_trt.records import to_json

KEYS = [(task, trial) for task in range(3) for trial in range(4)]


def test_success_is_paired_and_tested_with_mcnemar() -> None:
    a = run("baseline", change=outcome(*KEYS[:8]))
    b = run("rsd", change=outcome(*KEYS[1:8], *KEYS[9:12]))
    found = compare(a, b)
    assert found.modes == ("baseline", "rsd")
    assert (found.pairs, found.left_out) == (12, 0)
    assert found.success == (8 / 12, 10 / 12)
    assert found.success_points == pytest.approx(100 / 6)
    assert (found.mcnemar.gained, found.mcnemar.lost, found.mcnemar.p) == (3, 1, 0.625)


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [(range(80), range(90), "higher"), (range(90), range(80), "lower"), (range(90), range(1, 91), "not shown")],
)
def test_a_difference_is_told_where_mcnemars_test_shows_it(before: range, after: range, difference: str) -> None:
    keys = [(task, trial) for task in range(10) for trial in range(10)]
    many = {"tasks": tuple(range(10)), "trials": 10}
    a = run("baseline", change=outcome(*(keys[i] for i in before)), **many)  # type: ignore[arg-type]
    b = run("rsd", change=outcome(*(keys[i] for i in after)), **many)  # type: ignore[arg-type]
    found = compare(a, b)
    assert (found.difference, found.provable_loss) == (difference, 6)


def test_few_episodes_show_no_loss() -> None:
    found = compare(run("baseline", tasks=(0,)), run("rsd", tasks=(0,)))
    assert (found.difference, found.provable_loss) == ("not shown", None)


@hypothesis.settings(max_examples=25)
@given(st.sets(st.sampled_from(KEYS)), st.sets(st.sampled_from(KEYS)))
def test_the_difference_is_that_of_the_discordant_pairs(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> None:
    found = compare(run("baseline", change=outcome(*a)), run("rsd", change=outcome(*b)))
    assert found.success_points / 100 * found.pairs == pytest.approx(found.mcnemar.gained - found.mcnemar.lost)
    assert (found.mcnemar.gained, found.mcnemar.lost) == (len(b - a), len(a - b))


def test_episodes_with_an_error_in_either_run_are_left_out() -> None:
    found = compare(run("baseline", broken=((0, 0), (0, 1))), run("rsd", broken=((0, 1), (2, 3))))
    assert (found.pairs, found.left_out) == (9, 3)


def test_speedup_is_policy_time_per_action_over_the_pairs() -> None:
    def at(ms: float, slow: tuple[int, int]) -> object:
        def change(episode: Episode) -> Episode:
            cost = 1000.0 if episode.key == slow else ms
            return structs.replace(episode, queries=tuple(structs.replace(query, ms=cost) for query in episode.queries))

        return change

    a = run("baseline", change=at(30.0, slow=(0, 0)), broken=((0, 0),))  # type: ignore[arg-type]
    b = run("rsd", change=at(20.0, slow=(9, 9)))  # type: ignore[arg-type]
    found = compare(a, b)
    done = [[e for e in r.episodes if e.key != (0, 0)] for r in (a, b)]
    cost = [sum(e.policy_ms for e in es) / sum(e.steps for e in es) for es in done]
    assert found.ms_per_action == pytest.approx(cost)
    assert found.speedup is not None and found.speedup.interval is not None
    assert found.speedup.value == pytest.approx(cost[0] / cost[1])
    assert found.speedup.interval[0] < found.speedup.value < found.speedup.interval[1]
    assert found.no_speedup is None


def test_few_episodes_give_no_interval() -> None:
    found = compare(run("baseline", tasks=(0,)), run("rsd", tasks=(0,)))
    assert found.speedup is not None
    assert found.speedup.interval is None


@pytest.mark.parametrize("timings", [("batched", "batched"), ("single", "batched"), ("batched", "single")])
def test_batched_timing_never_gives_a_speedup(timings: tuple[str, str]) -> None:
    found = compare(run("baseline", timing=timings[0]), run("rsd", timing=timings[1]))
    assert (found.speedup, found.ms_per_action) == (None, None)
    assert found.no_speedup == "batched timing"
    assert found.pairs == 12


def test_another_machine_gives_no_speedup() -> None:
    found = compare(run("baseline"), run("rsd", hardware={"cpu": "made-up processor", "gpu": "another"}))
    assert (found.speedup, found.no_speedup, found.pairs) == (None, "other hardware", 12)
    assert "hardware.gpu is 'made-up GPU' and 'another'" in found.other_hardware
    batched = compare(run("baseline", timing="batched"), run("rsd", timing="batched", hardware={"cpu": "another"}))
    assert batched.other_hardware
    assert compare(run("baseline"), run("rsd")).other_hardware == ()


def test_shadow_mode_gives_no_speedup() -> None:
    found = compare(run("baseline"), run("shadow"))
    assert found.speedup is None
    assert found.no_speedup == "shadow mode computes all that rsd would save"


def test_runs_without_an_action_give_no_speedup() -> None:
    def idle(episode: Episode) -> Episode:
        return structs.replace(episode, steps=0, queries=())

    found = compare(run("baseline", change=idle), run("rsd", change=idle))
    assert found.no_speedup == "no action was executed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "trt"}, "backend is 'ort' and 'trt'"),
        ({"protocol": "original"}, "protocol is 'oft' and 'original'"),
        ({"n_action_steps": 8}, "n_action_steps is 4 and 8"),
        ({"max_steps": 9}, "max_steps is 220 and 9"),
        ({"trials": 3}, "trials is 4 and 3"),
        ({"tasks": (0, 1)}, r"tasks is \[0, 1, 2\] and \[0, 1\]"),
        ({"perturb": 0}, "perturb is None and 0"),
        ({"policy_sha256": "ff"}, "policy_sha256 is '3f2a.*' and 'ff'"),
        ({"versions": {**settings().versions, "torch": "3"}}, "versions.torch is '2.13.0' and '3'$"),
        ({"control": ControlConfig(rotate_images=False)}, "control.rotate_images is True and False"),
    ],
)
def test_other_conditions_are_refused_with_both_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"these runs cannot be compared: {message}"):
        compare(run("baseline"), run("rsd", **changes))


def test_a_script_is_compared_with_nothing() -> None:
    with pytest.raises(UserError, match=r"backend is None and 'ort'"):
        compare(run("baseline", policy="expert", bundle=None), run("rsd"))


def test_every_difference_is_named() -> None:
    with pytest.raises(UserError, match=r"suite is .*; seed is 7 and 8; both are of mode 'rsd'"):
        compare(run("rsd"), run("rsd", suite="libero_goal", seed=8))


def test_timing_and_tolerance_may_differ() -> None:
    other = structs.replace(settings("rsd").of_bundle.rsd, refresh=3)
    assert differences(settings("baseline"), settings("rsd", timing="batched", rsd=other)) == []


def test_runs_that_share_no_whole_episode_are_refused() -> None:
    with pytest.raises(UserError, match="no episode ended without an error in both"):
        compare(run("baseline", broken=tuple(KEYS[:6])), run("rsd", broken=tuple(KEYS[6:])))


def test_settings_that_must_be_equal_exist() -> None:
    assert set(SAME) < set(to_json(settings())) | set(to_json(settings().bundle))


def test_figures() -> None:
    found = figures(run("rsd", broken=((0, 0),)))
    assert (found["episodes"], found["errors"]) == (11, 1)
    assert figures(run("rsd", timing="batched"))["ms_per_action"] is None
    assert figures(run("baseline"))["accepted"] is None
    assert found["accepted"] is not None and 0 < found["accepted"] < 1


def test_episodes_whose_target_was_moved_are_counted() -> None:
    def change(episode: Episode) -> Episode:
        offset = None if episode.trial % 2 else (0.02, 0.03)
        return structs.replace(episode, perturbed_at=offset and 7, displacement=offset)

    assert moved(run("baseline", perturb="displace:3", change=change, broken=((0, 0),))) == 5
    assert moved(run("baseline", change=change)) is None
