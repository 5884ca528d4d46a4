"""What all charts share: their colours, and the package that draws them."""

from __future__ import annotations

import os

from rsd_trt.errors import UserError, missing_extra

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's palette


def can_plot() -> bool:
    """Whether charts can be drawn.

    Raises:
        UserError: MPLBACKEND names nothing that matplotlib knows, which keeps it from being imported.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    except ValueError:
        backend = os.environ.get("MPLBACKEND")
        raise UserError(
            f"MPLBACKEND is {backend!r}: matplotlib does not know it", "Unset it, or set it to agg"
        ) from None
    return True


def check_plots() -> None:
    """Raises UserError unless charts can be drawn: to be called before what they show is measured."""
    if not can_plot():
        raise missing_extra("matplotlib", "report")
