"""A function in a process of its own, with a time limit: what it breaks, hangs or prints stays there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Crashed(Exception):
    """The function gave no answer: it raised, ran out of time, or took its process down. Says which."""


def call(seconds: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args, **kwargs)`, all of it picklable, in a new process that is gone when this returns.

    Raises:
        Crashed: there is no answer, or none within so many seconds.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share CUDA's and GL's state
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, function, args, kwargs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise Crashed(f"no answer within {seconds:g} s")
        value: T
        value, problem = ours.recv()
    except (EOFError, OSError):
        process.join()
        raise Crashed(f"its process ended: {_how(process.exitcode)}") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if problem is not None:
        raise Crashed(problem)
    return value


def _serve(connection: Connection, function: Callable[..., object], args: tuple[object, ...], kwargs: object) -> None:
    """The child: what libraries print goes nowhere, since stdout is for results."""
    end_with_parent()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        connection.send((function(*args, **kwargs), None))  # type: ignore[arg-type]
    except BaseException as error:  # native bindings raise what is no Exception, too
        connection.send((None, f"{type(error).__name__}: {error}"))


def end_with_parent() -> None:
    """For a process that multiprocessing began: kills it once its parent is gone, whatever it is at and even if the
    parent went first. What hangs would stay for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a process that multiprocessing did not begin"

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
