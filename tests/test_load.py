"""What else keeps the processor busy: measured, told, and told only where it disturbs."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from msgspec import structs
from synthetic import run

from rsd_trt.eval.report.cost import COUNTED, disturbances, measured, read_price
from rsd_trt.eval.results import Episode
from rsd_trt.eval.summary import summarise
from rsd_trt.load import SHORTEST, SLACK, LoadMeter, fit_threads, steadiness

STEADY = [10.0] * 19 + [14.0]
BURN = "import time; end = time.monotonic() + {0}\nwhile time.monotonic() < end: pass"


def burn(seconds: float) -> None:
    """Keeps a core busy for so many seconds of processor time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def used(pid: str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_other_processes_are_measured_and_our_own_are_not() -> None:
    with subprocess.Popen([sys.executable, "-c", BURN.format(60)]) as child:  # no process of multiprocessing's
        meter, before, started = LoadMeter(), used(str(child.pid)), time.monotonic()
        time.sleep(2 * SHORTEST)
        found, share = meter.lap(), (used(str(child.pid)) - before) / (time.monotonic() - started)
        child.kill()
    assert found is not None and share > 0.01
    assert found >= 0.8 * share
    meter = LoadMeter()
    worker = multiprocessing.get_context("spawn").Process(target=burn, args=(1.0,))
    worker.start()
    worker.join()
    own = meter.lap()
    others = os.getloadavg()[0]  # of the machine that tests run on
    assert own is not None
    if others < 1:
        assert own < 0.5


def test_what_counts_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither idle nor waiting for a disk, nor a core that this process may not run on; ours is taken off."""
    stat = "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 100 200 400 800 1600 3200 6400 12800 0 0\ncpu1 7 7 7 7 7 7 7 7 7 7\nctxt 5\n"
    child = "4711 (a (b) c) S 1 1 1 0 -1 0 0 0 0 0 300 500 0 0"
    monkeypatch.setattr(Path, "read_text", lambda self, *_: child if self.parts[2] == "4711" else stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(os, "times", lambda: SimpleNamespace(user=1, system=2, children_user=4, children_system=8))
    monkeypatch.setattr(
        multiprocessing, "active_children", lambda: [SimpleNamespace(pid=4711), SimpleNamespace(pid=None)]
    )
    assert LoadMeter()._read()[1:] == (231.0, 23.0)  # s


def test_a_lap_that_is_too_short_is_that_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    read = iter([(0.0, 5.0, 1.0), (0.5, 9.0, 1.0), (2.0, 9.0, 2.0), (2.1, 99.0, 2.0), (4.0, 11.0, 3.5)])
    monkeypatch.setattr(LoadMeter, "_read", lambda self: next(read))
    meter = LoadMeter()
    assert [meter.lap() for _ in range(4)] == [None, 1.5, 1.5, 0.25]
    for first, second, found in (
        ((0.0, 1.0, 0.0), (SHORTEST, 3.0, 0.5), 1.5),
        ((0.0, None, 0.0), (9.0, None, 0.0), None),
        ((0.0, 1.0, 0.0), (9.0, None, 0.0), None),
        ((0.0, None, 0.0), (9.0, 1.0, 0.0), None),
    ):
        answers = iter((first, second))
        monkeypatch.setattr(LoadMeter, "_read", lambda self, answers=answers: next(answers))
        assert LoadMeter().lap() == found


def test_what_disturbs_is_told() -> None:
    assert not steadiness({}, SLACK, 2, 2).disturbed and steadiness({}, SLACK + 0.01, 2, 2).disturbed
    calm = steadiness({"full": STEADY}, 0.2, cores=2, own=2)
    assert (calm.others, calm.spread, calm.disturbed) == (0.2, {"full": 1.02}, ())
    assert steadiness({}, 1.2, cores=4, own=3).disturbed == ()  # there is a core for them
    busy = steadiness({"full": [10.0] * 15 + [30.0] * 5, "rejected": [1.0, 9.0]}, 1.04, cores=2, own=2)
    assert busy.disturbed == (
        "other processes kept 1.0 of 2 cores busy, and this one needs 2",
        "p95 / p50 of full is 3 (up to 1.5 is steady)",
    )
    assert busy.spread == {"full": 3.0}  # two times say nothing of their p95
    assert not steadiness({"full": [10.0] * 15 + [15.0] * 5}, 0, 2, 2).disturbed  # 1.5 is steady
    thirds = steadiness({"full": [3.0] * 15 + [10.0] * 5}, 1 / 3, 2, 2)
    assert (thirds.others, thirds.spread) == (0.33, {"full": 3.333})
    assert steadiness({"full": [0.0] * 20, "rejected": [0.5] * 20}, 0, 2, 2).spread == {"rejected": 1.0}


def test_a_run_and_its_report_say_so() -> None:
    calm = run("rsd")
    episodes: list[Episode] = [structs.replace(episode, others=3.0, seconds=2.0) for episode in calm.episodes]
    tasks = {task.task_id: task.task_description for task in calm.task_results}
    settings = structs.replace(calm.settings, hardware={"cpu": "x", "cores": 2, "threads": 1})
    found = summarise(settings, episodes, tasks, None, "eval")
    assert found.clock is not None and found.clock.others == 3.0
    told = "Disturbed while they were timed: rsd (other processes kept 3.0 of 2 cores busy, and this one needs 1"
    assert (disturbances([("rsd", found)], COUNTED) or "").startswith(told)
    assert disturbances([("rsd", structs.replace(calm, clock=None))], COUNTED) is None


def test_what_is_measured_is_the_median_of_each_route() -> None:
    results = run("rsd")
    episodes = list(results.episodes)
    first = episodes[0]
    slow = structs.replace(first.queries[0], ms=first.queries[0].ms + 1e6)
    episodes[0] = structs.replace(first, queries=(slow, *first.queries[1:]))
    assert measured(structs.replace(results, episodes=tuple(episodes))) == pytest.approx(measured(results), rel=0.05)
    assert measured(structs.replace(results, settings=structs.replace(results.settings, timing="batched"))) is None


def test_a_disturbed_profile_is_told_of_by_the_report(tmp_path: Path) -> None:
    clock = '{"others": 2.0, "cores": 2, "spread": {}, "disturbed": ["loud"]}'
    costs = ",".join(
        f'{{"what": "{what}", "backend": "ort", "backbone": "eager", "ms": {{"p50": {ms}}}}}'
        for what, ms in (("check", 1), ("full", 9))
    )
    path = tmp_path / "profile.json"
    path.write_text(f'{{"bundle": "b", "bundle_sha256": "0", "hardware": {{}}, "costs": [{costs}], "clock": {clock}}}')
    assert disturbances([], read_price(path, [])) == "Disturbed while they were timed: the profile (loud)."


def test_threads_are_the_cores_free_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    try:
        fit_threads(2)  # OMP_NUM_THREADS is set here
        assert torch.get_num_threads() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        for workers, threads in ((1, 5), (4, 2), (6, 1), (9, 1)):
            fit_threads(workers)
            assert torch.get_num_threads() == threads
            monkeypatch.setenv("OMP_NUM_THREADS", "all")  # PyTorch does not know it either
    finally:
        torch.set_num_threads(before)
