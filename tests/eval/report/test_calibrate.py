"""The tolerance: what it bounds, on drawn and on worked examples, and the command that writes it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec import structs
from numpy.typing import NDArray
from synthetic import run as shadow_run

from rsd_trt.bundle import Bundle
from rsd_trt.cli import main
from rsd_trt.config import ARM_DIMS, Dims
from rsd_trt.errors import UserError
from rsd_trt.eval.report.calibrate import Judged, calibrate, choose_tolerance, draft_spread, effect, judged
from rsd_trt.records import to_json

ONES = np.ones(ARM_DIMS)


def gaps(*steps: float, gripper: int | None = None) -> NDArray[np.float64]:
    """[n, A]: the same gap on every arm dimension of a step; `gripper`: the step at which signs differ."""
    found = np.repeat(np.array(steps, float)[:, None], Dims().A, axis=1)
    found[:, ARM_DIMS] = [i == gripper for i in range(len(steps))]
    return found


@pytest.mark.parametrize(
    ("query", "score"),
    [
        (Judged(gaps(0.1, 0.2, 0.3), right=3), math.inf),  # nothing of it is wrong
        (Judged(gaps(0.1, 0.2, 0.3), right=0), 0.1),  # wrong from the first step that is committed
        (Judged(gaps(0.1, 0.2, 0.3), right=1), 0.2),
        (Judged(gaps(0.3, 0.2, 0.1), right=2), 0.3),  # to get to the third, the first has to pass
        (Judged(gaps(0.1, 0.2, gripper=0), right=0), math.inf),  # its gripper keeps the draft from it
        (Judged(gaps(0.1, 0.2, gripper=1), right=0), 0.1),
    ],
)
def test_the_score_is_the_scale_at_which_a_query_is_accepted_wrongly(query: Judged, score: float) -> None:
    assert query.score(ONES) == score
    if score < math.inf:
        assert query.committed(ONES * score) > query.right
        assert query.committed(ONES * (score - 1e-9)) <= query.right


def drawn(random: np.random.Generator, count: int) -> list[list[Judged]]:
    """Episodes whose gaps are larger where the chunk is wrong, but not always, and more so in some episodes."""
    episodes = []
    for _ in range(count):
        queries, hard = [], random.uniform(0.5, 1.5)
        for _ in range(int(random.integers(1, 12))):
            steps = int(random.integers(1, 5))
            right = int(random.integers(0, steps + 1))
            draft = gaps(*([0.0] * steps), gripper=int(random.integers(0, 8)))
            far = hard * (1 + 2 * (np.arange(steps) >= right)[:, None])
            draft[:, :ARM_DIMS] = np.abs(random.normal(0, 0.03, (steps, ARM_DIMS))) * far * (1, 1, 2, 1, 1, 3)
            queries.append(Judged(draft, right))
        episodes.append(queries)
    return episodes


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_new_episodes_are_accepted_wrongly_at_a_mean_rate_of_alpha_at_most(alpha: float) -> None:
    """Over many draws of calibration data the mean rate on fresh data is at most alpha, and not far below."""
    random = np.random.default_rng(0)
    rates = []
    for _ in range(100):
        spread = draft_spread(drawn(random, 20))
        tolerance = choose_tolerance(drawn(random, 60), spread, alpha)
        rates.append(effect(tolerance, drawn(random, 40), alpha).false_accepts)
    error = 3 * float(np.std(rates)) / math.sqrt(len(rates))
    assert alpha / 4 < np.mean(rates) < alpha + error


def test_a_larger_alpha_accepts_more() -> None:
    random = np.random.default_rng(1)
    spread, episodes, held_out = draft_spread(drawn(random, 50)), drawn(random, 200), drawn(random, 200)
    alphas = (0.01, 0.05, 0.2, 0.5)
    found = [effect(choose_tolerance(episodes, spread, alpha), held_out, alpha).acceptance for alpha in alphas]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_the_scale_by_hand() -> None:
    """Three episodes with rates in halves and wholes: (sum of rates + 1) / 4 <= 0.6 leaves 1.4 for the sum."""
    episodes = [
        [Judged(gaps(0.1), right=0), Judged(gaps(0.4), right=0)],  # each adds 1/2
        [Judged(gaps(0.2), right=0)],  # adds 1
        [Judged(gaps(0.05), right=1)],  # can only be accepted rightly
    ]
    tolerance = choose_tolerance(episodes, ONES, 0.6)  # 0.1 fits with 0.5; with 0.2 the sum would be 1.5
    assert tolerance == pytest.approx(ONES * 0.1999)
    assert choose_tolerance(episodes, ONES, 0.9) == pytest.approx(ONES * 2.0)  # all of them fit


def test_too_few_episodes_are_told_with_the_number_that_is_needed() -> None:
    episodes = [[Judged(gaps(0.1), right=0)]] * 10
    message = "alpha 0.05 needs 19 episodes to choose the scale on, there are 10: evaluate 48"
    with pytest.raises(UserError, match=message):
        choose_tolerance(episodes, ONES, 0.05)
    assert len(choose_tolerance(episodes, ONES, 0.1)) == ARM_DIMS
    with pytest.raises(UserError, match="in no query did the main head confirm the chunk"):
        draft_spread(episodes)


def test_measure() -> None:
    episodes = [
        [
            Judged(gaps(0.05, 0.3), right=2),  # one step accepted, rightly
            Judged(gaps(0.05, 0.05), right=1),  # accepted, and wrongly
            Judged(gaps(0.3), right=0),  # rejected, rightly
        ],
        [Judged(gaps(0.3), right=1)],  # rejected; it could not have been wrong
    ]
    found = effect(ONES * 0.1, episodes, None)
    assert (found.acceptance, found.false_accepts) == (0.5, 0.25)
    assert found.false_accepts_interval is None


def test_gaps_of_a_run_are_judged_by_the_limit() -> None:
    for episode in shadow_run("shadow").episodes:
        strict, lax = judged(episode, ONES * 0.01), judged(episode, ONES * 1.0)
        assert len(strict) == len(lax) == sum(q.draft_gap is not None for q in episode.queries)
        assert sum(q.right for q in strict) < sum(q.right for q in lax)


def shadow_file(bundle: Bundle, folder: Path, **changes: object) -> Path:
    """A made-up shadow run of the bundle."""
    changes = {"policy_sha256": bundle.fingerprint, "trials": 20, **changes}
    path = folder / "shadow.json"
    path.write_text(json.dumps(to_json(shadow_run(**{"mode": "shadow", **changes}))))  # type: ignore[arg-type]
    return path


def test_the_command_writes_a_copy_that_differs_in_the_tolerance_alone(bundle: Bundle, tmp_path: Path) -> None:
    arguments = ["calibrate", str(bundle.path), str(shadow_file(bundle, tmp_path)), "-o", str(tmp_path / "copy")]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bundle"] == str(tmp_path / "copy")
    copy = Bundle.open(tmp_path / "copy")
    assert copy.config.rsd.tolerance == tuple(found["chosen"]["tolerance"])
    assert copy.config.rsd.tolerance != bundle.config.rsd.tolerance
    assert structs.replace(copy.config.rsd, tolerance=bundle.config.rsd.tolerance) == bundle.config.rsd
    assert {k: v for k, v in copy.fingerprints.items() if k != "config.json"} == {
        k: v for k, v in bundle.fingerprints.items() if k != "config.json"
    }
    assert [row["alpha"] for row in found["curve"]] == sorted(row["alpha"] for row in found["curve"])
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert "exists; choose another path" in again.stderr
    table = CliRunner().invoke(main, [*arguments[:-1], str(tmp_path / "other")])
    assert "accepted wrongly" in table.stdout
    assert f"bundle with the chosen tolerance: {tmp_path / 'other'}" in table.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "rsd"}, "the results are of mode rsd; calibrate needs: rsd-trt eval --mode shadow"),
        ({"policy_sha256": "ff" * 32}, "the results are of bundle ffffffffffff"),
        ({"tasks": (0,), "trials": 1}, "1 episodes that tested a chunk are too few to hold some out"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(
    bundle: Bundle, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = shadow_file(bundle, tmp_path, **changes)
    result = CliRunner().invoke(main, ["calibrate", str(bundle.path), str(path), "-o", str(tmp_path / "copy")])
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "copy").exists()


def test_the_limit_defaults_to_the_runs_own_tolerance(bundle: Bundle) -> None:
    shadow = shadow_run("shadow", policy_sha256=bundle.fingerprint, trials=20)
    assert calibrate(bundle, shadow, 0.1).limit == shadow.settings.of_bundle.rsd.tolerance
    assert calibrate(bundle, shadow, 0.1, limit=0.2).limit == (0.2,) * ARM_DIMS
