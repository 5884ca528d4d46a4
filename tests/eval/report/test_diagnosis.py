"""Each rule of the diagnosis, when it fires and when it does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from synthetic import N_ACTION_STEPS, run, settings

from rsd_trt.config import ACTION_NAMES, ARM_DIMS, Dims, RsdConfig
from rsd_trt.eval.report.diagnosis import Finding, diagnose
from rsd_trt.eval.report.runs import pair_up
from rsd_trt.eval.results import ActionStatistics, Episode, QueryRecord, Results

MANY = {"tasks": tuple(range(10)), "trials": 10}


def findings(*results: Results) -> list[Finding]:
    return list(diagnose(pair_up([(Path(f"{i}.json"), r) for i, r in enumerate(results)])))


def finding(title: str, *results: Results, run_name: str | None = None) -> Finding:
    (found,) = [f for f in findings(*results) if f.title == title and run_name in (None, f.run)]
    return found


def with_gaps(draft: float, main: float, dimension: int = 2) -> Results:
    """A failing shadow run in which one dimension's gaps are these at every step."""

    def change(episode: Episode) -> Episode:
        return dataclasses.replace(episode, queries=tuple(map(gapped, episode.queries)))

    def gapped(query: QueryRecord) -> QueryRecord:
        if query.draft_gap is None:
            return query
        rows = [[0.0] * len(ACTION_NAMES) for _ in range(2)]
        rows[0][dimension], rows[1][dimension] = draft, main
        gaps = [(tuple(row),) * N_ACTION_STEPS for row in rows]
        return dataclasses.replace(query, draft_gap=gaps[0], main_gap=gaps[1])

    return run("shadow", acceptance=0.3, change=change)


def test_nothing_is_diagnosed_where_every_target_is_met() -> None:
    good = {"success": 2.0, "acceptance": 1.0, **MANY}
    assert findings(run("baseline", **good), run("rsd", **good), run("shadow", **good)) == []


def test_action_names_are_those_of_the_dimensions() -> None:
    assert len(ACTION_NAMES) == ARM_DIMS + 1 == Dims().A


def test_actions_like_the_training_data_do_not_stand_out() -> None:
    found = finding("Executed actions", run("baseline", success=0.3))
    assert not found.stands_out
    assert found.sentence == "Nothing stands out: ranges and means are those of the training data."
    assert [row[0] for row in found.rows] == list(ACTION_NAMES)
    assert found.picture == "actions"


def shifted(by: float) -> Results:
    def change(episode: Episode) -> Episode:
        assert episode.actions is not None
        mean = tuple(m + by for m in episode.actions.mean)
        return dataclasses.replace(episode, actions=dataclasses.replace(episode.actions, mean=mean))

    return run("baseline", success=0.3, change=change)


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (run("baseline", success=0.3, action_scale=2.0), "leaves the training range in at least"),
        (run("baseline", success=0.3, action_scale=0.05), "of the training range"),
        (shifted(0.5), "dx is biased: its mean is +0.59"),
    ],
)
def test_odd_actions_stand_out(results: Results, said: str) -> None:
    found = finding("Executed actions", results)
    assert found.stands_out
    assert said in found.sentence
    assert found.sentence.endswith("Check the control section against the training.")


def test_actions_without_statistics_are_not_judged() -> None:
    without = finding("Executed actions", run("baseline", success=0.3, training_actions=None))
    assert not without.stands_out
    assert "the bundle has no training_actions" in without.sentence
    assert {row[-1] for row in without.rows} == {"-"}
    absent = run("baseline", success=0.3, change=lambda episode: dataclasses.replace(episode, actions=None))
    assert finding("Executed actions", absent).sentence.startswith("Not measured")


@pytest.mark.parametrize(("mse", "stands_out"), [(1e-8, False), (0.9e-4, False), (1.1e-4, True), (8.2, True)])
def test_codec(mse: float, stands_out: bool) -> None:
    found = finding("Codec round trip", run("baseline", success=0.3, codec_mse=mse))
    assert found.stands_out == stands_out
    assert f"{mse**0.5:.2g}" in found.sentence


@pytest.mark.parametrize(
    ("switches", "said"), [(0, "hardly ever closes"), (2, "Nothing stands out"), (40, "it chatters")]
)
def test_gripper(switches: int, said: str) -> None:
    actions = np.zeros((100, 7), np.float32)
    actions[:, ARM_DIMS] = -1
    actions[1 : 1 + switches : 2, ARM_DIMS] = 1
    statistics = ActionStatistics.of(actions)
    assert statistics.gripper_switches == switches

    def change(episode: Episode) -> Episode:
        return dataclasses.replace(episode, actions=statistics)

    found = finding("Gripper", run("baseline", success=0.3, change=change))
    assert said in found.sentence
    assert found.stands_out == (switches != 2)
    won = finding("Gripper", run("baseline", success=2.0, tasks=(0,)))  # all succeed, too few to prove it
    assert won.sentence == "No failed episode has action statistics."


def test_a_draft_on_the_last_block_stands_out() -> None:
    late = {"rsd": RsdConfig(draft_block=32), "draft_ms": 19.5}
    found = finding("Draft block", run("baseline"), run("rsd", **late))
    assert found.stands_out
    assert "after block 32, the last" in found.sentence
    early = finding("Draft block", run("baseline"), run("rsd", draft_ms=19.5))
    assert not early.stands_out
    assert early.sentence == "The draft reads after block 10 of 32: an accepted query skips 69% of the blocks."


