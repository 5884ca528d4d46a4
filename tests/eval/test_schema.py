"""The shipped JSON Schema is that of the types, and real results files are valid under it."""

from __future__ import annotations

import copy
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from synthetic import run, throughput

from rsd_trt.eval.results import SCHEMA_FILE, Results, results_schema
from rsd_trt.records import to_json

REGENERATE = (
    "python -c 'import json; from rsd_trt.eval.results import *; "
    'SCHEMA_FILE.write_text(json.dumps(results_schema(), indent=1) + "\\n")\''
)


def test_the_shipped_schema_is_that_of_the_types() -> None:
    assert json.loads(SCHEMA_FILE.read_text("utf-8")) == results_schema(), f"regenerate it: {REGENERATE}"


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(results_schema())


def valid(data: object) -> bool:
    return bool(jsonschema.Draft202012Validator(results_schema()).is_valid(data))


@pytest.mark.parametrize(
    "results",
    [
        run("baseline"),
        run("rsd", broken=((0, 0),), throughput=throughput(4, 2.0)),
        run("shadow", timing="batched", training_actions=None),
        run("baseline", policy="examples.reference_policy.scripted:expert", bundle=None),
        run("rsd", broken=tuple((task, trial) for task in range(3) for trial in range(4))),
    ],
    ids=["baseline", "rsd with an error", "shadow, batched", "a script", "errors only"],
)
def test_results_files_are_valid(results: Results) -> None:
    assert valid(to_json(results))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("task_suite"),
        lambda data: data.update(extra=1),
        lambda data: data.update(total_episodes="12"),
        lambda data: data["episodes"][0].update(success=None),
        lambda data: data["settings"]["bundle"].update(mode="fast"),
    ],
)
def test_damaged_results_files_are_not(damage: Callable[[dict[str, object]], object]) -> None:
    data = copy.deepcopy(to_json(run("rsd")))
    damage(data)
    assert not valid(data)


def test_the_experiments_keys_stay() -> None:
    data = to_json(run("rsd"))
    keys = {"task_suite", "use_speculative_decoding", "total_episodes", "total_successes", "final_success_rate"}
    assert keys | {"avg_inference_time_ms", "rsd_stats", "task_results"} <= data.keys()
    stats, tasks = data["rsd_stats"], data["task_results"]
    assert isinstance(stats, dict) and isinstance(tasks, list)
    assert set(stats) == {"draft_acceptance_rate", "partial_acceptance_rate", "full_rejection_rate"}
    assert {"task_id", "task_description", "success_rate", "successes", "episodes"} <= tasks[0].keys()


def test_data_files_are_shipped() -> None:
    """What setuptools is told to ship beside the code is what lies there."""
    assert importlib.metadata.version("rsd-trt")
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '"rsd_trt.eval" = ["results.schema.json"]\n"rsd_trt.eval.report" = ["templates/*"]' in project.read_text(
        "utf-8"
    )
    folder = SCHEMA_FILE.parent
    shipped = {path.name for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert shipped == {
        "results.schema.json",
        "report.css",
        "report.html.jinja",
        "report.md.jinja",
    }
