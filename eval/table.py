"""A table: columns with units, rows of values, and three ways to show it: on a terminal, as HTML and as Markdown.

    table = Table("Latency", (Column("what"), Column("p50", "ms"), Column("speed-up", "x")), rows)
    console.print(table)    # rich: as wide as the terminal
    {{ table }}             # jinja, autoescaped
    table.markdown()

A row holds values, not text: a number is formatted here and nowhere else, by the unit of its column.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table as RichTable

ABSENT = "-"
LONGEST_WORD = 28  # characters of a word that a text column is widened for; a longer one is folded
NARROWEST_TEXT = 12  # characters a line of a text column whose texts are longer
SPECIAL = "\\`*_{}[]#~$"
ENTITIES = {"<": "&lt;", ">": "&gt;", "|": "&#124;"}

STYLES = {  # what a cell of a `verdict` column begins with -> (rich's style, the class in HTML)
    **dict.fromkeys(("met", "ok", "passed", "fresh", "above"), ("green", "good")),
    **dict.fromkeys(("not met", "broken", "failed", "below"), ("bold red", "bad")),
    **dict.fromkeys(("not proved", "note", "not shown", "odd"), ("yellow", "open")),
}


def _plain(x: float) -> str:
    return f"{x:,.0f}" if x == int(x) else f"{x:,.2f}" if abs(x) < 100 else f"{x:,.1f}"


def _time(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}" if abs(x) < 100 else f"{x:,.1f}"


# The unit or kind of a column's numbers -> how one is written. Those of `IN_HEAD` stand in the column's head.
UNITS: dict[str, Callable[[float], str]] = {
    "": _plain,
    "%": lambda x: f"{x:.1%}",  # of a share, 0..1
    "rate": lambda x: f"{x:.3%}",  # a share of what is rare
    "x": lambda x: f"{x:.2f}x",
    "ms": _time,
    "s": lambda x: f"{x:,.1f}",
    "MB": lambda x: f"{x:,.1f}",
    "GB/s": lambda x: f"{x:,.0f}",
    "GFLOP": lambda x: f"{x:,.1f}",
    "TFLOP/s": lambda x: f"{x:,.3g}",
    "error": lambda x: f"{x:.2g}",
    "p": lambda x: f"{x:.2g}",
    "cosine": lambda x: f"{x:.6f}",
    "ratio": lambda x: f"{x:.3f}",
    "steps": lambda x: f"{x:.1f}",
    "points": lambda x: f"{x:+.1f}",
    "signed": lambda x: f"{round(x, 2) + 0.0:+.2f}",  # no minus before what rounds to zero
}
IN_HEAD = ("ms", "s", "MB", "GB/s", "GFLOP", "TFLOP/s")


def number(value: float | None, unit: str = "") -> str:
    """A number as every table shows it; `-` for None."""
    return ABSENT if value is None else UNITS[unit](value)


def interval(bounds: tuple[float, float] | None, unit: str = "") -> str:
    """`87.4 to 92.7`; `-` for None."""
    return ABSENT if bounds is None else " to ".join(number(bound, unit).rstrip("%x") for bound in bounds)


@dataclass(frozen=True)
class Measured:
    """A number with its 95% interval, and of how many: `94.5% of 200 (90.4 to 96.9)`. unit: if not its column's."""

    value: float | None
    interval: tuple[float, float] | None = None
    n: int | None = None
    unit: str | None = None


Value = str | float | bool | Measured | None  # an int is a float to the type checker


