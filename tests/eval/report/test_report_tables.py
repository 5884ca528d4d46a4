"""What the tables of results hold."""

from __future__ import annotations

from pathlib import Path

from msgspec import structs
from synthetic import outcome, run

from rsd_trt.eval.report.answer import answer
from rsd_trt.eval.report.cost import Price
from rsd_trt.eval.report.runs import pair_up
from rsd_trt.eval.report.tables import counts_table, matrix, rivals_table, tasks_table
from rsd_trt.eval.results import Results
from rsd_trt.eval.table import Measured, Table

PRICE = Price(0.2, 2.0, "ms", "made up")


def test_tasks_and_all_of_them() -> None:
    results = run("rsd", broken=((1, 1),))
    task = structs.replace(results.task_results[0], task_description="put [red]it[/red] there [/]")
    table = tasks_table(structs.replace(results, task_results=(task, *results.task_results[1:])))
    assert table.title == "libero_spatial, rsd, ort on cuda"
    assert table.rows[0][0] == "0  put [red]it[/red] there [/]"
    assert [row[2] for row in table.rows] == [None, 1, None, 1]
    assert table.rows[-1][1] == Measured(results.final_success_rate, results.final_success_interval, 11)


def named(table: Table, row: int = 0) -> dict[str, object]:
    return {column.name: value for column, value in zip(table.columns, table.rows[row], strict=True)}


def matrix_of(*runs: Results, price: Price = PRICE) -> Table:
    return matrix(pair_up([(Path(str(i)), results) for i, results in enumerate(runs)], price, 220), price)


def test_counts_are_per_action() -> None:
    results = run("rsd")
    found = named(counts_table(results))
    assert found["checks per action"] == results.checks / results.steps
    assert "accepted" not in named(counts_table(run("baseline")))
    assert not counts_table(run("rsd", change=lambda e: structs.replace(e, steps=0, queries=()))).rows[0][0]


def test_a_row_of_the_matrix() -> None:
    rsd = run("rsd", change=outcome((0, 0)))
    table = matrix_of(run("baseline", n_action_steps=1), run("baseline", n_action_steps=8, success=-1), rsd)
    found = named(table, 2)
    assert found["run"] == "3: rsd, n = 4"
    assert found["cost per action"] == (rsd.checks * 0.2 + rsd.full_queries * 2.0) / rsd.steps
    assert str(found["verdict"]).startswith("no open loop costs as little")
    assert named(table)["verdict"] is None
    assert "condition" not in found and "clipped steps" not in found


def test_verdicts() -> None:
    def verdict(*others: Results, **price: float) -> object:
        made = Price(price.get("check", 0.2), 2.0, "ms", "made up")
        table = matrix_of(*others, run("rsd"), price=made)
        return named(table, len(others))["verdict"]

    assert verdict() == "not compared"
    assert verdict(run("baseline", n_action_steps=1)) == "no open loop costs as little"
    assert verdict(run("baseline"), check=20.0) == "not shown; 96 episodes of 24 tasks would"
    many = {"tasks": tuple(range(10))}
    table = matrix_of(run("baseline", success=-1, **many), run("rsd", **many), price=Price(20.0, 2.0, "ms", ""))  # type: ignore[arg-type]
    assert str(named(table, 1)["verdict"]).startswith("above (p = ")


def test_conditions_are_a_column_where_there_are_several() -> None:
    table = matrix_of(run("baseline"), run("baseline", perturb="late:7"))
    assert [row[:2] for row in table.rows] == [
        ("unperturbed", "1: open loop, n = 4"),
        ("late:7", "2: open loop, n = 4"),
    ]
    assert table.grouped
    assert "cost per action" not in [
        c.name for c in matrix_of(run("baseline"), price=Price(0, 1, "full queries", "")).columns
    ]


def test_why_there_is_no_comparison() -> None:
    table = rivals_table(pair_up([(Path("a"), run("rsd"))]))
    assert table.rows == (("1: rsd, n = 4", "not compared: no run of open loop is among the results"),)


def test_the_answer_claims_what_both_tests_show_and_says_what_else_would_take() -> None:
    def answered(*runs: Results, check: float = 0.2) -> tuple[str, str, list[str]]:
        price = Price(check, 2.0, "ms", "made up")
        found = answer(pair_up([(Path(str(i)), one) for i, one in enumerate(runs)], price, 220), price)
        return found.verdict, found.style, [figure.name for figure in found.figures]

    many = {"tasks": tuple(range(10))}
    always, never = {"success": 2.0, **many}, {"success": -1.0, **many}
    verdict, style, figures = answered(run("baseline", **never), run("rsd", **always), check=20.0)  # type: ignore[arg-type]
    assert (verdict.startswith("RSD succeeds more often"), style) == (True, "good")
    assert figures[1:3] == ["points beside the best open loop", "cost per action, ms"] and len(figures) == 4
    verdict, style, _ = answered(run("baseline", **always), run("rsd", **never), check=20.0)  # type: ignore[arg-type]
    assert (verdict.startswith("RSD succeeds less often"), style) == (True, "bad")
    verdict, style, _ = answered(run("baseline"), run("rsd"), check=20.0)
    assert "RSD is not shown" in verdict and " episodes of " in verdict and style == "open"
    assert answered(run("baseline"), run("rsd"))[0].startswith("No run of open loop costs as little as RSD: ")
    assert answered(run("rsd"))[0] == "Not compared: no run of open loop is among the results."
    assert answered(run("baseline"))[0].startswith("Nothing is claimed")
