"""Runs that are stopped, killed, out of disk or started twice: nothing is lost, and they go on where they were."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles import lines

DRIVE = Path(__file__).parents[1] / "drive.py"
NAME = "libero_spatial_rsd"
EPISODES = 8
PATIENCE = 120.0  # s


def command(bundle: Path, out: Path) -> list[str]:
    options = ("--tasks", "0,1", "--trials", "4", "--max-steps", "16", "--workers", "2", "--out", str(out), "--json")
    return [sys.executable, str(DRIVE), str(bundle), *options]


@contextlib.contextmanager
def started(bundle: Path, out: Path, episodes: int) -> Iterator[subprocess.Popen[str]]:
    """A run of which so many episodes are on the disk, and which begins no other; it and its simulators are gone when
    the block ends."""
    file, end = out / f"{NAME}_episodes.jsonl", time.monotonic() + PATIENCE
    hold = {**os.environ, "HOLD_AT": str(episodes), "HOLD_BY": str(file)}
    with subprocess.Popen(
        command(bundle, out), stderr=subprocess.PIPE, text=True, start_new_session=True, env=hold
    ) as process:
        try:
            while lines(file) < episodes:
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.01)
            yield process
            process.wait(PATIENCE)
            end = time.monotonic() + PATIENCE
            while alive(process.pid):
                assert time.monotonic() < end, "a simulator's process is left"
                time.sleep(0.05)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def finish(bundle: Path, out: Path) -> None:
    done = subprocess.run(command(bundle, out), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def outcomes(out: Path) -> list[object]:
    """The episodes of a results file without what the clock puts into them."""
    results = json.loads((out / f"{NAME}_results.json").read_text())
    assert results["errors"] == 0
    for episode in results["episodes"]:
        del episode["seconds"], episode["others"]
        for query in episode["queries"]:
            del query["ms"]
    return list(results["episodes"])


@pytest.fixture(scope="module")
def uninterrupted(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    out = tmp_path_factory.mktemp("whole")
    finish(tiny_bundle, out)
    assert json.loads((out / f"{NAME}_results.json").read_text())["throughput"]["workers"] == 2
    found = outcomes(out)
    assert len(found) == EPISODES
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_an_uninterrupted_one(
    tiny_bundle: Path, tmp_path: Path, uninterrupted: list[object]
) -> None:
    for episodes in (1, 3, 6):
        with started(tiny_bundle, tmp_path, episodes) as process:
            process.kill()
    finish(tiny_bundle, tmp_path)
    assert outcomes(tmp_path) == uninterrupted
    assert json.loads((tmp_path / f"{NAME}_results.json").read_text())["throughput"] is None


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(
    tiny_bundle: Path, tmp_path: Path, uninterrupted: list[object], how: signal.Signals
) -> None:
    with started(tiny_bundle, tmp_path, 2) as process:
        os.killpg(process.pid, how)  # a terminal's Ctrl-C reaches the simulators' processes, too
        _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert f"of {EPISODES} episodes in {tmp_path / NAME}_episodes.jsonl. The same command goes on from there" in stderr
    assert "Traceback" not in stderr
    finish(tiny_bundle, tmp_path)
    assert outcomes(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_is_lost(
    tiny_bundle: Path, tmp_path: Path, uninterrupted: list[object]
) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    done = subprocess.run(
        command(tiny_bundle, tmp_path), capture_output=True, text=True, timeout=PATIENCE, preexec_fn=small_files
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    stored = (tmp_path / f"{NAME}_episodes.jsonl").read_text()
    assert stored == "" or stored.endswith("\n")
    finish(tiny_bundle, tmp_path)
    assert outcomes(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_second_run_of_the_same_files_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with started(tiny_bundle, tmp_path, 1) as process:
        process.send_signal(signal.SIGSTOP)  # it must not end before the second one comes to the files
        second = subprocess.run(command(tiny_bundle, tmp_path), capture_output=True, text=True, timeout=PATIENCE)
        process.kill()
    assert second.returncode == 1
    assert f"another evaluation writes {tmp_path / NAME}_*" in second.stderr
