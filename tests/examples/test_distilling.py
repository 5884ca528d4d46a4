"""The study of distillations: drafts side by side on the same frames, and rates."""

from __future__ import annotations

import json
from pathlib import Path

from command import rsd_trt

from examples.reference_policy.studies import distilling


def test_drafts_are_measured_on_the_same_frames(tiny_bundle: Path, recordings: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    arguments = ["distill", tiny_bundle, recordings, "-o", new, "--steps", 2, "--batch", 8, "--device", "cpu", "--json"]
    done = rsd_trt(*arguments)
    assert done.exit_code == 0, done.output
    both = ["--bundle", str(new), "--bundle", str(tiny_bundle)]
    out = tmp_path / "agreement.json"
    work = ["--work", str(tmp_path / "new.distill"), "--out", str(out), "--device", "cpu"]
    distilling.main(["agreement", *both, *work])
    drafts = json.loads(out.read_text())["drafts"]
    assert drafts.keys() == {str(new), str(tiny_bundle)}
    report = json.loads((tmp_path / "new.distill" / "report.json").read_text())
    assert drafts[str(new)] == report["held_out"]


def test_rates_are_measured(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "rates.json"
    small = ["--backbone", "eager", "--batches", "2", "--train-batch", "8", "--train-steps", "2"]
    distilling.main(["rates", "--bundle", str(tiny_bundle), "--device", "cpu", "--out", str(out), *small])
    rates = json.loads(out.read_text())
    assert all(rows[0]["frames_per_s"] > 0 for rows in rates["labels"].values())
    assert [rows[0]["images"] for rows in rates["labels"].values()] == [1, 2]
    assert rates["training"]["frames_per_s_from_disk"] > 0
