"""What shadow mode records between queries: how far a guess is from what is left of the chunk, by table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rsd_trt.config import ARM_DIMS, Dims
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.forward import Draft
from rsd_trt.runtime.speculate import Actions

OPEN, CLOSED = -1.0, 1.0


def steps(arm: list[float], gripper: list[float]) -> Actions:
    """[T, A]: step t has `arm[t]` in every arm dimension."""
    return np.array([[a] * ARM_DIMS + [g] for a, g in zip(arm, gripper, strict=True)], np.float32)


def chunk(arm: list[float], gripper: list[float], cursor: int) -> Chunk:
    return Chunk(steps(arm, gripper), np.zeros(1, np.int64), tuple(g > 0 for g in gripper), cursor)


@pytest.mark.parametrize(
    ("old", "cursor", "new", "most", "gap"),
    [
        # arm differences from the cursor on, whichever is larger
        (([0, 0.1, 0.2, 0.3], [OPEN] * 4), 1, ([0.3, 0.1, 0.3, 9], [OPEN] * 4), 3, [(0.2, 0), (0.1, 0), (0, 0)]),
        # at most `most` steps
        (([0, 0.1, 0.2, 0.3], [OPEN] * 4), 1, ([0.3, 0.1, 0.3, 9], [OPEN] * 4), 1, [(0.2, 0)]),
        # nothing behind the chunk's own switch of the gripper, and nothing at all if that is next
        (([0] * 4, [OPEN, OPEN, CLOSED, CLOSED]), 1, ([0] * 4, [OPEN] * 4), 4, [(0, 0)]),
        (([0] * 4, [OPEN, CLOSED, CLOSED, CLOSED]), 1, ([0] * 4, [OPEN] * 4), 4, []),
        # the gripper's sign counts, not its size; zero is open
        (([0] * 3, [CLOSED] * 3), 1, ([0] * 3, [0.5, -0.5, 0]), 2, [(0, 0), (0, 1)]),
        (([0] * 3, [OPEN] * 3), 1, ([0] * 3, [0.0, 0.2, 0]), 2, [(0, 0), (0, 1)]),
        (([0] * 3, [OPEN, 0.0, 0.0]), 1, ([0] * 3, [0.0, 0.2, 0]), 2, [(0, 0), (0, 1)]),
        # four decimals
        (([0] * 2, [OPEN] * 2), 1, ([0.123456, 0], [OPEN] * 2), 1, [(0.1235, 0)]),
    ],
)
def test_gap_table(
    old: tuple[list[float], list[float]],
    cursor: int,
    new: tuple[list[float], list[float]],
    most: int,
    gap: list[tuple[float, float]],
) -> None:
    found = chunk(*old, cursor).gap(steps(*new), most)
    assert found == tuple((*[pytest.approx(arm)] * ARM_DIMS, gripper) for arm, gripper in gap)
    assert all(round(x, 4) == x and len(step) == Dims().A for step in found for x in step)


def test_a_new_environment_has_no_chunk_and_a_query_no_time() -> None:
    assert (Chunk().cursor, Chunk().accepted_in_a_row, Chunk().forced(8, 8)) == (0, 0, "start")
    query = Query(np.zeros((1, Dims().A), np.float32), "full")
    assert query.ms == 0
    draft = Draft(np.zeros(1, np.int64), np.zeros(1, np.float32), np.zeros(1, bool), np.ones(1, bool))
    for record, name in ((query, "ms"), (draft, "finite")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, 1)
