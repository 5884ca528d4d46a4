"""`rsd-trt eval --record`: every query of every episode is recorded, and a draft can be distilled from that."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import rsd_trt
from made_without import made_without

from rsd_trt.eval.read import read_run
from rsd_trt.recordings import Recordings

DRIVE = Path(__file__).parents[1] / "drive.py"
PATIENCE = 300.0  # s


def evaluate(bundle: Path, out: Path, *options: str, trials: int = 3) -> subprocess.CompletedProcess[str]:
    common = ("--tasks", "0,1", "--trials", str(trials), "--max-steps", "12", "--workers", "2", "--out", str(out))
    command = [sys.executable, str(DRIVE), str(bundle), *common, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_the_journey_from_no_draft_to_one(tiny_bundle: Path, tmp_path: Path) -> None:
    mine = made_without(Path(shutil.copytree(tiny_bundle, tmp_path / "mine")), "draft")
    folder = str(tmp_path / "recordings")
    record = ("--mode", "baseline", "--n-action-steps", "1", "--record", folder, "--record-size", "8")
    done = evaluate(mine, tmp_path, *record)
    assert done.returncode == 0, done.stderr
    assert f"recordings: {folder}. A draft from them: rsd-trt distill {mine} {folder} -o NEW" in done.stdout
    results = read_run(tmp_path / "libero_spatial_baseline_results.json")
    episodes = {episode.name: episode for episode in Recordings(Path(folder)).episodes}
    assert len(episodes) == 6
    for episode in results.episodes:
        task, trial = episode.key
        recorded = episodes[f"{results.settings.run}_task{task}_trial{trial}"]
        assert (recorded.facts.task, recorded.facts.success) == (task, episode.success)
        assert (recorded.facts.steps, recorded.facts.initial_state) == (episode.steps, trial)
        arrays = recorded.read()
        assert arrays["step"].tolist() == [query.step for query in episode.queries]
        assert arrays["committed"].tolist() == [query.committed for query in episode.queries]
        assert np.isfinite(arrays["chunk"]).all()
        clipped = np.clip(arrays["chunk"][:, 0], -1, 1)
        assert np.allclose(arrays["actions"], clipped)
    new = tmp_path / "new"
    options = ("--steps", "3", "--batch", "8", "--device", "cpu", "--json")
    done_too = rsd_trt("distill", mine, folder, "-o", new, *options)
    assert done_too.exit_code == 0, done_too.output
    assert json.loads(done_too.stdout)["episodes"] == 6
    checks = ("--mode", "rsd", "--tolerance", "2", "--n-action-steps", "1")
    done = evaluate(new, tmp_path / "rsd", *checks, "--record", str(tmp_path / "more"), trials=2)
    assert done.returncode == 0, done.stderr
    results = read_run(tmp_path / "rsd" / "libero_spatial_rsd_results.json")
    asked = []
    for found in Recordings(tmp_path / "more").episodes:
        (of,) = (e for e in results.episodes if found.name.endswith("_task{}_trial{}".format(*e.key)))
        full = [query.full_query for query in of.queries]
        assert (~np.isnan(found.read("chunk")["chunk"]).any((1, 2))).tolist() == full
        asked += full
    assert len(asked) > 4 and True in asked


@pytest.mark.slow
def test_what_an_earlier_part_did_not_record_is_told(tiny_bundle: Path, tmp_path: Path) -> None:
    plain = ("--mode", "baseline")
    record = (*plain, "--record", str(tmp_path / "r"), "--record-size", "8")
    assert evaluate(tiny_bundle, tmp_path, *plain, trials=1).returncode == 0
    done = evaluate(tiny_bundle, tmp_path, *record, trials=1)
    assert done.returncode == 1
    assert "has 2 episodes that were not recorded. To record them all: --fresh" in done.stderr
    assert evaluate(tiny_bundle, tmp_path, *record, "--fresh", trials=1).returncode == 0
    assert len(Recordings(tmp_path / "r").episodes) == 2
    gone, kept = sorted((tmp_path / "r" / "episodes").iterdir())
    gone.unlink()  # as where there was no room for it: the run goes on
    full = ("--record-limit", str(1.5 * kept.stat().st_size / 1e9))
    done = evaluate(tiny_bundle, tmp_path, *record, *full, trials=1)
    assert done.returncode == 0, done.stderr
    assert "has 1 episodes that were not recorded: " in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--record-size", "64"), "--record-size' is of --record FOLDER"),
        (("--record-limit", "1"), "--record-limit' is of --record FOLDER"),
        (("--policy", "a:b", "--record", "r"), "--policy a:b runs no bundle: leave out '--record'"),
    ],
)
def test_options_without_effect_are_refused(options: tuple[str, ...], message: str) -> None:
    done = rsd_trt("eval", *options)
    assert done.exit_code == 2 and message in done.stderr, done.stderr
