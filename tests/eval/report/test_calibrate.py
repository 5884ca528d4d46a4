"""The threshold: what it bounds, on drawn and on worked examples, and the command that writes it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from command import rsd_trt
from msgspec import structs
from synthetic import run as shadow_run

from rsd_trt.bundle import Bundle, copy_with
from rsd_trt.config import ARM_DIMS, MAX_TOLERANCE, RsdConfig
from rsd_trt.eval.report.calibrate import (
    Check,
    _measured,
    _rates,
    auc,
    calibrate,
    choose,
    deviation,
    judge_checks,
    with_threshold,
)
from rsd_trt.eval.results import Episode, QueryRecord
from rsd_trt.records import to_json

LIMITS = np.array([0.1] * ARM_DIMS + [0])
FIRST = RsdConfig(rule="first", tolerance=(0.1, 0.2) * 3)


def query(draft: list[tuple[float, ...]], main: list[tuple[float, ...]], score: float | None = None) -> QueryRecord:
    return QueryRecord(0, "accepted", 1, 1.0, True, True, prefix=1, score=score, draft_gap=draft, main_gap=main)  # type: ignore[arg-type]


def gap(x: float, y: float = 0.0, gripper: float = 0.0) -> tuple[float, ...]:
    """Of the first arm dimension, the second, and the gripper."""
    return (x, y, 0.0, 0.0, 0.0, 0.0, gripper)


NEAR, FAR = gap(0.05), gap(0.3)


@pytest.mark.parametrize(
    ("made", "rsd", "expected"),
    [
        (query([gap(0.05, 0.3)], [NEAR]), FIRST, 1.5),  # of the second dimension's tolerance 0.2
        (query([gap(0.05, gripper=1)], [NEAR]), FIRST, math.inf),
        (query([NEAR, FAR], [NEAR, NEAR]), structs.replace(FIRST, rule="actions"), 0.5),
        (query([NEAR], [NEAR], score=0.7), structs.replace(FIRST, rule="path"), 0.7),
        (query([NEAR], [NEAR], score=None), structs.replace(FIRST, rule="path"), math.inf),
        (query([NEAR, gap(0.0, gripper=1)], [NEAR] * 2, score=0.7), structs.replace(FIRST, rule="path"), math.inf),
        (query([gap(0.05)], [NEAR]), structs.replace(FIRST, by_age=(1.0,) * 4 + (2.0,)), 0.25),  # of age 4
        (query([NEAR], [NEAR], score=-1.5), structs.replace(FIRST, rule="likelihood"), 1.5),
    ],
)
def test_the_deviation_is_what_the_rule_compares(made: QueryRecord, rsd: RsdConfig, expected: float) -> None:
    assert deviation(made, rsd) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("main", "rule", "quiet"),
    [
        ([NEAR, NEAR, FAR], "first", True),
        ([NEAR, FAR], "first", False),
        ([NEAR, FAR], "actions", True),  # one step is enough to be accepted
        ([NEAR], "first", True),  # all that is left
        ([gap(0.0, gripper=1)], "first", False),
    ],
)
def test_a_check_is_quiet_where_main_confirms_what_it_would_commit(
    main: list[tuple[float, ...]], rule: str, quiet: bool
) -> None:
    made = structs.replace(shadow_run("shadow").episodes[0], queries=(query([NEAR] * len(main), main),))
    rsd = structs.replace(FIRST, rule=rule, check_steps=2)
    assert [check.quiet for check in judge_checks(made, rsd, LIMITS)] == [quiet]


def test_what_no_draft_judged_is_no_check() -> None:
    """Shadow mode records gaps where a full query is due, too."""
    due = structs.replace(query([NEAR], [NEAR]), route="gripper", checked=False, prefix=None)
    made = structs.replace(shadow_run("shadow").episodes[0], queries=(due,))
    assert not judge_checks(made, FIRST, LIMITS)


def drawn(random: np.random.Generator, count: int) -> list[list[Check]]:
    """Episodes whose deviations are larger where main disagrees, but not always, and more so in some episodes."""
    episodes = []
    for _ in range(count):
        hard, quiet = random.uniform(0.5, 1.5), random.random(int(random.integers(2, 14))) < 0.8
        episodes.append([Check(float(random.gamma(2, hard if q else 3 * hard)), bool(q)) for q in quiet])
    return episodes


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_new_episodes_are_rejected_wrongly_at_a_mean_rate_of_alpha_at_most(alpha: float) -> None:
    """Over many draws of calibration data the mean rate on fresh data is at most alpha, and not far below."""
    random = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        threshold = choose(drawn(random, 60), alpha)
        rates.append(np.mean(_rates(drawn(random, 40), quiet=True, accepted=False, threshold=threshold)))
    error = 3 * float(np.std(rates)) / math.sqrt(len(rates))
    assert alpha / 4 < np.mean(rates) < alpha + error


def test_a_larger_alpha_accepts_less() -> None:
    random = np.random.default_rng(1)
    episodes, held_out = drawn(random, 200), drawn(random, 200)
    found = [_measured(FIRST, choose(episodes, a), held_out, a) for a in (0.01, 0.05, 0.2, 0.5)]
    for figure in ("acceptance", "false_accepts"):
        values = [getattr(one, figure) for one in found]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1]


def test_the_threshold_by_hand() -> None:
    """Three episodes with rates in halves and wholes: (sum of rates + 1) / 4 <= 0.6 leaves 1.4 for the sum."""
    episodes = [
        [Check(0.1, True), Check(0.4, True), Check(9.0, False)],  # each quiet one adds 1/2
        [Check(0.2, True)],  # adds 1
        [Check(0.3, False)],  # cannot be rejected wrongly
    ]
    assert choose(episodes, 0.6) == 0.2  # 0.4 fits with 0.5; rejecting 0.2 too would make 1.5
    assert choose(episodes, 0.3) == 0.4  # 0.2 is left for the sum: none fits
    assert choose([[Check(0.3, False)]], 0.9) == math.inf


def test_a_threshold_becomes_a_tolerance_that_lets_it_pass() -> None:
    found = with_threshold(FIRST, 1.50001)
    assert found.tolerance == pytest.approx((0.1501, 0.3001) * 3)
    assert structs.replace(found, tolerance=FIRST.tolerance) == FIRST
    assert with_threshold(FIRST, math.inf).tolerance == (MAX_TOLERANCE,) * ARM_DIMS
    likely = structs.replace(FIRST, rule="likelihood", threshold=-3.0)
    assert with_threshold(likely, 1.5) == structs.replace(likely, threshold=-1.5)
    assert with_threshold(likely, math.inf).threshold == -1e6


def test_the_area_under_the_curve_by_hand() -> None:
    """Pairs of a check that is not quiet and one that is: 3 of 4 are the right way round, and one is a tie."""
    checks = [Check(1.0, True), Check(2.0, True), Check(2.0, False), Check(math.inf, False)]
    assert auc(checks) == 3.5 / 4
    assert auc(checks[:2]) is auc(checks[2:]) is None


def test_what_a_threshold_does() -> None:
    episodes = [
        [Check(0.5, True), Check(2.0, True), Check(0.5, False), Check(2.0, False)],
        [Check(0.5, True), Check(0.6, False)],
    ]
    found = _measured(FIRST, 1.0, episodes, None)
    assert (found.acceptance, found.false_rejects, found.false_accepts) == (4 / 6, 0.25, 0.75)
    assert found.false_rejects_interval is None


@pytest.fixture
def first(bundle: Bundle, tmp_path: Path) -> Bundle:
    """The tiny bundle with rule `first`."""
    rsd = structs.replace(bundle.config.rsd, rule="first")
    return copy_with(bundle, structs.replace(bundle.config, rsd=rsd), tmp_path / "first")


def shadow_file(bundle: Bundle, folder: Path, **changes: object) -> Path:
    """A made-up shadow run of the bundle."""
    changes = {"policy_sha256": bundle.fingerprint, "trials": 20, "rsd": bundle.config.rsd, **changes}
    path = folder / "shadow.json"
    path.write_text(json.dumps(to_json(shadow_run(**{"mode": "shadow", **changes}))))  # type: ignore[arg-type]
    return path


def test_the_command_writes_a_copy_that_differs_in_the_tolerance_alone(first: Bundle, tmp_path: Path) -> None:
    arguments = ["calibrate", str(first.path), str(shadow_file(first, tmp_path)), "-o", str(tmp_path / "copy")]
    result = rsd_trt(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bundle"] == str(tmp_path / "copy")
    copy = Bundle.open(tmp_path / "copy")
    assert to_json(copy.config.rsd) == found["chosen"]["rsd"]
    assert copy.config.rsd.tolerance != first.config.rsd.tolerance
    assert structs.replace(copy.config.rsd, tolerance=first.config.rsd.tolerance) == first.config.rsd
    assert {k: v for k, v in copy.fingerprints.items() if k != "config.json"} == {
        k: v for k, v in first.fingerprints.items() if k != "config.json"
    }
    assert [row["alpha"] for row in found["curve"]] == sorted(row["alpha"] for row in found["curve"])
    again = rsd_trt(*arguments)
    assert again.exit_code == 1
    assert "exists; choose another path" in again.stderr
    table = rsd_trt(*arguments[:-1], tmp_path / "other")
    assert "rejected wrongly" in table.stdout and "accepted wrongly" in table.stdout
    assert f"bundle with the chosen threshold: {tmp_path / 'other'}" in table.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "rsd"}, "the results are of mode rsd; calibrate needs: rsd-trt eval --mode shadow"),
        ({"policy_sha256": "ff" * 32}, "the results are of bundle ffffffffffff"),
        ({"rsd": RsdConfig(rule="tokens")}, "rsd.rule is tokens"),
        ({"tasks": (0,), "trials": 1}, "1 episodes with a check are too few to hold some out"),
        ({"tasks": (0,), "trials": 6}, "alpha 0.2 needs 8 episodes with a check, there are 6"),
        # of one initial state, which cannot be in both halves
        ({"tasks": (0,), "trials": 18, "perturb": "late:7+8+9"}, "needs 8 initial states with a check, there are 6"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(
    first: Bundle, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = shadow_file(first, tmp_path, **changes)
    result = rsd_trt("calibrate", first.path, path, "-o", tmp_path / "copy")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "rsd",
    [
        RsdConfig(rule="path", tolerance=(0.3,) * ARM_DIMS),
        RsdConfig(rule="likelihood", threshold=-9.0),
        RsdConfig(rule="actions", check_steps=2),
    ],
)
def test_the_copy_has_the_rule_of_the_run(first: Bundle, tmp_path: Path, rsd: RsdConfig) -> None:
    """Another rule, tolerance or number of steps than the bundle's is an option of the shadow run alone."""

    def scored(episode: Episode) -> Episode:
        random = np.random.default_rng(episode.trial)
        sign = -1 if rsd.rule == "likelihood" else 1
        queries = (
            structs.replace(one, score=sign * float(random.gamma(2.0))) if one.checked else one
            for one in episode.queries
        )
        return structs.replace(episode, queries=tuple(queries))

    path = shadow_file(first, tmp_path, rsd=rsd, change=scored)
    result = rsd_trt("calibrate", first.path, path, "-o", tmp_path / "copy")
    assert result.exit_code == 0, result.output
    found = Bundle.open(tmp_path / "copy").config.rsd
    name = "threshold" if rsd.rule == "likelihood" else "tolerance"
    assert getattr(found, name) != getattr(rsd, name)
    assert structs.replace(found, **{name: getattr(rsd, name)}) == rsd


def test_the_limit_defaults_to_the_runs_own_tolerance(first: Bundle) -> None:
    shadow = shadow_run("shadow", policy_sha256=first.fingerprint, trials=20, rsd=first.config.rsd)
    assert calibrate(first, shadow, 0.1).limit == first.config.rsd.tolerance
    assert calibrate(first, shadow, 0.1, limit=0.2).limit == (0.2,) * ARM_DIMS
