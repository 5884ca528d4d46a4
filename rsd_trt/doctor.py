"""Whether this machine can do what a backend needs: every check by itself, with what was found and what to do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from rsd_trt import checks
from rsd_trt.checks import Found
from rsd_trt.isolated import Crashed, call

State = Literal["ok", "note", "broken"]

SECONDS = 120.0  # that a check may take: a first import of a large library from a slow disk takes a while
AT_ONCE = 2  # checks: each that is isolated loads its libraries anew
EVERY = ("torch", "graph", "ort", "trt")
CUDA = ("graph", "trt")


@dataclass(frozen=True)
class Check:
    """`find()` looks; `needed_by` are the backends that cannot do without. An isolated one may hang, abort, or load
    what takes long, and runs in a process of its own."""

    what: str
    find: Callable[[], Found]
    needed_by: tuple[str, ...] = ()
    isolated: bool = False


@dataclass(frozen=True)
class Line:
    """A check's outcome."""

    what: str
    state: Annotated[State, "broken: the backend needs it; note: it does not"]
    found: str
    remedy: Annotated[str | None, "null where none is needed"]
    needed: Annotated[bool, "by the backend"]


def all_checks(backend: str, bundle: Path, engines: Path) -> tuple[Check, ...]:
    """What is looked at, in the order in which it is shown."""
    return (
        Check("Python", checks.python, EVERY),
        Check("PyTorch", checks.pytorch, EVERY, isolated=True),
        Check("NVIDIA driver", checks.driver, CUDA),
        Check("GPU", partial(checks.cuda_gpu, bundle), CUDA, isolated=True),
        Check("ONNX Runtime", checks.onnx_runtime, ("ort",), isolated=True),
        Check("TensorRT", partial(checks.tensorrt, "tensorrt"), isolated=True),
        Check("TensorRT-RTX", partial(checks.tensorrt, "rtx"), isolated=True),
        Check("engines run here", checks.engines_run, ("trt",), isolated=True),
        Check("rendering", checks.rendering, isolated=True),
        Check("LIBERO", checks.libero, isolated=True),
        Check("disk", partial(checks.disk, engines)),
        Check("bundle", partial(checks.bundle, bundle), EVERY, isolated=True),
        Check("exports", partial(checks.exports, backend, bundle, engines), ("ort", "trt"), isolated=True),
    )


def examine(to_check: tuple[Check, ...], backend: str, seconds: float = SECONDS) -> tuple[Line, ...]:
    """Runs the checks. Never raises for what a check meets: that is its line."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return tuple(pool.map(lambda check: _line(check, backend, seconds), to_check))


def _line(check: Check, backend: str, seconds: float) -> Line:
    needed = backend in check.needed_by
    try:
        found = call(seconds, check.find) if check.isolated else check.find()
    except Crashed as error:
        found = Found(str(error), f"see what it prints: {_alone(check)}")
    except Exception as error:  # a check that breaks says nothing of the others
        found = Found(f"{type(error).__name__}: {error}", f"see more: {_alone(check)}")
    state: State = "ok" if found.remedy is None else "broken" if needed else "note"
    return Line(check.what, state, " ".join(found.text.split()), found.remedy, needed)


def _alone(check: Check) -> str:
    """The command that runs one check with all that it prints."""
    function = check.find.func if isinstance(check.find, partial) else check.find
    arguments = ", ".join(map(repr, check.find.args)) if isinstance(check.find, partial) else ""
    call_it = f"checks.{function.__name__}({arguments})"
    path = "from pathlib import PosixPath; " if "PosixPath" in arguments else ""
    return f'python -c "{path}from rsd_trt import checks; print({call_it})"'
