"""One table, shown on a terminal of any width, as HTML and as Markdown."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rsd_trt.eval.table import Column, Measured, Table, Value, interval, number

COLUMNS = (
    Column("what"),
    Column("backend", rank=1),
    Column("p50", "ms"),
    Column("worst of all inputs", "error", rank=2),
    Column("success", "%"),
    Column("result", "verdict"),
)
ROWS: tuple[tuple[Value, ...], ...] = (
    ("accepted query", "trt", 602.8, 1.1e-05, Measured(0.945, (0.904, 0.969), 200), "passed"),
    ("a|b <i>*x*</i> [red]", "ort", 0.0412, 0.25, Measured(None), "FAILED"),
)
NUMBERS = ("602.8", "1.1e-05", "0.041", "0.25", "94.5% of 200 (90.4 to 96.9)")


def terminal(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "ms", "-"),
        (1234, "", "1,234"),
        (2.5, "", "2.50"),
        (0.0412, "ms", "0.041"),
        (12.345, "ms", "12.35"),
        (1602.83, "ms", "1,602.8"),
        (0.945, "%", "94.5%"),
        (0.00012, "rate", "0.012%"),
        (1.314, "x", "1.31x"),
        (1.14e-05, "error", "1.1e-05"),
        (-1.5, "points", "-1.5"),
        (-0.001, "signed", "+0.00"),
        (0.9999991, "cosine", "0.999999"),
    ],
)
def test_a_number_is_written_by_its_unit(value: float | None, unit: str, shown: str) -> None:
    assert number(value, unit) == shown


def test_an_interval_says_its_unit_once() -> None:
    assert interval((0.904, 0.969), "%") == "90.4 to 96.9"
    assert interval((1.1, 1.4), "x") == "1.10 to 1.40"
    assert interval(None) == "-"


def test_a_wide_terminal_shows_every_column() -> None:
    text = terminal(Table("Latency", COLUMNS, ROWS, "a note"), 160)
    for shown in ("Latency", "p50, ms", "a note", *NUMBERS, "a|b <i>*x*</i> [red]"):
        assert shown in text


@pytest.mark.parametrize("width", range(40, 161, 5))
def test_no_width_cuts_or_wraps_a_number(width: int) -> None:
    lines = terminal(Table("Latency", COLUMNS, ROWS), width).splitlines()
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "…" not in text
    dropped = " ".join(lines).split("no room for: ")[1:]
    for shown in NUMBERS:
        assert shown in text or (dropped and shown in ("1.1e-05", "0.25"))


def test_the_least_important_column_goes_first_and_is_named() -> None:
    text = terminal(Table("Latency", COLUMNS, ROWS), 82)
    assert "no room for: worst of all inputs" in text
    assert "trt" in text


def test_a_table_without_columns_to_spare_is_stacked() -> None:
    lines = terminal(Table("Latency", COLUMNS, ROWS), 40).splitlines()
    assert lines[:4] == ["Latency", "accepted query", "  backend: trt", "  p50, ms: 602.8"]


def test_a_group_is_named_once() -> None:
    table = Table("", (Column("way"), Column("stage")), (("eager", "a"), ("eager", "b"), ("graph", "a")), grouped=True)
    assert terminal(table, 80).count("eager") == 1
    assert table.markdown().count("eager") == 2


def test_html_escapes_and_marks_numbers_and_verdicts() -> None:
    page = Table("L & R", COLUMNS, ROWS).__html__()
    assert "<caption>L &amp; R</caption>" in page
    assert "a|b &lt;i&gt;*x*&lt;/i&gt; [red]" in page
    assert '<td class="number" data-label="p50, ms">602.8</td>' in page
    assert '<td class="good" data-label="result">passed</td>' in page
    assert '<td class="bad" data-label="result">FAILED</td>' in page


def test_markdown_has_a_row_a_line_and_as_many_cells() -> None:
    lines = Table("Latency", COLUMNS, ROWS).markdown().splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [7] * 4
    assert lines[1] == "| --- | --- | --: | --: | --: | --- |"
    assert lines[3].startswith(r"| a&#124;b &lt;i&gt;\*x\*&lt;/i&gt; \[red\] |")


def test_a_row_has_a_value_for_each_column() -> None:
    with pytest.raises(ValueError, match="1 values for 2 columns"):
        Table("", (Column("a"), Column("b")), (("x",),))
