"""Statistics of success rates and latencies, as pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
PERCENTILES = (50, 90, 95, 99)
POWER = 0.8  # with which a difference that there is has to be shown
RESAMPLES = 10_000
SEED = 0  # of every resampling: the same results give the same intervals
CHUNK = 500  # resamples at a time: bounds the memory for any number of episodes
LEAST_RESAMPLED = 10  # with fewer episodes a bootstrap interval is far too narrow to be shown

Interval = tuple[float, float]


def wilson(successes: int, trials: int) -> Interval | None:
    """Wilson's score interval of a success rate (Wilson 1927); None without trials."""
    if trials == 0:
        return None
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class McNemar:
    """The pairs whose two outcomes differ, and how likely as uneven a split is by chance alone."""

    gained: Annotated[int, "pairs in which only the second run succeeded"]
    lost: Annotated[int, "pairs in which only the first run succeeded"]
    p: Annotated[float, "two-sided, exact; of trials that share initial states, the sign-flip test of the states' sums"]


def mcnemar_exact(gained: int, lost: int) -> McNemar:
    """McNemar's test (McNemar 1947) in its exact form: under the null hypothesis `gained` is binomial with p = 1/2.
    Without discordant pairs p is 1."""
    n = gained + lost
    tail = ways = 1
    for k in range(min(gained, lost)):
        ways = ways * (n - k) // (k + 1)  # n over k + 1, exactly
        tail += ways
    return McNemar(gained, lost, min(1.0, 2 * tail / 2**n))


