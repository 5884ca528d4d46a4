"""What a profile writes: every sample, the chart, and what stands in the way. Nothing here asserts a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timings import COSTS, MADE_UP

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.profile import components, write
from rsd_trt.eval.profile.components import ProfileRequest, Timing
from rsd_trt.eval.profile.write import write_components

REQUEST = ProfileRequest(("torch",), (1,), torch.device("cpu"), "fp32", Path("nowhere"), samples=3, warm_up=2)


def test_a_profile_is_written_with_every_sample(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "profile", lambda *_: iter(MADE_UP))
    monkeypatch.setattr(write, "costs", lambda *_: iter(COSTS))
    written, _, _ = write_components(bundle, REQUEST, tmp_path / "out", "rsd-trt profile --backend 'a b'")
    report = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert report == written
    assert report["samples"] == [list(map(float, row.ms)) for row in MADE_UP]
    assert report["command"] == "rsd-trt profile --backend 'a b'"
    assert "synchronised" in report["boundary"]
    assert report["bundle_sha256"] == bundle.fingerprint
    assert report["hardware"]["cpu"]
    assert report["versions"]["torch"]
    assert [(row["what"], row["ms"] and row["ms"]["p50"]) for row in report["costs"]] == [
        *(("check", 0.2), ("full", 2.0), ("check", None), ("full", None)),
    ]
    assert report["cost_samples"] == [[0.2, 0.2], [2.0, 2.0], [], []]
    rows = report["rows"]
    assert [row["speedup"] for row in rows] == [1, 2, 3, 1, 0.5, None, None, 1]
    assert [row["cuda_graph"] for row in rows] == [row.cuda_graph for row in MADE_UP]
    assert (rows[6]["ms"], rows[6]["reason"]) == (None, "no GPU")
    with Image.open(tmp_path / "out" / "profile.png") as chart:
        chart.verify()
        assert chart.format == "PNG"
        assert min(chart.size) > 200
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "profile.html",
        "profile.json",
        "profile.png",
    ]


@pytest.mark.parametrize(
    ("rows", "reason"), [([MADE_UP[6]], "no GPU"), ([], "no backend is given")], ids=["all unavailable", "none given"]
)
def test_nothing_measured_is_an_error(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Timing], reason: str
) -> None:
    monkeypatch.setattr(components, "profile", lambda *_: iter(rows))
    monkeypatch.setattr(write, "costs", lambda *_: iter(COSTS))
    with pytest.raises(UserError) as error:
        write_components(bundle, REQUEST, tmp_path / "out", "")
    assert str(error.value) == f"nothing could be measured: {reason}"
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_told_and_without_matplotlib_all_but_the_chart_is_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "profile", lambda *_: iter(MADE_UP))
    monkeypatch.setattr(write, "costs", lambda *_: iter(COSTS))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is no folder"):
        write_components(bundle, REQUEST, tmp_path / "file" / "out", "")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "profile.png").write_text("of an earlier run")
    _, _, tables = write_components(bundle, REQUEST, tmp_path, "")
    assert len(tables) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"file", "profile.json", "profile.html"}
    assert "<img" not in (tmp_path / "profile.html").read_text("utf-8")
