"""What the charts work out."""

from __future__ import annotations

import pytest

from rsd_trt.eval.report.charts import cost_at

LINE = [(1.0, 50.0), (4.0, 80.0), (8.0, 90.0), (16.0, 88.0)]


@pytest.mark.parametrize(
    ("rate", "cost"), [(50, 1), (65, 2), (80, 4), (85, 4 * 2**0.5), (89, 4 * 2**0.9), (90, 8), (49, None), (91, None)]
)
def test_the_cost_of_a_rate_lies_on_the_line(rate: float, cost: float | None) -> None:
    assert cost_at(rate, LINE) == (None if cost is None else pytest.approx(cost))


def test_a_line_of_one_run_or_one_rate_comes_nowhere() -> None:
    assert cost_at(50, LINE[:1]) is None
    assert cost_at(50, [(1, 50), (2, 50)]) is None