def holm(ps: Sequence[float]) -> tuple[float, ...]:
    """Each p adjusted for so many tests: no true null hypothesis among them is rejected with more than the level's
    probability (Holm 1979)."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return tuple(adjusted)


def bootstrap_speedup(before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]) -> Interval | None:
    """95% interval of how many times less an action costs in `after` than in `before`.

    Entry i of both is (cost, steps) of the same episode. Episodes are resampled in pairs, and the percentiles of
    sum(cost) / sum(steps) of the one over the other are taken (Efron 1979). None for fewer than `LEAST_RESAMPLED`
    episodes, or where a sample of a run has no step or no cost.
    """
    columns = np.asarray([(*a, *b) for a, b in zip(before, after, strict=True)], np.float64).reshape(-1, 4)
    if len(columns) < LEAST_RESAMPLED or not columns.sum(0).all():
        return None
    sums = _resampled_sums(columns)  # [R, 4]
    divisor = sums[:, 1] * sums[:, 2]
    return _percentile_interval((sums[:, 0] * sums[:, 3]) / divisor) if divisor.all() else None


def bootstrap_share(parts: Sequence[float], wholes: Sequence[float]) -> Interval | None:
    """95% interval of sum(parts) / sum(wholes), entry i of both being of the same episode.

    Queries of one episode are alike, so episodes are resampled and not queries (Efron 1979). None for fewer than
    `LEAST_RESAMPLED` episodes with a whole.
    """
    columns = np.asarray([row for row in zip(parts, wholes, strict=True) if row[1]], np.float64).reshape(-1, 2)
    if len(columns) < LEAST_RESAMPLED:
        return None
    sums = _resampled_sums(columns)  # [R, 2]
    return _percentile_interval(sums[:, 0] / sums[:, 1])


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of paired differences whose mean is 0 by hypothesis: how often their sum is as far from 0 or further
    when every sign is drawn by a coin (Fisher 1935). Of all signs where there are at most `RESAMPLES`, else of so many
    draws. McNemar's test is its case of differences that are -1, 0 or 1."""
    values = np.asarray([d for d in differences if d], np.float64)
    if 2 ** len(values) <= RESAMPLES:
        every = np.asarray(list(itertools.product((-1.0, 1.0), repeat=len(values))), np.float64)
        return float((np.abs(every @ values) >= abs(values.sum()) - 1e-9).mean())
    generator, reached = np.random.default_rng(SEED), 0
    for _ in range(RESAMPLES // CHUNK):
        sums = generator.choice((-1.0, 1.0), (CHUNK, len(values))) @ values
        reached += int((np.abs(sums) >= abs(values.sum()) - 1e-9).sum())
    return (reached + 1) / (RESAMPLES + 1)


def smallest_provable_loss(episodes: int, alpha: float = 1 - CONFIDENCE) -> int | None:
    """The fewest episodes that, all lost and none gained, make McNemar's exact p less than `alpha`; None where there
    are not as many."""
    return next((lost for lost in range(1, episodes + 1) if mcnemar_exact(0, lost).p < alpha), None)


def power_of_mcnemar(pairs: int, gained: float, lost: float, alpha: float) -> float:
    """How likely McNemar's exact test of so many pairs shows a difference at level `alpha` if a pair is gained or lost
    with these probabilities."""
    counts = np.arange(pairs + 1)
    factorials = np.array([math.lgamma(n + 1.0) for n in counts])
    share = gained / (gained + lost)

    def binomial(n: int, p: float) -> NDArray[np.float64]:
        """Probabilities of 0..n."""
        if p in (0.0, 1.0):
            return np.eye(n + 1)[round(p) * n]
        k = counts[: n + 1]
        logs = factorials[n] - factorials[k] - factorials[n - k] + k * math.log(p) + (n - k) * math.log1p(-p)
        return np.exp(logs)

    power = 0.0
    for discordant, probability in enumerate(binomial(pairs, gained + lost)):
        if probability > 1e-9:
            tails = np.cumsum(binomial(discordant, 0.5))
            beyond = int(np.searchsorted(tails, alpha / 2))  # counts of the rarer outcome that are rare enough
            likely = binomial(discordant, share)
            power += probability * (likely[:beyond].sum() + likely[discordant + 1 - beyond :].sum())
    return power


def smallest_difference(
    pairs: int, tests: int = 1, discordant: float = 0.1, power: float = POWER, alpha: float = 1 - CONFIDENCE
) -> float | None:
    """The smallest true difference of two success rates that McNemar's exact test of so many pairs shows with this
    power, to a tenth of a point. Holm's adjustment for `tests` is counted as `alpha` / `tests`, its strictest step.
    discordant: share of pairs whose two outcomes differ, or the difference, where that is more. None: not even a
    difference of 1."""

    def shown(points: int) -> bool:
        difference = points / 1000
        share = max(discordant, difference)
        return power_of_mcnemar(pairs, (share + difference) / 2, (share - difference) / 2, alpha / tests) >= power

    if not shown(1000):
        return None
    low, high = 0, 1000  # tenths of a point: one that is not shown, and one that is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high / 1000


def pairs_to_show(pairs: int, gained: int, lost: int, tests: int = 1) -> int | None:
    """About how many pairs McNemar's test would need to show a difference as large as this one with `POWER` (Connor
    1987), at Holm's strictest level of so many tests; None where there is no difference."""
    share, difference = (gained + lost) / pairs, abs(gained - lost) / pairs
    if not difference:
        return None
    level, likely = _deviates(tests)
    return math.ceil(((level * math.sqrt(share) + likely * math.sqrt(share - difference**2)) / difference) ** 2)


def groups_to_show(differences: Sequence[float], tests: int = 1) -> int | None:
    """The same of `sign_flip` over groups whose differences are spread like these. It needs some at the least: n groups
    of one sign have p = 2 / 2^n, and those without a difference do not count."""
    if not (average := abs(fmean(differences))):
        return None
    fewest = math.floor(math.log2(2 * tests / (1 - CONFIDENCE))) + 1
    fewest = math.ceil(fewest * len(differences) / sum(map(bool, differences)))
    spread = stdev(differences) if len(differences) > 1 else 0.0
    return max(fewest, math.ceil((sum(_deviates(tests)) * spread / average) ** 2))


def _deviates(tests: int) -> tuple[float, float]:
    """The normal deviates of the two-sided level, divided by the number of tests, and of `POWER`."""
    normal = NormalDist()
    return normal.inv_cdf(1 - (1 - CONFIDENCE) / tests / 2), normal.inv_cdf(POWER)


def what_can_be_shown(episodes: int, near: float = 0.9) -> str:
    """One line for before a run: how well it will know a success rate near `near`, and what loss it can show."""
    interval = wilson(round(near * episodes), episodes)
    if interval is None:
        return "0 episodes show nothing"
    points = (interval[1] - interval[0]) / 2 * 100
    line = f"{counted(episodes, 'episode')}: a rate near {near:.0%} is known to about ±{points:.1f} points; "
    loss = smallest_provable_loss(episodes)
    if loss is None:
        return line + "too few to show any loss against another run on the same initial states"
    return line + (
        "against another run on the same initial states, the smallest loss that can be shown is, at best (none "
        f"gained), {loss} episodes ({loss / episodes * 100:.1f} points)"
    )


def counted(number: int, noun: str) -> str:
    """`1 episode`, `2 episodes`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """n, mean, p50, p90, p95, p99 and max; None without values."""
    if not values:
        return None
    found = np.percentile(values, PERCENTILES)
    return {
        "n": len(values),
        "mean": float(np.mean(values)),
        **{f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)},
        "max": float(np.max(values)),
    }


def _resampled_sums(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums [R, C] of rows [n, C] over bootstrap samples; a sample is how often each row was drawn."""
    n, generator = len(rows), np.random.default_rng(SEED)
    chunks = [generator.multinomial(n, np.full(n, 1 / n), size=CHUNK) @ rows for _ in range(RESAMPLES // CHUNK)]
    return np.concatenate(chunks)


def _percentile_interval(values: NDArray[np.float64]) -> Interval:
    """The middle `CONFIDENCE` of the values."""
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)