@dataclass(frozen=True)
class Column:
    """unit: a key of `UNITS`, or `text` or `verdict`; "": text is set to the left, numbers to the right.
    rank: on a narrow terminal, columns above 0 are left out, those of the highest first."""

    name: str
    unit: str = ""
    rank: int = 0

    @property
    def head(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit in IN_HEAD else self.name


@dataclass(frozen=True)
class Table:
    """Each row has a value for each column. grouped: on a terminal a line is drawn where the first column changes, and
    what it repeats is left out. headless: columns without names: names and values."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""
    grouped: bool = field(default=False, kw_only=True)
    headless: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of {self.title!r} has {len(row)} values for {len(self.columns)} columns: {row}"
                )

    def __bool__(self) -> bool:
        """Whether it has rows."""
        return bool(self.rows)

    def cell(self, row: Sequence[Value], index: int) -> str:
        """The text of a value."""
        return _text(row[index], self.columns[index].unit)

    def numeric(self, index: int) -> bool:
        """Whether a column holds numbers: it has a unit, or nothing but numbers."""
        if self.columns[index].unit:
            return self.columns[index].unit in UNITS
        values = [row[index] for row in self.rows if row[index] is not None]
        return bool(values) and not any(isinstance(value, (str, bool)) for value in values)

    # A terminal

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As a table where it fits, without its less important columns where that helps, and else a row below the
        other as `name: value`. No number is cut or wrapped."""
        from rich.markup import escape

        shown = list(range(len(self.columns)))
        ranks = sorted({column.rank for column in self.columns} - {0})
        while (widths := self._widths(shown, options.max_width)) is None and ranks:
            least = ranks.pop()
            shown = [i for i in shown if self.columns[i].rank != least]
        if widths is None:
            yield from self._stacked()
        else:
            yield self._rich(widths)
            if dropped := [column.name for i, column in enumerate(self.columns) if i not in shown]:
                yield f"[dim]no room for: {escape(', '.join(dropped))}[/]"
        if self.note:
            yield f"[dim]{escape(self.note)}[/]"

    def _widths(self, shown: Sequence[int], room: int) -> dict[int, int] | None:
        """Characters of each column, as wide as there is room for; None where not even its numbers and words fit."""
        least, most = zip(*map(self._least_and_most, shown), strict=True)
        widths = dict(zip(shown, least, strict=True))
        spare = room - 1 - sum(width + 3 for width in widths.values())
        if spare < 0:
            return None
        while spare and (narrow := [i for i, full in zip(shown, most, strict=True) if widths[i] < full]):
            for i in narrow[:spare]:
                widths[i] += 1
                spare -= 1
        return widths

    def _least_and_most(self, index: int) -> tuple[int, int]:
        """Characters that a column needs for all of its numbers, or the longest word of its texts, and that of its
        head; and those at which nothing is wrapped."""
        from rich.cells import cell_len

        cells = [self.cell(row, index) for row in self.rows]
        head = "" if self.headless else self.columns[index].head
        most = max(map(cell_len, [*cells, head]), default=0)
        words = head.split() + (cells if self.numeric(index) else [word for cell in cells for word in cell.split()])
        least = max(map(cell_len, words), default=0)
        if self.numeric(index):
            return least, most
        return max(min(least, LONGEST_WORD), min(most, NARROWEST_TEXT)), most

    def _rich(self, widths: Mapping[int, int]) -> RichTable:
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title) or None, title_justify="left", show_header=not self.headless)
        for i, width in widths.items():
            right = self.numeric(i)
            head = escape(self.columns[i].head)
            table.add_column(head, justify="right" if right else "left", width=width, overflow="fold")
        before: str | None = None
        for row in self.rows:
            cells = [self._styled(row, i) for i in widths]
            first = cells[0]
            if self.grouped and first != before:
                table.add_section()
            if self.grouped and first == before:
                cells[0] = ""
            before = first
            table.add_row(*cells)
        return table

    def _stacked(self) -> Iterator[str]:
        from rich.markup import escape

        if self.title:
            yield f"[italic]{escape(self.title)}[/]"
        for row in self.rows:
            yield f"[bold]{self._styled(row, 0)}[/]"
            for i in range(1, len(self.columns)):
                if row[i] is not None:
                    name = escape(self.columns[i].head)
                    yield f"  [dim]{name}:[/] {self._styled(row, i)}" if name else f"  {self._styled(row, i)}"

    def _styled(self, row: Sequence[Value], index: int) -> str:
        from rich.markup import escape

        text = escape(self.cell(row, index))
        style = _style(text) if self.columns[index].unit == "verdict" else None
        return f"[{style[0]}]{text}[/]" if style else text

    # Pages

    def __html__(self) -> str:
        """A `<table>` in a box that scrolls; each cell says its column, so that a phone can show a row as a card. Of a
        grouped one the first column becomes a line above its rows."""
        shown = range(int(self.grouped), len(self.columns))
        kind = "names" if self.headless else "cards" if len(shown) > 3 else "plain"
        title = f"<caption>{html.escape(self.title)}</caption>\n" if self.title else ""
        heads = "".join(f"<th{self._class(i)}>{html.escape(self.columns[i].head)}</th>" for i in shown)
        head = "" if self.headless else f"<thead><tr>{heads}</tr></thead>\n"
        rows, before = [], None
        for row in self.rows:
            if self.grouped and (first := self.cell(row, 0)) != before:
                rows.append(f'<tr class="group"><th colspan="{len(shown)}">{html.escape(first)}</th></tr>')
                before = first
            rows.append(f"<tr>{''.join(self._html_cell(row, i) for i in shown)}</tr>")
        note = f'\n<p class="faint">{html.escape(self.note)}</p>' if self.note else ""
        table = f'<table class="{kind}">\n{title}{head}<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table>'
        return f'<div class="wide">{table}</div>{note}'

    def _html_cell(self, row: Sequence[Value], index: int) -> str:
        text, column = self.cell(row, index), self.columns[index]
        style = _style(text) if column.unit == "verdict" else None
        labelled = index > self.grouped and not self.headless and row[index] is not None
        label = f' data-label="{html.escape(column.head)}"' if labelled else ""
        return f"<td{self._class(index, style[1] if style else '')}{label}>{html.escape(text)}</td>"

    def _class(self, index: int, more: str = "") -> str:
        found = " ".join(filter(None, ("number" if self.numeric(index) else "", more)))
        return f' class="{found}"' if found else ""

    def markdown(self) -> str:
        """A pipe table."""
        columns = range(len(self.columns))
        lines = [
            [markdown_text(column.head) for column in self.columns],
            ["--:" if self.numeric(i) else "---" for i in columns],
            *([markdown_text(self.cell(row, i)) for i in columns] for row in self.rows),
        ]
        pipes = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{pipes}\n\n{markdown_text(self.note)}" if self.note else pipes


def markdown_text(text: str) -> str:
    """Any text on one line of Markdown, with all that Markdown or HTML would take for markup made harmless."""
    line = " ".join(text.replace("&", "&amp;").split())
    return "".join(ENTITIES.get(c, f"\\{c}" if c in SPECIAL else c) for c in line)


def _text(value: Value, unit: str) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Measured):
        unit = unit if value.unit is None else value.unit
        of = "" if value.n is None else f" of {value.n:,}"
        bounds = "" if value.interval is None else f" ({interval(value.interval, unit)})"
        return f"{number(value.value, unit)}{of}{bounds}" if value.value is not None else ABSENT
    return number(value, unit)


def _style(text: str) -> tuple[str, str] | None:
    """Of the longest beginning that has one."""
    begun = [start for start in STYLES if text.lower().startswith(start)]
    return STYLES[max(begun, key=len)] if begun else None
