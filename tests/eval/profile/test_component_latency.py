"""The arithmetic of a profile, on made-up samples, and what it writes. Nothing here asserts a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_without import made_without
from timings import MADE_UP, timing

from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS
from rsd_trt.eval.profile.components import ProfileRequest, profile, speedups, time_calls
from rsd_trt.eval.profile.costs import costs

CPU = torch.device("cpu")
REQUEST = ProfileRequest(("torch", "trt"), (1, 3), CPU, "fp32", Path("nowhere"), samples=3, warm_up=2)


def test_speedups_are_ratios_of_medians_at_the_same_batch() -> None:
    assert speedups(MADE_UP) == {
        ("head", "torch", 1): 1,
        ("head", "ort", 1): 2,
        ("head", "ort + CUDA graph", 1): 3,
        ("head", "torch", 8): 1,
        ("head", "ort", 8): 0.5,
        ("predict", "torch", 1): 1,
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


def test_every_component_is_timed(bundle: Bundle) -> None:
    timings = list(profile(bundle, REQUEST))
    for batch in REQUEST.batches:
        rows = {(row.backend, row.what): row for row in timings if row.batch == batch}
        assert set(rows) == {(backend, what) for backend in ("torch", "trt") for what in COMPONENTS}
        for (backend, _), row in rows.items():
            assert len(row.ms) == (3 if backend == "torch" else 0)
            assert not row.cuda_graph
            wanted = "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort"
            assert row.reason == (None if backend == "torch" else wanted)


def test_a_bundle_without_a_draft_has_rows_for_the_rest(bundle_copy: Path) -> None:
    made_without(bundle_copy, "draft")
    rows = list(profile(Bundle.open(bundle_copy), REQUEST))
    assert {row.what for row in rows} == {"head", "decoder", "predict"}
    found = {cost.what: cost for cost in costs(Bundle.open(bundle_copy), REQUEST) if cost.backend == "torch"}
    assert (len(found["check"].ms), len(found["full"].ms)) == (0, 3)
    assert found["check"].reason == f"{bundle_copy} has no draft"
