"""`rsd-trt sweep` on this machine, on the simulator's double."""

from __future__ import annotations

import json
from pathlib import Path

import doubles
import pytest
import synthetic
from click.testing import Result
from command import rsd_trt

from rsd_trt.eval.libero import run as run_module
from rsd_trt.eval.sweep.plan import read_sweep
from rsd_trt.eval.sweep.run import with_rate
from rsd_trt.runtime import policy as policy_module

OPTIONS = ("--tasks", "0,1", "--trials", "2", "--max-steps", "12", "--workers", "2", "--device", "cpu")


def sweep(*arguments: object) -> Result:
    return rsd_trt("sweep", *arguments)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "Simulator", doubles.world)
    monkeypatch.setattr(run_module, "_tasks", lambda request: ({task: f"task {task}" for task in (0, 1)}, "0" * 64))


def test_a_run_that_is_declared_by_two_names_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text('mode = "baseline"\n[[run]]\n[[run]]\nn_action_steps = [2, 4]\n')  # 4: the bundle's own
    result = sweep(file, *OPTIONS, "--bundle", tiny_bundle, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "baseline_tiny and baseline_tiny_n4 have the same settings: they are one run" in result.stderr


def test_a_sweep_loads_a_model_once_goes_on_and_reports(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    opened = policy_module.open_forward

    def counted(*arguments: object) -> object:
        loads.append(arguments)
        return opened(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(policy_module, "open_forward", counted)
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'bundle = "{tiny_bundle}"\n[[run]]\nmode = "baseline"\nn_action_steps = [1, 2]\n'
        '[[run]]\nmode = ["rsd", "random"]\nn_action_steps = 2\naccept_rate = 0.5\n'
    )
    arguments = (file, *OPTIONS, "-o", tmp_path / "out")
    plan = json.loads(sweep(*arguments, "--dry-run", "--json").stdout)
    assert (plan["missing"], plan["episodes"], plan["comparisons"], plan["pairs"]) == (16, 16, 2, 4)
    assert {run["seconds_of"] for run in plan["runs"]} == {"assumed"}
    assert not (tmp_path / "out").exists()

    done = sweep(*arguments)
    assert done.exit_code == 0, done.output
    assert len(loads) == 1
    assert "frontier.png" in done.stdout
    report = json.loads((tmp_path / "out" / "report" / "performance_comparison.json").read_text())
    assert len(report["runs"]) == 4

    log = tmp_path / "out" / "baseline_tiny_n1" / "libero_spatial_baseline_episodes.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    log.with_name("libero_spatial_baseline_results.json").unlink()
    plan = sweep(*arguments, "--dry-run")
    assert "1 episode of 16 to run" in plan.stdout
    assert "this run" in plan.stdout
    again = sweep(*arguments, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["runs"][0]["episodes"] == 4
    assert len(loads) == 2, "what is finished needs no model"
    assert sweep(*arguments).exit_code == 0
    assert len(loads) == 2


def test_a_control_takes_over_the_rate_of_its_run(tmp_path: Path) -> None:
    plan = read_sweep(None, {"mode": ("random", "rsd"), "n_action_steps": 4}, tmp_path, 1)
    rsd, random = plan.runs
    assert (rsd.name, random.name, random.matched) == ("rsd_n4", "random_n4", "rsd_n4")
    made = synthetic.run("rsd")
    rsd.request.out.mkdir()
    synthetic.write(rsd.request.results_file, made)
    checks = [made.routes.get(route, 0) for route in ("accepted", "partial", "rejected")]
    assert with_rate(random, plan).accept_rate == pytest.approx(sum(checks[:2]) / sum(checks))
    assert with_rate(rsd, plan) == rsd.request


def test_a_finished_run_of_other_settings_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("--bundle", tiny_bundle, "--mode", "baseline", *OPTIONS, "-o", tmp_path)
    assert sweep(*arguments).exit_code == 0
    other = sweep(*arguments, "--trials", "1")
    assert other.exit_code == 1
    assert "trials is 2 there and 1 here" in other.stderr
    steps = OPTIONS.index("--max-steps")
    usual = sweep(*arguments[:4], *OPTIONS[:steps], *OPTIONS[steps + 2 :], "-o", tmp_path)
    assert (usual.exit_code, "there and 220 here" in usual.stderr) == (1, True), usual.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a SWEEP.toml, or options such as"),
        (("--mode", "basline"), "mode[0] is 'basline'; did you mean 'baseline'"),
        (("--mode", "baseline", "--n-action-steps", "0"), "n_action_steps[0] is 0, which must be >= 1"),
        (("--mode", "baseline", "--trials", "x"), "trials is 'x', not a whole number"),
        (("--ray", "sweep.toml"), "--ray sweep.toml is no address: put --ray behind the file"),
    ],
)
def test_usage(arguments: tuple[str, ...], message: str) -> None:
    result = sweep(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = sweep(tmp_path / "none.toml")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "cannot be read: No such file" in result.stderr


def test_without_ray_the_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    result = sweep("--mode", "baseline", *OPTIONS, "-o", tmp_path, "--ray")
    assert result.exit_code == 1
    assert "Ray is not installed. Install it: pip install 'rsd-trt[ray]'" in result.stderr
