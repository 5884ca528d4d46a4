"""A matplotlib figure as an image in a page, readable on light and dark, or as a picture of its own."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#747c84"  # of text and axes: in contrast to a white page as much as to a dark one
WIDTH = 4.4  # inches; on a phone of 390 px the text keeps its size
PNG_DPI = 160


@dataclass(frozen=True)
class Chart:
    """An SVG file as matplotlib writes it, and in words what it shows."""

    svg: bytes
    caption: str

    def __html__(self) -> str:
        """A `<figure>` that holds the file."""
        source = f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"
        caption = html.escape(self.caption)
        return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def shared_legend(figure: Figure, columns: int) -> None:
    """Of all axes, above them, where it covers nothing."""
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    shown = {label: handle for handle, label in pairs}
    figure.legend(
        list(shown.values()), list(shown), loc="outside upper center", ncols=columns, frameon=False, fontsize=8
    )


def draw_chart(name: str, draw: Callable[[Figure], None], height: float, caption: str) -> Chart:
    """Draws on a transparent figure of `height` inches. name: tells a page's charts apart."""
    stream = io.BytesIO()
    with _figure(name, draw, WIDTH, height) as figure:
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return Chart(stream.getvalue(), caption)


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
            "grid.alpha": 0.25,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 10,
            "svg.fonttype": "none",  # text as text: small, and in a font that the reader has
            "svg.hashsalt": name,  # the same ids at each run
        }
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        yield figure
