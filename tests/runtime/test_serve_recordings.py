"""What a server records, and what it replays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving import (
    SIDE,
    STUB_CONTROL,
    STUB_DIMS,
    Client,
    as_request,
    first,
    request,
    running,
    stub_service,
    wait_until,
)

from rsd_trt.bundle import Bundle
from rsd_trt.recorder import Recorder
from rsd_trt.recordings import Facts, Recordings
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.launch import ServedPolicy, open_service
from rsd_trt.runtime.serve.service import ServeOptions

Observe = Callable[..., Observation]


def test_what_was_served_is_recorded_and_can_be_replayed(bundle: Bundle, scene: Observe, tmp_path: Path) -> None:
    control = bundle.config.control
    served = ServedPolicy(bundle=bundle.path, device="cpu", n_action_steps=2)
    service = open_service(served, ServeOptions(port=0, record=tmp_path / "seen"))
    with running(service) as port:
        client = Client(port)
        told = [client.infer(as_request(scene(control, seed), control))["actions"] for seed in range(3)]
        client.infer({"endpoint": "reset"})
        client.close()
    recordings = Recordings(tmp_path / "seen")
    [episode] = recordings.episodes
    assert episode.facts.steps == 6
    np.testing.assert_array_equal(episode.read("actions")["actions"], np.concatenate(told))  # type: ignore[arg-type]
    assert episode.read("step")["step"].tolist() == [0, 2, 4]
    replay = open_service(ServedPolicy(replay=tmp_path / "seen", n_action_steps=3), ServeOptions(port=0))
    with running(replay) as port:
        client = Client(port)
        anything = as_request(scene(control), control)
        parts = [client.infer(anything)["actions"] for _ in range(2)]
        np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(told))  # type: ignore[arg-type]
        assert client.send(anything) == "the recorded episode is over"


def test_a_state_that_nobody_sent_is_recorded_as_unknown(tmp_path: Path) -> None:
    service = stub_service()
    service.interface = dataclasses.replace(service.interface, reads_state=False)
    service.recorder = Recorder(tmp_path, Facts("stub", "0" * 64, STUB_CONTROL.cameras, SIDE, STUB_DIMS.T))
    with running(service) as port:
        client = Client(port)
        client.infer({key: value for key, value in request(0).items() if "state" not in key})
        client.infer({"endpoint": "reset"})
    [episode] = Recordings(tmp_path).episodes
    assert np.isnan(episode.read("state")["state"]).all()


def test_what_is_recorded_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long episode is written in parts, and where the folder is full nothing is kept."""
    monkeypatch.setattr("rsd_trt.runtime.serve.service.MOST_RECORDED", 2)
    service = stub_service()
    service.recorder = Recorder(tmp_path, Facts("stub", "0" * 64, STUB_CONTROL.cameras, SIDE, STUB_DIMS.T))
    with running(service) as port:
        client = Client(port)
        for step in range(5):
            client.infer(request(20 * step))
        [session] = [x for own in service.sessions._of.values() for x in own.values()]
        assert session.recording is not None
        assert len(session.recording) == 1
        service.recorder.full = True
        client.infer(request(100))
        assert len(session.recording) == 0
    parts = Recordings(tmp_path).episodes
    assert [(x.facts.steps, x.read("step")["step"].tolist()) for x in parts] == [(4, [0, 2]), (8, [4, 6])]


def test_each_instructions_recordings_are_replayed_in_turn(tmp_path: Path) -> None:
    """What was committed and not executed is not among them, and what was not executed of a reply is given again."""
    service = stub_service(n=3)
    service.recorder = Recorder(tmp_path, Facts("stub", "0" * 64, STUB_CONTROL.cameras, SIDE, STUB_DIMS.T))
    with running(service) as port:
        client = Client(port)
        for i, prompt in enumerate("abab"):
            client.infer(request(100 + i, prompt=prompt))
            client.infer(request(100 + i + 10, prompt=prompt, executed=1))
            client.infer(request(100 + i + 20, 255, prompt=prompt, executed=1))
        client.close()
        wait_until(lambda: len(list(tmp_path.glob("episodes/[!.]*"))) == 4)
    assert [x.facts.steps for x in Recordings(tmp_path).episodes] == [5] * 4
    with running(open_service(ServedPolicy(replay=tmp_path, n_action_steps=5), ServeOptions(port=0))) as port:
        client = Client(port)
        for i, prompt in enumerate("abab"):
            once = client.infer(request(prompt=prompt))
            assert first(once) == [round((100 + i + x) / 1000, 4) for x in (0, 10, 20, 30, 40)]
            assert first(client.infer(request(prompt=prompt, executed=0))) == first(once)


def test_a_recorder_needs_the_same_policy(bundle: Bundle, tmp_path: Path) -> None:
    Recorder(tmp_path / "seen", Facts("other", "0" * 64, bundle.config.control.cameras, 32, 8))
    served = ServedPolicy(bundle=bundle.path, device="cpu")
    with pytest.raises(Exception, match="Use the bundle that was recorded"):
        open_service(served, ServeOptions(port=0, record=tmp_path / "seen"))
