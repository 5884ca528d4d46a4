"""Targets follow from the numbers by rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs
from synthetic import outcome, run

from rsd_trt.eval.report.compare import SpeedUp
from rsd_trt.eval.report.runs import Run, pair_up
from rsd_trt.eval.report.targets import targets
from rsd_trt.eval.results import Results
from rsd_trt.eval.statistics import Verdict

MANY = {"tasks": tuple(range(10)), "trials": 10}
KEYS = [(task, trial) for task in range(10) for trial in range(10)]


def runs(*results: Results) -> tuple[Run, ...]:
    return pair_up([(Path(f"{i}.json"), r) for i, r in enumerate(results)])


def verdicts(found: Run) -> dict[str, str]:
    return {target.what: target.verdict for target in found.targets}


@pytest.mark.parametrize(
    ("succeeded", "verdict"), [(95, "met"), (86, "not proved"), (84, "not proved"), (70, "not met"), (0, "not met")]
)
def test_success_target(succeeded: int, verdict: str) -> None:
    (baseline,) = runs(run("baseline", change=outcome(*KEYS[:succeeded]), **MANY))
    assert verdicts(baseline) == {"success": verdict}


@pytest.mark.parametrize(
    ("succeeded", "errors", "verdict"),
    [(97, 3, "met"), (80, 20, "not proved"), (70, 5, "not met"), (70, 10, "not proved"), (0, 90, "not proved")],
)
def test_errors_count_against_every_verdict(succeeded: int, errors: int, verdict: str) -> None:
    results = run("rsd", change=outcome(*KEYS[:succeeded]), broken=tuple(KEYS[100 - errors :]), **MANY)
    (found,) = runs(results)
    target = found.targets[0]
    assert (target.verdict, target.value) == (verdict, succeeded / (100 - errors))
    said = f"{errors} of 100 episodes ended in an error"
    assert target.reason == (said if verdict == "not proved" else None)


def test_success_without_an_episode_is_not_measured() -> None:
    (baseline,) = runs(run("baseline", tasks=(0,), trials=1, broken=((0, 0),)))
    (target,) = baseline.targets
    assert (target.verdict, target.reason) == ("not measured", "no episode ended without an error")


@pytest.mark.parametrize(("draft_ms", "verdict"), [(5.0, "met"), (19.0, "not met")])
def test_speedup_target(draft_ms: float, verdict: str) -> None:
    _, rsd = runs(run("baseline", **MANY), run("rsd", draft_ms=draft_ms, **MANY))
    assert verdicts(rsd)["speed-up"] == verdict


def test_speedup_target_is_judged_by_the_interval() -> None:
    _, rsd = runs(run("baseline", **MANY), run("rsd", **MANY))
    cases: list[tuple[tuple[float, float] | None, Verdict]] = [
        ((1.21, 1.3), "met"),
        ((1.19, 1.3), "not proved"),
        ((1.0, 1.19), "not met"),
        (None, "not proved"),
    ]
    for interval, verdict in cases:
        assert targets(rsd.results, SpeedUp(1.25, interval), None)[1].verdict == verdict


@pytest.mark.parametrize(("acceptance", "verdict"), [(0.9, "met"), (0.3, "not met")])
def test_acceptance_target(acceptance: float, verdict: str) -> None:
    rsd, shadow = runs(run("rsd", acceptance=acceptance, **MANY), run("shadow", acceptance=acceptance, **MANY))
    assert verdicts(rsd)["acceptance"] == verdicts(shadow)["acceptance"] == verdict


def test_modes_speak_of_what_they_measure() -> None:
    found = {r.name: list(verdicts(r)) for r in runs(run("baseline"), run("rsd"), run("shadow"))}
    assert found == {
        "baseline": ["success"],
        "rsd": ["success", "speed-up", "acceptance"],
        "shadow": ["success", "acceptance"],
    }


def test_not_measured_says_why() -> None:
    _, batched = runs(run("baseline", timing="batched"), run("rsd", timing="batched"))
    assert (batched.targets[1].verdict, batched.targets[1].reason) == ("not measured", "batched timing")
    (alone,) = runs(run("rsd"))
    assert alone.targets[1].reason == "no baseline run is among the results"
    (untested,) = runs(run("rsd", change=lambda episode: structs.replace(episode, queries=())))
    assert (untested.targets[2].verdict, untested.targets[2].reason) == (
        "not measured",
        "no query tested a chunk",
    )


def test_few_episodes_prove_nothing() -> None:
    _, rsd = runs(run("baseline", tasks=(0,)), run("rsd", tasks=(0,), acceptance=1.0))
    assert verdicts(rsd)["speed-up"] == verdicts(rsd)["acceptance"] == "not proved"
    assert rsd.targets[1].reason == rsd.targets[2].reason == "too few episodes for an interval"
    assert rsd.targets[1].interval is None


def test_targets_are_those_of_the_original_experiment() -> None:
    _, rsd = runs(run("baseline"), run("rsd"))
    assert [(target.what, target.bound) for target in rsd.targets] == [
        ("success", "85%"),
        ("speed-up", "1.2x"),
        ("acceptance", "60%"),
    ]


def test_the_control_has_no_targets_and_rsd_is_set_against_it() -> None:
    baseline, rsd, control = runs(
        run("baseline", change=outcome(*KEYS[:90]), **MANY),
        run(
            "random", change=outcome(*KEYS[:70]), accept_rate=run("rsd", **MANY).rsd_stats.draft_acceptance_rate, **MANY
        ),
        run("rsd", change=outcome(*KEYS[:88]), **MANY),
    )
    assert [found.name for found in (baseline, rsd, control)] == ["baseline", "rsd", "random"]
    assert control.targets == ()
    assert (rsd.control, control.control, baseline.control) == ("random", None, None)
    assert rsd.versus_control is not None and rsd.versus_control.modes == ("random", "rsd")
    assert (rsd.versus_control.mcnemar.gained, rsd.versus_control.mcnemar.lost) == (18, 0)
    assert control.versus is not None and (control.versus.mcnemar.gained, control.versus.mcnemar.lost) == (0, 20)


def test_the_control_of_another_run_is_none() -> None:
    rate = run("rsd", **MANY).rsd_stats.draft_acceptance_rate
    assert rate is not None
    for other in ({"n_action_steps": 2, "accept_rate": rate}, {"accept_rate": rate - 0.02}):
        rsd, control = runs(run("rsd", **MANY), run("random", **other, **MANY))
        assert (rsd.control, rsd.versus_control) == (None, None)
    assert control.targets == ()
