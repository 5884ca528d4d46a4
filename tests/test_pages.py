"""The pages are true: every command on them parses as it stands, every module runs, every target and link is there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
from command import rsd_trt

from rsd_trt import config
from rsd_trt.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "engines/README.md")),
    *sorted(page for page in (ROOT / "docs").glob("**/*.md") if page.name != "report.md"),  # made by rsd-trt report
    *sorted((ROOT / "examples").glob("**/README.md")),
]
PLACEHOLDER = re.compile(r"[A-Z]+(\.\.\.)?|\.\.\.")  # BUNDLE, RESULTS..., K
RECORDS = (
    *(config.BundleConfig, config.RsdConfig, config.ControlConfig, config.Limits, config.Quantiles, config.Dims),
    *(config.BackboneConfig, config.TowerConfig, config.LanguageConfig, config.HeadConfig, config.CodecConfig),
    *(config.VisionDraftConfig, config.HiddenDraftConfig, config.WeightsFolder),
)
LONGEST = 200  # lines of a page; of the README 150
RUN = ("rsd-trt info", "rsd-trt init bundles/mine --size reference", "rsd-trt eval --help", "rsd-trt --version")


def commands() -> list[str]:
    """Every command of the pages: what stands in backquotes, and the lines of code blocks, without their comments."""
    found: list[str] = []
    for page in PAGES:
        text = page.read_text("utf-8")
        blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += [line for line in text.splitlines() if line.startswith("    ")]
        inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for code in (*lines, *(" ".join(code.split()) for code in inline)):
            command = code.strip().removeprefix(".venv/bin/").partition("  #")[0].strip()
            if re.match(r"(rsd-trt|make|python -m examples\.\S+) ", command):
                found.append(command)
    return list(dict.fromkeys(found))


COMMANDS = commands()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("rsd-trt")])
def test_a_command_is_taken_as_it_stands(command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    if name.startswith("-"):
        assert any(name in parameter.opts for parameter in main.params) or name in ("--help", "--version")
        return
    assert name in main.commands, f"no command {name}"
    given = [argument for argument in arguments if argument.startswith("-")]
    if "--help" not in given and arguments and not any(map(PLACEHOLDER.fullmatch, arguments)):
        main.commands[name].make_context(name, list(arguments))
        return
    known = {option for parameter in main.commands[name].params for option in parameter.opts} | {"--help"}
    assert set(given) <= known


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python")])
def test_a_module_has_the_options_that_it_is_given(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(words[2]).main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", told), option


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_a_target_is_there_and_is_no_file(command: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None and command.split()[1] in phony[1].split()


@pytest.mark.parametrize("command", RUN)
def test_what_is_quick_is_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = rsd_trt(*shlex.split(command)[1:])
    assert done.exit_code == 0, done.output


@pytest.mark.libero
@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps by hand, one after the other as they stand."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    [steps] = [block for block in blocks if "pip install" in block]
    for command in re.findall(r"^rsd-trt .*$", steps, re.MULTILINE):
        done = rsd_trt(*shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
    assert Path("results/demo/report/report.html").stat().st_size
    assert len(list(Path("results/demo/videos/beside").glob("*.mp4"))) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_short(page: Path) -> None:
    assert page.read_text("utf-8").count("\n") <= (150 if page == PAGES[0] else LONGEST)


def test_the_index_leads_to_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index} == set()


def test_every_field_of_the_configuration_is_on_its_page() -> None:
    """Fields of the records that a bundle's config.json is made of."""
    page = (ROOT / "docs" / "bundle.md").read_text("utf-8")
    fields = {field for record in RECORDS for field in record.__struct_fields__}
    assert {field for field in fields if f"`{field}`" not in page} == set()


def test_the_pages_name_every_command() -> None:
    named = {shlex.split(command)[1] for command in COMMANDS if command.startswith("rsd-trt")}
    assert set(main.commands) <= named
    assert isinstance(main, click.Group)
