"""The arithmetic of a profile, on made-up samples, and what it writes. Nothing here asserts a time."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS
from rsd_trt.errors import UserError
from rsd_trt.eval import latency
from rsd_trt.eval.latency import (
    PAIR,
    TEXTBOOK,
    ProfileRequest,
    Timing,
    profile,
    speedups,
    textbook,
    time_calls,
    write_profile,
)
from rsd_trt.eval.parity import hidden_states, make_case
from rsd_trt.runtime.backends import Launcher

CPU = torch.device("cpu")
REQUEST = ProfileRequest((("torch", True), ("trt", True)), (1, 3), CPU, "fp32", Path("nowhere"), samples=3, warm_up=2)


def timing(
    what: str, backend: str, *ms: float, batch: int = 1, graph: bool = False, reason: str | None = None
) -> Timing:
    return Timing(what, backend, "fp32", batch, graph, ms, None, reason)


MADE_UP = [
    timing("head", "torch", 4, 2, 3),
    timing("head", "ort", 1.5, 1.5, 9),
    timing("head", "ort", 1, 1, 1, graph=True),
    timing("head", "torch", 6, 6, batch=8),
    timing("head", "ort", 12, 12, batch=8),
    timing("draft", "graph", 1, 1, graph=True),
    timing("head", "trt", graph=True, reason="no GPU"),
    timing(TEXTBOOK, "torch", 5, 5),
]


def test_speedups_are_ratios_of_medians_at_the_same_batch() -> None:
    assert speedups(MADE_UP) == {
        ("head", "torch", 1): 1,
        ("head", "ort", 1): 2,
        ("head", "ort + CUDA graph", 1): 3,
        ("head", "torch", 8): 1,
        ("head", "ort", 8): 0.5,
        (TEXTBOOK, "torch", 1): 1,
    }


def test_a_row_has_percentiles_and_no_raw_samples() -> None:
    row = timing("head", "ort", *range(1, 101)).summary()
    assert row["ms"] == pytest.approx(
        {"n": 100, "mean": 50.5, "p50": 50.5, "p90": 90.1, "p95": 95.05, "p99": 99.01, "max": 100}
    )
    assert MADE_UP[6].summary()["ms"] is None


@pytest.mark.parametrize(
    ("backend", "graph", "variant"),
    [
        ("torch", False, "torch"),
        ("ort", False, "ort"),
        ("ort", True, "ort + CUDA graph"),
        ("trt", True, "trt + CUDA graph"),
        ("graph", True, "graph"),
    ],
)
def test_variants_have_names_for_people(backend: str, graph: bool, variant: str) -> None:
    assert timing("head", backend, 1, graph=graph).variant == variant


def test_calls_are_counted_after_the_warm_up() -> None:
    calls: list[bool] = []
    samples, allocations, grown = time_calls(lambda: calls.append(torch.is_inference_mode_enabled()), REQUEST)
    assert calls == [True] * 5
    assert (len(samples), allocations, grown) == (3, None, None)
    assert all(ms >= 0 for ms in samples)


def test_every_component_the_pair_and_the_textbook_are_timed(bundle: Bundle) -> None:
    timings = list(profile(bundle, REQUEST))
    for batch in REQUEST.batches:
        rows = {(row.backend, row.what): row for row in timings if row.batch == batch}
        assert set(rows) == {("torch", what) for what in (*COMPONENTS, PAIR, TEXTBOOK)} | {
            ("trt", what) for what in COMPONENTS
        }
        for (backend, _), row in rows.items():
            assert len(row.ms) == (3 if backend == "torch" else 0)
            assert not row.cuda_graph
            wanted = "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort"
            assert row.reason == (None if backend == "torch" else wanted)


def test_the_textbook_sequence_computes_what_the_chain_does(bundle: Bundle) -> None:
    launcher = Launcher(bundle, "torch", CPU)
    prefix, final = hidden_states(bundle, 3, None, CPU)
    case = make_case(launcher, prefix, final, torch.tensor(bundle.config.rsd.tolerance))
    sessions = {component: launcher.open(component, "dynamic") for component in COMPONENTS}
    accepted, actions = textbook(sessions, case.inputs, bundle.config.rsd.token_share)
    chain = sessions["chain"].run(case.inputs["chain"])
    torch.testing.assert_close(actions, chain["actions"])  # the tiny bundle's actions are the environment's
    coarse = sessions["accept"].run(case.inputs["accept"])["tokens"]
    share = (coarse == chain["tokens"][..., : coarse.shape[-1]]).float().mean()
    assert accepted == bool(share >= bundle.config.rsd.token_share)


def test_a_profile_is_written_with_every_sample(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "profile", lambda *_: iter(MADE_UP))
    report = write_profile(bundle, REQUEST, tmp_path / "out", "rsd-trt profile --backend 'a b'")
    assert report == json.loads((tmp_path / "out" / "profile.json").read_text())
    assert report["samples"] == [list(map(float, row.ms)) for row in MADE_UP]
    assert report["command"] == "rsd-trt profile --backend 'a b'"
    assert "synchronised" in report["boundary"]
    assert report["bundle_sha256"] == bundle.fingerprint
    assert report["hardware"]["cpu"]
    assert report["versions"]["torch"]
    rows = report["rows"]
    assert [row["speedup"] for row in rows] == [1, 2, 3, 1, 0.5, None, None, 1]
    assert [row["cuda_graph"] for row in rows] == [row.cuda_graph for row in MADE_UP]
    assert (rows[6]["ms"], rows[6]["reason"]) == (None, "no GPU")
    with Image.open(tmp_path / "out" / "profile.png") as chart:
        chart.verify()
        assert chart.format == "PNG"
        assert min(chart.size) > 200
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["profile.json", "profile.png"]


@pytest.mark.parametrize(
    ("rows", "reason"), [([MADE_UP[6]], "no GPU"), ([], "no backend is given")], ids=["all unavailable", "none given"]
)
def test_nothing_measured_is_an_error(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Timing], reason: str
) -> None:
    monkeypatch.setattr(latency, "profile", lambda *_: iter(rows))
    with pytest.raises(UserError) as error:
        write_profile(bundle, REQUEST, tmp_path / "out", "")
    assert str(error.value) == f"nothing could be measured: {reason}"
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_and_a_file_in_the_way_are_told(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "profile", lambda *_: iter(MADE_UP))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out cannot be written: Not a directory"):
        write_profile(bundle, REQUEST, tmp_path / "file" / "out", "")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError) as error:
        write_profile(bundle, dataclasses.replace(REQUEST), tmp_path, "")
    assert str(error.value) == "matplotlib is not installed. Install it: pip install 'rsd-trt[report]'"
