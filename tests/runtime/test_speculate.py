"""The decisions by tables, and what must hold for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rsd_trt.config import ARM_DIMS
from rsd_trt.models import fused
from rsd_trt.runtime.speculate import (
    Acceptance,
    Actions,
    Coin,
    Route,
    acceptance_rate,
    agreeing_prefix,
    agreeing_steps,
    agreeing_token_steps,
    commit_accepted,
    commit_full,
    gripper_holds,
    refresh_due,
    route_tested,
)

STEPS = 8
booleans = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)
prefixes = st.integers(0, STEPS)
committed = st.integers(1, STEPS)


def grippers(*signs: float) -> Actions:
    """A plan [1, T, A] with these gripper commands."""
    plan = np.zeros((1, len(signs), ARM_DIMS + 1), np.float32)
    plan[0, :, ARM_DIMS] = signs
    return plan


# Few values, so that many steps agree and many differences are just the tolerance.
chunks = arrays(
    np.float32,
    (2, STEPS, ARM_DIMS + 1),
    elements=st.sampled_from([0.0, -0.0, 0.25, 0.5, -0.5, 1.0, np.inf, np.nan]),
)


@given(a=chunks, b=chunks, tolerance=st.sampled_from([0.0, 0.25, 0.5]))
def test_the_host_decides_as_the_device_does(a: Actions, b: Actions, tolerance: float) -> None:
    limits = np.full(ARM_DIMS, tolerance, np.float32)
    there = fused.agreeing_steps(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(limits))
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        assert agreeing_steps(a, b, limits).tolist() == there.tolist()


@pytest.mark.parametrize(
    ("dimension", "delta", "agrees"),
    [(0, 0.1, True), (5, 0.1, True), (0, 0.11, False), (5, -0.11, False), (6, 0.5, True), (6, -1.5, False)],
)
def test_agreement_table(dimension: int, delta: float, agrees: bool) -> None:
    first = np.full((1, 2, ARM_DIMS + 1), 0.5, np.float32)
    second = first.copy()
    second[0, 1, dimension] += np.float32(delta)
    limits = np.full(ARM_DIMS, 0.1000001, np.float32)
    assert agreeing_steps(first, second, limits).tolist() == [[True, agrees]]
    second[0, 1, dimension] = np.nan
    assert agreeing_steps(first, second, limits).tolist() == [[True, False]]


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
    plan = np.zeros((1, 2, 2, 2), np.int64)
    draft = plan.copy()
    draft[0, 1].reshape(-1)[equal:] = 1
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


coins = st.builds(Coin, st.floats(0, 1), st.integers(0, 2**32 - 1))
keys = st.tuples(st.integers(0, 999), st.integers(0, 999))


@given(coin=coins, episode=keys, query=st.integers(0, 500), higher=st.floats(0, 1))
def test_a_coin_of_a_higher_rate_accepts_what_a_lower_one_does(
    coin: Coin, episode: tuple[int, int], query: int, higher: float
) -> None:
    other = Coin(max(coin.rate, higher), coin.seed)
    assert other.accepts(episode, query) >= coin.accepts(episode, query)
    assert Coin(1.0, coin.seed).accepts(episode, query)
    assert not Coin(0.0, coin.seed).accepts(episode, query)


def test_coins_fall_as_often_as_they_should_and_apart_from_each_other() -> None:
    rate, count = 0.656, 4000
    of_queries = [Coin(rate, 7).accepts((3, 4), query) for query in range(count)]
    of_episodes = [Coin(rate, 7).accepts((task, trial), 5) for task in range(10) for trial in range(400)]
    of_seeds = [Coin(rate, seed).accepts((3, 4), 5) for seed in range(count)]
    for coins in (of_queries, of_episodes, of_seeds):
        assert sum(coins) / count == pytest.approx(rate, abs=0.03)  # four standard deviations
    assert len({tuple(coins) for coins in (of_queries, of_episodes, of_seeds)}) == 3


def test_a_coin_does_not_change_between_versions() -> None:
    assert [int(Coin(0.5, 7).accepts((3, 4), query)) for query in range(12)] == [0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("counts", "rate"), [((6, 0, 4), 0.6), ((6, 2, 2), 0.8), ((0, 0, 3), 0.0), ((5, 0, 0), 1.0), ((0, 0, 0), None)]
)
def test_acceptance_in_part_is_acceptance_to_the_coin(counts: tuple[int, int, int], rate: float | None) -> None:
    assert acceptance_rate(*counts) == rate


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
