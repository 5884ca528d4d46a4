"""Runs are named, set against open loop and their control, and judged with Holm's adjustment."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs
from synthetic import outcome, profile, run, throughput, write

from rsd_trt.config import RsdConfig
from rsd_trt.errors import UserError
from rsd_trt.eval.report.cost import Price
from rsd_trt.eval.report.runs import Run, pair_up, read_runs, run_names, variant
from rsd_trt.eval.results import Results
from rsd_trt.eval.statistics import mcnemar_exact

MANY = {"tasks": tuple(range(10)), "trials": 10}
KEYS = [(task, trial) for task in range(10) for trial in range(10)]
ALL = 220


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", run("rsd"))
    with pytest.raises(UserError, match="is given twice"):
        read_runs([path, tmp_path / "." / "r.json"])


def test_a_report_is_on_runs_of_bundles(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", run("baseline", policy="expert", bundle=None))
    with pytest.raises(UserError, match=r"r\.json is a run of expert, a script; a report is on runs of bundles"):
        read_runs([path])


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([run("baseline"), run("rsd")], ["open loop, n = 4", "rsd, n = 4"]),
        (
            [run("rsd"), run("rsd", backend="trt"), run("shadow")],
            ["rsd, n = 4, ort", "rsd, n = 4, trt", "shadow, n = 4"],
        ),
        (
            [run("rsd", throughput=throughput(n, 1.0)) for n in (1, 2)],
            ["rsd, n = 4, 1 worker", "rsd, n = 4, 2 workers"],
        ),
        ([run("rsd"), run("rsd")], ["rsd, n = 4, #1", "rsd, n = 4, #2"]),
        (
            [run("baseline"), run("baseline", perturb="late:7"), run("rsd", n_action_steps=2)],
            ["open loop, n = 4, unperturbed", "open loop, n = 4, late:7", "rsd, n = 2"],
        ),
        ([], []),
    ],
)
def test_names_say_what_differs(runs: list[Results], names: list[str]) -> None:
    assert run_names(runs) == names


def test_rules_are_told_apart() -> None:
    own = RsdConfig(rule="first")
    wide = structs.replace(own, tolerance=(0.4,) * 3 + (0.02,) * 3, check_steps=2)
    made = [run("baseline"), *(run("rsd", rsd=rsd) for rsd in (own, wide))]
    assert run_names(made)[1:] == ["rsd, n = 4, first 0.2", "rsd, n = 4, first 0.4/0.02, m = 2"]
    assert variant(run("random").settings.of_bundle) == "accepting 70.0%"
    for rsd, told in (
        (structs.replace(own, rule="tokens"), "tokens 0.7"),
        (structs.replace(own, rule="likelihood", threshold=-1.25), "likelihood -1.25"),
    ):
        assert variant(run("rsd", rsd=rsd).settings.of_bundle) == told


def paired(*runs: Results, price: Price | None = None) -> dict[str, Run]:
    found = [(Path(str(i)), results) for i, results in enumerate(runs)]
    return {one.name: one for one in (pair_up(found, price, ALL) if price else pair_up(found, within=ALL))}


def rivals(one: Run) -> dict[str, str]:
    return {against.rival: against.versus.names[0] for against in one.against}


def test_rivals_are_open_loop_with_one_action_and_the_best_that_costs_no_more() -> None:
    loops = [
        run("baseline", n_action_steps=n, change=outcome(*KEYS[:k]), **MANY) for n, k in ((1, 95), (4, 90), (8, 92))
    ]
    rsd = run("rsd", n_action_steps=8, acceptance=0.0, **MANY)
    found = paired(*loops, rsd, price=Price(0.3, 1.0, "ms", "made up"))
    assert list(found)[:3] == ["open loop, n = 1", "open loop, n = 4", "open loop, n = 8"]
    mine = found["rsd, n = 8"]
    assert rivals(mine) == {"open loop, n = 1": "open loop, n = 1", "open loop of no higher cost": "open loop, n = 8"}
    dear = paired(*loops, rsd, price=Price(20.0, 1.0, "ms", "made up"))["rsd, n = 8"]
    assert rivals(dear)["open loop of no higher cost"] == "open loop, n = 1", "the best, not the nearest"
    cheap = paired(*loops[:1], rsd)["rsd, n = 8"]
    assert rivals(cheap) == {"open loop, n = 1": "open loop, n = 1"}
    assert cheap.rival("open loop of no higher cost") is None


def test_p_is_adjusted_over_all_declared_comparisons() -> None:
    other = run("baseline", n_action_steps=1, perturb="late:7", change=outcome(*KEYS[:80]), **MANY)
    spread = [(task, trial) for task in range(10) for trial in range(8 + (task < 7))]  # one more of seven tasks
    loop = run("baseline", n_action_steps=1, change=outcome(*(k for k in KEYS if k[1] < 8)), **MANY)
    better = run("rsd", change=outcome(*spread), acceptance=0.0, **MANY)
    same = run("rsd", change=outcome(*KEYS[:80]), acceptance=0.0, perturb="late:7", **MANY)
    alone = paired(loop, better)["rsd, n = 4"].against[0]
    assert (alone.p, alone.verdict) == (mcnemar_exact(7, 0).p, "above")
    both = paired(loop, other, better, same)["rsd, n = 4, unperturbed"].against[0]
    assert both.p == pytest.approx(2 * mcnemar_exact(7, 0).p)
    assert both.verdict == "above"
    four = paired(loop, other, better, same, *(run("rsd", n_action_steps=n, **MANY) for n in (2, 3)))
    lacking = four["rsd, n = 4, unperturbed"].against[0]
    assert lacking.verdict == "not shown" and lacking.needed is not None
    assert lacking.needed.tasks > 10 and lacking.needed.episodes > 100


def test_a_difference_of_few_tasks_is_not_shown() -> None:
    loop = run("baseline", n_action_steps=1, change=outcome(*KEYS[:80]), **MANY)
    found = paired(loop, run("rsd", change=outcome(*KEYS), acceptance=0.0, **MANY))["rsd, n = 4"].against[0]
    assert found.p < 0.001 and found.by_task_p > 0.3
    assert (found.verdict, str(found.needed)) == ("not shown", "350 episodes of 35 tasks")


def test_the_control_of_the_same_rate_is_outside_of_the_adjustment() -> None:
    rsd = run("rsd")
    rates = rsd.rsd_stats
    assert rates.draft_acceptance_rate is not None and rates.partial_acceptance_rate is not None
    rate = rates.draft_acceptance_rate + rates.partial_acceptance_rate
    controls = [run("random", accept_rate=r) for r in (rate, 0.2)]
    found = paired(run("baseline", n_action_steps=1), rsd, *controls)
    name = f"random, n = 4, accepting {rate:.1%}"
    assert rivals(found["rsd, n = 4"])["random acceptance"] == name
    control = found["rsd, n = 4"].rival("random acceptance")
    assert control is not None and control.p == control.versus.mcnemar.p
    assert not rivals(found[name])  # it is a control, and set against nothing


def test_why_a_run_is_alone() -> None:
    assert paired(run("rsd"))["rsd, n = 4"].alone == "no run of open loop is among the results"
    found = paired(run("baseline", seed=8), run("baseline", seed=9, suite="libero_goal"), run("rsd"))
    mine = next(one for name, one in found.items() if name.startswith("rsd"))
    assert mine.alone == "it differs from open loop, n = 4, libero_spatial: seed is 8 and 7"
    everything = tuple((task, trial) for task in range(3) for trial in range(4))
    broken = paired(run("baseline", n_action_steps=1, broken=everything), run("rsd"))["rsd, n = 4"]
    assert broken.alone is not None and "no episode ended without an error in both" in broken.alone
    assert paired(run("baseline"), run("shadow"))["shadow, n = 4"].against == ()


def test_figures_of_a_run(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.json", run(mode)) for i, mode in enumerate(("rsd", "baseline"))]  # type: ignore[arg-type]
    price, (loop, rsd) = read_runs(paths, profile(tmp_path / "profile.json", 0.2, 2.0))
    assert loop.open_loop and not rsd.open_loop
    assert rsd.endpoint.within == 100
    assert rsd.cost == price.per_action(rsd.results)
    early = [e for e in rsd.results.episodes if e.success and e.steps <= 100]
    assert rsd.reached == len(early) / 12
    assert rsd.mean_steps is not None and min(e.steps for e in early) <= rsd.mean_steps <= 100
