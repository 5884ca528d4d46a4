"""Against published values, scipy, and properties that hold for all data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from rsd_trt.eval.statistics import (
    LEAST_RESAMPLED,
    RESAMPLES,
    _percentile_interval,
    bootstrap_share,
    bootstrap_speedup,
    groups_to_show,
    holm,
    mcnemar_exact,
    pairs_to_show,
    percentiles,
    power_of_mcnemar,
    sign_flip,
    smallest_difference,
    smallest_provable_loss,
    what_can_be_shown,
    wilson,
)

Sample = NDArray[np.float64]
COUNTS = st.integers(0, 600)
EPISODES = st.lists(
    st.tuples(st.floats(0.5, 1000), st.integers(1, 300), st.floats(0.5, 1000), st.integers(1, 300)),
    min_size=LEAST_RESAMPLED,
    max_size=30,
)


# Newcombe (1998), Statistics in Medicine 17, table I.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(COUNTS, COUNTS)
def test_wilson_is_scipys_and_holds_the_rate(successes: int, failures: int) -> None:
    trials = successes + failures
    assume(trials)
    found = wilson(successes, trials)
    assert found is not None
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found[0] <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= found[1] <= 1


def test_wilson_without_trials() -> None:
    assert wilson(0, 0) is None


def test_holm_by_hand() -> None:
    """In order: .005 x 4, .01 x 3, .03 x 2, and .04 is raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.8]) == (1.0, 1.0)
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_adjusts_upwards_keeps_the_order_and_is_below_bonferroni(ps: list[float]) -> None:
    found = holm(ps)
    for p, adjusted in zip(ps, found, strict=True):
        assert p <= adjusted <= min(1.0, len(ps) * p) + 1e-12
    order = sorted(range(len(ps)), key=ps.__getitem__)
    assert [found[i] for i in order] == sorted(found)


def test_mcnemar_published() -> None:
    """Fagerland, Lydersen and Laake (2013), BMC Medical Research Methodology 13:91, table 3: airway
    hyper-responsiveness before and after transplantation, 1 and 7 discordant pairs."""
    assert mcnemar_exact(1, 7).p == pytest.approx(0.0703, abs=5e-5)


@given(COUNTS, COUNTS)
def test_mcnemar_is_scipys_binomial_test(gained: int, lost: int) -> None:
    found = mcnemar_exact(gained, lost)
    assert (found.gained, found.lost) == (gained, lost)
    assert found.p == mcnemar_exact(lost, gained).p
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


def pairs(rows: list[tuple[float, int, float, int]]) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    return [(ms, steps) for ms, steps, _, _ in rows], [(ms, steps) for _, _, ms, steps in rows]


