"""The robot's loop and the load test run as their pages say."""

from __future__ import annotations

import json

import pytest
from serving import running, stub_service

from examples.robot import robot
from examples.serving import load


def test_the_robots_loop_runs_and_stops_where_there_is_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    with running(stub_service()) as port:
        robot.main([f"ws://127.0.0.1:{port}", "--mode", "baseline", "--steps", "4"])
        url = f"ws://127.0.0.1:{port}"
    assert capsys.readouterr().out.startswith("step 2: full, 2 actions, ")
    with pytest.raises(Exception, match=f"{url} cannot be reached"):
        robot.main([url, "--mode", "baseline"])


def test_the_load_test_measures(capsys: pytest.CaptureFixture[str]) -> None:
    load.main(["--stub", "--clients", "2", "--queries", "60"])
    found = json.loads(capsys.readouterr().out)
    assert (found["clients"], found["queries"]) == (2, 80)  # without the first 20 of each
    assert 0 < found["p50_ms"] <= found["p99_ms"]
