"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result
from command import rsd_trt

from rsd_trt import __version__
from rsd_trt.cli import main


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = [pytest.param(path, command, id=" ".join(path)) for path, command in commands()]


def failed(result: Result) -> str:
    """The message of a user error: one line on stderr, exit code 1, no traceback."""
    assert (result.exit_code, result.stdout) == (1, "")
    assert isinstance(result.exception, SystemExit)
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_command_has_help_with_an_example(path: tuple[str, ...], command: click.Command) -> None:
    result = rsd_trt(*path, "--help")
    assert result.exit_code == 0
    assert f"Example: rsd-trt {' '.join(path)}" in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} has no help"


def test_the_example_parses() -> None:
    for path, command in commands():
        assert command.help is not None
        line = next(line for line in command.help.splitlines() if "Example: rsd-trt" in line)
        words = line.split("rsd-trt", 1)[1].split()[len(path) :]
        command.make_context(" ".join(path), words)


def test_help_lists_every_command() -> None:
    result = rsd_trt("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in main.commands)
    assert rsd_trt("-h").output == result.output
    assert rsd_trt("--version").output == f"rsd-trt, version {__version__}\n"


def test_the_environment_says_where_files_lie_by_default(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rsd_trt", "report"]
    done = subprocess.run(command, env=os.environ | {"RSD_TRT_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'results'} is not there. rsd-trt eval writes results\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evl",), "no such command 'evl'; did you mean 'eval'?"),
        (("inof", "x"), "no such command 'inof'; did you mean 'info'?"),
        (("zzzzzz",), "no such command 'zzzzzz' (one of: "),
        (("info", "--jsn"), "--jsn"),
        (("init", "x", "--size", "huge"), "'huge' is unknown (one of: openvla-7b, reference, tiny)"),
        (("init", "x", "--seed", "one"), "'one' is not a valid integer"),
        (("eval", "--tasks", "a"), "'a' is not a list such as 0,3 or 0-4 or all"),
        (("eval", "--tasks", "4-0"), "'4-0' names no task"),
        (("eval", "--mode", "rds"), "'rds' is unknown; did you mean 'rsd'?"),
        (("eval", "--backend", "tensor"), "'tensor' is unknown"),
        (("eval", "--backbone", "compile"), "'compile' is unknown; did you mean 'compiled'?"),
        (("eval", "--suite", "libero_space"), "'libero_space' is unknown; did you mean 'libero_spatial'?"),
        (("eval", "--trials", "0"), "0 is not in the range"),
        (("compare", "a.json"), "Missing argument 'B'"),
    ],
)
def test_wrong_usage_is_exit_code_two(arguments: tuple[str, ...], message: str) -> None:
    result = rsd_trt(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nothing"), "there is no folder nothing. A bundle is a folder, made by rsd-trt pack"),
        (("eval", "nothing"), "there is no folder nothing"),
        (("init", "."), "exists; choose another path or remove it first"),
        (("compare", "a.json", "b.json"), "a.json"),
    ],
)
def test_a_user_error_is_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failed(rsd_trt(*arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_is_one_line(bundle_copy: Path) -> None:
    file = bundle_copy / "draft.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} cannot be read as safetensors" in failed(rsd_trt("info", bundle_copy))
    (bundle_copy / "tokenizer.json").write_text("")
    assert "tokenizer.json cannot be read: " in failed(rsd_trt("info", bundle_copy))


def test_a_bug_keeps_its_traceback(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsd_trt.cli.info.describe", lambda *_: 1 / 0)
    assert isinstance(rsd_trt("info", tiny_bundle).exception, ZeroDivisionError)


def test_a_warning_that_is_an_error_names_the_variable(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(*_: object) -> None:
        raise DeprecationWarning("x is deprecated")

    monkeypatch.setattr("rsd_trt.cli.info.describe", warns)
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    told = "a library warns, which is an error here: x is deprecated: PYTHONWARNINGS is 'error'. Unset it"
    assert told in failed(rsd_trt("info", tiny_bundle))


def test_init_then_info(tmp_path: Path) -> None:
    path = tmp_path / "new"
    made = rsd_trt("init", path, "--size", "tiny", "--seed", 3)
    assert made.exit_code == 0
    assert "UNTRAINED" in made.stdout
    shown = rsd_trt("info", path)
    assert shown.exit_code == 0
    for text in ("UNTRAINED", "backbone", "draft", "hidden [B, H=32] float32", "protocol", "control.prompt"):
        assert text in shown.stdout
    described = json.loads(rsd_trt("info", path, "--json").stdout)
    assert described["name"] == "new"
    assert described["config"]["backbone"]["language"]["hidden"] == 32
    assert f"{described['parts']['draft']['parameters']:,}" in shown.stdout


def test_init_without_backbone(tmp_path: Path) -> None:
    assert rsd_trt("init", tmp_path / "new", "--size", "tiny", "--without-backbone").exit_code == 0
    assert json.loads(rsd_trt("info", tmp_path / "new", "--json").stdout)["parts"]["backbone"] is None
    assert "absent" in rsd_trt("info", tmp_path / "new").stdout