def test_bootstrap_speedup_is_scipys() -> None:
    random = np.random.default_rng(3)
    steps = random.integers(60, 220, (2, 200))
    ms = steps * random.gamma(20, 1, (2, 200)) * np.array([[1.0], [0.6]])

    def ratio(a_ms: Sample, a_steps: Sample, b_ms: Sample, b_steps: Sample, axis: int) -> Sample:
        return (a_ms.sum(axis) / a_steps.sum(axis)) / (b_ms.sum(axis) / b_steps.sum(axis))

    expected = stats.bootstrap(
        (ms[0], steps[0], ms[1], steps[1]),
        ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    runs = [list(zip(map(float, ms[i]), map(int, steps[i]), strict=True)) for i in range(2)]
    assert bootstrap_speedup(*runs) == pytest.approx((expected.low, expected.high), rel=0.005)


@given(EPISODES, st.floats(0.1, 10))
def test_bootstrap_speedup_scales_and_repeats(rows: list[tuple[float, int, float, int]], factor: float) -> None:
    baseline, other = pairs(rows)
    found = bootstrap_speedup(baseline, other)
    assert found is not None
    assert found == bootstrap_speedup(baseline, other)
    assert 0 < found[0] <= found[1]
    faster = bootstrap_speedup([(ms * factor, steps) for ms, steps in baseline], other)
    assert faster == pytest.approx((found[0] * factor, found[1] * factor))


@given(EPISODES)
def test_episodes_are_resampled_in_pairs(rows: list[tuple[float, int, float, int]]) -> None:
    baseline, _ = pairs(rows)
    halved = [(ms / 2, steps) for ms, steps in baseline]
    assert bootstrap_speedup(baseline, halved) == pytest.approx((2, 2))


def test_bootstrap_speedup_of_too_little() -> None:
    few = [(10.0, 5)] * (LEAST_RESAMPLED - 1)
    assert bootstrap_speedup(few, few) is None
    assert bootstrap_speedup([], []) is None
    enough, idle = [(10.0, 5)] * LEAST_RESAMPLED, [(0.0, 0)] * LEAST_RESAMPLED
    assert bootstrap_speedup(enough, idle) is None
    once = [(0.0, 0)] * (LEAST_RESAMPLED - 1) + [(10.0, 5)]  # some resamples do not hold the only step
    assert bootstrap_speedup(enough, once) is None
    with pytest.raises(ValueError, match="zip"):
        bootstrap_speedup(enough, few)


def test_bootstrap_share_takes_episodes_for_the_unit() -> None:
    """40 episodes of 50 queries, each all accepted or all rejected: as uncertain as 40 coin tosses, not as 2000."""
    parts, wholes = [50, 0] * 20, [50] * 40
    found = bootstrap_share(parts, wholes)
    assert found == pytest.approx(wilson(20, 40), abs=0.02)
    assert bootstrap_share(parts[:8], wholes[:8]) is None
    assert bootstrap_share([0] * 40, [0] * 40) is None


def test_smallest_provable_loss_is_minimal() -> None:
    assert smallest_provable_loss(500) == 6
    assert mcnemar_exact(0, 6).p < 0.05 <= mcnemar_exact(0, 5).p
    assert smallest_provable_loss(6) == 6
    assert smallest_provable_loss(5) is None
    assert smallest_provable_loss(0) is None


def test_what_can_be_shown() -> None:
    assert what_can_be_shown(500) == (
        "500 episodes: a rate near 90% is known to about ±2.6 points; against another run on the same initial "
        "states, the smallest loss that can be shown is, at best (none gained), 6 episodes (1.2 points)"
    )
    assert what_can_be_shown(20).endswith("6 episodes (30.0 points)")
    assert what_can_be_shown(5).endswith("too few to show any loss against another run on the same initial states")
    assert what_can_be_shown(1).startswith("1 episode: ")
    assert what_can_be_shown(0) == "0 episodes show nothing"


def test_percentiles() -> None:
    found = percentiles([float(i) for i in range(1, 101)])
    assert found == pytest.approx(
        {"n": 100, "mean": 50.5, "p50": 50.5, "p90": 90.1, "p95": 95.05, "p99": 99.01, "max": 100}
    )
    assert percentiles([]) is None


def test_mcnemar_of_many_pairs_is_a_number() -> None:
    assert math.isfinite(mcnemar_exact(5000, 5200).p)


def test_a_share_has_an_interval_from_the_least_number_of_episodes_on() -> None:
    parts, wholes = [1.0, 2.0] * LEAST_RESAMPLED, [4.0] * 2 * LEAST_RESAMPLED
    assert bootstrap_share(parts[:LEAST_RESAMPLED], wholes[:LEAST_RESAMPLED]) is not None
    assert bootstrap_share(parts[: LEAST_RESAMPLED - 1], wholes[: LEAST_RESAMPLED - 1]) is None


def test_an_interval_is_the_middle_95_percent() -> None:
    assert _percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))


def test_without_any_time_there_is_no_speedup() -> None:
    idle, busy = [(0.0, 5)] * LEAST_RESAMPLED, [(10.0, 5)] * LEAST_RESAMPLED
    assert bootstrap_speedup(idle, busy) is None
    assert bootstrap_speedup(busy, idle) is None


def test_a_loss_is_proved_below_alpha_and_not_at_it() -> None:
    assert mcnemar_exact(0, 3).p == 0.25
    assert smallest_provable_loss(9, alpha=0.25) == 4


def test_an_episode_without_a_step_does_not_hide_the_others() -> None:
    episodes = [(0.0, 0), *[(10.0, 5)] * 5 * LEAST_RESAMPLED]
    assert bootstrap_speedup(episodes, episodes) == (1.0, 1.0)


