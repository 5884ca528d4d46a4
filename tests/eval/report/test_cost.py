"""What a run costs by its counts, and whose medians those are multiplied with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec import structs
from synthetic import profile, run

from rsd_trt.errors import UserError
from rsd_trt.eval.report.cost import COUNTED, cannot_save_time, read_price


def test_cost_per_action_is_counts_times_medians(tmp_path: Path) -> None:
    results = run("rsd")
    price = read_price(profile(tmp_path / "profile.json", 0.25, 2.5), [results])
    assert (price.check, price.full, price.unit) == (0.25, 2.5, "ms")
    assert price.told == "made-up on made-up GPU, ort, graph"
    expected = (results.checks * 0.25 + results.full_queries * 2.5) / results.steps
    assert price.per_action(results) == pytest.approx(expected)
    done = [episode for episode in results.episodes if episode.error is None]
    assert sum(price.of(done)) / results.steps == pytest.approx(expected)


def test_without_a_profile_full_queries_are_counted() -> None:
    results = run("rsd")
    assert read_price(None, [results]) is COUNTED
    assert COUNTED.per_action(results) == results.full_queries / results.steps
    assert COUNTED.per_action(run("shadow")) is None
    assert COUNTED.per_action(structs.replace(results, steps=0)) is None


def test_the_costs_of_the_runs_own_backend_are_taken_else_the_fastest(tmp_path: Path) -> None:
    path = profile(tmp_path / "profile.json", 0.25, 2.5)
    data = json.loads(path.read_text())
    fast = [{**row, "backend": "trt", "ms": {"p50": row["ms"]["p50"] / 2}} for row in data["costs"]]
    data["costs"] += [*fast, {**fast[0], "backend": "graph"}, {**fast[0], "backend": "torch", "ms": None}]
    path.write_text(json.dumps(data))
    assert read_price(path, [run("rsd"), run("rsd"), run("rsd", backend="trt")]).full == 2.5
    assert read_price(path, [run("rsd", backend="graph")]).full == 1.25


def test_costs_of_another_bundle_are_an_estimate(tmp_path: Path) -> None:
    price = read_price(profile(tmp_path / "p.json", 0.3, 9.0, bundle="7b", bundle_sha256="ff" * 32), [run("rsd")])
    assert price.told == "an estimate for 7b on made-up GPU, ort, graph, by the counts of these runs"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": []}, "measured no check beside a full query"),
        ({"costs": [{"what": "check", "backend": "ort", "backbone": "graph", "ms": {"p50": 1}}]}, "measured no check"),
        (
            {"costs": [{"what": "half", "backend": "ort", "backbone": "graph", "ms": None}]},
            r"costs\[0\].what is 'half'",
        ),
        (
            {"costs": [{"what": "full", "backend": "a", "backbone": "b", "ms": {"p50": 0}}]},
            "p50 is 0, which must be > 0",
        ),
        ({"bundle": 3}, "bundle is 3, not a string"),
    ],
)
def test_a_profile_without_costs_is_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_price(profile(tmp_path / "profile.json", 1.0, 2.0, **changes), [run("rsd")])
    assert "\n" not in str(error.value)


def test_what_is_no_profile_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for text, message in (("{", "cannot be read"), ("[]", "has no costs"), ("{}", "rsd-trt profile")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_price(path, [])
    with pytest.raises(UserError, match=r"absent\.json cannot be read: No such file"):
        read_price(tmp_path / "absent.json", [])


def test_a_hidden_draft_cannot_save_time() -> None:
    assert cannot_save_time([run("rsd"), run("baseline", policy="expert", bundle=None)]) is None
    told = cannot_save_time([run("rsd", draft="hidden"), run("baseline", draft="hidden")])
    assert told is not None
    assert told.startswith("The draft of made-up reads the backbone's hidden state") and "cannot save time" in told
