"""Shards, seats that come and go, and logs: nothing is lost, nothing is counted twice, and the cost stays flat."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeSeats, Quiet, episode, sweep

from rsd_trt.errors import UserError
from rsd_trt.eval.libero.request import EvalRequest
from rsd_trt.eval.libero.run import Job
from rsd_trt.eval.read import read_run
from rsd_trt.eval.results import EpisodeKey
from rsd_trt.eval.sweep import board as board_module
from rsd_trt.eval.sweep.board import Lost, Place, Refused, conduct
from rsd_trt.eval.sweep.plan import Sweep
from rsd_trt.eval.sweep.run import groups, state_of

Strike = Callable[[int, Place], Refused | Lost | None]


def outcomes(done: Sweep) -> list[list[object]]:
    """The runs' episodes, each log's lines being as many."""
    found = []
    for run in done.runs:
        results = read_run(run.request.results_file)
        log = run.request.out / f"{run.request.name}_episodes.jsonl"
        assert len(log.read_text().splitlines()) == len(results.episodes)
        found.append([(e.key, e.success, e.steps) for e in results.episodes])
    return found


def every(n: int, answer: Refused | Lost) -> Strike:
    return lambda number, place: answer if number % n == 0 else None


@pytest.mark.parametrize("strike", [every(11, Lost("the node died")), every(13, Refused("the GL context is lost"))])
def test_seats_that_are_lost_again_and_again_lose_no_episode_and_double_none(tmp_path: Path, strike: Strike) -> None:
    calm, troubled = sweep(tmp_path / "a", 3, 8, tasks=2), sweep(tmp_path / "b", 3, 8, tasks=2)
    conduct(calm, FakeSeats(2), Quiet(), "command")
    seats = FakeSeats(3, lambda number, place: strike(number, place) if place.shard is not None else None)
    watch = Quiet()
    conduct(troubled, seats, watch, "command")
    assert watch.losses
    assert outcomes(troubled) == outcomes(calm)
    assert len(watch.added) == len(set(watch.added)) == 48
    assert max(Counter(seats.asked).values()) == 1, "what is tried again is tried elsewhere"


def test_an_episode_that_no_seat_finishes_ends_the_sweep(tmp_path: Path) -> None:
    def strike(number: int, place: Place) -> Lost | None:
        held = place.shard is not None and min(place.shard, default=None) == (0, 0, 3)
        return Lost("the node died") if held else None

    with pytest.raises(UserError, match=r"run0: task 0, trial 3 was given to 3 seats in turn, .* last: the node died"):
        conduct(sweep(tmp_path, 1, 4), FakeSeats(1, strike), Quiet(), "command")
    state = state_of(sweep(tmp_path, 1, 4).runs[0])
    assert sorted(state.lines) == [(0, 0), (0, 1), (0, 2)]


def test_a_seat_that_cannot_open_a_run_ends_the_sweep_and_names_its_node(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="node node0: no headless OpenGL"):
        conduct(sweep(tmp_path, 1, 4), FakeSeats(1, lambda *_: Refused("no headless OpenGL")), Quiet(), "command")
    with pytest.raises(UserError, match="run0 cannot be opened: 3 seats in turn were lost; last: it died"):
        conduct(sweep(tmp_path, 1, 4), FakeSeats(1, lambda *_: Lost("it died")), Quiet(), "command")


class Mixed(FakeSeats):
    """Its second seat has other packages."""

    def job(self, place: Place, request: EvalRequest) -> Job:
        made = super().job(place, request)
        if place.node == "node1":
            made.settings.versions["torch"] = "1.0"
        return made


def test_nodes_may_differ_in_their_processors_and_in_nothing_else(tmp_path: Path) -> None:
    seats = FakeSeats(2, hardware={"node0": "one", "node1": "another"})
    conduct(sweep(tmp_path / "a", 1, 40), seats, Quiet(), "command")
    assert len({node for node, *_ in seats.asked}) == 2
    with pytest.raises(UserError, match=r"node node1, run0: versions.torch is '1.0' there and '2.13.0' here"):
        conduct(sweep(tmp_path / "b", 1, 40), Mixed(2), Quiet(), "command")
    again = FakeSeats(1, hardware={"node0": "a third"})  # a sweep goes on on other nodes
    conduct(sweep(tmp_path / "a", 1, 40), again, watch := Quiet(), "command")
    assert (watch.started[:2], again.asked) == ((40, 40), [])


def test_a_driver_that_is_killed_at_any_line_goes_on(tmp_path: Path) -> None:
    whole = sweep(tmp_path / "a", 2, 6)
    conduct(whole, FakeSeats(2), Quiet(), "command")

    class Killed(BaseException):
        pass

    for lines in range(1, 12):
        out = sweep(tmp_path / str(lines), 2, 6)

        class Watch(Quiet):
            def add(self, run: str, one: object, stop: int = lines) -> None:
                super().add(run, one)  # type: ignore[arg-type]
                if len(self.added) == stop:
                    raise Killed

        with pytest.raises(Killed):
            conduct(out, FakeSeats(2), Watch(), "command")
        conduct(out, FakeSeats(2), watch := Quiet(), "command")
        assert watch.started[:2] == (12, lines)
        assert len(watch.added) == 12 - lines
        assert outcomes(out) == outcomes(whole)


def test_a_cluster_without_nodes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="no node to work on"):
        conduct(sweep(tmp_path, 1, 4), FakeSeats(0), Quiet(), "command")


def test_shards_are_few_and_of_few_tasks_and_the_seats_end_together(tmp_path: Path) -> None:
    seats = FakeSeats(4)
    shards: list[tuple[str, int, set[int]]] = []  # (node, episodes, tasks)
    run = seats.run

    def noted(place: Place, keys: Sequence[Sequence[EpisodeKey]]) -> None:
        assert place.shard is not None
        shards.append((place.node, len(place.shard), place.tasks))
        run(place, keys)

    seats.run = noted  # type: ignore[method-assign]
    conduct(sweep(tmp_path, 9, 24, tasks=3), seats, Quiet(), "command")
    assert [size for _, size, _ in shards[:4]] == [121] * 4  # three quarters of 9 * 24 * 3 / 4
    assert len(shards) < 20 and min(size for _, size, _ in shards) >= 2
    for node, _, tasks in shards[4:8]:
        first = next(mine for other, _, mine in shards if other == node)
        assert tasks & first
    each = Counter(node for node, _, _ in seats.asked).values()
    assert max(each) - min(each) <= 6


def test_runs_of_a_group_finish_together_and_those_of_another_model_apart(tmp_path: Path) -> None:
    alike = sweep(tmp_path, 3, 2)
    one, other, third = (run.request for run in alike.runs)
    odd = replace(alike.runs[1], request=replace(other, backend="graph"))
    matched = replace(alike.runs[2], matched="run0")
    assert groups((alike.runs[0], odd, matched)) == [(alike.runs[0],), (odd,), (matched,)]
    assert groups((odd, matched)) == [(odd,), (matched,)], "the run that has the rate is through"
    assert groups(alike.runs) == [alike.runs]
    assert {one.seed, other.seed, third.seed} == {7}


def test_the_throughput_of_a_run_on_several_seats(tmp_path: Path) -> None:
    done = sweep(tmp_path, 1, 40)
    conduct(done, FakeSeats(2), Quiet(), "command")
    found = read_run(done.runs[0].request.results_file).throughput
    assert found is not None and found.cores is not None and found.runs == 1
    assert (found.policy_share, found.bound, found.gpus) == (0.25, "simulator", 0.0)
    assert found.cores == pytest.approx(found.workers, abs=1)


@pytest.mark.slow
def test_the_drivers_own_cost_of_an_episode_is_flat(tmp_path: Path) -> None:
    """100,000 episodes take about two minutes; these are a tenth of them. What is measured is processor time."""
    runs, trials = 100, 100
    marks: list[tuple[float, int]] = []

    class Watch(Quiet):
        def add(self, run: str, one: object) -> None:
            self.count = getattr(self, "count", 0) + 1
            if self.count % (runs * trials // 4) == 0:
                marks.append((time.process_time(), resident()))

    conduct(sweep(tmp_path, runs, trials), FakeSeats(4), Watch(), "command")
    seconds = [after - before for (before, _), (after, _) in itertools.pairwise(marks)]
    assert seconds[-1] < 3 * seconds[0]  # what grew with their number would be 7 times as much
    assert marks[-1][1] - marks[0][1] < 20e6


def test_reading_is_linear(tmp_path: Path) -> None:
    seconds = {}
    for trials in (500, 4000):
        done = sweep(tmp_path / str(trials), 1, trials)
        conduct(done, FakeSeats(2), Quiet(), "command")
        started = time.process_time()
        for _ in range(3):
            read_run(done.runs[0].request.results_file)
            state_of(done.runs[0])
        seconds[trials] = (time.process_time() - started) / trials
    assert seconds[4000] < 4 * seconds[500]  # what is quadratic would be 8 times as much


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_fakes_are_what_they_say() -> None:
    assert episode((0, 1)).success and not episode((0, 3)).success
