"""Targets and sentences follow from the numbers by rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from synthetic import outcome, run

from rsd_trt.eval.report.compare import SpeedUp
from rsd_trt.eval.report.conclusion import conclude, difference_sentence, headline, speedup_sentence, targets
from rsd_trt.eval.report.runs import Run, pair_up
from rsd_trt.eval.results import Episode, Results
from rsd_trt.eval.statistics import Verdict

MANY = {"tasks": tuple(range(10)), "trials": 10}
KEYS = [(task, trial) for task in range(10) for trial in range(10)]


def runs(*results: Results) -> tuple[Run, ...]:
    return pair_up([(Path(f"{i}.json"), r) for i, r in enumerate(results)])


def verdicts(found: Run) -> dict[str, str]:
    return {target.what: target.verdict for target in targets(found)}


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
    target = targets(found)[0]
    assert (target.verdict, target.value) == (verdict, succeeded / (100 - errors))
    said = f"{errors} of 100 episodes ended in an error"
    assert target.reason == (said if verdict == "not proved" else None)
    assert headline(found).endswith(f"; {said}.")


def test_success_without_an_episode_is_not_measured() -> None:
    (baseline,) = runs(run("baseline", tasks=(0,), trials=1, broken=((0, 0),)))
    (target,) = targets(baseline)
    assert (target.verdict, target.reason) == ("not measured", "no episode ended without an error")


@pytest.mark.parametrize(("draft_ms", "verdict"), [(5.0, "met"), (19.0, "not met")])
def test_speedup_target(draft_ms: float, verdict: str) -> None:
    _, rsd = runs(run("baseline", **MANY), run("rsd", draft_ms=draft_ms, **MANY))
    assert verdicts(rsd)["speed-up"] == verdict


def test_speedup_target_is_judged_by_the_interval() -> None:
    _, rsd = runs(run("baseline", **MANY), run("rsd", **MANY))
    assert rsd.versus is not None
    cases: list[tuple[tuple[float, float] | None, Verdict]] = [
        ((1.21, 1.3), "met"),
        ((1.19, 1.3), "not proved"),
        ((1.0, 1.19), "not met"),
        (None, "not proved"),
    ]
    for interval, verdict in cases:
        versus = dataclasses.replace(rsd.versus, speedup=SpeedUp(1.25, interval))
        assert verdicts(dataclasses.replace(rsd, versus=versus))["speed-up"] == verdict


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
    assert (targets(batched)[1].verdict, targets(batched)[1].reason) == ("not measured", "batched timing")
    (alone,) = runs(run("rsd"))
    assert targets(alone)[1].reason == "no baseline run is among the results"
    (untested,) = runs(run("rsd", change=lambda episode: dataclasses.replace(episode, queries=())))
    assert (targets(untested)[2].verdict, targets(untested)[2].reason) == (
        "not measured",
        "no query tested a live plan",
    )


def test_few_episodes_prove_nothing() -> None:
    _, rsd = runs(run("baseline", tasks=(0,)), run("rsd", tasks=(0,), acceptance=1.0))
    assert verdicts(rsd)["speed-up"] == verdicts(rsd)["acceptance"] == "not proved"
    assert targets(rsd)[1].reason == targets(rsd)[2].reason == "too few episodes for an interval"
    assert targets(rsd)[1].interval is None


def test_targets_are_those_of_the_original_experiment() -> None:
    _, rsd = runs(run("baseline"), run("rsd"))
    assert [(target.what, target.bound) for target in targets(rsd)] == [
        ("success", "85%"),
        ("speed-up", "1.2x"),
        ("acceptance", "60%"),
    ]


def test_headlines() -> None:
    _, good = runs(run("baseline", **MANY), run("rsd", success=2.0, acceptance=1.0, **MANY))
    assert headline(good) == "The run rsd meets all three targets."
    (mixed,) = runs(run("rsd", success=0.3, acceptance=1.0, **MANY))
    assert headline(mixed) == (
        "The run rsd meets the target for acceptance; it misses the target for success; it does not measure the target "
        "for speed-up."
    )
    (few,) = runs(run("rsd", tasks=(0,), trials=1))
    assert "neither meets nor misses the targets for success and acceptance beyond doubt" in headline(few)


@pytest.mark.parametrize(
    ("before", "after", "end"),
    [
        (KEYS[:80], KEYS[:90], "(+10.0 points, McNemar's exact p = 0.002): its success is higher."),
        (KEYS[:90], KEYS[:80], "(-10.0 points, McNemar's exact p = 0.002): its success is lower."),
        (
            KEYS[:90],
            KEYS[1:91],
            "(+0.0 points, McNemar's exact p = 1): no difference is shown, and by 100 pairs no loss of fewer than 6 "
            "episodes (6.0 points) could be.",
        ),
    ],
)
def test_difference(before: list[tuple[int, int]], after: list[tuple[int, int]], end: str) -> None:
    _, rsd = runs(run("baseline", change=outcome(*before), **MANY), run("rsd", change=outcome(*after), **MANY))
    assert rsd.versus is not None
    gained, lost = len(set(after) - set(before)), len(set(before) - set(after))
    assert difference_sentence(rsd.versus, "rsd", "baseline") == (
        f"On the same 100 initial states, rsd gains {gained} and loses {lost} against baseline {end}"
    )


def test_difference_of_a_few_episodes() -> None:
    _, rsd = runs(run("baseline", tasks=(0,)), run("rsd", tasks=(0,), broken=((0, 1),)))
    assert rsd.versus is not None
    said = difference_sentence(rsd.versus, "rsd", "baseline")
    assert said.startswith("On the same 3 initial states (1 left out), ")
    assert said.endswith("too few episodes to show any difference.")


def test_a_replayed_speedup_says_so() -> None:
    _, rsd = runs(run("baseline"), run("rsd"))
    assert rsd.versus is not None
    versus = dataclasses.replace(rsd.versus, speedup=SpeedUp(1.2, (1.1, 1.3), replayed=True))
    assert speedup_sentence(versus, "rsd", "baseline").startswith("Replayed, an action takes ")


@pytest.mark.parametrize(
    ("interval", "end"),
    [
        ((1.1, 1.3), "1.20x (1.10x to 1.30x), faster."),
        ((0.8, 0.9), "1.20x (0.80x to 0.90x), slower."),
        ((0.9, 1.3), "1.20x (0.90x to 1.30x), neither faster nor slower beyond doubt."),
        (None, "1.20x, from too few episodes for an interval."),
    ],
)
def test_speedup_sentence(interval: tuple[float, float] | None, end: str) -> None:
    _, rsd = runs(run("baseline"), run("rsd"))
    assert rsd.versus is not None
    versus = dataclasses.replace(rsd.versus, speedup=SpeedUp(1.2, interval), ms_per_action=(12.0, 10.0))
    assert speedup_sentence(versus, "rsd", "baseline") == (
        f"An action takes 10.00 ms of policy time in rsd and 12.00 ms in baseline: {end}"
    )


def test_no_speedup_is_said_with_its_reason() -> None:
    _, rsd = runs(run("baseline", timing="batched"), run("rsd", timing="batched"))
    assert "Speed-up of rsd over baseline: not measured: batched timing." in conclude([rsd]).sentences


def test_errors_are_counted_apart() -> None:
    everything = tuple((task, trial) for task in range(3) for trial in range(4))
    some, none = conclude(runs(run("baseline", broken=((0, 0),)))), conclude(runs(run("baseline", broken=everything)))
    assert some.sentences[0].endswith("; 1 episode ended in an error, counted apart.")
    assert none.sentences[0] == "In baseline, no episode ended without an error (12 errors)."


def test_what_is_missing_is_said() -> None:
    assert conclude(runs(run("baseline"))).headlines == (
        "No run of mode rsd is among the results: speed-up and acceptance of rsd are not measured.",
    )
    assert "The run rsd is not compared: no baseline run is among the results." in conclude(runs(run("rsd"))).sentences


def test_an_untrained_bundle_comes_first() -> None:
    found = conclude(runs(run("baseline", trained=False), run("rsd", trained=False)))
    assert found.headlines[0].startswith("The bundle of baseline and rsd is untrained (random weights)")


def test_the_conclusion_does_not_depend_on_the_order_of_the_files() -> None:
    a, b = run("baseline"), run("rsd")
    assert conclude(runs(a, b)) == conclude(runs(b, a))


def test_episodes_resume_order_does_not_matter() -> None:
    def shuffled(results: Results) -> Results:
        episodes: list[Episode] = list(results.episodes)
        return dataclasses.replace(results, episodes=tuple(reversed(episodes)))

    a, b = run("baseline"), run("rsd")
    assert conclude(runs(a, b)).headlines == conclude(runs(a, shuffled(b))).headlines


def test_the_control_has_no_targets_and_rsd_is_set_against_it() -> None:
    baseline, rsd, control = runs(
        run("baseline", change=outcome(*KEYS[:90]), **MANY),
        run(
            "random", change=outcome(*KEYS[:70]), accept_rate=run("rsd", **MANY).rsd_stats.draft_acceptance_rate, **MANY
        ),
        run("rsd", change=outcome(*KEYS[:88]), **MANY),
    )
    assert [found.name for found in (baseline, rsd, control)] == ["baseline", "rsd", "random"]
    assert targets(control) == ()
    assert (rsd.control, control.control, baseline.control) == ("random", None, None)
    assert rsd.versus_control is not None and rsd.versus_control.modes == ("random", "rsd")
    sentences = conclude((baseline, rsd, control)).sentences
    assert any(
        said.startswith("On the same 100 initial states, rsd gains 18 and loses 0 against random") for said in sentences
    )
    assert any(
        said.startswith("On the same 100 initial states, random gains 0 and loses 20 against") for said in sentences
    )


def test_the_control_of_another_run_is_none() -> None:
    rate = run("rsd", **MANY).rsd_stats.draft_acceptance_rate
    assert rate is not None
    for other in ({"n_action_steps": 2, "accept_rate": rate}, {"accept_rate": rate - 0.02}):
        rsd, control = runs(run("rsd", **MANY), run("random", **other, **MANY))
        assert (rsd.control, rsd.versus_control) == (None, None)
    assert targets(control) == ()


def test_displaced_episodes_are_counted() -> None:
    def moved(episode: Episode) -> Episode:
        offset = None if episode.trial % 2 else (0.02, 0.03)
        return dataclasses.replace(episode, perturbed_at=offset and 7, displacement=offset)

    (found,) = runs(run("baseline", perturb=3, change=moved, broken=((0, 0),), **MANY))
    assert (
        "; 1 episode ended in an error, counted apart; the target was displaced in 49 of them."
        in conclude([found]).sentences[0]
    )
    (calm,) = runs(run("baseline", **MANY))
    assert "displaced" not in conclude([calm]).sentences[0]
