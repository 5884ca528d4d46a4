"""The Python API as its documentation shows it, and as a program uses it without a network."""

from __future__ import annotations

import doctest
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from safetensors.torch import load_file, save_file

import rsd_trt
from rsd_trt.bundle import Bundle
from rsd_trt.cli import main
from rsd_trt.errors import UserError
from rsd_trt.records import write_record

# Runs in every Python process that is started with it, before anything else.
NO_NETWORK = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") or (
        event in ("socket.connect", "socket.bind") and not isinstance(arguments[1], (str, bytes))
    ):
        with open(os.environ["NETWORK_LOG"], "a") as log:
            log.write(f"{event} {arguments}\\n")
        raise PermissionError(f"network: {event} {arguments}")
sys.addaudithook(refuse)
"""
SESSION = """
import importlib, importlib.util, sys
from pathlib import Path
import rsd_trt
package = Path(rsd_trt.__file__).parent
for path in sorted(package.glob("**/*.py")) + [p for l in package.iterdir() if l.is_symlink() for p in l.glob("*.py")]:
    parts = path.relative_to(package).with_suffix("").parts
    if parts == ("models", "fast", "kernels") and importlib.util.find_spec("triton") is None:
        continue
    importlib.import_module(".".join(("rsd_trt", *(part for part in parts if part != "__init__"))))
from rsd_trt.cli import main
bundle, out = sys.argv[1:]
for backend, mode in (("torch", "rsd"), ("torch", "baseline")):
    policy = rsd_trt.Policy.load(bundle, mode, backend)
    policy.warm_up()
