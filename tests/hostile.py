"""What a reader may do with a hostile file: one line that says what is wrong, or success. No other exception, no hang,
no memory out of proportion, and nothing executed. Tests import `told` too: it counts the inputs."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rsd_trt.errors import UserError

SECONDS = 20  # of an input
# Bytes of memory, over all inputs of a kind. The files are small; what grows without them is hypothesis, and pages of
# libraries that the kernel had dropped.
GROWTH = 512 << 20

TRIED: Counter[str] = Counter()
ARMED: list[str] = []  # the kind of file that is being read
EXECUTED: list[str] = []
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if ARMED and event in FORBIDDEN:
        EXECUTED.append(f"{ARMED[0]}: {event} {arguments}")


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def told(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Counts the inputs, for the end of the run: see conftest. On one thread: with tiny parts, more of them only wait
    for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    record_property("hostile inputs", dict(TRIED))
    TRIED.clear()


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(kind: str, read: Callable[[], object]) -> None:
    """Reads: a UserError of one line, or success."""
    TRIED[kind] += 1
    ARMED.append(kind)
    try:
        with within(SECONDS):
            read()
    except UserError as error:
        message = str(error)
        assert "\n" not in message and message.isprintable(), f"{message!r} is not one line"
        assert len(message) < 3000, f"{len(message)} characters: {message[:100]}"
    finally:
        ARMED.clear()
    assert not EXECUTED


def memory(anew: bool = False) -> int:
    """The most bytes that this process ever held; `anew`: counted from here on."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def try_all(kind: str, hostile: st.SearchStrategy[bytes], read: Callable[[bytes], object], examples: int) -> None:
    """Tries so many inputs, always the same."""

    @settings(
        max_examples=examples,
        phases=[Phase.generate],  # shrinking would run what hangs again and again
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        database=None,
    )
    @given(hostile)
    def each(data: bytes) -> None:
        attempt(kind, lambda: read(data))

    before = memory(anew=True)
    each()
    assert memory() - before < GROWTH
