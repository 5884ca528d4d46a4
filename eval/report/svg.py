"""A matplotlib figure as an SVG element of a page, readable on light and dark, or as a picture of its own."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # a colour that nothing else has: it becomes the page's own
WIDTH = 4.4  # inches; on a phone of 390 px the text keeps its size
PNG_DPI = 160


@dataclass(frozen=True)
class Chart:
    """An SVG element, and in words what it shows."""

    svg: str
    caption: str


def legend(axes: Axes, columns: int) -> None:
    """Above the axes, where it covers nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)


def draw_chart(name: str, draw: Callable[[Figure], None], height: float, caption: str) -> Chart:
    """Draws on a transparent figure of `height` inches, and makes the SVG one that can stand in a page."""
    stream = io.StringIO()
    with _figure(name, draw, WIDTH, height) as figure:
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return Chart(_inline(stream.getvalue(), caption), caption)


def draw_png(name: str, draw: Callable[[Figure], None], width: float, height: float) -> bytes:
    """Draws on a white figure of these inches, for where no page gives it its colours."""
    stream = io.BytesIO()
    with _figure(name, draw, width, height) as figure:
        figure.savefig(stream, format="png", dpi=PNG_DPI)
    return stream.getvalue()


@contextmanager
def _figure(name: str, draw: Callable[[Figure], None], width: float, height: float) -> Iterator[Figure]:
    """A drawn figure in the report's style, which holds while it is saved, too."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {
            "text.parse_math": False,  # names of runs are shown as they are
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": INK,
            "grid.alpha": 0.15,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 10,
            "svg.fonttype": "none",
            "svg.hashsalt": name,  # ids are the same at each run, and differ between the charts of a page
        }
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        yield figure


def _inline(svg: str, label: str) -> str:
    """A matplotlib SVG as an element of an HTML page: no prologue, metadata or namespaces, and the page's colour."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)  # the page's
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups, and their ids are the same in each chart
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()
