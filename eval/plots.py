"""What all charts share: their colours, and the package that draws them."""

from __future__ import annotations

from rsd_trt.errors import missing_extra

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's palette


def can_plot() -> bool:
    """Whether charts can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def check_plots() -> None:
    """Raises UserError unless charts can be drawn: to be called before what they show is measured."""
    if not can_plot():
        raise missing_extra("matplotlib", "report")
