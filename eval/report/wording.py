"""Numbers in words: the same digits and units on the terminal, in the report and in its conclusion."""

from __future__ import annotations

from collections.abc import Sequence

from rsd_trt.eval.statistics import Interval

ABSENT = "-"


def number(value: float | None, unit: str = "") -> str:
    """With three digits or so; `%` takes a share. `-` for None."""
    if value is None:
        return ABSENT
    if unit == "%":
        return f"{value:.1%}"
    if unit == "x":
        return f"{value:.2f}x"
    if not unit and value == int(value):
        return f"{value:,.0f}"
    digits = 2 if abs(value) < 100 else 1
    return f"{value:,.{digits}f} {unit}".strip()


def interval(bounds: Interval | None, unit: str = "") -> str:
    """`87.4% to 92.7%`."""
    return ABSENT if bounds is None else f"{number(bounds[0], unit)} to {number(bounds[1], unit)}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def signed(value: float) -> str:
    """`+0.50`, `-0.25`, and no minus before what rounds to zero."""
    return f"{round(value, 2) + 0.0:+.2f}"
