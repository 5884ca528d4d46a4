"""Tables show foreign text as it is, and every figure."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from synthetic import run

from rsd_trt.eval.report.compare import FIGURES, figures
from rsd_trt.eval.report.runs import pair_up
from rsd_trt.tables import figures_table, summary_table, targets_table


def printed(table: RenderableType) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_summary_table() -> None:
    results = run("rsd", broken=((1, 1),))
    task = dataclasses.replace(results.task_results[0], task_description="put [red]it[/red] there [/]")
    shown = printed(summary_table(dataclasses.replace(results, task_results=(task, *results.task_results[1:]))))
    assert "put [red]it[/red] there [/]" in shown
    assert "libero_spatial, rsd, ort on cuda" in shown
    assert "1 errors" in shown
    assert f"{results.total_successes}/11" in shown


@pytest.mark.parametrize("mode", ["baseline", "rsd", "shadow"])
def test_figures_table_has_every_figure(mode: str) -> None:
    shown = printed(figures_table({"[a]": figures(run(mode))}))  # type: ignore[arg-type]
    assert "[a]" in shown
    assert all(figure.label in shown for figure in FIGURES.values())


def test_targets_table() -> None:
    paired = pair_up([(Path("a"), run("baseline", timing="batched")), (Path("b"), run("rsd", timing="batched"))])
    shown = printed(targets_table(paired))
    assert "speed-up > 1.2x" in shown
    assert "not measured (batched timing)" in shown
