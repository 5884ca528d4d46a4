"""What a process is started with: streams that are closed or full, names in its environment. One line each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

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


def test_a_name_that_matplotlib_does_not_know(tmp_path: Path) -> None:
    results = synthetic.write(tmp_path / "r.json", synthetic.run("rsd", tasks=(0,), trials=2))
    command = [sys.executable, "-m", "rsd_trt", "report", str(results), "-o", str(tmp_path / "report")]
    environment = {**os.environ, "MPLBACKEND": "nosuch"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    message = "error: MPLBACKEND is 'nosuch': matplotlib does not know it. Unset it, or set it to agg\n"
    assert (done.returncode, done.stderr) == (1, message)
