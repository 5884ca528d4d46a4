"""What is remembered between queries, by table: when a full query is due, and how far a guess is from what is left."""

from __future__ import annotations

import numpy as np
import pytest

from rsd_trt.config import ARM_DIMS, Dims
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.loop import Guess
from rsd_trt.runtime.speculate import Actions, Route

OPEN, CLOSED = -1.0, 1.0


def steps(arm: list[float], gripper: list[float]) -> Actions:
    """[T, A]: step t has `arm[t]` in every arm dimension."""
    return np.array([[a] * ARM_DIMS + [g] for a, g in zip(arm, gripper, strict=True)], np.float32)


@pytest.mark.parametrize(
    ("old", "cursor", "new", "gap"),
    [
        # arm differences of all that is left
        (([0, 0.1, 0.2, 0.3], [OPEN] * 4), 1, ([0.3, 0.1, 0.3, 9], [OPEN] * 4), [(0.2, 0), (0.1, 0), (0, 0)]),
        # behind the chunk's own switch of the gripper, too
        (([0] * 3, [OPEN, OPEN, CLOSED]), 1, ([0] * 3, [OPEN] * 3), [(0, 0), (0, 1)]),
        # the gripper's sign counts, not its size; zero is open
        (([0] * 3, [CLOSED] * 3), 1, ([0] * 3, [0.5, -0.5, 0]), [(0, 0), (0, 1)]),
        (([0] * 3, [OPEN, 0.0, 0.0]), 1, ([0] * 3, [0.0, 0.2, 0]), [(0, 0), (0, 1)]),
        # four decimals
        (([0] * 2, [OPEN] * 2), 1, ([0.123456, 0], [OPEN] * 2), [(0.1235, 0)]),
    ],
)
def test_gap_table(
    old: tuple[list[float], list[float]],
    cursor: int,
    new: tuple[list[float], list[float]],
    gap: list[tuple[float, float]],
) -> None:
    found = Chunk(steps(*old), cursor=cursor).gap(steps(*new))
    assert found == tuple((*[pytest.approx(arm)] * ARM_DIMS, gripper) for arm, gripper in gap)
    assert all(round(x, 4) == x and len(step) == Dims().A for step in found for x in step)


@pytest.mark.parametrize(
    ("cursor", "late", "fixed", "instruction", "refresh", "route"),
    [
        (1, 0, None, "do it", None, None),
        (1, 0, None, "do it", 2, None),
        (1, 0, None, "do it", 1, "refresh"),
        (1, 1, None, "do it", 1, "gripper"),
        (1, 0, 2, "do it", None, "gripper"),  # a check commits two or none, and one keeps the gripper
        (2, 0, None, "do it", None, "gripper"),
        (3, 0, None, "do it", None, None),
        (3, 1, None, "do it", None, "exhausted"),
        (3, 0, 2, "do it", None, "exhausted"),
        (4, 0, None, "do it", None, "exhausted"),
        (4, 1, None, "do it", None, "exhausted"),
        (4, 0, None, "do that", 1, "instruction"),
    ],
)
def test_a_full_query_is_due(
    cursor: int, late: int, fixed: int | None, instruction: str, refresh: int | None, route: Route | None
) -> None:
    actions = steps([0] * 4, [OPEN, OPEN, CLOSED, CLOSED])
    chunk = Chunk(actions, instruction="do it", cursor=cursor, late=late, fixed=fixed)
    assert chunk.due(instruction, refresh) == route


def test_a_new_environment_has_no_chunk_and_a_query_no_time() -> None:
    assert (Chunk().cursor, Chunk().due("do it", None)) == (0, "start")
    query = Query(np.zeros((1, Dims().A), np.float32), "full")
    assert (query.ms, query.skipped) == (0, 0)
    guess = Guess(np.zeros(1, np.int64), np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, bool))
    for record, name in ((query, "ms"), (guess, "finite")):
        with pytest.raises(AttributeError):
            setattr(record, name, 1)
