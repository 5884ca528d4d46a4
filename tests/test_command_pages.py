"""The command reference is the command line's own help: `python tests/test_command_pages.py` writes it anew."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click
import pytest

from rsd_trt.cli import GROUPS, main

FOLDER = Path(__file__).parents[1] / "docs" / "commands"
NOTE = "Made from the commands themselves: `python tests/test_command_pages.py`."


def pages() -> dict[str, str]:
    """Each page's text by its file's name: one for each group of commands, and an overview."""
    context = click.Context(main, info_name="rsd-trt")
    overview = ["# Command reference", NOTE, ""]
    made = {}
    for title, names in GROUPS.items():
        name = re.sub(r"\W+", "-", title.lower()) + ".md"
        commands = [main.commands[name] for name in names]
        overview += [f"## {title}", f"[All options]({name})", "", "| command | what it does |", "|---|---|"]
        overview += [f"| `rsd-trt {one.name}` | {_cell(one.get_short_help_str(1000))} |" for one in commands] + [""]
        made[name] = "\n".join([f"# {title}", NOTE, "", *(line for one in commands for line in section(one, context))])
    overview += [
        "Where a command takes a BUNDLE, it takes the shipped policy without one. `rsd-trt --version` tells the",
        "version, `rsd-trt -v COMMAND` shows what the library logs. By default files lie in the current folder, or in",
        "`RSD_TRT_HOME`.",
        "Exit codes: 0 done, 1 a check failed or something that the message names is wrong, 2 wrong usage. Results go",
        "to stdout, progress to stderr.",
    ]
    return {"README.md": "\n".join(overview) + "\n", **made}


def section(command: click.Command, parent: click.Context) -> list[str]:
    """A command: its help and a row for each option."""
    context = click.Context(command, info_name=command.name, parent=parent)
    paragraphs = (command.help or "").split("\n\n")
    example = next(part for part in paragraphs if "Example:" in part).replace("\b", "").partition("Example:")[2]
    usage = " ".join(["usage: rsd-trt", command.name or "", *command.collect_usage_pieces(context)])
    told = [" ".join(part.split()) for part in paragraphs if "Example:" not in part]
    lines = [f"## {command.name}", "\n\n".join(told), "", "```", usage, example.strip(), "```", ""]
    lines += ["| option | what |", "|---|---|"]
    for parameter in command.params:
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)) is not None:
            lines.append(f"| `{_cell(record[0])}` | {_cell(record[1]).replace('[', chr(92) + '[')} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """On one line, without what would end a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def write() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, "utf-8")


def test_every_command_is_in_one_group() -> None:
    assert sorted(main.commands) == sorted(name for names in GROUPS.values() for name in names)


def test_the_reference_is_current() -> None:
    there = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.md")}
    assert there == pages(), "python tests/test_command_pages.py"


@pytest.mark.parametrize("page", sorted(pages()))
def test_a_page_is_short(page: str) -> None:
    assert pages()[page].count("\n") <= 200


if __name__ == "__main__":
    write()
