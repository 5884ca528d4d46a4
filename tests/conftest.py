"""Shared fixtures: a tiny bundle, observations that fit it, and modules with weights that hide no mistake."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# Tiny products gain nothing from threads, which keep each other waiting where others want the processor, too.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import numpy as np
import pytest
import torch
from torch import nn

from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, PROPRIO_DIM, Component, ControlConfig, Precision
from rsd_trt.presets import initialise
from rsd_trt.recorder import Recorder
from rsd_trt.recordings import Facts
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy

RECORDED_SIDE = 32  # pixels

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

# Tests that a shell runs in the background ignore SIGINT, and so would every process that they stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many hostile inputs test_hostile.py tried, on whichever processes."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    tried: Counter[str] = Counter()
    for report in reports:
        if getattr(report, "when", "") == "teardown":
            for name, counts in report.user_properties:
                tried.update(counts if name == "hostile inputs" else {})
    if tried:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in tried.items())
        terminalreporter.write_line(f"hostile inputs tried: {tried.total()} ({kinds})")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny bundle of seed 0. Read only: a test that writes takes `bundle_copy`."""
    return initialise(tmp_path_factory.mktemp("bundles") / "tiny", "tiny", seed=0).path


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Path) -> Bundle:
    """The tiny bundle, opened."""
    return Bundle.open(tiny_bundle)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle's folder, to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def exported(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """exported(precision, *components) -> an engines folder with the tiny bundle's ONNX graphs of these components, or
    of all, exported once. Read only.

    With pytest-xdist all its processes share the folder: an export waits for another one, and keeps what is fresh.
    """
    from rsd_trt.export.run import ExportRequest, export_bundle

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    @functools.cache
    def export(precision: Precision, *components: Component) -> Path:
        folder = shared / f"engines_{precision}"
        request = ExportRequest(folder, components or COMPONENTS, precision)
        export_bundle(bundle, request, lambda _: None, lambda *_: None)
        return folder

    return export


@pytest.fixture(scope="session")
def observe() -> Callable[..., Observation]:
    """observe(control, seed=0, instruction="pick up the bowl") -> a random observation."""

    def make(control: ControlConfig, seed: int = 0, instruction: str = "pick up the bowl") -> Observation:
        random = np.random.default_rng(seed)
        shape = (len(control.cameras), control.camera_size, control.camera_size, 3)
        return Observation(
            images=random.integers(0, 256, shape, dtype=np.uint8),
            proprio=random.uniform(-1, 1, PROPRIO_DIM).astype(np.float32),
            instruction=instruction,
        )

    return make


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    """randomise(module, seed=0) gives norms, scales and biases random weights too, so that none of them is idle."""

    def fill(module: nn.Module, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    return fill


@pytest.fixture(scope="session")
def record() -> Callable[..., Path]:
    """record(bundle, folder, episodes=5, queries=4) -> the folder, with recordings of random frames."""

    def make(bundle: Bundle, folder: Path, episodes: int = 5, queries: int = 4) -> Path:
        policy, control = Policy.load(bundle, "baseline"), bundle.config.control
        recorder, random = Recorder(folder, Facts.of(bundle, RECORDED_SIDE)), np.random.default_rng(0)
        shape = (len(control.cameras), control.camera_size, control.camera_size, 3)
        for i in range(episodes):
            episode = recorder.episode(task=i % 2)
            for step in range(queries):
                images = random.integers(0, 256, shape, dtype=np.uint8)
                state = random.uniform(-1, 1, 8).astype(np.float32)
                seen = Observation(images, state, f"pick up bowl {i % 2}")
                (query,) = policy.act_batch([seen], [0])
                said = (query.actions, query.chunk, query.tokens)
                episode.add(step, seen.images, seen.proprio, seen.instruction, *said)
            episode.save(f"task{i % 2}_{i}", success=True)
        return folder

    return make


@pytest.fixture(scope="session")
def recordings(bundle: Bundle, record: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of the tiny bundle. Read only."""
    return record(bundle, tmp_path_factory.mktemp("recordings"))
