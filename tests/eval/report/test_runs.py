"""Runs are named, and paired with the baseline of their settings."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from msgspec import structs
from synthetic import run, throughput, write

from rsd_trt.config import MODES, RsdConfig
from rsd_trt.errors import UserError
from rsd_trt.eval.report.runs import pair_up, read_runs, run_names, variant
from rsd_trt.eval.results import Results


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


def test_tolerances_are_told_apart() -> None:
    """Of rsd and shadow; a baseline has none, and a bundle that compares tokens neither."""
    own = RsdConfig(draft_block=10)
    wide = structs.replace(own, tolerance=(0.4,) * 6)
    mixed = structs.replace(own, tolerance=(0.1,) * 3 + (0.02,) * 3)
    made = [run("baseline", rsd=own), *(run("rsd", rsd=rsd) for rsd in (own, wide, mixed))]
    assert run_names(made) == ["baseline", "rsd, tolerance 0.1", "rsd, tolerance 0.4", "rsd, tolerance 0.1/0.02"]
    assert variant(run("random").settings.of_bundle) == "accepting 70.0%"
    assert variant(run("rsd", rsd=structs.replace(own, rule="tokens")).settings.of_bundle) == ""


def test_where_some_are_perturbed_every_run_says_whether_it_is() -> None:
    made = [run("baseline", n_action_steps=1), run("baseline", n_action_steps=2, perturb="displace:0"), run("rsd")]
    assert run_names(made) == [
        "baseline, 1 action a query, unperturbed",
        "baseline, 2 actions a query, perturbed (displace:0)",
        "rsd, unperturbed",
    ]


def test_the_nearest_hardware_is_preferred_and_named() -> None:
    """A baseline and a control of the same machine."""
    rate = run("rsd").rsd_stats.draft_acceptance_rate
    made = [
        run(mode, accept_rate=rate if mode == "random" else None, hardware={"cpu": "made-up processor", "gpu": gpu})
        for gpu in ("H1", "H2")
        for mode in MODES
        if mode != "shadow"
    ]
    found = [r for r in pair_up([(Path(str(i)), r) for i, r in enumerate(made)]) if r.results.settings.mode == "rsd"]
    for r, gpu in zip(found, ("H1", "H2"), strict=True):
        assert (r.name, r.baseline, r.control) == (f"rsd, {gpu}", f"baseline, {gpu}", f"random, {gpu}")
        assert r.versus is not None
        assert r.versus.speedup is not None


def test_a_report_is_on_runs_of_bundles(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", run("baseline", policy="expert", bundle=None))
    with pytest.raises(UserError, match=r"r\.json is a run of expert, a script; a report is on runs of bundles"):
        read_runs([path])


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
