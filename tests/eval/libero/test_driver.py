"""What decides acceptance: the tolerance, and the control's rate, given or of the run that it is the control of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner
from synthetic import run, write

from rsd_trt.bundle import Bundle
from rsd_trt.cli import main
from rsd_trt.config import Mode
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.driver import Driver, bundle_driver
from rsd_trt.eval.libero.request import EvalRequest
from rsd_trt.eval.results import Results, Settings


def settings(bundle: Bundle, accept_rate: float | Path | None, mode: Mode = "random") -> Settings:
    request = EvalRequest(bundle.path, mode=mode, accept_rate=accept_rate, device="cpu", n_action_steps=2)
    return bundle_driver(request, bundle, (0,)).settings


def rsd(bundle: Bundle, **changes: object) -> Results:
    return run(**{"mode": "rsd", "n_action_steps": 2, "bundle_sha256": bundle.fingerprint, **changes})  # type: ignore[arg-type]


def test_the_rate_is_that_of_the_rsd_run(bundle: Bundle, tmp_path: Path) -> None:
    results = rsd(bundle)
    found = settings(bundle, write(tmp_path / "rsd.json", results)).accept_rate
    assert results.rsd_stats.full_rejection_rate is not None and results.rsd_stats.partial_acceptance_rate
    assert found == pytest.approx(1 - results.rsd_stats.full_rejection_rate)
    assert settings(bundle, found).accept_rate == found


def test_the_rate_is_a_setting_of_mode_random_alone(bundle: Bundle) -> None:
    assert settings(bundle, None, "rsd").accept_rate is None
    runs = {settings(bundle, rate).run for rate in (0.2, 0.3)}
    assert len(runs) == 2


def test_a_tolerance_takes_the_place_of_the_bundles(bundle: Bundle) -> None:
    def asked(bundle: Bundle, tolerance: float | None) -> Driver:
        return bundle_driver(EvalRequest(bundle.path, device="cpu", tolerance=tolerance), bundle, (0,))

    own, wide = asked(bundle, None), asked(bundle, 0.4)
    assert own.settings.rsd == bundle.config.rsd
    assert wide.settings.rsd == dataclasses.replace(bundle.config.rsd, tolerance=(0.4,) * 6)
    assert wide.policy is not None and wide.policy.config.rsd == wide.settings.rsd
    assert own.settings.bundle_sha256 == wide.settings.bundle_sha256
    assert own.settings.run != wide.settings.run
    by_tokens = dataclasses.replace(bundle.config, rsd=dataclasses.replace(bundle.config.rsd, rule="tokens"))
    with pytest.raises(UserError, match=r"--tolerance 0.4: the bundle's rsd.rule is tokens; only actions has a toler"):
        asked(dataclasses.replace(bundle, config=by_tokens), 0.4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "shadow"}, "is of mode shadow; the rate is that of a run of mode rsd"),
        ({"bundle_sha256": "3f2a" * 16}, "is of bundle 3f2a3f2a3f2a, not of"),
        ({"n_action_steps": 4}, "has n_action_steps 4, this run 2: --n-action-steps"),
        ({"broken": tuple((t, i) for t in range(3) for i in range(4))}, "has no query that tested a live plan"),
    ],
)
def test_another_run_has_no_rate_for_it(
    bundle: Bundle, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        settings(bundle, write(tmp_path / "results.json", rsd(bundle, **changes)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "random"), "--mode random needs --accept-rate, and no other mode has one"),
        (("--accept-rate", "0.5"), "--mode random needs --accept-rate"),
        (("--mode", "random", "--accept-rate", "1.5"), "'1.5' is not in 0..1"),
        (("--mode", "random", "--accept-rate", "nan"), "'nan' is not in 0..1"),
        (("--mode", "baseline", "--tolerance", "0.2"), "--tolerance is of the modes rsd and shadow: baseline compares"),
        (("--tolerance", "-1"), "-1.0 is not in the range 0<=x<=2"),
        (("--policy", "expert", "--tolerance", "0.2"), "--policy expert runs no bundle: leave out '--tolerance'"),
    ],
)
def test_usage(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, ["eval", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(("mode", "rate"), [("random", None), ("rsd", 0.5), ("random", 1.5)])
def test_settings_of_another_shape_are_refused(mode: Mode, rate: float | None) -> None:
    with pytest.raises(UserError, match=r"settings.accept_rate"):
        run(mode, accept_rate=rate)
