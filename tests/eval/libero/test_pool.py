"""Many simulator processes and one policy: the same outcomes, and what happens when one of them breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from doubles import Broken, Reader, Troubled, World, shake, unusable
from msgspec import structs

from rsd_trt.bundle import Bundle
from rsd_trt.config import Mode
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.episode import Assignment, Environment, serve
from rsd_trt.eval.libero.pool import HOPELESS, Meter, Schedule, run_episodes
from rsd_trt.eval.libero.target import Displace
from rsd_trt.eval.results import Episode
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.speculate import RandomAcceptance, Rule

STEPS = 12


def run(
    policy: Reader | Policy,
    build: Callable[[int], Environment],
    workers: int = 2,
    tasks: int = 2,
    trials: int = 3,
    batch: int = 1,
    timeout: float = 60.0,
    meter: Meter | None = None,
) -> dict[tuple[int, int], Episode]:
    """The episodes by key, without what the clock puts into them."""
    assignments = [Assignment(task, trial, STEPS) for task in range(tasks) for trial in range(trials)]
    found = {}
    for episode in run_episodes(
        policy, partial(serve, build=build), assignments, workers, batch, timeout, meter or Meter()
    ):
        queries = tuple(structs.replace(query, ms=0.0, batch=1) for query in episode.queries)
        assert episode.key not in found
        found[episode.key] = structs.replace(episode, seconds=0.0, queries=queries)
    assert sorted(found) == [(a.task, a.trial) for a in assignments]
    return found


@pytest.fixture(scope="module")
def calm() -> dict[tuple[int, int], Episode]:
    """What the episodes are when nothing goes wrong."""
    found = run(Reader(), World, workers=1)
    assert {episode.success for episode in found.values()} == {True, False}
    assert all(episode.error is None for episode in found.values())
    return found


@pytest.mark.parametrize(("workers", "batch"), [(2, 1), (5, 5), (9, 3)])
def test_the_number_of_processes_changes_nothing(
    calm: dict[tuple[int, int], Episode], workers: int, batch: int
) -> None:
    policy, meter = Reader(), Meter()
    assert run(policy, World, workers=workers, batch=batch, meter=meter) == calm
    assert max(policy.batches) <= min(batch, workers)
    assert (meter.forwards, meter.queries) == (len(policy.batches), sum(policy.batches))


@pytest.mark.parametrize(("mode", "rule"), [("rsd", None), ("random", RandomAcceptance(0.6, 7))])
def test_a_real_policy_on_the_cpu_gives_the_same_episodes_for_any_number_of_processes(
    bundle: Bundle, mode: Mode, rule: Rule | None
) -> None:
    control = bundle.config.control
    build = partial(World, side=control.camera_size, cameras=len(control.cameras))
    found = [
        run(
            Policy.load(bundle, mode, environments=workers, n_action_steps=4, rule=rule),
            build,
            workers=workers,
            trials=2,
        )
        for workers in (1, 3)
    ]
    assert found[0] == found[1]
    assert len({episode.actions for episode in found[0].values()}) == len(found[0])
    assert all(any(query.checked for query in episode.queries) for episode in found[0].values())


@pytest.mark.parametrize(
    ("how", "times"),
    [
        *(("dies", 1), ("dies", 2), ("raises", 1), ("raises", 2), ("hangs", 1)),
        pytest.param("hangs", 2, marks=pytest.mark.slow),
    ],
)
def test_an_accident_is_tried_again_once(
    calm: dict[tuple[int, int], Episode], tmp_path: Path, how: str, times: int
) -> None:
    """One accident leaves no trace in the results; two in the same episode make it an error, and only it."""
    build = partial(Troubled, how=how, times=times, marks=tmp_path)
    timeout = 6.0 if how == "hangs" else 60.0
    found = run(Reader(), build, tasks=1, workers=2, timeout=timeout)
    expected = {key: episode for key, episode in calm.items() if key[0] == 0}
    broken = found[0, 1]
    if times == 1:
        assert found == expected
        return
    message = {
        "dies": "the simulator's process ended (exit code -9)",
        "hangs": "the simulator's process said nothing for 6 s",
        "raises": "RuntimeError: the GL context is lost",
    }[how]
    assert (broken.error, broken.success, len(broken.queries)) == (message, False, 2)
    assert {**found, (0, 1): None} == {**expected, (0, 1): None}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "the policy gave actions that are not finite"),
        ("shape", r"the policy gave actions of shape [2, 3], not [n, 7]"),
        ("told", "the hidden state after block 4 is not finite"),
        ("raises", "ValueError: images are uint8 (1, 9, 9, 3)"),
    ],
)
def test_a_fault_of_the_policy_ends_that_episode_alone(
    calm: dict[tuple[int, int], Episode], fault: str, message: str
) -> None:
    found = run(Reader(fault=fault), World, workers=4, batch=4)
    for (task, trial), episode in found.items():
        if task == 0 and calm[task, trial].steps > 4:
            assert (episode.error, episode.steps, episode.success) == (message, 4, False)
        else:
            assert episode == calm[task, trial]
    assert any(episode.error for episode in found.values())


def test_a_machine_that_cannot_run_the_simulator_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="apt-get install libegl1"):
        run(Reader(), unusable)


def test_a_simulator_that_always_breaks_stops_the_run(tmp_path: Path) -> None:
    assignments = [Assignment(0, trial, STEPS) for trial in range(HOPELESS + 5)]
    found = []
    with pytest.raises(UserError, match=f"the simulator broke in {HOPELESS} episodes in a row, .*: RuntimeError: no"):
        for episode in run_episodes(Reader(), partial(serve, build=Broken), assignments, 4, 1, 60.0, Meter()):
            found.append(episode)
    assert len(found) == HOPELESS


def test_a_policy_that_fails_at_one_task_stops_no_other() -> None:
    found = run(Reader(fault="told", fault_step=0), World, trials=HOPELESS + 2, workers=1)
    assert all((episode.error is None) == (task == 1) for (task, _), episode in found.items())


class Watchdog(threading.Timer):
    """A timer of a minute, which is up as soon as the process that it would kill is stopped, and never before."""

    def __init__(self, interval: float, function: Callable[[], None]) -> None:
        assert interval == 60.0
        super().__init__(interval, function)

    def run(self) -> None:
        process = self.function.__self__  # type: ignore[attr-defined]
        while not self.finished.wait(0.02):
            if Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].startswith("T"):
                self.function()
                break


def test_a_process_that_freezes_in_the_middle_of_a_message_is_replaced(
    calm: dict[tuple[int, int], Episode],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(threading, "Timer", Watchdog)
    build = partial(Troubled, how="freezes", times=1, marks=tmp_path)
    found = run(Reader(), build, tasks=1, workers=2, timeout=60.0)
    assert found == {key: episode for key, episode in calm.items() if key[0] == 0}
    assert caplog.messages == ["task 0, trial 1: the simulator's process ended (exit code -9); again"]


def test_a_run_that_is_stopped_while_it_listens_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(threading.Timer):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Timer", Stopped)
    with pytest.raises(KeyboardInterrupt):
        run(Reader(), World, timeout=3600.0)
    assert all(thread.finished.is_set() for thread in threading.enumerate() if isinstance(thread, Stopped))


def test_a_clock_that_jumps_hangs_nobody(calm: dict[tuple[int, int], Episode], monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: next(jumps) * 86400.0 * (-1) ** next(jumps))
    assert run(Reader(), World, timeout=20.0) == calm


def test_a_stopped_run_leaves_no_process_behind() -> None:
    assignments = [Assignment(0, trial, STEPS) for trial in range(4)]
    episodes = run_episodes(Reader(), partial(serve, build=World), assignments, 2, 1, 60.0, Meter())
    next(episodes)
    import multiprocessing

    assert len(multiprocessing.active_children()) == 2
    episodes.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_script_acts_in_the_processes_and_nobody_is_asked() -> None:
    assignments = [Assignment(0, trial, STEPS) for trial in range(3)]
    meter = Meter()
    found = list(run_episodes(None, partial(serve, build=World, script=shake), assignments, 2, 1, 60.0, meter))
    assert sorted(episode.trial for episode in found) == [0, 1, 2]
    assert all(not episode.queries and episode.steps and episode.error is None for episode in found)
    assert (meter.forwards, meter.queries, meter.seconds) == (0, 0, 0.0)


def test_displacements_are_recorded() -> None:
    """That of trial 1 comes too late, that of trial 2 has no room."""
    planned = (Displace(2, ((0.02, 0.03),)), Displace(STEPS, ((0.02, 0.03),)), Displace(2, ((-0.03, 0.0),)))
    assignments = [Assignment(0, trial, STEPS, perturbation=planned[trial]) for trial in range(3)]
    episodes = run_episodes(None, partial(serve, build=World, script=shake), assignments, 1, 1, 60.0, Meter())
    found = [(episode.perturbed_by, episode.perturbed_at, episode.displacement) for episode in episodes]
    assert found == [("displace", 2, (0.02, 0.03)), (None, None, None), (None, None, None)]


def test_a_process_keeps_its_task_and_then_takes_where_most_is_left() -> None:
    schedule = Schedule.of(
        [Assignment(task, trial, 1) for task, trials in ((0, 2), (1, 5), (2, 3)) for trial in range(trials)]
    )
    taken = []
    task = 0
    for _ in range(4):
        assignment = schedule.take(task, at_work=[1])
        assert assignment is not None
        taken.append((assignment.task, assignment.trial))
        task = assignment.task
    assert taken == [(0, 0), (0, 1), (2, 0), (2, 1)]  # 5 / 2 of task 1 is less than 3 / 1 of task 2
    assert schedule.take(None, at_work=[1, 2]) == Assignment(1, 0, 1)
    assert Schedule().take(0, []) is None


def test_a_task_that_lags_behind_is_helped() -> None:
    schedule = Schedule.of([Assignment(task, trial, 1) for task in (0, 1) for trial in range(9 * task + 1)], lag=8)
    taken = [schedule.take(0, at_work=[]) for _ in range(4)]
    assert [assignment.task if assignment else None for assignment in taken] == [1, 1, 0, 1]
