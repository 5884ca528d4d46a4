"""Against published values: Newcombe (1998), Statistics in Medicine 17, table I."""

from __future__ import annotations

import pytest

from rsd_trt.eval.statistics import percentiles, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_without_trials() -> None:
    assert wilson(0, 0) is None


def test_percentiles() -> None:
    found = percentiles([float(i) for i in range(1, 101)])
    assert found == pytest.approx(
        {"n": 100, "mean": 50.5, "p50": 50.5, "p90": 90.1, "p95": 95.05, "p99": 99.01, "max": 100}
    )
    assert percentiles([]) is None
