"""A function in a process of its own: its answer, or how it failed to give one."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rsd_trt.isolated import Crashed, call, end_with_parent

PATIENCE = 60.0  # s


class NoException(BaseException):
    """As native bindings raise."""


def answer(a: int, b: int) -> int:
    print("a library that chats on stdout")
    print("and on stderr", file=sys.stderr)
    os.write(1, b"below Python, too")
    return a + b


def segfault() -> None:
    ctypes.string_at(0)


def hang() -> None:
    time.sleep(600)


def leave() -> None:
    os._exit(3)


def begin_late() -> None:
    """Comes to itself when its parent is gone, and then hangs."""
    first = os.getppid()
    print(os.getpid(), flush=True)
    while os.getppid() == first:
        time.sleep(0.01)
    end_with_parent()
    hang()


def complain() -> None:
    raise ValueError("no good")


def panic() -> None:
    raise NoException("worse")


def test_an_answer_comes_back_and_prints_do_not(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(60, answer, 2, b=3) == 5
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "function", "message"),
    [
        (60, segfault, "its process ended: killed by SIGSEGV"),
        (1, hang, "no answer within 1 s"),
        (60, leave, "its process ended: exit code 3"),
        (60, complain, "ValueError: no good"),
        (60, panic, "NoException: worse"),
    ],
)
def test_what_gives_no_answer_says_how(seconds: float, function: object, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(Crashed, match=f"^{message}$"):
        call(seconds, function)  # type: ignore[arg-type]
    assert time.monotonic() - started < PATIENCE


PARENT = """
import multiprocessing, time
from test_isolated import begin_late
multiprocessing.get_context("spawn").Process(target=begin_late).start()
time.sleep(600)
"""


def test_a_process_ends_with_its_parent_even_if_that_went_first() -> None:
    parent = [sys.executable, "-c", PARENT]
    with subprocess.Popen(parent, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        try:
            process.communicate(timeout=PATIENCE)  # its end comes when no process is left that could write
        except subprocess.TimeoutExpired:
            os.kill(child, signal.SIGKILL)
            raise
