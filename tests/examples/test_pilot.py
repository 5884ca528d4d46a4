"""The pilot study: its cells, the loop that answers them, and its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from examples.reference_policy.studies import pilot, summary
from examples.reference_policy.studies.cells import TRIALS, Cell, Job, jobs, shard
from examples.reference_policy.studies.loops import Loops, confirmed
from rsd_trt.config import ARM_DIMS, PROPRIO_DIM, Dims
from rsd_trt.eval.libero.target import Late
from rsd_trt.eval.results import Episode, QueryRecord
from rsd_trt.runtime.forward import Guess, Main
from rsd_trt.runtime.observation import Observation

T, A = Dims().T, Dims().A
SIDE = 4


class Scripted:
    """Main's chunk at observation k says k + i / 100 in step i, gripper open; the draft says that + 0.05."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []  # what, of how many

    def check(self, observations: Sequence[Observation]) -> Guess:
        actions, finite = self._actions("check", observations)
        tokens, logits = np.zeros((len(actions), T, 1, 1), np.int64), np.zeros((len(actions), T, 1, 2), np.float32)
        return Guess(tokens, actions + np.float32(0.05), logits, finite)

    def full(self, observations: Sequence[Observation]) -> Main:
        actions, finite = self._actions("full", observations)
        return Main(np.zeros((len(actions), T, 1, 1), np.int64), actions, finite)

    def _actions(self, what: str, observations: Sequence[Observation]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        self.asked.append((what, len(observations)))
        k = np.array([x.proprio[0] for x in observations], np.float32)
        actions = np.full((len(k), T, A), -1.0, np.float32)
        actions[..., :ARM_DIMS] = (k[:, None] + np.arange(T) / 100)[..., None]
        return actions, np.isfinite(k)


def seen(k: float) -> Observation:
    return Observation(np.zeros((1, SIDE, SIDE, 3), np.uint8), np.full(PROPRIO_DIM, k, np.float32), "go")


def steps_of(cells: Sequence[Cell], observations: Sequence[float]) -> list[list[tuple[str, list[float]]]]:
    """Each cell's answers to a series of observations: route, and the first arm dimension of the actions."""
    loops = Loops(Scripted(), lambda number: cells[number])  # type: ignore[arg-type]
    for slot in range(len(cells)):
        loops.reset(slot, (0, slot * TRIALS + 3))
    answers: list[list[tuple[str, list[float]]]] = [[] for _ in cells]
    for k in observations:
        for slot, query in enumerate(loops.act_batch([seen(k)] * len(cells), range(len(cells)))):
            answers[slot].append((query.route, [round(x, 2) for x in query.actions[:, 0].tolist()]))
    return answers


def test_open_loop_without_latency() -> None:
    (found,) = steps_of([Cell(2)], [1, 2])
    assert found == [("full", [1.0, 1.01]), ("full", [2.0, 2.01])]


def test_latency_the_robot_goes_on_with_its_old_chunk_and_holds_when_nothing_is_left() -> None:
    two, eight = steps_of([Cell(2, latency=2), Cell(8, latency=3)], [1, 2, 3, 4])
    assert two[:3] == [
        ("full", [0.0, 0.0, 1.0, 1.01]),  # nothing yet: it holds, and enters the chunk at its first step
        ("full", [1.02, 1.03, 2.02, 2.03]),
        ("full", [2.04, 2.05, 3.02, 3.03]),
    ]
    assert eight[1] == ("full", [0.0, 0.0, 0.0, *(round(2 + i / 100, 2) for i in range(8))])


def test_a_short_rest_of_a_chunk_is_used_up_first() -> None:
    (found,) = steps_of([Cell(6, latency=4)], [1, 2])
    assert found[1] == ("full", [1.06, 1.07, 0.0, 0.0, *(round(2 + i / 100, 2) for i in range(2, 8))])


def test_a_hold_keeps_the_gripper() -> None:
    loops = Loops(Scripted(), lambda number: Cell(8, latency=1))  # type: ignore[arg-type]
    loops.reset(0, (0, 0))
    first = loops.act_batch([seen(1)], [0])[0].actions
    assert first[0].tolist() == [0.0] * ARM_DIMS + [-1.0]
    loops.states[0].gripper = 1.0
    assert loops.act_batch([seen(1)], [0])[0].actions[0, ARM_DIMS] == 1.0


def test_the_oracle_checks_what_is_left_against_mains_fresh_chunk() -> None:
    oracle = Cell(n=2, guess="main", rule="first", tolerance=0.1, m=2)
    (found,) = steps_of([oracle], [1, 1.02, 1.04, 5, 5.02])
    assert found == [
        ("start", [1.0, 1.01]),
        ("accepted", [1.02, 1.03]),
        ("accepted", [1.04, 1.05]),
        ("rejected", [5.0, 5.01]),
        ("accepted", [5.02, 5.03]),
    ]


def test_a_rejected_check_with_latency_goes_on_with_the_rejected_chunk() -> None:
    (found,) = steps_of([Cell(n=2, latency=2, guess="main", tolerance=0.1, m=1)], [1, 5])
    assert found[1] == ("rejected", [1.02, 1.03, 5.02, 5.03])


def test_refresh_and_the_end_of_a_chunk_make_full_queries_due() -> None:
    refreshed, ended = steps_of(
        [Cell(2, guess="main", tolerance=9.0, m=2, refresh=2), Cell(4, guess="main", tolerance=9.0, m=4)], [1, 1, 1, 1]
    )
    assert [route for route, _ in refreshed] == ["start", "accepted", "refresh", "accepted"]
    assert [route for route, _ in ended] == ["start", "accepted", "exhausted", "accepted"]


def test_cells_share_a_forward_and_draft_and_coin_have_their_own_guess() -> None:
    cells = [Cell(1), Cell(2, guess="draft", tolerance=0.04, m=2), Cell(2, guess="random", tolerance=1.0, m=2)]
    by_draft = steps_of(cells, [1, 1.02])
    assert [answers[1][0] for answers in by_draft] == ["full", "rejected", "accepted"]
    assert steps_of([Cell(2, guess="alone")], [1]) == [[("full", [1.05, 1.06])]]
    loops = Loops(forward := Scripted(), lambda number: Cell(1))  # type: ignore[arg-type]
    for slot in range(3):
        loops.reset(slot, (0, 0))
    loops.act_batch([seen(1)] * 3, range(3))
    assert forward.asked == [("full", 3)]


@pytest.mark.parametrize(
    ("rule", "errors", "expected"),
    [
        ("first", [0.05, 0.5, 0.5, 0.5, 0.5], 5),
        ("first", [0.15, 0.0, 0.0, 0.0, 0.0], 0),
        ("actions", [0.05, 0.05, 0.5, 0.0, 0.0], 2),
        ("path", [0.08, -0.08, 0.08, -0.08, 0.9], 5),  # noise cancels; beyond the look-ahead nothing counts
        ("path", [0.04, 0.04, 0.04, 0.0, 0.0], 0),  # a drift does not
    ],
)
def test_rules(rule: str, errors: list[float], expected: int) -> None:
    left = np.full((5, A), -1.0, np.float32)
    guess = np.full((T, A), -1.0, np.float32)
    guess[:5, 0] += np.array(errors, np.float32)
    assert confirmed(rule, guess, left, -1.0, 0.1, 1) == expected  # type: ignore[arg-type]
    guess[0, ARM_DIMS] = 1.0
    assert confirmed(rule, guess, left, -1.0, 0.1, 1) == 0  # type: ignore[arg-type]


def test_a_fault_ends_the_episode() -> None:
    loops = Loops(Scripted(), lambda number: Cell(1))  # type: ignore[arg-type]
    loops.reset(0, (0, 0))
    assert loops.act_batch([seen(float("nan"))], [0])[0].fault


def test_jobs_are_paired_and_leave_out_tasks_without_room() -> None:
    cells = [Cell(1), Cell(4)]
    found = list(jobs(cells, ["none", "late:0.05-0.08"], [0, 3], [0, 1], [101, 102]))
    assert [(j.cell.n, j.condition, j.task, j.trial, j.seed) for j in found[:4]] == [
        (1, "none", 0, 0, 101),
        (4, "none", 0, 0, 101),
        (1, "late:0.05-0.08", 0, 0, 101),
        (4, "late:0.05-0.08", 0, 0, 101),
    ]
    assert {(j.task, j.condition) for j in found} == {(0, "none"), (3, "none"), (0, "late:0.05-0.08")}
    assert {j.seed for j in found if j.condition == "none"} == {101}
    parts = [shard(found, i, 3) for i in range(3)]
    assert sorted(j.key for part in parts for j in part) == sorted(j.key for j in found)
    assert all({j.cell.n for j in part} == {1, 4} for part in parts)
    made = found[2].assignment(7, 220)
    assert (made.task, made.trial % TRIALS, made.trial // TRIALS) == (0, 0, 7)
    assert isinstance(made.perturbation, Late) and made.perturbation.key == (101, 0, 0)


def episode(success: bool, steps: int, routes: Sequence[tuple[int, str, bool]], event: int | None) -> Episode:
    queries = tuple(
        QueryRecord(step, route, 1, 1.0, checked=route in ("accepted", "rejected"), full_query=full)  # type: ignore[arg-type]
        for step, route, full in routes
    )
    return Episode(0, 0, success, steps, 1.0, queries, perturbed_at=event, perturbed_by="late" if event else None)


def test_records_and_their_table(tmp_path: Path) -> None:
    """A kill in the middle of a line costs that episode alone."""
    record = pilot._record
    n1, n8 = Cell(1), Cell(8)
    oracle = Cell(4, guess="main", rule="first", tolerance=0.2, m=2)
    made = [
        record(Job(n1, "late", 0, 0, 101), episode(True, 50, [(i, "full", True) for i in range(50)], 10)),
        record(Job(n8, "late", 0, 0, 101), episode(False, 220, [(i, "full", True) for i in range(0, 220, 8)], 10)),
        record(
            Job(oracle, "late", 0, 0, 101),
            episode(True, 60, [(0, "start", True), (4, "accepted", False), (11, "rejected", True)], 10),
        ),
        record(Job(oracle, "late", 1, 0, 101), episode(True, 150, [(0, "start", True)], None)),
    ]
    assert made[0]["reaction"] == 1 and made[1]["reaction"] == 6
    assert (made[2]["checks"], made[2]["accepted"], made[2]["full_queries"], made[2]["reaction"]) == (2, 1, 2, 1)
    lines = "\n".join(json.dumps(record) for record in made)
    (tmp_path / "episodes_0_of_1.jsonl").write_text(lines + '\n{"condition": "la')
    assert len(pilot._done(tmp_path)) == 4
    table = summary.rows(summary.read(tmp_path))
    assert [(row.cell, row.episodes) for row in table] == [(n1.name, 1), (n8.name, 1), (oracle.name, 2)]
    assert (table[2].within, table[2].success, table[2].perturbed) == (0.5, 1.0, 1)
    assert table[2].restricted_steps == (60 + 100) / 2
    (place,) = summary.room(table)
    assert (place.budget, place.n1, place.best, place.gain) == (n8.name, 1.0, oracle.name, 0.5)
    assert "above it: +50.0 points" in summary.text(table, [place])


def test_a_dry_run_says_how_much_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        pilot.main(["--out", str(tmp_path), "--dry-run", "--conditions", "none,moving:0.02-0.06", "--trials", "0-1"])
    assert "still to run" in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["--conditions=latex", "--rules=last:0.2", "--shard=4/4", "--guess=oracle"])
def test_wrong_usage(argument: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        pilot.main(["--out", str(tmp_path), argument])
    assert ended.value.code == 2
