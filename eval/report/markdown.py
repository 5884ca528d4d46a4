"""Foreign text in Markdown: shown as it is, whatever it holds."""

from __future__ import annotations

from rsd_trt.eval.report.grids import Grid

SPECIAL = "\\`*_{}[]#~$"
ENTITIES = {"<": "&lt;", ">": "&gt;", "|": "&#124;"}


class Markdown(str):
    """Text that is Markdown already."""


def text(value: object) -> object:
    """Any text on one line, with everything that Markdown or HTML would take for markup made harmless."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    line = " ".join(value.replace("&", "&amp;").split())
    return Markdown("".join(ENTITIES.get(c, f"\\{c}" if c in SPECIAL else c) for c in line))


def table(grid: Grid) -> Markdown:
    """A pipe table."""
    lines = [grid.columns, ("---",) * len(grid.columns), *grid.rows]
    return Markdown("\n".join(f"| {' | '.join(str(text(cell)) for cell in line)} |" for line in lines))


def code(line: str) -> Markdown:
    """A line of a code block, where nothing is markup."""
    return Markdown("    " + " ".join(line.split()))
