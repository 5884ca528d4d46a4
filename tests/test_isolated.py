"""A function in a process of its own: its answer, or how it failed to give one."""

from __future__ import annotations

import ctypes
import os
import sys
import time

import pytest

from rsd_trt.isolated import Crashed, call


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
    assert time.monotonic() - started < 60
