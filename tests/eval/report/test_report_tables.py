"""What the tables of results hold."""

from __future__ import annotations

from pathlib import Path

from msgspec import structs
from synthetic import run

from rsd_trt.eval.report.runs import pair_up
from rsd_trt.eval.report.tables import comparison_table, runs_table, targets_table, tasks_table
from rsd_trt.eval.table import Measured


def test_tasks_and_all_of_them() -> None:
    results = run("rsd", broken=((1, 1),))
    task = structs.replace(results.task_results[0], task_description="put [red]it[/red] there [/]")
    table = tasks_table(structs.replace(results, task_results=(task, *results.task_results[1:])))
    assert table.title == "libero_spatial, rsd, ort on cuda"
    assert table.rows[0][0] == "0  put [red]it[/red] there [/]"
    assert [row[2] for row in table.rows] == [None, 1, None, 1]
    assert table.rows[-1][1] == Measured(results.final_success_rate, results.final_success_interval, 11)


def test_figures_that_no_run_has_are_no_columns() -> None:
    def heads(*modes: str) -> list[str]:
        return [column.name for column in runs_table({mode: run(mode) for mode in modes}).columns]  # type: ignore[arg-type]

    assert "accepted" not in heads("baseline")
    assert {"accepted", "full queries", "query p50"} <= set(heads("baseline", "rsd"))
    assert "target moved in" not in heads("rsd")


def test_a_verdict_comes_with_its_reason() -> None:
    runs = pair_up([(Path("a"), run("baseline", timing="batched")), (Path("b"), run("rsd", timing="batched"))])
    rows = [row for row in targets_table(runs).rows if row[1] == "speed-up > 1.2x"]
    assert rows == [("rsd", "speed-up > 1.2x", Measured(None, unit="x"), "not measured: batched timing")]


def test_why_there_is_no_comparison() -> None:
    table = comparison_table([("rsd", None, None, "no baseline run is among the results")])
    assert table.rows == (("rsd", "not compared: no baseline run is among the results"),)
