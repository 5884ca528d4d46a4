"""`rsd-trt profile` as a user meets it: stages, traces and replays. Components: `test_deploy_commands.py`."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from replayable import made
from synthetic import run, write

from rsd_trt.cli import main
from rsd_trt.cli.measure import _sort_out
from rsd_trt.config import DEFAULT_BUNDLE
from rsd_trt.eval.profile import floor, replay
from rsd_trt.eval.profile.query_times import QUERIES
from rsd_trt.eval.profile.work import STAGES

QUICK = ("--device", "cpu", "-n", 2, "--warm-up", 1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "CPU_COPY", 1 << 20)
    monkeypatch.setattr(floor, "CPU_SIDE", 64)
    monkeypatch.setattr(replay, "WARM_UP", 1)


def profile(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["profile", *map(str, arguments)])


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what would need a network."""

    VOID = ("meta", "img", "br", "link", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_stages_are_timed_printed_and_written(tiny_bundle: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    sizes = ("--images", "1,2", "--prompt-tokens", 30)
    result = profile(tiny_bundle, "--stages", *sizes, "--trace", trace, *QUICK, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / "profile.json").read_text())
    assert (report["rows"], report["samples"]) == ([], [])
    stages = report["stages"]
    eager = [row for row in stages["rows"] if row["backbone"] == "eager"]
    assert {(row["what"], row["images"], row["prompt_tokens"]) for row in eager} == {
        (what, images, 30) for what in (*STAGES, *QUERIES) for images in (1, 2)
    }
    assert {len(samples) for row, samples in zip(stages["rows"], stages["samples"], strict=True) if row["ms"]} == {2}
    assert len(stages["outside_samples"]) == len(stages["rows"])
    assert stages["machine"]["bytes_per_s"] > 0 and set(stages["machine"]["flops_per_s"]) == {"fp32"}
    assert sorted(path.name for path in out.iterdir()) == ["profile.html", "profile.json", "stages.png"]
    page = Page((out / "profile.html").read_text("utf-8"))
    assert page.tags.count("svg") == 2 and "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    for text in ("1 image, 30 prompt tokens", "eager fp32, blocks <= k", "GB/s", str(report["hardware"]["cpu"])):
        assert text in page.text
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"accepted query", "rejected query", "aten::linear"}


def test_stages_and_components_in_one_report(tiny_bundle: Path, tmp_path: Path) -> None:
    result = profile(tiny_bundle, "--stages", "--backend", "torch", *QUICK, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for text in (
        "propose + predict",
        "blocks <= k",
        "rejected query",
        "floors are of what was measured",
        "start-up of",
    ):
        assert text in result.stdout
    report = json.loads((tmp_path / "profile.json").read_text())
    assert report["rows"] and report["stages"]["rows"]
    names = {"profile.html", "profile.json", "profile.png", "stages.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(name in result.stdout for name in names)
    assert "Components" in Page((tmp_path / "profile.html").read_text("utf-8")).text


def test_what_is_foreign_is_escaped(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rsd-trt", "profile", "<b>&amp;</b>"])
    assert profile(bundle_copy, "--stages", *QUICK, "--out", tmp_path / "out").exit_code == 0
    page = Page((tmp_path / "out" / "profile.html").read_text("utf-8"))
    assert "b" not in page.tags and "'<b>&amp;</b>'" in page.text


def test_decisions_are_replayed(tiny_bundle: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{mode}.json", made(mode)) for mode in ("baseline", "rsd")]
    command = (tiny_bundle, "--replay", *files, "--episodes", 2, "--device", "cpu", "--out", tmp_path / "out")
    table = profile(*command)
    assert table.exit_code == 0, table.output
    for text in (
        "decisions of the runs below, clock of tiny, eager backbone",
        "made-up, rsd",
        "a replay: a query alone",
    ):
        assert text in table.stdout
    printed = profile(*command, "--prompt-tokens", 20, "--json")
    record = json.loads(printed.stdout)
    assert record == json.loads((tmp_path / "out" / "replay.json").read_text())
    assert [row["mode"] for row in record["rows"]] == ["baseline", "rsd"]
    assert (record["prompt_tokens"], record["rows"][1]["speedup"] > 0) == (20, True)


def test_files_after_the_first_may_stand_where_the_bundle_does(tmp_path: Path) -> None:
    first, second, folder = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "bundle"
    second.write_text("")
    folder.mkdir()
    assert _sort_out(DEFAULT_BUNDLE, (first,), ()) == (DEFAULT_BUNDLE, (first,))
    assert _sort_out(second, (first,), (second,)) == (DEFAULT_BUNDLE, (first, second, second))
    assert _sort_out(folder, (first,), (second,)) == (folder, (first, second))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--stages", "--replay", "r.json"), "--stages cannot be used with --replay"),
        (("--replay", "r.json", "--batch", "8"), "--batch cannot be used with --replay"),
        (("--replay", "r.json", "--backbone", "eager,graph"), "--replay takes one --backbone"),
        (("--replay", "r.json", "--prompt-tokens", "28,64"), "--replay takes one --prompt-tokens"),
        (("--replay", "r.json", "--backend", ","), "--replay takes one --backend"),
        (("--backbone", "graph"), "--backbone needs --stages or --replay"),
        (("--images", "2"), "--images needs --stages or --replay"),
        (("--episodes", "3"), "--episodes needs --replay"),
        (("--trace", "t.json"), "--trace needs --stages"),
        (("--stages", "--backbone", ","), "--backbone is empty"),
        (("--stages", "--images", "0"), "--images 0 is not a list of sizes"),
        (("--stages", "--prompt-tokens", "a"), "--prompt-tokens a is not a list of sizes"),
        (("more.json",), "unexpected argument (more.json)"),
    ],
)
def test_options_that_clash_are_wrong_usage(tiny_bundle: Path, arguments: tuple[str, ...], text: str) -> None:
    result = profile(tiny_bundle, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert text in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--stages", "--backbone", "garph"), "backbone 'garph' is unknown; did you mean 'graph'?"),
        (("--stages", "--backbone-precision", "f8"), "backbone precision 'f8' is unknown; did you mean 'fp8'?"),
        (("--stages", "--backbone", "graph"), "nothing could be measured: backbone graph needs a CUDA device, not cpu"),
        (("--stages", "--prompt-tokens", "1"), "no text gives a prompt of 1 tokens"),
        (("--replay", "none.json"), "none.json cannot be read"),
    ],
)
def test_what_cannot_be_timed_is_one_line(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = profile(tiny_bundle, *arguments, "--device", "cpu")
    assert (result.exit_code, result.stdout) == (1, "")
    message = result.stderr.partition("error: ")[2].strip()
    assert message.startswith(text) and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_decides_nothing_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "shadow.json", run("shadow", tasks=(0,), trials=1))
    result = profile(tiny_bundle, "--replay", path, "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "is a run of shadow: only baseline, rsd and random decide what is computed" in result.stderr
