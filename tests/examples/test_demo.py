"""The last lines of `make demo`, of made-up runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import run, write

from examples.demo import main


def test_the_headline_follows_from_counts_and_medians(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline, rsd = run("baseline", full_ms=20.0), run("rsd", full_ms=20.0, draft_ms=5.0)
    for mode, results in (("baseline", baseline), ("rsd", rsd)):
        write(tmp_path / f"libero_spatial_{mode}_results.json", results)
    main([str(tmp_path)])
    told = capsys.readouterr().out
    cost, open_loop = (one.full_queries / one.steps + 0.25 * one.checks / one.steps for one in (rsd, baseline))
    assert f"rsd {rsd.total_successes} of {rsd.total_episodes}" in told
    assert "A check took 25% of a full query" in told
    assert f"cost {cost:.2f} full queries, of open loop {open_loop:.2f}" in told
    assert "video:  none" in told and f"report: {tmp_path / 'report' / 'report.html'}" in told
