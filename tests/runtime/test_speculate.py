"""The decisions by tables, and what must hold for all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rsd_trt.config import ARM_DIMS
from rsd_trt.runtime.speculate import (
    Acceptance,
    Route,
    agreeing_prefix,
    agreeing_token_steps,
    commit_accepted,
    commit_full,
    gripper_holds,
    refresh_due,
    remaining,
    route_tested,
)

STEPS = 8
booleans = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)
prefixes = st.integers(0, STEPS)
committed = st.integers(1, STEPS)


def grippers(*signs: float) -> Tensor:
    """A plan [1, T, A] with these gripper commands."""
    plan = torch.zeros(1, len(signs), ARM_DIMS + 1)
    plan[0, :, ARM_DIMS] = torch.tensor(signs)
    return plan


@given(cursors=st.lists(st.integers(0, STEPS), min_size=1, max_size=4), trailing=st.sampled_from([(), (3,), (2, 3)]))
def test_remaining_is_slicing(cursors: list[int], trailing: tuple[int, ...]) -> None:
    shape = (len(cursors), STEPS, *trailing)
    chunk = torch.arange(math.prod(shape)).view(shape)
    ahead, length = remaining(chunk, torch.tensor(cursors))
    assert ahead.shape == chunk.shape
    for row, cursor in enumerate(cursors):
        assert length[row] == STEPS - cursor
        assert torch.equal(ahead[row, : STEPS - cursor], chunk[row, cursor:])


@pytest.mark.parametrize(
    ("passes", "length", "prefix"),
    [
        ([1, 1, 1, 1], 4, 4),
        ([1, 1, 0, 1], 4, 2),
        ([0, 1, 1, 1], 4, 0),
        ([1, 1, 1, 1], 3, 3),
        ([1, 1, 1, 1], 0, 0),
        ([1, 0, 0, 0], 3, 1),
    ],
)
def test_prefix_table(passes: list[int], length: int, prefix: int) -> None:
    assert agreeing_prefix(torch.tensor([passes]).bool(), torch.tensor([length])).tolist() == [prefix]


@given(rows=st.lists(st.tuples(booleans, prefixes), min_size=1, max_size=4))
def test_a_prefix_never_passes_a_disagreement_nor_the_end(rows: list[tuple[list[bool], int]]) -> None:
    passes, lengths = torch.tensor([row for row, _ in rows]), torch.tensor([length for _, length in rows])
    for n, (row, length) in zip(agreeing_prefix(passes, lengths).tolist(), rows, strict=True):
        assert n <= length
        assert all(row[:n])
        assert n == length or not row[n]


@pytest.mark.parametrize(
    ("before", "signs", "holds"),
    [
        (-1, [-1, -1, -1], [True, True, True]),
        (1, [-1, -1, -1], [False, True, True]),
        (-1, [-1, 1, 1], [True, False, True]),
        (-1, [1, -1, 1], [False, False, False]),
        (0.2, [0.1, 1, 0.5], [True, True, True]),
        (0, [-1, 0, -0.1], [True, True, True]),
    ],
)
def test_a_gripper_switch_does_not_hold(before: float, signs: list[float], holds: list[bool]) -> None:
    assert gripper_holds(grippers(*signs), torch.tensor([before])).tolist() == [holds]


@given(passes=booleans, closed=booleans, before=st.booleans())
def test_a_gripper_switch_ends_the_prefix(passes: list[bool], closed: list[bool], before: bool) -> None:
    signs = [1.0 if c else -1.0 for c in closed]
    holds = gripper_holds(grippers(*signs), torch.tensor([1.0 if before else -1.0]))
    n = int(agreeing_prefix(torch.tensor([passes]) & holds, torch.tensor([STEPS])))
    assert len({before, *closed[:n]}) == 1


@pytest.mark.parametrize(
    ("equal", "share", "agrees"), [(4, 1.0, True), (3, 1.0, False), (3, 0.75, True), (2, 0.75, False), (0, 0.01, False)]
)
def test_token_rule_table(equal: int, share: float, agrees: bool) -> None:
    plan = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    draft = plan.clone()
    draft[0, 1].view(-1)[equal:] = 1
    assert agreeing_token_steps(draft, plan, share).tolist() == [[True, agrees]]


@given(prefix=st.integers(1, STEPS), steps=committed)
def test_an_accepted_query_commits_all_that_it_may(prefix: int, steps: int) -> None:
    count = commit_accepted(prefix, steps)
    assert 1 <= count <= min(prefix, steps)
    assert count in (prefix, steps)


@given(prefix=prefixes, steps=committed)
def test_a_full_pass_commits_the_prefix_at_most_but_one_at_least(prefix: int, steps: int) -> None:
    count = commit_full(prefix, steps)
    assert 1 <= count <= max(1, min(prefix, steps))
    assert count >= min(prefix, steps)


@pytest.mark.parametrize(
    ("prefix", "left", "steps", "route"),
    [
        (0, 8, 4, "rejected"),
        (0, 1, 4, "rejected"),
        (1, 8, 4, "partial"),
        (3, 8, 4, "partial"),
        (4, 8, 4, "accepted"),
        (8, 8, 4, "accepted"),
        (2, 2, 4, "accepted"),
        (1, 2, 4, "partial"),
        (1, 8, 1, "accepted"),
    ],
)
def test_route_table(prefix: int, left: int, steps: int, route: Route) -> None:
    assert route_tested(prefix, left, steps) == route


@pytest.mark.parametrize("refresh", [1, 2, 5])
def test_every_refreshth_query_is_a_full_pass(refresh: int) -> None:
    due = []
    accepted = 0
    for _ in range(12):
        due.append(refresh_due(accepted, refresh))
        accepted = 0 if due[-1] else accepted + 1
    full = [i for i, forced in enumerate(due) if forced]
    assert full == list(range(refresh - 1, 12, refresh))


@given(st.lists(st.sampled_from(["accepted", "partial", "rejected", "start", "exhausted", "gripper", "refresh"])))
def test_acceptance_shares_add_up_to_one(routes: list[Route]) -> None:
    record = Acceptance()
    for route in routes:
        record.add(route)
    shares = list(record.rates().values())
    tested = sum(route in ("accepted", "partial", "rejected") for route in routes)
    if not tested:
        assert shares == [None, None, None]
        return
    assert sum(shares) == pytest.approx(1)
    assert shares == [routes.count(route) / tested for route in ("accepted", "partial", "rejected")]


def test_each_tested_query_is_counted_once() -> None:
    acceptance = Acceptance()
    for route in ("accepted", "accepted", "partial", "rejected", "start", "fault"):
        acceptance.add(route)  # type: ignore[arg-type]
    assert (acceptance.accepted, acceptance.partial, acceptance.rejected) == (2, 1, 1)
