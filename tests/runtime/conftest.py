"""What the tests of the server and of its client at the robot's side share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs
from safetensors.torch import load_file, save_file

from rsd_trt.bundle import Bundle, copy_with
from rsd_trt.config import RsdConfig
from rsd_trt.export.run import ExportRequest, export_bundle
from rsd_trt.runtime.observation import Observation

Observe = Callable[..., Observation]


@pytest.fixture(scope="session")
def lenient(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with a gripper that never switches, and a rule that accepts about as often as it rejects."""
    rsd = RsdConfig(rule="first", tolerance=(0.5,) * 6, n_action_steps=3, check_steps=2)
    copy = copy_with(bundle, structs.replace(bundle.config, rsd=rsd), tmp_path_factory.mktemp("lenient") / "tiny")
    codec = load_file(copy.file("codec"))
    codec["decoder.2.bias"][-1] = 1e3
    save_file(codec, copy.file("codec"))
    return Bundle.open(copy.path)


@pytest.fixture(scope="session")
def engines(lenient: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its exports."""
    folder = tmp_path_factory.mktemp("engines")
    request = ExportRequest(folder, components=("propose", "predict"))
    export_bundle(lenient, request, lambda _: None, lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def scene(observe: Observe) -> Observe:
    """`observe` with a hand that stays where it is: a random jump would be a new episode."""

    def make(*arguments: object) -> Observation:
        observation = observe(*arguments)
        observation.proprio[:3] = 0
        return observation

    return make
