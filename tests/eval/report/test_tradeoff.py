"""What runs cost and what they are worth: times from a replay or a run's own, and the baseline that costs the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from synthetic import outcome, replay, run, settings, write

from rsd_trt.cli import main
from rsd_trt.config import Mode
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.replay_record import Replay
from rsd_trt.eval.report.compare import SpeedUp
from rsd_trt.eval.report.runs import Run, pair_up
from rsd_trt.eval.report.tradeoff import (
    Judgement,
    Tradeoff,
    check_replay,
    enclosing,
    judge_same_cost,
    shares,
    tradeoff,
)
from rsd_trt.eval.report.tradeoff_chart import _curves, _look, has_curve, panels, tradeoff_png
from rsd_trt.eval.report.write import PerformanceComparison, write_report
from rsd_trt.eval.results import Episode, Results
from rsd_trt.eval.statistics import mcnemar_exact, sign_flip
from rsd_trt.records import from_json, to_json

KEYS = [(task, trial) for task in range(10) for trial in range(5)]
MS = {("baseline", 1): 16.0, ("baseline", 2): 8.0, ("baseline", 4): 4.0, ("rsd", 1): 10.0, ("rsd", 2): 5.0}
SUCCEEDED = {("baseline", 1): 45, ("baseline", 2): 35, ("baseline", 4): 20, ("rsd", 1): 48, ("rsd", 2): 30}


def made(mode: Mode, n: int, succeeded: int, **changes: object) -> Results:
    """A batched run of 50 episodes, of which the first ones succeed."""
    settings: dict[str, object] = {"timing": "batched", "tasks": tuple(range(10)), "trials": 5, **changes}
    return run(mode, n_action_steps=n, change=outcome(*KEYS[:succeeded]), **settings)  # type: ignore[arg-type]


def batched() -> list[tuple[Results, float, tuple[float, float] | None]]:
    return [
        (made(mode, n, SUCCEEDED[mode, n]), ms, (ms * 0.98, ms * 1.02))  # type: ignore[arg-type, index]
        for (mode, n), ms in MS.items()
    ]


def named(*results: Results) -> tuple[Run, ...]:
    return pair_up([(Path(f"{i}.json"), r) for i, r in enumerate(results)])


def of(timed: list[tuple[Results, float, tuple[float, float] | None]]) -> Tradeoff:
    return tradeoff(named(*(results for results, _, _ in timed)), replay(*timed))


def test_a_replay_gives_batched_runs_their_times() -> None:
    found = of(batched())
    assert {(p.mode, p.n_action_steps): p.ms for p in found.points} == MS
    assert all(p.replayed and p.ms_interval and p.ms_interval[0] < p.ms < p.ms_interval[1] for p in found.points)
    assert found.left_out == ()


def test_without_a_replay_a_batched_run_is_no_point_and_says_so() -> None:
    single = run("rsd", n_action_steps=1)
    found = tradeoff(named(run("baseline", n_action_steps=2, timing="batched"), single), None)
    (point,) = found.points
    assert (point.mode, point.replayed, point.ms) == ("rsd", False, single.avg_inference_time_ms)
    assert point.ms_interval is not None and point.ms_interval[0] < point.ms < point.ms_interval[1]
    assert found.left_out == ("baseline: batched timing, and no replay",)


def test_runs_without_a_figure_are_left_out_with_the_reason() -> None:
    nothing = tuple((task, trial) for task in range(3) for trial in range(4))
    found = tradeoff(named(run("baseline", broken=nothing), run("shadow")), None)
    assert found.points == ()
    assert found.left_out == (
        "baseline: no episode ended without an error",
        "shadow: shadow mode computes all that rsd would save",
    )


def test_runs_that_were_timed_elsewhere_are_left_out() -> None:
    timed = batched()
    own = run("rsd", n_action_steps=4, hardware={"cpu": "another one"})
    found = tradeoff(named(*(results for results, _, _ in timed), own), replay(*timed))
    assert {(p.mode, p.n_action_steps) for p in found.points} == set(MS)
    (reason,) = found.left_out
    assert reason.startswith(
        "rsd, 4 actions a query: timed on another one, ort fp32, graph backbone, not on made-up GPU"
    )


def test_of_two_runs_of_a_kind_the_larger_counts() -> None:
    timed = batched()
    small = run("baseline", n_action_steps=2)
    found = tradeoff(named(*(results for results, _, _ in timed), small), replay(*timed))
    assert [p.episodes for p in found.points if (p.mode, p.n_action_steps) == ("baseline", 2)] == [50]
    (reason,) = found.left_out
    assert reason.endswith(": another run of its kind has more episodes")


def changed(record: Replay, **changes: object) -> Replay:
    first = structs.replace(record.rows[0], **changes)  # type: ignore[arg-type]
    return structs.replace(record, rows=(first, *record.rows[1:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "0123456789ab"}, "as run 0123456789ab, which is none of the results given"),
        ({"mode": "rsd"}, "its mode is 'rsd', its results 'baseline'. Replay again"),
        ({"n_action_steps": 8}, "its n_action_steps is 8, its results 1"),
        ({"perturb": 3}, "its perturb is 3, its results None"),
    ],
)
def test_a_replay_of_another_run_is_refused(changes: dict[str, object], message: str) -> None:
    timed = batched()
    runs = named(*(results for results, _, _ in timed))
    with pytest.raises(UserError, match=message):
        check_replay(changed(replay(*timed), **changes), runs)
    check_replay(replay(*timed), runs)


def test_a_replay_of_another_bundle_is_refused() -> None:
    timed = batched()
    other = structs.replace(replay(*timed), bundle_sha256="ff" * 32)
    with pytest.raises(UserError, match=r"of bundle ffffffffffff, baseline.json of 3f2a3f2a3f2a"):
        tradeoff(named(*(results for results, _, _ in timed)), other)


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        (10.0, ("one", "two")),
        (8.0, ("two", "two")),
        (1.0, ("four", None)),
        (20.0, (None, "one")),
        (16.0, ("one", "one")),
    ],
)
def test_the_baseline_runs_that_enclose_a_cost(ms: float, expected: tuple[str | None, str | None]) -> None:
    assert enclosing(ms, {"two": 8.0, "one": 16.0, "four": 4.0}) == expected
    assert enclosing(ms, {}) == (None, None)


@given(cheaper=st.floats(0.1, 50), gap=st.floats(0, 50), at=st.floats(0, 1))
def test_the_shares_give_the_time(cheaper: float, gap: float, at: float) -> None:
    ms = cheaper + at * gap
    dear, cheap = shares(ms, cheaper + gap, cheaper)
    assert dear + cheap == pytest.approx(1)
    assert -1e-9 <= dear <= 1 + 1e-9
    assert dear * (cheaper + gap) + cheap * cheaper == pytest.approx(ms if gap else cheaper, abs=1e-6)


@pytest.mark.parametrize(
    ("success", "p", "verdict"),
    [
        ((0.8, 0.9), 0.049, "above"),
        ((0.9, 0.8), 0.049, "below"),
        ((0.8, 0.9), 0.051, "not shown"),
        ((0.9, 0.9), 1.0, "not shown"),
        (None, None, "not measured"),
    ],
)
def test_the_rule(success: tuple[float, float] | None, p: float | None, verdict: Judgement) -> None:
    assert judge_same_cost(success, p) == verdict


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (6, 0), (8, 2), (5, 5), (1, 9)])
def test_the_sign_flip_test_of_whole_differences_is_mcnemars(gained: int, lost: int) -> None:
    differences = [1.0] * gained + [-1.0] * lost + [0.0] * 40
    assert sign_flip(differences) == pytest.approx(mcnemar_exact(gained, lost).p, abs=0.015)  # three standard errors


def test_the_baseline_of_the_same_cost_divides_the_episodes() -> None:
    rows = {(row.mode, row.n_action_steps): row for row in of(batched()).same_cost}
    one = rows["rsd", 1]
    assert [(n.ms, n.share) for n in one.neighbours] == [(16.0, 0.25), (8.0, 0.75)]
    assert one.success == pytest.approx((0.25 * 45 / 50 + 0.75 * 35 / 50, 48 / 50))
    assert (one.pairs, one.verdict) == (50, "above")
    assert [n.versus.success_points for n in one.neighbours] == pytest.approx([6.0, 26.0])
    two = rows["rsd", 2]
    assert two.success == pytest.approx((0.25 * 35 / 50 + 0.75 * 20 / 50, 30 / 50))


def test_episodes_with_an_error_in_one_of_the_runs_are_left_out() -> None:
    timed = batched()
    broken = made("baseline", 1, 45, broken=((0, 0), (9, 4)))
    timed[0] = (broken, *timed[0][1:])
    one = next(row for row in of(timed).same_cost if row.n_action_steps == 1)
    assert one.pairs == 48
    assert one.success == pytest.approx((0.25 * 44 / 48 + 0.75 * 34 / 48, 47 / 48))


def test_a_run_that_costs_more_than_every_baseline_is_not_judged() -> None:
    timed = [(made("baseline", 1, 45), 16.0, None), (made("rsd", 1, 50), 17.0, None)]
    (row,) = of(timed).same_cost
    assert (row.verdict, row.neighbours, row.success, row.p) == ("not measured", (), None, None)


def test_a_run_that_costs_less_than_every_baseline_is_set_against_the_cheapest() -> None:
    timed = [(made("baseline", 1, 30), 16.0, None), (made("rsd", 1, 45), 3.0, None)]
    (row,) = of(timed).same_cost
    assert [(n.run, n.share) for n in row.neighbours] == [("baseline", 1.0)]
    assert (row.success, row.verdict) == ((0.6, 0.9), "above")


def test_other_conditions_are_no_baseline() -> None:
    timed = [(made("baseline", 1, 30), 16.0, None), (made("rsd", 1, 45, perturb="displace:3"), 3.0, None)]
    (row,) = of(timed).same_cost
    assert row.verdict == "not measured"


def test_a_curve_needs_two_numbers_of_actions() -> None:
    found = of(batched())
    assert has_curve(found)
    assert not has_curve(dataclasses.replace(found, points=tuple(p for p in found.points if p.n_action_steps == 1)))
    assert tradeoff_png(found).startswith(b"\x89PNG")


def test_a_tolerance_and_a_rate_have_curves_of_their_own() -> None:
    wide = structs.replace(settings().of_bundle.rsd, tolerance=(0.4,) * 6)
    others = [(made("rsd", 1, 40, rsd=wide), 7.0, None), (made("random", 1, 30, accept_rate=0.5), 9.0, None)]
    found = of([*batched(), *others, (made("random", 1, 33, accept_rate=0.9), 6.0, None)])
    modes: tuple[Mode, ...] = ("rsd", "random")
    curves = {m: [(name, len(points)) for name, points in _curves(found.points, m).items()] for m in modes}
    assert curves == {
        "rsd": [("tolerance 0.1", 2), ("tolerance 0.4", 1)],
        "random": [("accepting 50.0%", 1), ("accepting 90.0%", 1)],
    }
    assert _look(found, "baseline", "") == ("baseline, open loop", "")
    assert _look(found, "rsd", "tolerance 0.1") == ("rsd, tolerance 0.1", "")
    label, hollow = _look(found, "rsd", "tolerance 0.4")
    assert label == "rsd, tolerance 0.4"
    assert hollow
    assert tradeoff_png(found).startswith(b"\x89PNG")


def test_a_replays_speedups_are_those_of_the_runs() -> None:
    timed = batched()
    runs, record = named(*(results for results, _, _ in timed)), replay(*timed)
    baseline, rsd = record.rows[0], next(row for row in record.rows if row.mode == "rsd")
    faster = structs.replace(rsd, baseline=baseline.run, speedup=1.6, speedup_interval=(1.5, 1.7))
    record = structs.replace(record, rows=tuple(faster if row is rsd else row for row in record.rows))
    found = {run.results.settings.run: run for run in pair_up([(run.path, run.results) for run in runs], record)}
    versus = found[rsd.run].versus
    assert versus is not None and versus.no_speedup is None
    assert versus.speedup == SpeedUp(1.6, (1.5, 1.7), replayed=True)
    assert versus.ms_per_action == (baseline.ms_per_action, rsd.ms_per_action)
    left = [run for run in found.values() if run.versus is not None and run.results.settings.run != rsd.run]
    assert left and all(run.versus and run.versus.speedup is None for run in left)
    (point,) = (p for p in tradeoff(runs, record).points if p.mode == "rsd" and p.n_action_steps == 1)
    assert point.speedup == versus.speedup


def test_the_unperturbed_panel_comes_first() -> None:
    timed = [(made("baseline", 1, 45, perturb=perturb), 16.0, None) for perturb in ("displace:3", None, "displace:0")]
    assert [panel.title for panel in panels(of(timed))] == [
        "unperturbed",
        "perturbed (displace:0)",
        "perturbed (displace:3)",
    ]


def test_the_report_has_the_curve(tmp_path: Path) -> None:
    def moved(episode: Episode) -> Episode:
        offset = None if episode.trial == 0 else (0.02, 0.03)
        return structs.replace(episode, perturbed_at=offset and 7, displacement=offset)

    perturbed = [run(mode, perturb="displace:3", timing="batched", change=moved) for mode in ("baseline", "rsd")]  # type: ignore[arg-type]
    timed = [*batched(), *((results, ms, None) for results, ms in zip(perturbed, (4.1, 3.0), strict=True))]
    control = made("random", 1, 30, accept_rate=timed[3][0].rsd_stats.draft_acceptance_rate)
    paths = [write(tmp_path / f"{i}.json", results) for i, results in enumerate([*(r for r, _, _ in timed), control])]
    record = tmp_path / "replay.json"
    record.write_text(json.dumps(to_json(replay(*timed))))
    written = write_report(paths, tmp_path / "a", "rsd-trt report", record)
    assert (tmp_path / "a" / "tradeoff.png").read_bytes() == tradeoff_png(written.comparison.tradeoff)
    page, markdown = (tmp_path / "a" / "report.html").read_text(), (tmp_path / "a" / "report.md").read_text()
    assert "](tradeoff.png)" in markdown
    for said in (
        "time per action (95%), ms",
        "Against the baseline that costs the same",
        "batched timing, and no replay",
    ):
        assert said in page
    data = json.loads((tmp_path / "a" / "performance_comparison.json").read_text())
    assert from_json(PerformanceComparison, data, "file") == written.comparison
    rsd = next(r for r in written.comparison.runs if r.control is not None)
    assert rsd.control_comparison is not None and rsd.control_comparison.modes == ("random", "rsd")


def test_a_report_of_one_condition_has_no_curve(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{mode}.json", run(mode)) for mode in ("baseline", "rsd")]  # type: ignore[arg-type]
    written = write_report(paths, tmp_path / "out", "rsd-trt report")
    assert [point.run for point in written.comparison.tradeoff.points] == ["baseline", "rsd"]
    assert not (tmp_path / "out" / "tradeoff.png").exists()


def test_report_command_takes_a_replay(tmp_path: Path) -> None:
    from click.testing import CliRunner

    timed = batched()
    paths = [write(tmp_path / f"{i}.json", results) for i, (results, _, _) in enumerate(timed)]
    record = tmp_path / "replay.json"
    record.write_text(json.dumps(to_json(replay(*timed[:2]))))
    arguments = ["report", *map(str, paths), "-o", str(tmp_path / "out"), "--replay", str(record)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "tradeoff.png" in result.stdout.replace("\n", "")
    record.write_text(json.dumps(to_json(changed(replay(*timed), run="0123456789ab"))))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
