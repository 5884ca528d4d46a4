"""What people type by mistake, and the one line that sends them on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import rsd_trt
from made_without import made_without
from msgspec import structs
from synthetic import run, write

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.summary import summarise
from rsd_trt.runtime.policy import Policy

SAID = {
    "eval nosuch": (1, "there is no folder nosuch. A bundle is a folder"),
    "info .": (1, ". is no bundle: it has no config.json"),
    "eval baseline.json": (1, "baseline.json is a file, and a bundle is a folder"),
    "report empty": (1, "empty has no *_results.json. rsd-trt eval writes them"),
    "report nosuch.json": (1, "nosuch.json is not there. rsd-trt eval writes results"),
    "report x_episodes.jsonl": (1, "is a run's log of episodes. Give its results: x_results.json"),
    "report loop": (1, "loop cannot be read: Too many levels of symbolic links"),
    "compare . .": (1, ". is a folder. Give a results file: SUITE_MODE_results.json"),
    "compare twice.json twice.json": (1, "twice.json cannot be read: the key a stands there twice"),
    f"init {'x' * 300} --size tiny": (1, "cannot be read or written: File name too long"),
    "report x_episodes.jsonl/y -o z": (1, "x_episodes.jsonl/y cannot be read: Not a directory"),
    "calibrate nosuch.json": (1, "nosuch.json is not there"),
    "calibrate a b c": (2, "got 3 paths"),
    "eval --backend tensorrt": (2, "did you mean 'trt'?"),
    "eval --backend onnx": (2, "did you mean 'ort'?"),
    "eval --max-steps 99999999999999999999": (2, "is not in the range 1<=x<=1000000"),
    "eval --mode rds": (2, "did you mean 'rsd'?"),
    "eval --mode random": (2, "needs --accept-rate, such as 0.68 or an rsd run's results file"),
    "profile --device gpu": (1, "device 'gpu' is unknown: there are cpu, cuda, cuda:N and auto"),
}


@pytest.mark.parametrize("command", SAID)
def test_a_slip_is_one_line(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x_episodes.jsonl").write_text("{}\n{}\n")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    write(tmp_path / "baseline.json", run("baseline"))
    code, message = SAID[command]
    done = rsd_trt(*command.split())
    assert (done.exit_code, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.output


def test_a_report_takes_a_folder(tmp_path: Path) -> None:
    for mode in ("baseline", "rsd"):
        write(tmp_path / f"libero_spatial_{mode}_results.json", run(mode))  # type: ignore[arg-type]
    done = rsd_trt("report", tmp_path, "-o", tmp_path / "report")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report" / "report.html").exists()


def test_only_checking_needs_a_draft(bundle_copy: Path) -> None:
    made_without(bundle_copy, "draft")
    bundle = Bundle.open(bundle_copy)
    assert Policy.load(bundle, "baseline").exports == {}
    with pytest.raises(UserError, match=r"has no draft, and mode rsd checks with one\. Use: --mode baseline"):
        Policy.load(bundle, "rsd")


def test_two_scripts_are_compared_and_a_script_with_a_bundle_is_not(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        found = run("baseline")
        settings = structs.replace(found.settings, bundle=None, policy=f"m:{name}", policy_sha256=name * 64)
        episodes = [structs.replace(episode, queries=(), run=settings.run) for episode in found.episodes]
        tasks = {task.task_id: task.task_description for task in found.task_results}
        files.append(str(write(tmp_path / f"{name}.json", summarise(settings, episodes, tasks, None, "eval"))))
    done = rsd_trt("compare", *files, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pairs"] > 0 and json.loads(done.stdout)["cost"] is None
    assert rsd_trt("compare", *files).exit_code == 0
    mixed = rsd_trt("compare", files[0], str(write(tmp_path / "c.json", run("baseline"))))
    assert (mixed.exit_code, "two of a kind are compared" in mixed.stderr) == (1, True)
