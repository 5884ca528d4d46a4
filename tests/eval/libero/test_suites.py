"""The suites beyond LIBERO's five: which there are, and what the robot is told to do in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import rsd_trt

from rsd_trt.config import ControlConfig, with_protocol
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.driver import max_steps
from rsd_trt.eval.libero.request import EvalRequest
from rsd_trt.eval.libero.simulator import initial_states, instruction, open_suite, task_file
from rsd_trt.suites import ALL_SUITES, FURTHER, SUITES, base_of

TOLD = {
    ("libero_spatial", 0): "pick up the black bowl between the plate and the ramekin and place it on the plate",
    ("libero_spatial_swap", 0): "pick up the black bowl between the plate and the ramekin and place it on the plate",
    ("libero_spatial_object", 9): "pick up the black bowl on the wooden cabinet and place it on the plate",
    ("libero_spatial_lan", 9): "lift bowl from cabinet and put on plate",
    ("libero_spatial_task", 9): "Pick the akita black bowl on the stove and place it on the plate",
    ("libero_goal_lan", 3): "slide open the top drawer and place the bowl in it",
    ("libero_object_task", 9): "Pick the chocolate pudding and place it in the basket",
    ("libero_10_task", 9): "put the white mug in the microwave and close it",
    ("libero_object_with_mug", 3): "pick the chocolate pudding and place it in the basket",
    ("libero_study_table", 4): "The task involves using object",
}


@pytest.mark.libero
def test_all_suites_with_files_and_states_have_a_name() -> None:
    assert len(set(FURTHER)) == 52 and not set(SUITES) & set(FURTHER)
    open_suite(SUITES[0])
    from libero.libero import benchmark

    found = set()
    for name in benchmark.get_benchmark_dict():
        suite = benchmark.get_benchmark(name)()
        try:
            whole = [(task_file(suite, i), initial_states(suite, i)) for i in range(suite.n_tasks)]
        except UserError:
            continue
        found |= {name} if whole else set()
    assert found == set(ALL_SUITES)


@pytest.mark.libero
@pytest.mark.parametrize(("suite", "task"), TOLD)
def test_the_instruction_is_taken_from_where_it_stands(suite: str, task: int) -> None:
    assert instruction(open_suite(suite), suite, task) == TOLD[suite, task]


def test_a_variant_ends_its_episodes_where_its_base_does() -> None:
    control = ControlConfig()
    assert max_steps(EvalRequest(suite="libero_10_swap"), control) == 520
    assert max_steps(EvalRequest(suite="libero_goal_lan"), with_protocol(control, "original")) == 300
    assert max_steps(EvalRequest(suite="libero_mine", max_steps=9), control) == 9
    with pytest.raises(UserError, match=r"has no libero_mine\. Give --max-steps"):
        max_steps(EvalRequest(suite="libero_mine"), control)
    assert {base_of(suite) for suite in FURTHER} == {*SUITES[:4], None}


def test_help_lists_the_suites() -> None:
    done = rsd_trt("eval", "--suite", "help")
    assert (done.exit_code, done.stdout.split()) == (0, list(ALL_SUITES))


@pytest.mark.slow
@pytest.mark.libero
def test_the_command_runs_one(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("--suite", "libero_spatial_task", "--tasks", "9", "--trials", "1", "--max-steps", "2")
    done = rsd_trt("eval", tiny_bundle, *arguments, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results["task_results"][0]["task_description"] == TOLD["libero_spatial_task", 9]


@pytest.mark.libero
def test_no_initial_states_and_no_files_are_one_line(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", str(tiny_bundle), "--trials", "1", "--out", str(tmp_path / "out"), "--suite"]
    done = rsd_trt(*command, "libero_10_with_milk", "--tasks", "3")
    assert (done.exit_code, "no initial states for task 3. Leave it out: --tasks 0,1,2,5,6,7,8,9" in done.stderr) == (
        1,
        True,
    )
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    for config in ("bddl_files: /nowhere", "[1, 2]", "a: b: c", "bddl_files: 3"):
        (tmp_path / "config.yaml").write_text(config)
        done = rsd_trt(*command, "libero_spatial")
        assert (done.exit_code, f"LIBERO_CONFIG_PATH is '{tmp_path}'" in done.stderr) == (1, True), done.output
        assert len(done.stderr.strip().splitlines()) == 1
