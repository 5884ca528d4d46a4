"""What the charts work out."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import run

from rsd_trt.eval.report.charts import cost_at, open_loop
from rsd_trt.eval.report.runs import pair_up

LINE = [(1.0, 50.0), (4.0, 80.0), (8.0, 90.0), (16.0, 88.0)]


@pytest.mark.parametrize(
    ("rate", "cost"), [(50, 1), (65, 2), (80, 4), (85, 4 * 2**0.5), (89, 4 * 2**0.9), (90, 8), (49, None), (91, None)]
)
def test_the_cost_of_a_rate_lies_on_the_line(rate: float, cost: float | None) -> None:
    assert cost_at(rate, LINE) == (None if cost is None else pytest.approx(cost))


def test_open_loop_that_is_better_where_it_is_cheapest_leaves_nothing_to_save() -> None:
    assert cost_at(85, [(1.0, 90.0), (2.0, 80.0), (4.0, 95.0)]) is None


def test_the_line_beside_a_run_is_of_runs_that_it_can_be_compared_with() -> None:
    loops = [run("baseline", n_action_steps=n) for n in (1, 2)]
    results = [*loops, run("baseline", n_action_steps=1, suite="libero_goal"), rsd := run("rsd")]
    found = pair_up([(Path(str(i)), one) for i, one in enumerate(results)])
    assert len(open_loop(found)) == 3
    assert len(open_loop(found, next(one for one in found if one.results is rsd))) == 2


def test_a_line_of_one_run_or_one_rate_comes_nowhere() -> None:
    assert cost_at(50, LINE[:1]) is None
    assert cost_at(50, [(1, 50), (2, 50)]) is None
