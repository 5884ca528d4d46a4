"""The decisions by tables, and what must hold for all of them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rsd_trt.config import ARM_DIMS
from rsd_trt.models import components
from rsd_trt.runtime.speculate import (
    Actions,
    Checks,
    RandomAcceptance,
    Route,
    agreeing_prefix,
    agreeing_steps,
    agreeing_token_steps,
    commit_accepted,
    commit_full,
    gripper_holds,
    refresh_due,
    route_checked,
)

STEPS = 8
booleans = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)
prefixes = st.integers(0, STEPS)
committed = st.integers(1, STEPS)


def grippers(*signs: float) -> Actions:
    """A chunk [1, T, A] with these gripper commands."""
    chunk = np.zeros((1, len(signs), ARM_DIMS + 1), np.float32)
    chunk[0, :, ARM_DIMS] = signs
    return chunk


# Few values, so that many steps agree and many differences are just the tolerance.
chunks = arrays(
    np.float32,
    (2, STEPS, ARM_DIMS + 1),
    elements=st.sampled_from([0.0, -0.0, 0.25, 0.5, -0.5, 1.0, np.inf, np.nan]),
)


@given(a=chunks, b=chunks, tolerance=st.sampled_from([0.0, 0.25, 0.5]))
def test_the_host_decides_as_the_device_does(a: Actions, b: Actions, tolerance: float) -> None:
    limits = np.full(ARM_DIMS, tolerance, np.float32)
    there = components.agreeing_steps(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(limits))
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        assert agreeing_steps(a, b, limits).tolist() == there.tolist()


@pytest.mark.parametrize(
    ("passes", "prefix"),
    [([1, 1, 1, 1], 4), ([1, 1, 0, 1], 2), ([0, 1, 1, 1], 0), ([1, 0, 0, 0], 1), ([], 0)],
)
def test_prefix_table(passes: list[int], prefix: int) -> None:
    assert agreeing_prefix(np.array([passes], bool)).tolist() == [prefix]


@given(rows=st.lists(booleans, min_size=1, max_size=4))
def test_a_prefix_ends_before_the_first_disagreement(rows: list[list[bool]]) -> None:
    for n, row in zip(agreeing_prefix(np.array(rows)).tolist(), rows, strict=True):
        assert all(row[:n])
        assert n == len(row) or not row[n]


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
    assert gripper_holds(grippers(*signs), np.array([before])).tolist() == [holds]


@given(passes=booleans, closed=booleans, before=st.booleans())
def test_a_gripper_switch_ends_the_prefix(passes: list[bool], closed: list[bool], before: bool) -> None:
    signs = [1.0 if c else -1.0 for c in closed]
    holds = gripper_holds(grippers(*signs), np.array([1.0 if before else -1.0]))
    n = int(agreeing_prefix(np.array([passes]) & holds)[0])
    assert len({before, *closed[:n]}) == 1


@pytest.mark.parametrize(
    ("equal", "share", "agrees"), [(4, 1.0, True), (3, 1.0, False), (3, 0.75, True), (2, 0.75, False), (0, 0.01, False)]
)
def test_token_rule_table(equal: int, share: float, agrees: bool) -> None:
    chunk = np.zeros((1, 2, 2, 2), np.int64)
    draft = chunk.copy()
    draft[0, 1].reshape(-1)[equal:] = 1
    assert agreeing_token_steps(draft, chunk, share).tolist() == [[True, agrees]]


@given(prefix=st.integers(1, STEPS), steps=committed)
def test_an_accepted_query_commits_all_that_it_may(prefix: int, steps: int) -> None:
    count = commit_accepted(prefix, steps)
    assert 1 <= count <= min(prefix, steps)
    assert count in (prefix, steps)


@given(prefix=prefixes, steps=committed)
def test_a_full_query_commits_the_prefix_at_most_but_one_at_least(prefix: int, steps: int) -> None:
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
    assert route_checked(prefix, left, steps) == route


@pytest.mark.parametrize("refresh", [1, 2, 5])
def test_every_refreshth_query_is_a_full_query(refresh: int) -> None:
    due = []
    accepted = 0
    for _ in range(12):
        due.append(refresh_due(accepted, refresh))
        accepted = 0 if due[-1] else accepted + 1
    full = [i for i, forced in enumerate(due) if forced]
    assert full == list(range(refresh - 1, 12, refresh))


rules = st.builds(RandomAcceptance, st.floats(0, 1), st.integers(0, 2**32 - 1))
places = st.tuples(st.integers(0, 999), st.integers(0, 999), st.integers(0, 500))  # task, trial, query


@given(rule=rules, query=places, higher=st.floats(0, 1))
def test_a_higher_rate_accepts_what_a_lower_one_does(
    rule: RandomAcceptance, query: tuple[int, ...], higher: float
) -> None:
    other = RandomAcceptance(max(rule.rate, higher), rule.seed)
    assert other.accepts(query) >= rule.accepts(query)
    assert RandomAcceptance(1.0, rule.seed).accepts(query)
    assert not RandomAcceptance(0.0, rule.seed).accepts(query)


def test_acceptance_is_as_frequent_as_it_should_be_and_independent() -> None:
    rate, count = 0.656, 4000
    of_queries = [RandomAcceptance(rate, 7).accepts((3, 4, query)) for query in range(count)]
    of_episodes = [RandomAcceptance(rate, 7).accepts((task, trial, 5)) for task in range(10) for trial in range(400)]
    of_seeds = [RandomAcceptance(rate, seed).accepts((3, 4, 5)) for seed in range(count)]
    for accepted in (of_queries, of_episodes, of_seeds):
        assert sum(accepted) / count == pytest.approx(rate, abs=0.03)  # four standard deviations
    assert len({tuple(accepted) for accepted in (of_queries, of_episodes, of_seeds)}) == 3


def test_what_is_accepted_does_not_change_between_versions() -> None:
    rule = RandomAcceptance(0.5, 7)
    assert [int(rule.accepts((3, 4, query))) for query in range(12)] == [0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("counts", "rate"), [((6, 0, 4), 0.6), ((6, 2, 2), 0.8), ((0, 0, 3), 0.0), ((5, 0, 0), 1.0), ((0, 0, 0), None)]
)
def test_acceptance_in_part_is_acceptance_to_the_control(counts: tuple[int, int, int], rate: float | None) -> None:
    assert Checks(*counts).acceptance_rate == rate


@given(st.lists(st.sampled_from(get_args(Route))))
def test_shares_of_checks_add_up_to_one(routes: list[Route]) -> None:
    shares = list(Checks.of(routes).rates().values())
    names = ("accepted", "partial", "rejected")
    if not (checks := [route for route in routes if route in names]):
        assert shares == [None, None, None]
        return
    assert sum(shares) == pytest.approx(1)
    assert shares == [checks.count(name) / len(checks) for name in names]
