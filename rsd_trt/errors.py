"""The errors that a user can mend. Everything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One line that names the thing, both values and the remedy. The CLI prints it and exits with 1."""


class Unavailable(UserError):
    """This machine cannot do it: a package, a provider or a GPU is missing. Nothing is wrong with the user's files."""


class PolicyFault(UserError):
    """The policy produced something that must not reach a robot (NaN, infinity). Ends that episode."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest option, else the list of all options."""
    names = sorted(options)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f" (one of: {', '.join(names)})"


def missing_extra(package: str, extra: str) -> Unavailable:
    """The error for an optional dependency that is not installed."""
    return Unavailable(f"{package} is not installed. Install it: pip install 'rsd-trt[{extra}]'")
