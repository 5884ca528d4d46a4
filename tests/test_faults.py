"""Faults that no other test injects: what is kept, and what the message says. All: docs/architecture.md."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import synthetic
import torch
from command import rsd_trt
from doubles import Reader, World
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import Precision
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.episode import Assignment, serve
from rsd_trt.eval.libero.episode_log import EpisodeLog
from rsd_trt.eval.libero.pool import Meter, run_episodes
from rsd_trt.eval.report.write import write_report
from rsd_trt.export import run as export_run
from rsd_trt.manifest import read_manifest
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.chunk import Query
from rsd_trt.runtime.observation import Observation

FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is free."
    "\nProcess 7 has 77 GiB memory in use."
)
TOLD = "the GPU's memory is full: 2.50 GiB more were needed, 1.25 GiB are free. End what else uses it (nvidia-smi)"
STOPPED = "error: stopped. What was finished is kept, and no file is half-written: run the same command again"
PATIENCE = 180.0  # s


@pytest.mark.parametrize(
    ("error", "message"),
    [(FULL, TOLD), ("CUDA error: out of memory", "the GPU's memory is full. End what else uses it")],
)
def test_a_full_gpu_is_one_line(
    error: str, message: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(error)

    monkeypatch.setattr("rsd_trt.eval.verify.components.verify", full)
    done = rsd_trt("verify", tiny_bundle, "--device", "cpu")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


class Cramped(Reader):
    """A policy that has memory for `most` queries at once, and from the third forward on for `later`."""

    def __init__(self, most: int, later: int, error: Exception | None = None) -> None:
        super().__init__(seconds=0.1)  # so that processes come to wait for each other, and are answered together
        self.most, self.later = most, later
        self.error = error or torch.OutOfMemoryError(FULL)
        self.tensors: list[weakref.ref[Tensor]] = []  # of the forwards that did not fit

    def act_batch(self, observations: Sequence[Observation], environments: Sequence[int]) -> list[Query]:
        assert not any(tensor() is not None for tensor in self.tensors), "the memory of a broken forward is not free"
        if len(environments) > (self.most if len(self.batches) < 3 else self.later):
            tensor = torch.zeros(1)
            self.tensors.append(weakref.ref(tensor))
            raise type(self.error)(*self.error.args)
        return super().act_batch(observations, environments)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError(FULL), TOLD),
        (ValueError("a\nbug"), "the policy broke: ValueError: a bug. See where with rsd-trt -v"),
    ],
)
def test_a_batch_that_does_not_fit_is_answered_one_by_one(
    error: Exception, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy, meter = Cramped(most=1, later=1, error=error), Meter()
    assignments = [Assignment(0, trial, 6) for trial in range(4)]
    episodes = list(run_episodes(policy, partial(serve, build=World), assignments, 4, 4, 60.0, meter))
    assert [episode.error for episode in episodes] == [None] * 4
    assert set(policy.batches) == {1}
    assert meter.split == len(policy.tensors) > 1
    (record,) = caplog.records  # however many batches failed
    assert record.getMessage().startswith(told)
    assert record.getMessage().endswith(". Batches that fail are answered one by one")
    assert "Traceback" not in caplog.text and "\n" not in record.getMessage()


def test_a_query_that_breaks_is_one_line_and_a_traceback_with_verbose(caplog: pytest.LogCaptureFixture) -> None:
    def run(level: int) -> list[str]:
        caplog.clear()
        with caplog.at_level(level, "rsd_trt.eval.libero.pool"):
            policy = Reader(fault="raises", fault_step=0)
            list(run_episodes(policy, partial(serve, build=World), [Assignment(0, 0, 4)], 1, 1, 60.0, Meter()))
        return caplog.text.splitlines()

    (line,) = run(logging.WARNING)
    assert line.endswith("the policy broke: ValueError: images are uint8 (1, 9, 9, 3). See where with rsd-trt -v")
    assert "Traceback (most recent call last):" in run(logging.DEBUG)


def test_a_query_that_does_not_fit_ends_the_run_and_keeps_its_episodes(tmp_path: Path) -> None:
    policy = Cramped(most=1, later=0)
    assignments = [Assignment(0, trial, 4) for trial in range(4)]
    found = []
    with pytest.raises(UserError) as error:
        for episode in run_episodes(policy, partial(serve, build=World), assignments, 1, 1, 60.0, Meter()):
            found.append(episode)
    assert str(error.value).startswith(TOLD)
    assert found and all(episode.error is None for episode in found)


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[2J").mkdir()
    done = rsd_trt("info", tmp_path / "a\x1b[2J")
    assert done.exit_code == 1
    assert "\\x1b[2J is no bundle" in done.stderr
    assert "\x1b[2J" not in done.stderr


def test_an_export_exchanged_while_a_session_runs(
    bundle: Bundle, exported: Callable[[Precision], Path], tmp_path: Path
) -> None:
    engines = Path(shutil.copytree(exported("fp32"), tmp_path / "engines"))
    launcher = Launcher(bundle, "ort", torch.device("cpu"), engines=engines)
    session = launcher.open("predict", "1")
    hidden = {"hidden": torch.randn(1, bundle.config.hidden, generator=torch.Generator().manual_seed(0))}
    before = {name: value.clone() for name, value in session.run(hidden).items()}
    for file in (engines / "tiny").glob("predict.*.onnx"):
        file.write_bytes(b"x" * file.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in session.run(hidden).items())
    with pytest.raises(UserError, match=r"has sha256 .*, the manifest says .*\. Rebuild: rsd-trt export"):
        launcher.open("predict", "1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of 256 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no permission to mount: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], capture_output=True)


def fill(disk: Path) -> None:
    with pytest.raises(OSError), (disk / "rest").open("wb") as stream:
        while True:
            stream.write(b"x" * 512)
            stream.flush()


def test_a_full_disk_keeps_the_episodes_that_are_on_it(small_disk: Path) -> None:
    run = synthetic.run("rsd", tasks=(0,), trials=4)
    log = EpisodeLog(small_disk, "x", run.settings, fresh=True)
    log.append(run.episodes[0])
    before = log.path.read_bytes()
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        for episode in run.episodes[1:]:
            log.append(episode)
    after = log.path.read_bytes()
    assert after.startswith(before)
    assert after.endswith(b"\n")
    (small_disk / "rest").unlink()
    assert len(EpisodeLog(small_disk, "x", run.settings, fresh=False).done) == after.count(b"\n")


def test_an_evaluation_on_a_full_disk_goes_on_from_whole_lines(small_disk: Path, tiny_bundle: Path) -> None:
    (drive,) = Path(__file__).parent.rglob("drive.py")
    options = ["--tasks", "0,1", "--trials", "4", "--max-steps", "16", "--workers", "1", "--out", str(small_disk)]

    def evaluate() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(drive), str(tiny_bundle), *options, "--json"]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)

    fill(small_disk)
    os.truncate(small_disk / "rest", (small_disk / "rest").stat().st_size - (20 << 10))
    done = evaluate()
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("No space left on device")
    assert "Traceback" not in done.stderr
    log = next(small_disk.glob("*_episodes.jsonl"))
    kept = log.read_bytes()
    assert 0 < kept.count(b"\n") < 8 and kept.endswith(b"\n")
    (small_disk / "rest").unlink()
    done = evaluate()
    assert done.returncode == 0, done.stderr
    assert log.read_bytes().startswith(kept) and log.read_bytes().count(b"\n") == 8


def test_a_full_disk_keeps_the_old_report(small_disk: Path, tmp_path: Path) -> None:
    results = synthetic.write(tmp_path / "r.json", synthetic.run("rsd", tasks=(0,), trials=2))
    out = small_disk / "report"
    write_report([results], out, "rsd-trt report")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fill(small_disk)
    with pytest.raises(UserError, match="report cannot be written: No space left on device"):
        write_report([results], out, "rsd-trt report")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def stop(arguments: list[str], ready: Callable[[], bool], code: str, how: signal.Signals = signal.SIGTERM) -> str:
    """Runs `code`, then a command; ends it with a signal once it is ready. What it said on stderr."""
    program = f"{code}\nfrom rsd_trt.cli import main\nmain({arguments!r}, prog_name='rsd-trt')"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + PATIENCE
        while not ready():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(how)
        try:
            _, stderr = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "Traceback" not in stderr
    return stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_export_keeps_what_is_built(
    how: signal.Signals, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "exporting"
    arguments = ["export", str(tiny_bundle), "-o", str(tmp_path), "--target", "onnx", "--component", "decoder"]
    hang = (  # in the second of the two artefacts
        "import time, pathlib, rsd_trt.export.run as r\n"
        "def first(module, batch, path): path.touch(); return [path]\n"
        f"def second(*_): pathlib.Path({str(mark)!r}).touch(); time.sleep(600)\n"
        "exports = iter([first, second])\n"
        "r.export_onnx = lambda *a: next(exports)(*a)"
    )
    stderr = stop(arguments, mark.exists, hang, how)
    assert stderr.strip().endswith(STOPPED)
    assert len(read_manifest(tmp_path / "tiny", Bundle.open(tiny_bundle)).artefacts) == 1
    monkeypatch.setattr(export_run, "export_onnx", lambda _module, _batch, path: path.touch() or [path])
    done = rsd_trt(*arguments, "--json")
    assert done.exit_code == 0
    assert [row in done.stdout for row in ('"built": true', '"built": false')] == [True, True]
    assert not list((tmp_path / "tiny").glob(".building.*"))


def test_sigterm_in_a_report_keeps_the_old_one(tmp_path: Path) -> None:
    results = synthetic.write(tmp_path / "r.json", synthetic.run("rsd", tasks=(0,), trials=2))
    out, mark = tmp_path / "report", tmp_path / "rendering"
    write_report([results], out, "rsd-trt report")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    slow = (
        "import os, time, pathlib, rsd_trt.eval.report.write as r\n"
        f"def fsync(_): pathlib.Path({str(mark)!r}).touch(); time.sleep(600)\n"
        "os.fsync = fsync"
    )
    stderr = stop(["report", str(results), "-o", str(out)], mark.exists, slow)
    assert stderr.strip().endswith(STOPPED)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_clock_that_jumps_back_names_no_file_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming goes by what is in the file, not by its time."""
    run = synthetic.run("rsd", tasks=(0,), trials=3)
    log = EpisodeLog(tmp_path, "x", run.settings, fresh=True)
    log.append(run.episodes[0])
    os.utime(log.path, (0, 0))
    monkeypatch.setattr(time, "time", lambda: -1e9)
    again = EpisodeLog(tmp_path, "x", run.settings, fresh=False)
    assert again.lacks(0, 1) and not again.lacks(0, 0)
    again.append(run.episodes[1])
    assert len(EpisodeLog(tmp_path, "x", run.settings, fresh=False).done) == 2


def test_every_row_of_the_table_of_faults_names_tests_that_are_there() -> None:
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| .* \|$", text.partition("## Faults")[2].partition("\n## ")[0], re.MULTILINE)[1:]
    assert len(rows) > 12
    for row in rows:
        files = re.findall(r"`([\w/]+\.py)`", row.split("|")[4])
        assert files, row
        assert [file for file in files if not (tests / file).is_file()] == [], row
