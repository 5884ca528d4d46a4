"""What acts: a bundle's policy with its tolerance or rate, or a script; and options that do not go together."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import doubles
import numpy as np
import pytest
from click.testing import CliRunner
from msgspec import structs
from synthetic import run, write
from torch import Tensor

import rsd_trt
from rsd_trt.bundle import Bundle
from rsd_trt.cli import main
from rsd_trt.config import Mode
from rsd_trt.errors import UserError
from rsd_trt.eval.libero import run as run_module
from rsd_trt.eval.libero.driver import Driver, bundle_driver, script_driver
from rsd_trt.eval.libero.request import EvalRequest, Script
from rsd_trt.eval.results import Results, Settings
from rsd_trt.runtime.session import Tensors, TorchSession


def settings(bundle: Bundle, accept_rate: float | Path | None, mode: Mode = "random") -> Settings:
    request = EvalRequest(bundle=bundle.path, mode=mode, accept_rate=accept_rate, device="cpu", n_action_steps=2)
    return bundle_driver(request, bundle, (0,)).settings


def rsd(bundle: Bundle, **changes: object) -> Results:
    rsd = structs.replace(bundle.config.rsd, **{"n_action_steps": 2, **changes.pop("loop", {})})  # type: ignore[dict-item]
    own = {"mode": "rsd", "n_action_steps": rsd.n_action_steps, "rsd": rsd, "policy_sha256": bundle.fingerprint}
    return run(**{**own, **changes})  # type: ignore[arg-type]


def test_the_rate_is_that_of_the_rsd_run(bundle: Bundle, tmp_path: Path) -> None:
    results = rsd(bundle)
    found = settings(bundle, write(tmp_path / "rsd.json", results)).of_bundle.accept_rate
    assert results.rsd_stats.full_rejection_rate is not None and results.rsd_stats.partial_acceptance_rate
    assert found == pytest.approx(1 - results.rsd_stats.full_rejection_rate)
    assert settings(bundle, found).of_bundle.accept_rate == found


def test_the_rate_is_a_setting_of_mode_random_alone(bundle: Bundle) -> None:
    assert settings(bundle, None, "rsd").of_bundle.accept_rate is None
    runs = {settings(bundle, rate).run for rate in (0.2, 0.3)}
    assert len(runs) == 2


def test_a_tolerance_takes_the_place_of_the_bundles(bundle: Bundle) -> None:
    def asked(bundle: Bundle, tolerance: float | None) -> Driver:
        return bundle_driver(EvalRequest(bundle=bundle.path, device="cpu", tolerance=tolerance), bundle, (0,))

    own, wide = asked(bundle, None), asked(bundle, 0.4)
    assert own.settings.of_bundle.rsd == bundle.config.rsd
    assert wide.settings.of_bundle.rsd == structs.replace(bundle.config.rsd, tolerance=(0.4,) * 6)
    assert wide.policy is not None and wide.policy.config.rsd == wide.settings.of_bundle.rsd
    assert own.settings.policy_sha256 == wide.settings.policy_sha256
    assert own.settings.run != wide.settings.run


def test_what_is_asked_of_the_checks_is_recorded(bundle: Bundle) -> None:
    request = EvalRequest(
        bundle=bundle.path,
        device="cpu",
        rule="likelihood",
        threshold=-1.5,
        sure=-0.5,
        n_action_steps=3,
        check_steps=2,
        refresh=5,
    )
    driver = bundle_driver(request, bundle, (0,))
    found = driver.settings.of_bundle
    rsd = found.rsd
    assert (rsd.rule, rsd.threshold, rsd.sure, rsd.check_steps, rsd.refresh) == ("likelihood", -1.5, -0.5, 2, 5)
    with pytest.raises(UserError, match=r"rsd.sure -2 is below rsd.threshold -1.5"):
        bundle_driver(dataclasses.replace(request, sure=-2), bundle, (0,))
    assert driver.policy is not None
    assert (driver.policy.n_action_steps, driver.policy.check_steps) == (driver.settings.n_action_steps, 2) == (3, 2)
    assert found.draft == "vision"
    with pytest.raises(UserError, match=r"rsd.check_steps 9 is not in 1\.\.8, the steps of a chunk"):
        bundle_driver(dataclasses.replace(request, check_steps=9), bundle, (0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "shadow"}, "is of mode shadow; the rate is that of a run of mode rsd"),
        ({"policy_sha256": "3f2a" * 16}, "is of bundle 3f2a3f2a3f2a, not of"),
        ({"loop": {"n_action_steps": 4}}, "has n_action_steps 4, this run 2: --n-action-steps"),
        ({"loop": {"check_steps": 1}}, "has check_steps 1, this run None: --check-steps"),
        ({"broken": tuple((t, i) for t in range(3) for i in range(4))}, "has no check, and so no rate"),
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
        (("--mode", "random"), "--mode random needs --accept-rate, such as 0.68"),
        (("--accept-rate", "0.5"), "--mode random needs --accept-rate"),
        (("--mode", "random", "--accept-rate", "1.5"), "'1.5' is not in 0..1"),
        (("--mode", "random", "--accept-rate", "nan"), "'nan' is not in 0..1"),
        (("--mode", "baseline", "--tolerance", "0.2"), "--tolerance is of checks, and mode baseline makes none"),
        (("--mode", "baseline", "--rule", "path"), "--rule is of checks, and mode baseline makes none"),
        (("--mode", "baseline", "--threshold", "-1"), "--threshold is of checks, and mode baseline makes none"),
        (("--mode", "baseline", "--check-steps", "2"), "--check-steps is of checks, and mode baseline makes none"),
        (("--mode", "baseline", "--refresh", "8"), "--refresh is of checks, and mode baseline makes none"),
        (("--mode", "random", "--accept-rate", "0.5", "--rule", "first"), "--rule is of rules, and mode random"),
        (
            ("--mode", "rsd,baseline", "--rule", "likelihood", "--threshold", "-1", "--tolerance", "0.1"),
            "of the rules first",
        ),
        (
            ("--rule", "tokens", "--tolerance", "0.2"),
            "--tolerance is of the rules first, actions, path: the rule",
        ),
        (
            ("--rule", "likelihood", "--threshold", "-1", "--tolerance", "0.2"),
            "--tolerance is of the rules first, actions, path",
        ),
        (("--rule", "first", "--threshold", "-1"), "--threshold is of the rule likelihood: the rule is first"),
        (
            ("--rule", "likelihood", "--threshold", "-1", "--sure", "-0.5", "--check-steps", "1"),
            "--sure is of checks that may commit more than one action: check_steps is 1",
        ),
        (("--rule", "frist"), "'frist' is unknown; did you mean 'first'?"),
        (("--tolerance", "-1"), "-1.0 is not in the range 0<=x<=2"),
        (("--record-hidden", "h"), "--record-hidden needs --mode shadow"),
        (("--mode", "baseline,rds"), "'rds' is unknown; did you mean 'rsd'?"),
        (("--mode", "baseline,random"), "--mode random needs --accept-rate"),
        (("--mode", "baseline,rsd", "--accept-rate", "0.5"), "--mode random needs --accept-rate"),
        (("--engines", "x"), "--engines is of the backends ort and trt: torch runs no export"),
        (("--policy", "expert"), "--policy expert is not MODULE:FUNCTION"),
        (("--policy", "a:b", "--mode", "rsd"), "--policy a:b runs no bundle: leave out '--mode'"),
        (("--policy", "a:b", "--tolerance", "0.2"), "--policy a:b runs no bundle: leave out '--tolerance'"),
        (("--policy", "a:b", "bundles/mine"), "--policy a:b runs no bundle: leave out '[BUNDLE]'"),
    ],
)
def test_usage(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, ["eval", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_likelihood_needs_a_threshold(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(main, ["eval", str(tiny_bundle), "--rule", "likelihood"])
    assert result.exit_code == 2
    assert "the rule likelihood needs a threshold, such as -1.5: the bundle has none" in result.stderr


def test_the_options_are_the_fields_of_the_request() -> None:
    options = main.commands["eval"].make_context("eval", []).params
    del options["as_json"]
    (options["mode"],) = options["mode"]
    assert options == {field.name: field.default for field in dataclasses.fields(EvalRequest)}


SCRIPT = """
import numpy as np
SUITE = "libero_goal"
act = lambda simulator: np.zeros((2, 7))
few = lambda simulator: np.zeros((2, 6))
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules in it."""
    (tmp_path / "my_policy.py").write_text(SCRIPT)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    (tmp_path / "my_lacking.py").write_text("import not_installed_here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_policy", "my_broken", "my_lacking"):
        sys.modules.pop(name, None)


def test_a_script_is_found_in_the_current_folder(folder: Path) -> None:
    script = Script.find("my_policy:act")
    assert script == Script("my_policy:act", hashlib.sha256(SCRIPT.encode()).hexdigest(), ("libero_goal",))
    actions = pickle.loads(pickle.dumps(script))(None)  # as a simulator's process gets it
    assert (actions.shape, actions.dtype) == ((2, 7), np.float32)
    request = EvalRequest(policy=script.name, suite="libero_goal", perturb=None)
    driver = script_driver(request, script, (0,))
    found = driver.settings
    assert (found.policy, found.policy_sha256, found.bundle) == (script.name, script.sha256, None)
    assert request.results_file.name == "libero_goal_my_policy.act_results.json"
    with pytest.raises(UserError, match="my_policy:act is written for libero_goal, not for libero_10"):
        script_driver(EvalRequest(policy=script.name, suite="libero_10"), script, (0,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_polcy:act", "there is no module my_polcy in .*, nor among the packages"),
        ("my_policy.deeper:act", "there is no module my_policy.deeper in "),
        ("my_policy:atc", "my_policy has no atc; did you mean 'act'?"),
        ("my_policy:number", "number is int, no function"),
        ("my_broken:act", "--policy my_broken:act cannot be imported: ZeroDivisionError: division by zero"),
        ("my_lacking:act", "cannot be imported: ModuleNotFoundError: No module named 'not_installed_here'"),
    ],
)
def test_no_script_is_one_line(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Script.find(name)
    assert "\n" not in str(caught.value)


def test_actions_of_a_script_that_cannot_be_executed(folder: Path) -> None:
    with pytest.raises(
        UserError, match=re.escape("--policy my_policy:few gave actions [2, 6], not finite ones [n, 7]")
    ):
        Script.find("my_policy:few")(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "rate"), [("random", None), ("rsd", 0.5)])
def test_settings_of_another_shape_are_refused(mode: Mode, rate: float | None) -> None:
    with pytest.raises(UserError, match=r"settings.accept_rate"):
        run(mode, accept_rate=rate)


def test_a_query_reaches_its_kernels_in_ten_calls(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command's function on, up to the session that runs the component."""
    package, depths, answer = str(Path(rsd_trt.__file__).parent), set(), TorchSession.run

    def measured(session: TorchSession, inputs: Tensors) -> dict[str, Tensor]:
        calls = [call for call in traceback.extract_stack() if call.filename.startswith(package)]
        if "act_batch" in (names := [call.name for call in calls]):
            depths.add(len(names) - names.index("evaluate"))
        return answer(session, inputs)

    monkeypatch.setattr(TorchSession, "run", measured)
    monkeypatch.setattr(run_module, "Simulator", doubles.world)
    monkeypatch.setattr(run_module, "_tasks", lambda request: ({0: "task 0"}, "0" * 64))
    arguments = ("--trials", "1", "--max-steps", "6", "--out", str(tmp_path))
    result = CliRunner().invoke(main, ["eval", str(tiny_bundle), *arguments])
    assert result.exit_code == 0, result.output
    assert depths and max(depths) <= 10