main(["info", bundle], standalone_mode=False)
main(["export", bundle, "-o", out, "--target", "onnx", "--component", "decoder"], standalone_mode=False)
"""


def test_the_documentation_is_right() -> None:
    outcome = doctest.testmod(rsd_trt)
    assert outcome.attempted >= 10
    assert outcome.failed == 0


@pytest.mark.parametrize("kind", [str, Path, Bundle.open])
def test_a_bundle_may_be_given_by_its_path(kind: Callable[[Path], Bundle | str | Path], tiny_bundle: Path) -> None:
    assert rsd_trt.Policy.load(kind(tiny_bundle)).config.name == "tiny"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "rds"}, "mode 'rds' is unknown; did you mean 'rsd'?"),
        ({"backend": "onnx"}, "backend 'onnx' is unknown"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"n_action_steps": 99}, "n_action_steps is 99; a chunk has 1..8 steps"),
        ({"n_action_steps": "2"}, "n_action_steps is '2'; a chunk has 1..8 steps"),
        ({"environments": 0}, "environments is 0; it is a whole number in 1..1024"),
        ({"environments": 10**12}, "environments is 1000000000000; it is"),
        ({"batch": 1.5}, "batch is 1.5; it is a whole number"),
        ({"mode": None}, "mode None is unknown"),
        ({"backend": None}, "backend None is unknown"),
        ({"rule": 3}, "rule 3 is unknown"),
        ({"engines": 3}, "engines is 3, of type int"),
        ({"device": 0}, "device 0 is unknown: there are cpu"),
        ({"backbone_precision": "int4"}, "backbone precision 'int4' is unknown"),
        ({"rule": "frist"}, "rule 'frist' is unknown; did you mean 'first'?"),
        ({"tolerance": -0.1}, "rsd.tolerance[0] is -0.1"),
        ({"tolerance": float("nan")}, "rsd.tolerance"),
        ({"tolerance": (0.1, 0.2)}, "rsd.tolerance is (0.1, 0.2), which must be of length"),
        ({"tolerance": 0.1, "rule": "tokens"}, "tolerance is of the rules first, actions, path: the rule is tokens"),
        ({"threshold": -1.0}, "threshold is of the rule likelihood: the rule is first"),
        ({"rule": "likelihood"}, "the rule likelihood needs a threshold, such as -1.5: the bundle has none"),
        ({"mode": "baseline", "tolerance": 0.1}, "tolerance is of checks, and mode baseline makes none"),
    ],
)
def test_what_cannot_be_loaded_says_why(settings: dict[str, str], message: str, tiny_bundle: Path) -> None:
    with pytest.raises(UserError) as raised:
        rsd_trt.Policy.load(tiny_bundle, **settings)  # type: ignore[arg-type]
    assert message in str(raised.value)
    with pytest.raises(UserError, match="bundle is None, of type NoneType"):
        rsd_trt.Policy.load(None)  # type: ignore[arg-type]


def test_the_loop_is_set_as_it_is_loaded(tiny_bundle: Path) -> None:
    load = rsd_trt.Policy.load
    assert load(tiny_bundle, rule="path", tolerance=0.3).config.rsd.tolerance == (0.3,) * 6
    each = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert load(tiny_bundle, tolerance=each).config.rsd.tolerance == each
    found = load(tiny_bundle, rule="likelihood", threshold=-2.0).config.rsd
    assert (found.rule, found.threshold) == ("likelihood", -2.0)
    own = load(tiny_bundle, rule=None)
    assert own.config.rsd == Bundle.open(tiny_bundle).config.rsd


def test_the_default_device_is_the_command_lines() -> None:
    device = inspect.signature(rsd_trt.Policy.load).parameters["device"].default
    option = next(parameter for parameter in main.commands["eval"].params if parameter.name == "device")
    assert device == option.default == "auto"


def test_a_query_says_how_it_came_about(tiny_bundle: Path) -> None:
    policy = rsd_trt.Policy.load(tiny_bundle, tolerance=2.0, n_action_steps=2)
    first, second = policy.query(seen(policy)), policy.query(seen(policy))
    assert (first.route, first.prefix, first.full_query) == ("start", None, True)
    assert (second.route in ("accepted", "partial", "rejected")) == second.checked == (second.prefix is not None)
    assert second.route == "gripper" or second.checked
    assert min(first.ms, second.ms) > 0


def seen(policy: rsd_trt.Policy, **changes: object) -> rsd_trt.Observation:
    """An observation of what lies black before the robot, with changes."""
    control = policy.config.control
    images = np.zeros((len(control.cameras), control.camera_size, control.camera_size, 3), np.uint8)
    given = {"images": images, "proprio": np.zeros(8, np.float32), "instruction": "x"}
    return rsd_trt.Observation(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images are NoneType, the bundle takes uint8 [2, 256, 256, 3]"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "or have them resized: Policy.load(resize=True)"),
        (
            {"images": np.zeros((2, 256, 256, 3), np.float32)},
            "images are float32 [2, 256, 256, 3], the bundle takes uint8",
        ),
        ({"proprio": None}, "the observation has no proprio, the bundle reads float32 [8]"),
        ({"proprio": np.full(8, np.inf, np.float32)}, "proprio[0] is not finite"),
        ({"proprio": np.full(8, 1e300)}, "proprio[0] is not finite as float32"),
        ({"proprio": np.zeros(7, np.float32)}, "proprio is float32 [7], the bundle takes float32 [8]"),
        ({"instruction": None}, "the observation has no instruction"),
        ({"instruction": 3}, "instruction is of type int, not a string"),
    ],
)
def test_what_a_policy_does_not_take_is_one_line(changes: dict[str, object], message: str, tiny_bundle: Path) -> None:
    policy = rsd_trt.Policy.load(tiny_bundle)
    with pytest.raises(UserError) as raised:
        policy.act(seen(policy, **changes))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("environments", [[], [0, 0], [1], [-1], [0.0], ["a"]])
def test_environments_that_are_not_there(environments: list[object], tiny_bundle: Path) -> None:
    policy = rsd_trt.Policy.load(tiny_bundle)
    with pytest.raises(UserError, match="environments"):
        policy.act_batch([seen(policy)] * len(environments), environments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"environments \[-1\], each of 0\.\.0 at most once"):
        policy.reset(-1)
    with pytest.raises(UserError, match="got one Observation, not a list of them"):
        policy.act_batch(seen(policy), [0])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="got str, not an Observation"):
        policy.act_batch(["frame"], [0])  # type: ignore[list-item]


def test_whole_chunks_are_of_the_frames_that_queries_see(tiny_bundle: Path) -> None:
    """Resized by the same rule, whoever runs the loop."""
    policy = rsd_trt.Policy.load(tiny_bundle, "baseline", n_action_steps=8, resize=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    observation = seen(policy, images=pixels)
    assert np.array_equal(policy.full([observation]).actions[0], policy.act(observation))


def test_a_bundle_that_does_not_read_the_state_needs_none(bundle_copy: Path) -> None:
    config = Bundle.open(bundle_copy).config
    draft = structs.replace(config.draft, state=False)
    backbone = structs.replace(config.backbone, proprio=False)
    write_record(bundle_copy / "config.json", structs.replace(config, draft=draft, backbone=backbone))
    for path in (bundle_copy / "draft.safetensors", bundle_copy / "backbone.safetensors"):
        kept = {k: v for k, v in load_file(path).items() if not k.startswith(("state.", "proprio"))}
        save_file(kept, path)
    policy = rsd_trt.Policy.load(bundle_copy)
    assert not policy.reads_state
    observation = seen(policy)
    without = rsd_trt.Observation(observation.images, instruction="x")
    first = policy.act(without)
    policy.reset()
    assert np.array_equal(policy.act(observation), first)


def without_network(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with arguments; asserts that neither it nor its children asked for the network."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(NO_NETWORK)
    log = tmp_path / "network.log"
    path = os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "NETWORK_LOG": str(log)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert not log.exists(), log.read_text()
    return done


def test_the_network_is_watched(tmp_path: Path) -> None:
    code = "import socket; socket.create_connection(('127.0.0.1', 9))"
    with pytest.raises(AssertionError, match="socket"):
        without_network(tmp_path, "-c", code)


@pytest.mark.slow
def test_importing_loading_and_exporting_ask_for_no_network(tmp_path: Path, tiny_bundle: Path) -> None:
    done = without_network(tmp_path, "-c", SESSION, str(tiny_bundle), str(tmp_path / "engines"))
    assert done.returncode == 0, done.stderr
    assert "UNTRAINED" in done.stdout


@pytest.mark.slow
def test_a_report_and_the_doctor_ask_for_no_network(tmp_path: Path, tiny_bundle: Path) -> None:
    recorded = Path(__file__).parents[1] / "docs" / "results" / "reference"
    files = [str(recorded / f"{name}.json.gz") for name in ("late_baseline_6", "late_rsd_first")]
    code = (
        "import sys\n"
        "from rsd_trt.cli import main\n"
        "main(['report', *sys.argv[3:], '-o', sys.argv[2]], standalone_mode=False)\n"
        "main(['doctor', sys.argv[1], '--backend', 'torch', '--json'])\n"
    )
    done = without_network(tmp_path, "-c", code, str(tiny_bundle), str(tmp_path / "report"), *files)
    assert (tmp_path / "report" / "report.html").exists(), done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :])


def test_an_evaluation_asks_for_no_network(tmp_path: Path, tiny_bundle: Path) -> None:
    drive = str(Path(__file__).parent / "eval" / "drive.py")
    options = ["--tasks", "0", "--trials", "1", "--max-steps", "4", "--workers", "2", "--out", str(tmp_path)]
    done = without_network(tmp_path, drive, str(tiny_bundle), *options)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.libero
def test_the_simulator_asks_for_no_network(tmp_path: Path) -> None:
    code = (
        "from rsd_trt.config import ControlConfig\n"
        "from rsd_trt.eval.libero.simulator import Simulator\n"
        "simulator = Simulator('libero_spatial', 0, ControlConfig(camera_size=64))\n"
        "simulator.reset(0)\n"
        "print(simulator.observation().images.shape)\n"
    )
    done = without_network(tmp_path, "-c", code)
    assert done.stdout == "(2, 64, 64, 3)\n", done.stderr


def test_actions_belong_to_the_caller(tiny_bundle: Path) -> None:
    policy = rsd_trt.Policy.load(str(tiny_bundle))
    control = policy.config.control
    images = np.zeros((len(control.cameras), control.camera_size, control.camera_size, 3), np.uint8)
    observation = rsd_trt.Observation(images, np.zeros(8, np.float32), "x")
    first = policy.act(observation)
    kept = first.copy()
    policy.reset()
    second = policy.act(observation)
    assert np.array_equal(first, second)
    second[:] = 0
    assert np.array_equal(first, kept)
