"""Results files are checked against their own episodes, named, and paired with the baseline of their settings."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from synthetic import outcome, run, throughput, write

from rsd_trt.errors import UserError
from rsd_trt.eval.results import Results, RsdStats
from rsd_trt.eval.runs import pair_up, read_run, read_runs, run_names
from rsd_trt.jsonio import to_json


def test_reads_what_was_written(tmp_path: Path) -> None:
    results = run("shadow", broken=((1, 2),), throughput=throughput(4, 2.0))
    assert read_run(write(tmp_path / "r.json", results)) == results


def test_reads_compressed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run()
    plain = write(tmp_path / "r.json", results).read_bytes()
    path = tmp_path / "r.json.gz"
    path.write_bytes(gzip.compress(plain))
    assert read_run(path) == results
    path.write_bytes(gzip.compress(plain)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        read_run(path)
    path.write_bytes(plain)
    with pytest.raises(UserError, match="cannot be read: Not a gzipped file"):
        read_run(path)
    monkeypatch.setattr("rsd_trt.eval.results.MAX_BYTES", 1000)
    path.write_bytes(gzip.compress(b" " * 2000))
    with pytest.raises(UserError, match="holds more than 1,000 bytes"):
        read_run(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("\x00", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("9" * 5_000, "cannot be read"),
        ("[]", "is not a results file"),
        ("{}", "is not a results file"),
        ('{"task_suite": 1, "final_success_rate": 1}', "has schema_version None, this version reads 1: evaluate again"),
        ('{"task_suite": 1, "final_success_rate": 1, "schema_version": 9}', "reads 1: update rsd-trt"),
        ('{"task_suite": 1, "final_success_rate": 1, "schema_version": 1}', "the key .* is missing"),
    ],
)
def test_old_and_foreign_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"r\.json.*{message}") as error:
        read_run(path)
    assert "\n" not in str(error.value)


def twice(data: dict[str, object]) -> None:
    data["episodes"] = [*data["episodes"], data["episodes"][0]]  # type: ignore[index, misc]


def first(**changes: object) -> Callable[[dict[str, object]], None]:
    def change(data: dict[str, object]) -> None:
        data["episodes"][0] |= changes  # type: ignore[index]

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (twice, "holds task 0, trial 0 twice"),
        (first(trial=99), r"holds task 0, trial 99, which its settings do not ask for \(tasks .*, 4 trials\)"),
        (first(run="0123"), "mixes runs: task 0, trial 0 is of run 0123"),
        (first(run=""), r"mixes runs: .* is of run \(none\), its settings are of [0-9a-f]+"),
        (first(success="yes"), r"episodes\[0\].success is 'yes', not true or false"),
        (first(stpes=3), "unknown key .*stpes; did you mean 'steps'"),
        (lambda data: data.update(total_successes=12), r"is damaged: total_successes is 12, its episodes give \d+"),
        (lambda data: data.update(errors=1), "is damaged: errors is 1, its episodes give 0"),
        (lambda data: data.update(task_results=[]), r"has results for tasks \[\], its settings ask for \[0, 1, 2\]"),
        (lambda data: data.update(steps=float("nan")), "steps is nan"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, damage: Callable[[dict[str, object]], None], message: str) -> None:
    path = write(tmp_path / "r.json", run("rsd", success=0.5))
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"r\.json:? ?{message}"):
        read_run(path)


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"final_success_rate": 0.999}, "final_success_rate is 0.999, its episodes give 0.5"),
        ({"final_success_rate": None}, "final_success_rate is None, its episodes give 0.5"),
        ({"final_success_interval": [0.1, 0.2]}, r"final_success_interval\[0\] is 0.1, its episodes give 0.25"),
        ({"use_speculative_decoding": False}, "use_speculative_decoding is False, its episodes give True"),
        ({"avg_inference_time_ms": 1.0}, "avg_inference_time_ms is 1.0, its episodes give "),
        ({"query_ms": None}, "query_ms is None, its episodes give {'max'"),
        ({"routes": {"accepted": 3}}, r"routes.accepted is 3, its episodes give \d+"),
        ({"verdicts": {"true_accept": 3}}, "verdicts.true_accept is 3, its episodes give None"),
        ({"token_agreement": [0.9]}, r"token_agreement is \[0.9\], its episodes give \["),
        ({"token_agreement_chance": 0.1}, "token_agreement_chance is 0.1, its episodes give 0.14"),
        ({"task_suite": "libero_10"}, "task_suite is 'libero_10', its episodes give 'libero_spatial'"),
        (
            {"rsd_stats": dict.fromkeys(to_json(RsdStats(None, None, None)), 1 / 3)},
            "rsd_stats.draft_acceptance_rate is 0.33",
        ),
    ],
)
def test_forged_figures_are_one_line(tmp_path: Path, forged: dict[str, object], message: str) -> None:
    data = to_json(run("rsd", change=outcome((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)))) | forged
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"r\.json is damaged: {message}"):
        read_run(path)


def test_forged_tasks_are_one_line(tmp_path: Path) -> None:
    results = run("rsd")
    forged = dataclasses.replace(results.task_results[1], success_rate=0.123)
    path = write(
        tmp_path / "r.json",
        dataclasses.replace(results, task_results=(results.task_results[0], forged, results.task_results[2])),
    )
    with pytest.raises(UserError, match=r"task_results\[1\].success_rate is 0.123, its episodes give"):
        read_run(path)


def test_a_batched_file_has_no_latency(tmp_path: Path) -> None:
    forged = dataclasses.replace(run("rsd", timing="batched"), avg_inference_time_ms=5.0)
    with pytest.raises(UserError, match=r"avg_inference_time_ms is 5\.0, its episodes give None"):
        read_run(write(tmp_path / "r.json", forged))


def test_figures_may_differ_by_rounding(tmp_path: Path) -> None:
    results = run("rsd")
    assert results.avg_inference_time_ms is not None
    rounded = dataclasses.replace(results, avg_inference_time_ms=results.avg_inference_time_ms * (1 + 1e-9))
    assert read_run(write(tmp_path / "r.json", rounded)) == rounded


def setting(**changes: object) -> Callable[[dict[str, object]], None]:
    return lambda data: data["settings"].update(changes)  # type: ignore[attr-defined]


def query(**changes: object) -> Callable[[dict[str, object]], None]:
    return lambda data: data["episodes"][0]["queries"][0].update(changes)  # type: ignore[index]


def actions(**changes: object) -> Callable[[dict[str, object]], None]:
    return lambda data: data["episodes"][0]["actions"].update(changes)  # type: ignore[index]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (setting(levels=0), "settings.levels 0 must be >= 2"),
        (setting(trials=-1), "settings.trials -1 must be >= 0"),
        (setting(seed=10**400), "settings.seed is too large a whole number"),
        (
            setting(training_actions={"q01": [], "q99": [0.0] * 7, "mask": [True] * 7}),
            "settings.training_actions.q01 has 0",
        ),
        (setting(suite="\ud800"), r"settings.suite is '\\ud800', not Unicode text"),
        (setting(hardware={"cpu": {"name": "\udfff"}}), r"settings.hardware.cpu.name is '\\udfff', not Unicode text"),
        (setting(hardware={"cpu": float("inf")}), "settings.hardware.cpu is inf, not a finite number"),
        (setting(hardware={"cpu": json.loads("[" * 300 + "]" * 300)}), "settings is nested more than 32 deep"),
        (setting(versions={"\ud800": "1"}), r"settings.versions is '\\ud800', not Unicode text"),
        (first(error="\ud800"), r"episodes\[0\].error is '\\ud800', not Unicode text"),
        (first(steps=-1), "an episode's steps -1 must be >= 0"),
        (query(step=-1), "a query's step -1 must be >= 0"),
        (query(token_agreement=[]), "a query's token_agreement must have an entry"),
        (query(token_agreement=[0.5]), r"the queries' token_agreement has \[1, 3\] entries"),
        (query(draft_gap=[[0.0]]), "a row of draft_gap has 1 entries, not 7"),
        (query(draft_gap=[], main_gap=[[0.0] * 7]), "draft_gap has 0 steps and main_gap 1"),
        (actions(minimum=[]), "actions.minimum has 0 entries, not 7"),
        (actions(maximum=[0.0] * 8), "actions.maximum has 8 entries, not 7"),
        (actions(maximum=[-9.0] * 7), "actions.minimum .* is above actions.maximum -9.0"),
        (actions(mean=[0.0]), "actions.mean has 1 entries, not 7"),
        (actions(histogram=[[1] * 20] * 6), "actions.histogram has 6 entries, not 7"),
        (actions(histogram=[[1] * 19] * 7), "a row of actions.histogram has 19 entries"),
        (lambda data: data.update(codec_round_trip_mse=-1), "codec_round_trip_mse -1.0 must be >= 0"),
        (
            lambda data: data.update(throughput=to_json(throughput(1, 1.0)) | {"workers": 0}),
            "throughput.workers 0 must",
        ),
    ],
)
def test_values_that_no_run_has_are_one_line(
    tmp_path: Path, damage: Callable[[dict[str, object]], None], message: str
) -> None:
    data = to_json(run("shadow", throughput=throughput(1, 1.0)))
    damage(data)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"r\.json: {message}") as error:
        read_run(path)
    assert "\n" not in str(error.value)


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", run("rsd"))
    with pytest.raises(UserError, match="is given twice"):
        read_runs([path, tmp_path / "." / "r.json"])


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([run("baseline"), run("rsd")], ["baseline", "rsd"]),
        ([run("rsd"), run("rsd", backend="trt"), run("shadow")], ["rsd, ort", "rsd, trt", "shadow"]),
        (
            [run("rsd", throughput=throughput(n, 1.0)) for n in (1, 2)],
            ["rsd, 1 worker", "rsd, 2 workers"],
        ),
        (
            [run("rsd"), run("rsd", timing="batched"), run("rsd", timing="batched", throughput=throughput(2, 1.0))],
            ["rsd, single timing", "rsd, batched timing, interrupted", "rsd, batched timing, 2 workers"],
        ),
        ([run("rsd"), run("rsd")], ["rsd, #1", "rsd, #2"]),
        ([], []),
    ],
)
def test_names_say_what_differs(runs: list[Results], names: list[str]) -> None:
    assert run_names(runs) == names


def paired(*runs: Results) -> dict[str, tuple[str | None, str | None]]:
    return {run.name: (run.baseline, run.alone) for run in pair_up([(Path(str(i)), r) for i, r in enumerate(runs)])}


def test_disturbed_runs_are_told_apart() -> None:
    names = run_names([run("baseline"), run("baseline", disturb=0), run("rsd")])
    assert names == ["baseline, undisturbed", "baseline, disturbed with seed 0", "rsd"]


def test_a_report_is_on_runs_of_bundles(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", run("baseline", policy="expert"))
    with pytest.raises(UserError, match=r"r\.json is a run of the expert; a report is on runs of bundles"):
        read_runs([path])


def test_a_setting_at_its_default_does_not_name_the_run(tmp_path: Path) -> None:
    """Files from before a setting existed are read as having its default."""
    results = run("rsd")
    path = write(tmp_path / "r.json", results)
    data = json.loads(path.read_text())
    for name in ("policy", "disturb", "accept_rate", "backbone_precision"):
        del data["settings"][name]
    for name in ("resize", "statistics"):
        del data["settings"]["control"][name]
    told = json.dumps(data["settings"], sort_keys=True).encode()
    assert results.settings.run == hashlib.sha256(told).hexdigest()[:12]
    path.write_text(json.dumps(data))
    assert read_run(path) == results
    assert run("rsd", disturb=0).settings.run != results.settings.run


def test_each_run_is_compared_with_the_baseline_of_its_settings() -> None:
    found = paired(run("rsd"), run("baseline"), run("shadow"))
    assert list(found) == ["baseline", "rsd", "shadow"]
    assert found == {"baseline": (None, None), "rsd": ("baseline", None), "shadow": ("baseline", None)}
    found = paired(*(run(mode, backend=backend) for mode in ("baseline", "rsd") for backend in ("ort", "trt")))
    assert found["rsd, trt"] == ("baseline, trt", None)


def test_a_baseline_of_the_same_timing_is_preferred() -> None:
    runs = [run(mode, timing=timing) for mode in ("baseline", "rsd") for timing in ("batched", "single")]
    runs = [runs[0], runs[1], runs[3]]
    assert paired(*runs)["rsd"] == ("baseline, single timing", None)
    larger = run("baseline", timing="batched", trials=5), run("baseline"), run("rsd", timing="batched", trials=5)
    assert paired(*larger)["rsd"] == ("baseline, batched timing", None)


def test_why_a_run_is_alone() -> None:
    assert paired(run("rsd"))["rsd"] == (None, "no baseline run is among the results")
    found = paired(run("baseline", seed=8), run("baseline", seed=9, suite="libero_goal"), run("rsd"))
    assert found["rsd"] == (None, "it differs from baseline, libero_spatial: seed is 8 and 7")
    everything = tuple((task, trial) for task in range(3) for trial in range(4))
    assert "no episode ended without an error in both" in str(paired(run("baseline", broken=everything), run("rsd")))


def throughput_only(*runs: Results) -> list[bool]:
    return [run.throughput_only for run in pair_up([(Path(str(i)), r) for i, r in enumerate(runs)])]


def test_a_series_over_workers_adds_its_throughput_only() -> None:
    single, series = run("rsd"), [run("rsd", timing="batched", trials=2, throughput=throughput(n, n)) for n in (1, 2)]
    assert throughput_only(single, *series) == [False, True, True]
    large = run("rsd", timing="batched", trials=5)
    assert throughput_only(single, *series, large) == [False, True, True, False]
    assert throughput_only(run("baseline"), *series) == [False, False, True]
    assert throughput_only(run("rsd"), run("rsd", backend="trt", trials=2)) == [False, False]


def test_runs_of_the_same_episodes_are_all_shown() -> None:
    """A second run is dropped neither for its place, its errors nor its success; nor is one of other tasks."""
    broken = run("rsd", broken=((0, 0), (1, 1)), throughput=throughput(4, 2.0))
    again = run("rsd", success=0.5, throughput=throughput(4, 1.0))
    assert throughput_only(run("rsd"), run("rsd", success=0.5), broken, again) == [False] * 4
    assert throughput_only(run("rsd", tasks=(0,)), run("rsd", tasks=(1,))) == [False] * 2
    assert throughput_only(broken, run("rsd", trials=3)) == [False, True]


@hypothesis.given(st.permutations(range(5)))
@hypothesis.settings(max_examples=20, deadline=None)
def test_what_counts_does_not_depend_on_the_order(order: list[int]) -> None:
    several = [run("rsd", timing="batched", throughput=throughput(n, n)) for n in (4, 2, 2, 8)]
    several.append(run("rsd", timing="batched", trials=2))
    only = throughput_only(*(several[i] for i in order))
    assert [only[order.index(i)] for i in range(5)] == [True, False, False, True, True]


def test_a_run_whose_fields_are_out_of_range_is_not_accepted(tmp_path: Path) -> None:
    results = run("rsd")
    wrong = dataclasses.replace(results, queries=results.queries + 1)
    with pytest.raises(UserError, match="queries is"):
        read_run(write(tmp_path / "r.json", wrong))


@pytest.mark.parametrize("name", ["baseline_1_action_single", "rsd_1_action_single"])
def test_published_results_are_still_read(name: str) -> None:
    path = Path(__file__).parents[2] / "docs" / "results" / "reference" / f"{name}.json.gz"
    results = read_run(path)  # raises where a setting that came later has changed the run's name
    assert results.total_episodes == len(results.episodes) > 0