def test_a_part_without_its_whole_is_a_bug() -> None:
    with pytest.raises(ValueError, match="shorter"):
        bootstrap_share([1.0] * 2 * LEAST_RESAMPLED, [4.0] * LEAST_RESAMPLED)


NONE_REACHED = 1 / (RESAMPLES + 1)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([], 1.0),
        ([0.0] * 5, 1.0),
        ([3.0], 1.0),
        ([0.1, 0.2, -0.3], 1.0),
        ([1.0] * 60, NONE_REACHED),
        ([-2.5] * 60 + [0.0], NONE_REACHED),
    ],
)
def test_the_sign_flip_test_where_no_coin_matters(differences: list[float], p: float) -> None:
    assert sign_flip(differences) == p


@pytest.mark.parametrize("differences", [[0.5, 1.0, 1.5, 2.0], [0.5, -1.0, 1.5, 2.0], [4.0, -1.0, -1.0, 0.5, 3.0, 0.0]])
def test_the_sign_flip_test_against_all_signs(differences: list[float]) -> None:
    signs = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(sum(sign * value for sign, value in zip(row, differences, strict=True))) for row in signs]
    exact = sum(value >= abs(sum(differences)) for value in sums) / len(sums)
    assert sign_flip(differences) == exact
    drawn = sign_flip([*differences, *[1e-12] * 20])  # too many for all signs
    assert drawn == pytest.approx(exact, abs=0.015)  # three standard errors


@pytest.mark.parametrize(
    ("pairs", "gained", "lost", "alpha"), [(60, 0.3, 0.1, 0.05), (40, 0.2, 0.0, 0.05), (25, 0.3, 0.3, 0.2)]
)
def test_the_power_of_mcnemars_test_is_that_of_all_outcomes(
    pairs: int, gained: float, lost: float, alpha: float
) -> None:
    outcomes = itertools.product(range(pairs + 1), repeat=2)
    counts = np.array([(a, b, pairs - a - b) for a, b in outcomes if a + b <= pairs])
    likely = stats.multinomial(pairs, (gained, lost, 1 - gained - lost)).pmf(counts)
    shown = np.array([mcnemar_exact(int(a), int(b)).p < alpha for a, b, _ in counts])
    assert power_of_mcnemar(pairs, gained, lost, alpha) == pytest.approx(likely[shown].sum(), abs=1e-6)


def test_the_smallest_difference_has_the_power_and_a_smaller_one_has_not() -> None:
    found = smallest_difference(450, tests=4, discordant=0.1)
    assert found == pytest.approx(0.051)
    for difference, enough in ((found, True), (found - 0.001, False)):
        power = power_of_mcnemar(450, (0.1 + difference) / 2, (0.1 - difference) / 2, 0.05 / 4)
        assert (power >= 0.8) == enough
    assert smallest_difference(5) is None
    assert (smallest_difference(6) or 0) > 0.9


@pytest.mark.parametrize(("gained", "lost", "tests"), [(71, 36, 1), (71, 36, 10), (18, 48, 4)])
def test_the_pairs_that_would_show_a_difference_have_the_power(gained: int, lost: int, tests: int) -> None:
    found = pairs_to_show(450, gained, lost, tests)
    assert found is not None
    assert power_of_mcnemar(found, gained / 450, lost / 450, 0.05 / tests) == pytest.approx(0.8, abs=0.04)
    assert pairs_to_show(450, 5, 5, tests) is None


def test_the_groups_that_would_show_a_difference_have_the_power() -> None:
    measured = (3.0, -1.0, 2.0, 0.5, 1.5, -0.5)  # a mean of 0.92 and a deviation of 1.5
    found = groups_to_show(measured)
    assert found is not None
    generator = np.random.default_rng(0)
    shown = [sign_flip(generator.normal(0.917, 1.53, found).tolist()) < 0.05 for _ in range(150)]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.1)
    assert (groups_to_show((1.0,) * 4), groups_to_show((2.0,)), groups_to_show((1.0,) * 4, tests=10)) == (6, 6, 9)
    assert 2 / 2**6 < 0.05 < 2 / 2**5, "fewer of one sign show nothing"
    assert groups_to_show((5.0, 5.0, 0.0, 5.0, 5.0, 5.0)) == 8, "one of six has no difference"
    assert groups_to_show((1.0, -1.0)) is None
