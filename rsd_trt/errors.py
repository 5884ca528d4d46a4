"""The errors that a user can mend. Everything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from collections.abc import Iterable

# What people call our backends.
OTHERWISE = {"tensorrt": "trt", "onnx": "ort", "onnxruntime": "ort", "pytorch": "torch", "cuda": "graph"}
MOST_SHOWN = 400  # characters of a library's error
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlist, _SHOWN.maxdict = 3, 200, 200, 12, 12


class UserError(Exception):
    """One line that names the thing, both values and the remedy. The CLI prints it and exits with 1.

    `remedy` is a sentence without its full stop; None where the message says itself what to do.
    """

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message, remedy)
        self.message, self.remedy = message, remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}. {self.remedy}"


class Unavailable(UserError):
    """This machine cannot do it: a package, a provider or a GPU is missing. Nothing is wrong with the user's files."""


class PolicyFault(UserError):
    """The policy produced something that must not reach a robot (NaN, infinity). Ends that episode."""


def reason(error: BaseException) -> str:
    """What a library's error says: one short line that can be printed, though it may quote a hostile file. Of an error
    about a file, without its name."""
    told = error.strerror if isinstance(error, OSError) and error.filename is not None else None
    text = " ".join((told or str(error)).split())[:MOST_SHOWN] or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value that came from a file, for a message: short, on one line, whatever it is."""
    return _SHOWN.repr(value)


def named(key: object) -> str:
    """A key that came from a file, for a message: as it is, if that is short and can be printed."""
    text = str(key)
    return text if text.isprintable() and len(text) <= 80 else shown(text)


def did_you_mean(name: object, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest option, else the list of all options. name: whatever was given for one."""
    names, name = sorted(options), str(name)
    close = [OTHERWISE[name]] if OTHERWISE.get(name) in names else difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f" (one of: {', '.join(names)})"


def missing_extra(package: str, extra: str) -> Unavailable:
    """The error for an optional dependency that is not installed."""
    return Unavailable(f"{package} is not installed", f"Install it: {installing(extra)}")


def installing(*extras: str) -> str:
    """The command that brings one of `extras`, from an index and in a clone."""
    index, clone = (" or ".join(f"'{name}[{extra}]'" for extra in extras) for name in ("rsd-trt", "."))
    return f"pip install {index}, or in a clone pip install -e {clone}"


def out_of_memory(error: BaseException) -> UserError | None:
    """What PyTorch says when a GPU's memory is full, as one line: what was asked for and what is free, if it says so.
    None for any other error."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    free = re.search(r"([\d.]+ \w+) (?:is )?free", str(error))
    facts = [f"{wanted[1]} more were needed" if wanted else "", f"{free[1]} are free" if free else ""]
    told = ", ".join(filter(None, facts))
    return UserError(
        f"the GPU's memory is full{': ' * bool(told)}{told}",
        "End what else uses it (nvidia-smi), or take fewer --workers, a smaller --batch, or --device cpu",
    )


def require(holds: bool, message: str) -> None:
    """Raises UserError unless it holds."""
    if not holds:
        raise UserError(message)