def test_where_the_time_goes() -> None:
    found = finding("Where the time goes", run("baseline"), run("rsd", acceptance=0.1))
    assert found.stands_out
    assert "% of the queries run the whole backbone (routes: accepted " in found.sentence
    assert {row[0] for row in found.rows} == {"accepted", "partial", "rejected", "full query"}
    shares = [float(row[3].rstrip("%")) for row in found.rows]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    dear = finding("Where the time goes", run("baseline"), run("rsd", acceptance=1.0, draft_ms=18.0))
    assert dear.stands_out
    assert "an accepted query takes 86% of a full query's time" in dear.sentence


def test_batched_time_is_not_told() -> None:
    found = finding("Where the time goes", run("baseline", timing="batched"), run("rsd", timing="batched"))
    assert found.rows == ()
    assert "time" not in found.sentence


def test_fewer_actions_a_query_stand_out() -> None:
    found = finding("Actions per query", run("baseline"), run("rsd", draft_ms=19.0))
    assert found.stands_out
    assert found.sentence.endswith("the queries that this adds eat up what cheap ones save.")


def test_acceptance_without_a_shadow_run_is_not_measured() -> None:
    found = finding("Agreement by dimension and step", run("baseline"), run("rsd", acceptance=0.3))
    assert not found.stands_out
    assert found.sentence.startswith("Not measured: no shadow-mode run of the same settings")
    other = run("shadow", acceptance=0.3, seed=8)
    assert finding("Agreement by dimension and step", run("rsd", acceptance=0.3), other)


def test_acceptance_is_explained_by_the_shadow_run_of_the_same_settings() -> None:
    found = finding("Agreement by dimension", run("rsd", acceptance=0.3), with_gaps(0.2, 0.01))
    assert (found.run, found.source) == ("rsd", "shadow")
    assert found.stands_out
    assert found.sentence == (
        "dz agrees least: the draft is within the tolerance in 0% of the steps, the main head's own next plan in 100%."
    )
    assert found.picture == "dimensions"


def test_a_tolerance_that_the_main_head_does_not_keep_is_said() -> None:
    found = finding("Agreement by dimension", with_gaps(0.2, 0.3))
    assert found.sentence.endswith(": the tolerance is tighter than the main head repeats itself.")
    good = finding("Agreement by dimension", with_gaps(0.01, 0.01))
    assert not good.stands_out


def test_agreement_by_step() -> None:
    found = finding("Agreement by step", with_gaps(0.2, 0.01))
    assert found.stands_out
    assert len(found.rows) == settings().n_action_steps
    assert not finding("Agreement by step", with_gaps(0.01, 0.01)).stands_out


def test_a_shadow_run_that_tested_nothing_says_so() -> None:
    first = run("shadow", change=lambda episode: dataclasses.replace(episode, queries=episode.queries[:1]))
    found = finding("Agreement by dimension and step", first)
    assert found.sentence == "Not measured: shadow tested no live plan."
    assert finding("Right and wrong decisions", first).sentence == "No query was accepted."


@pytest.mark.parametrize("wrong", [True, False])
def test_wrong_accepts(wrong: bool) -> None:
    def change(episode: Episode) -> Episode:
        verdict = "false_accept" if wrong else "true_accept"
        queries = [dataclasses.replace(q, verdict=verdict) if q.verdict else q for q in episode.queries]
        return dataclasses.replace(episode, queries=tuple(cast("list[QueryRecord]", queries)))

    found = finding("Right and wrong decisions", run("shadow", acceptance=0.3, change=change))
    assert found.stands_out == wrong
    assert found.sentence.startswith("100.0%" if wrong else "0.0%")


def test_token_agreement_against_chance() -> None:
    def change(episode: Episode) -> Episode:
        queries = [dataclasses.replace(query, token_agreement=(0.9, 0.5, 0.15)) for query in episode.queries]
        return dataclasses.replace(episode, queries=tuple(queries))

    found = finding("Token agreement", run("shadow", acceptance=0.3, change=change))
    assert found.stands_out
    assert found.sentence == "No better than chance (14%): the draft's tokens of L2."
    assert [row[1] for row in found.rows] == ["90.0%", "50.0%", "15.0%"]
    assert finding("Token agreement", run("shadow", acceptance=0.3)).sentence.startswith("Every coarse layer")
    without = run(
        "shadow",
        acceptance=0.3,
        change=lambda episode: dataclasses.replace(
            episode, queries=tuple(dataclasses.replace(query, token_agreement=None) for query in episode.queries)
        ),
    )
    assert "Token agreement" not in {f.title for f in findings(without)}


def test_shadow_mode_is_not_blamed_for_the_baselines_success() -> None:
    bad = {"success": 0.3, **MANY}
    assert {f.run for f in findings(run("baseline", **bad), run("shadow", **bad)) if f.topic == "success"} == {
        "baseline"
    }
    assert {f.run for f in findings(run("shadow", **bad)) if f.topic == "success"} == {"shadow"}


def test_runs_of_nothing_are_not_diagnosed() -> None:
    everything = tuple((task, trial) for task in range(3) for trial in range(4))
    assert findings(run("rsd", broken=everything)) == []
