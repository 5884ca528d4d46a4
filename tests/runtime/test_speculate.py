"""The decisions by tables, and what must hold for all of them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rsd_trt.config import ACTION_DIMS, ARM_DIMS, RULES, RsdConfig, RuleName
from rsd_trt.models import components
from rsd_trt.runtime.speculate import (
    Actions,
    ActionsAgree,
    Check,
    Checks,
    FirstStep,
    Likelihood,
    PathAgrees,
    RandomAcceptance,
    Route,
    Rule,
    TokensAgree,
    Tolerance,
    agreeing_prefix,
    agreeing_steps,
    agreeing_token_steps,
    factor,
    log_likelihood,
    route_checked,
    rule_of,
    steps_until_switch,
    within_limits,
)

STEPS = 8
booleans = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)


def grippers(*signs: float) -> Actions:
    """A chunk [T, A] with these gripper commands."""
    chunk = np.zeros((len(signs), ARM_DIMS + 1), np.float32)
    chunk[:, ARM_DIMS] = signs
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
    assert agreeing_prefix(np.array(passes, bool)) == prefix


@given(row=booleans)
def test_a_prefix_ends_before_the_first_disagreement(row: list[bool]) -> None:
    n = agreeing_prefix(np.array(row))
    assert all(row[:n])
    assert n == len(row) or not row[n]


@pytest.mark.parametrize(
    ("before", "signs", "steps"),
    [
        (-1, [-1, -1, -1], 3),
        (1, [-1, -1, -1], 0),
        (-1, [-1, 1, 1], 1),
        (-1, [1, -1, 1], 0),
        (0.2, [0.1, 1, 0.5], 3),
        (0, [-1, 0, -0.1], 3),
        (1, [], 0),
    ],
)
def test_a_gripper_switch_ends_what_may_be_executed(before: float, signs: list[float], steps: int) -> None:
    assert steps_until_switch(grippers(*signs), before) == steps


@given(closed=booleans, before=st.booleans())
def test_the_gripper_does_not_switch_before_that(closed: list[bool], before: bool) -> None:
    n = steps_until_switch(grippers(*(1.0 if c else -1.0 for c in closed)), 1.0 if before else -1.0)
    assert {before, *closed[:n]} == {before}
    assert n == len(closed) or closed[n] != before


@pytest.mark.parametrize(
    ("equal", "share", "agrees"), [(4, 1.0, True), (3, 1.0, False), (3, 0.75, True), (2, 0.75, False), (0, 0.01, False)]
)
def test_token_rule_table(equal: int, share: float, agrees: bool) -> None:
    chunk = np.zeros((1, 2, 2, 2), np.int64)
    draft = chunk.copy()
    draft[0, 1].reshape(-1)[equal:] = 1
    assert agreeing_token_steps(draft, chunk, share).tolist() == [[True, agrees]]


TOLERANCE = Tolerance((0.5,) * ARM_DIMS)
LEVELS = 3


def case(
    guess: list[float], left: list[float], ahead: int = 2, closed: tuple[int, ...] = (), age: int = 1, **fields: object
) -> Check:
    """A check of chunks whose arm dimensions are all alike. closed: steps of `left` at which its gripper is another."""
    there = grippers(*[-1.0] * len(left))
    there[:, :ARM_DIMS] = np.array(left, np.float32)[:, None]
    there[list(closed), ARM_DIMS] = 1
    now = grippers(*[-1.0] * len(guess))
    now[:, :ARM_DIMS] = np.array(guess, np.float32)[:, None]
    values: dict[str, object] = {
        "left_tokens": np.zeros((len(left), 2, 3), np.int64),
        "guess_tokens": np.zeros((len(guess), 2, 2), np.int64),
        "logits": np.zeros((len(guess), 2, LEVELS), np.float32),
    }
    return Check(there, guess=now, ahead=ahead, age=age, query=(0, 0, 1), **{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "check", "steps", "score"),
    [
        (FirstStep(TOLERANCE), case([0.5, 9, 9], [0, 0, 0]), 3, 1.0),
        (FirstStep(TOLERANCE), case([0.6, 0, 0], [0, 0, 0]), 0, 1.2),
        (FirstStep(TOLERANCE), case([0, 0, 0], [0, 0, 0], closed=(0,)), 0, 0.0),
        (FirstStep(TOLERANCE), case([0.1] * 4, [0]), 1, 0.2),
        (ActionsAgree(TOLERANCE), case([0, 0.5, 0.6, 0], [0, 0, 0, 0]), 2, None),
        (ActionsAgree(TOLERANCE), case([0, 0, 0, 0], [0, 0, 0], closed=(1,)), 1, None),
        # the sum of the steps ahead counts: noise cancels, drift does not
        (PathAgrees(TOLERANCE), case([0.4, -0.4, 9], [0, 0, 0]), 3, 0.8),
        (PathAgrees(TOLERANCE), case([0.3, 0.3, 0], [0, 0, 0]), 0, 1.2),
        (PathAgrees(TOLERANCE), case([0.3, 0.3, 0], [0, 0, 0], ahead=1), 3, 0.6),
        (PathAgrees(TOLERANCE), case([0.9, -0.9, 0], [0, 0, 0]), 0, 1.8),  # on the way, too
        (PathAgrees(TOLERANCE), case([0, 0, 0], [0, 0, 0], closed=(1,)), 0, 0.0),
        (PathAgrees(TOLERANCE), case([0, 0, 0], [0, 0, 0], closed=(2,)), 3, 0.0),
        (TokensAgree(1.0), case([9, 9, 9], [0, 0]), 2, None),
        (Likelihood(-1.2), case([9] * 3, [0] * 2), 2, -np.log(LEVELS)),
        (Likelihood(-1.0), case([9] * 3, [0] * 2), 0, -np.log(LEVELS)),
        (Likelihood(-1.2, sure=-1.15), case([9] * 3, [0] * 2), 2, -np.log(LEVELS)),
        (Likelihood(-1.2, sure=-1.05), case([9] * 3, [0] * 2), 1, -np.log(LEVELS)),
        (Likelihood(-1.2, sure=-1.05), case([9] * 3, [0] * 3, fewest=2), 2, -np.log(LEVELS)),
        (Likelihood(-1.0, sure=-0.5), case([9] * 3, [0] * 2), 0, -np.log(LEVELS)),
        (Likelihood(-2.4, (1.0, 0.5), sure=-2.1), case([9] * 3, [0] * 2, age=7), 1, -np.log(LEVELS)),
        # a factor by the chunk's age; the last one is that of all older
        (FirstStep(Tolerance((0.5,) * ARM_DIMS, (1.0, 0.5))), case([0.3], [0], age=0), 1, 0.6),
        (FirstStep(Tolerance((0.5,) * ARM_DIMS, (1.0, 0.5))), case([0.3], [0], age=7), 0, 1.2),
        (Likelihood(-2.0, (1.0, 0.5)), case([9] * 3, [0] * 2, age=7), 0, -np.log(LEVELS)),
    ],
)
def test_rule_table(rule: Rule, check: Check, steps: int, score: float | None) -> None:
    found = rule(check)
    assert found.steps == steps
    assert found.score == (None if score is None else pytest.approx(score))


def test_the_likelihood_is_of_the_chunks_own_coarsest_tokens_of_the_steps_ahead() -> None:
    logits = np.zeros((3, 2, LEVELS), np.float32)
    logits[0, :, 2] = logits[1, :, 1] = 50
    tokens = np.zeros((3, 2, 3), np.int64)
    tokens[0, :, 0], tokens[1, :, 0] = 2, 1
    for ahead, score in ((1, 0.0), (2, 0.0), (3, -np.log(LEVELS) / 3)):
        check = case([9] * 3, [0] * 3, ahead=ahead, logits=logits, left_tokens=tokens)
        assert Likelihood(-1.0)(check).score == pytest.approx(score, abs=1e-6)
    assert Likelihood(-1.0)(case([9] * 3, [0] * 3, ahead=2, logits=logits)).steps == 0
    expected = torch.log_softmax(torch.from_numpy(logits), -1).gather(-1, torch.from_numpy(tokens[..., :1])).mean()
    assert log_likelihood(logits, tokens[..., 0]) == pytest.approx(float(expected))


@given(st.integers(1, 6), st.integers(1, 16), st.integers(2, 64), st.integers(0, 2**31))
def test_the_likelihood_is_that_of_a_softmax_for_few_logits_and_for_many(t: int, d: int, k: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    logits, tokens = draw.normal(0, 30, (t, d, k)).astype(np.float32), draw.integers(0, k, (t, d))
    soft = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    expected = float(soft.gather(-1, torch.from_numpy(tokens)[..., None]).mean())
    assert log_likelihood(logits, tokens) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_actions_within_limits_are_a_copy_and_others_are_counted_by_step() -> None:
    low, high = np.full(ACTION_DIMS, -1, np.float32), np.full(ACTION_DIMS, 1, np.float32)
    chunk = np.zeros((3, ACTION_DIMS), np.float32)
    same, outside = within_limits(chunk, low, high)
    same[0] = 9
    assert outside == 0 and not chunk.any()
    chunk[0, :2], chunk[2, 6] = (2, -3), np.nan
    clipped, outside = within_limits(chunk, low, high)
    assert outside == 2 and clipped[0, :2].tolist() == [1, -1] and not clipped[1].any()


@pytest.mark.parametrize("name", RULES)
def test_every_rule_that_a_bundle_may_name_is_there(name: RuleName) -> None:
    rule = rule_of(RsdConfig(rule=name, threshold=-9.0))
    assert rule(case([0] * 3, [0] * 2)).steps == 2
    assert factor((), 3) == 1


@pytest.mark.parametrize(
    ("steps", "ahead", "route"),
    [
        (0, 4, "rejected"),
        (1, 4, "partial"),
        (3, 4, "partial"),
        (4, 4, "accepted"),
        (8, 4, "accepted"),
        (1, 1, "accepted"),
    ],
)
def test_route_table(steps: int, ahead: int, route: Route) -> None:
    assert route_checked(steps, ahead) == route


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
