"""`rsd-trt serve` and `rsd-trt edge` as commands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from command import rsd_trt

from rsd_trt.presets import initialise
from rsd_trt.runtime.serve.edge import EdgePolicy

COMMAND = [sys.executable, "-c", "from rsd_trt.cli import main; main(prog_name='rsd-trt')"]


def test_a_bundle_is_served_from_the_command_line_and_asked_from_it(tiny_bundle: Path) -> None:
    arguments = ["serve", str(tiny_bundle), "--device", "cpu", "--port", "0", "--instruction", "go"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        url = line.split()[1]
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(url.replace("ws:", "http:") + "/readyz", timeout=5)
                break
            except OSError:
                assert time.monotonic() < end
                assert server.poll() is None
                time.sleep(0.2)
        asked = rsd_trt("edge", url, "--mode", "baseline", "-n", "3", "--json")
        assert asked.exit_code == 0, asked.output
        told = json.loads(asked.stdout)
        assert told["policy"] == "tiny"
        assert 0 < told["of that, in the server"]["p50_ms"] <= told["full query"]["p50_ms"]
        with EdgePolicy(url, mode="baseline") as policy:
            assert policy.n_action_steps == 4
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=30)
    assert server.returncode == 0
    assert errors.splitlines() == ["stopped: everybody was answered"]


def test_requests_that_were_cut_off_are_told(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsd_trt.runtime.serve.server.serve", lambda *_: (True, 2))
    done = rsd_trt("serve", tiny_bundle, "--port", "0")
    assert (done.exit_code, done.stderr) == (1, "stopped: 2 not answered\n")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("serve", "nothing"), 1, "there is no folder nothing"),
        (("serve", "--replay", "nothing"), 1, "holds no recordings"),
        (("serve", "--replay", "x", "--record", "y"), 2, "leave one of them out"),
        (("serve", "--host", "192.0.2.1", "--port", "1"), 1, "192.0.2.1:1 cannot be listened on"),
        (("serve", "--n-action-steps", "99"), 1, "--n-action-steps is 99; a chunk of reference has 1..16 steps"),
        (("serve", "--mode", "shadow"), 2, "'shadow' is unknown"),
        (("edge", "ws://127.0.0.1:9", "--timeout", "1"), 1, "ws://127.0.0.1:9 cannot be reached"),
        (("edge", "no url"), 1, "no url cannot be reached"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: tuple[str, ...], code: int, told: str) -> None:
    done = rsd_trt(*arguments)
    assert done.exit_code == code, done.output
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bundle_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    bundle = initialise(tmp_path / "tiny", "tiny", seed=0).path
    (bundle / "head.safetensors").write_bytes(b"no")
    done = rsd_trt("serve", bundle, "--device", "cpu", "--port", "0")
    assert done.exit_code == 1
    assert "head.safetensors" in done.stderr
