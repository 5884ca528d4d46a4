"""Statistics of success rates and latencies, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

PERCENTILES = (50, 90, 95, 99)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float] | None:
    """Wilson's score interval of a success rate (Wilson 1927); None without trials."""
    if trials == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


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
