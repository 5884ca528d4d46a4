"""Streams that are closed or full: one line, and no file of ours in their place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAID = {
    ">&-": (1, "error: stdout is closed, and results go there. Without them: > /dev/null"),
    ">/dev/full": (1, "error: stdout cannot be written: No space left on device"),
    "<&-": (0, ""),
    "2>&-": (0, ""),
}


@pytest.mark.parametrize("redirection", SAID)
def test_a_stream_that_is_not_there(redirection: str, tiny_bundle: Path) -> None:
    code, message = SAID[redirection]
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m rsd_trt info '{tiny_bundle}' {redirection}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert len(done.stderr.strip().splitlines()) <= 1
    assert bool(done.stdout) == (code == 0)
