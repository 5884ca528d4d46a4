"""Results files are checked against their bounds, their schema and their own episodes."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs
from synthetic import outcome, run, throughput, write

from rsd_trt.errors import UserError
from rsd_trt.eval.read import read_run
from rsd_trt.eval.results import RsdStats
from rsd_trt.eval.summary import summarise
from rsd_trt.records import to_json


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
    monkeypatch.setattr("rsd_trt.eval.read.MAX_BYTES", 1000)
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
        (
            '{"task_suite": 1, "final_success_rate": 1, "schema_version": 1}',
            "reads 3: make it anew",
        ),
        ('{"task_suite": 1, "final_success_rate": 1, "schema_version": 9}', "reads 3: update rsd-trt"),
        ('{"task_suite": 1, "final_success_rate": 1, "schema_version": 3}', "task_suite is 1, not a string"),
        ('{"task_suite": "a", "final_success_rate": 1}', "the key .* is missing"),
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
        (lambda data: data.update(steps=float("nan")), "cannot be read: JSON is malformed.* Give a results file"),
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
        ({"checks": 1}, r"checks is 1, its episodes give \d+"),
        ({"clipped_steps": 1}, "clipped_steps is 1, its episodes give 0"),
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
    forged = structs.replace(results.task_results[1], success_rate=0.123)
    path = write(
        tmp_path / "r.json",
        structs.replace(results, task_results=(results.task_results[0], forged, results.task_results[2])),
    )
    with pytest.raises(UserError, match=r"task_results\[1\].success_rate is 0.123, its episodes give"):
        read_run(path)


def test_a_batched_file_has_no_latency(tmp_path: Path) -> None:
    forged = structs.replace(run("rsd", timing="batched"), avg_inference_time_ms=5.0)
    with pytest.raises(UserError, match=r"avg_inference_time_ms is 5\.0, its episodes give None"):
        read_run(write(tmp_path / "r.json", forged))


def test_figures_may_differ_by_rounding(tmp_path: Path) -> None:
    results = run("rsd")
    assert results.avg_inference_time_ms is not None
    rounded = structs.replace(results, avg_inference_time_ms=results.avg_inference_time_ms * (1 + 1e-9))
    assert read_run(write(tmp_path / "r.json", rounded)) == rounded


MALFORMED = "cannot be read: JSON is malformed"


def setting(**changes: object) -> Callable[[dict[str, object]], None]:
    return lambda data: data["settings"].update(changes)  # type: ignore[attr-defined]


def of_bundle(**changes: object) -> Callable[[dict[str, object]], None]:
    return lambda data: data["settings"]["bundle"].update(changes)  # type: ignore[index]


def query(**changes: object) -> Callable[[dict[str, object]], None]:
    return lambda data: data["episodes"][0]["queries"][0].update(changes)  # type: ignore[index]


def actions(**changes: object) -> Callable[[dict[str, object]], None]:
    return lambda data: data["episodes"][0]["actions"].update(changes)  # type: ignore[index]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_bundle(levels=0), "settings.bundle.levels is 0, which must be >= 2"),
        (of_bundle(accept_rate=1.5), "settings.bundle.accept_rate is 1.5, which must be <= 1.0"),
        (setting(trials=-1), "settings.trials is -1, which must be >= 0"),
        (setting(seed=10**400), "settings.seed is 1000.*, which must be <="),
        (
            of_bundle(training_actions={"q01": [], "q99": [0.0] * 7, "mask": [True] * 7}),
            "settings.bundle.training_actions.q01 has 0",
        ),
        (setting(suite="\ud800"), MALFORMED),
        (setting(hardware={"cpu": "\udfff"}), MALFORMED),
        (setting(hardware={"cpu": float("inf")}), MALFORMED),
        (
            setting(hardware={"cpu": json.loads("[" * 300 + "]" * 300)}),
            "settings.hardware.cpu is .*, not a whole",
        ),
        (setting(versions={"\ud800": "1"}), MALFORMED),
        (first(error="\ud800"), MALFORMED),
        (first(steps=-1), r"episodes\[0\].steps is -1, which must be >= 0"),
        (query(step=-1), r"episodes\[0\].queries\[0\].step is -1, which must be >= 0"),
        (
            query(token_agreement=[]),
            r"episodes\[0\].queries\[0\].token_agreement is \[\], which must",
        ),
        (query(token_agreement=[0.5]), r"the queries' token_agreement has \[1, 3\] entries"),
        (
            query(draft_gap=[[0.0]]),
            r"episodes\[0\].queries\[0\].draft_gap\[0\] is \[0.0\], which",
        ),
        (query(draft_gap=[], main_gap=[[0.0] * 7]), "draft_gap has 0 steps and main_gap 1"),
        (actions(minimum=[]), r"episodes\[0\].actions.minimum is \[\], which must be of length >= 7"),
        (actions(maximum=[0.0] * 8), r"episodes\[0\].actions.maximum is .*, which must be of length <= 7"),
        (actions(maximum=[-9.0] * 7), "actions.minimum .* is above actions.maximum -9.0"),
        (actions(mean=[0.0]), r"episodes\[0\].actions.mean is \[0.0\], which must be of length >= 7"),
        (actions(histogram=[[1] * 20] * 6), r"episodes\[0\].actions.histogram is .*, which must be of length >= 7"),
        (
            actions(histogram=[[1] * 19] * 7),
            r"episodes\[0\].actions.histogram\[0\] is .* length >= 20",
        ),
        (lambda data: data.update(codec_round_trip_mse=-1), "codec_round_trip_mse is -1, which must be >= 0.0"),
        (
            lambda data: data.update(throughput=to_json(throughput(1, 1.0)) | {"workers": 0}),
            "throughput.workers is 0, which must be >= 1",
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
    with pytest.raises(UserError, match=rf"r\.json:? {message}") as error:
        read_run(path)
    assert "\n" not in str(error.value)


def test_a_run_whose_fields_are_out_of_range_is_not_accepted(tmp_path: Path) -> None:
    results = run("rsd")
    wrong = structs.replace(results, queries=results.queries + 1)
    with pytest.raises(UserError, match="queries is"):
        read_run(write(tmp_path / "r.json", wrong))


def test_a_run_of_many_tasks_is_read_in_time_that_grows_with_them(tmp_path: Path) -> None:
    """And a message about them stays short."""
    one = run(tasks=(0,), trials=1)
    episode = structs.replace(one.episodes[0], queries=())
    seconds = []
    for count in (1_000, 10_000):
        chosen = structs.replace(one.settings, tasks=tuple(range(count)))
        episodes = [structs.replace(episode, task_id=i, run=chosen.run) for i in range(count)]
        made = summarise(chosen, episodes, dict.fromkeys(range(count), "open it"), None, "eval")
        path = write(tmp_path / f"{count}.json", made)
        started = time.process_time()
        assert read_run(path).total_episodes == count
        seconds.append(time.process_time() - started)
    assert seconds[1] < 40 * seconds[0] + 1, seconds
    strange = structs.replace(made, episodes=(*made.episodes[:-1], structs.replace(made.episodes[-1], task_id=20_000)))
    with pytest.raises(UserError, match="task 20000") as error:
        read_run(write(tmp_path / "strange.json", strange))
    assert len(str(error.value)) < 400
