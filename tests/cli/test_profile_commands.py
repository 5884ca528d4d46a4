"""`rsd-trt profile`, `profile-query` and `replay` as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from replayable import made
from synthetic import run, write

from rsd_trt.cli import main
from rsd_trt.config import COMPONENTS, MAX_BATCH
from rsd_trt.eval.profile import replay, roofline
from rsd_trt.eval.profile.components import PAIR
from rsd_trt.eval.profile.queries import QUERIES
from rsd_trt.eval.profile.roofline import STAGES

QUICK = ("--device", "cpu", "-n", 2, "--warm-up", 1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "CPU_COPY", 1 << 20)
    monkeypatch.setattr(roofline, "CPU_SIDE", 64)
    monkeypatch.setattr(replay, "WARM_UP", 1)


def rsd_trt(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what would need a network."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_components_are_timed_printed_and_written(
    tiny_bundle: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("profile", tiny_bundle, "--engines", exported("fp32"), *QUICK)
    result = rsd_trt(*command, "--backend", "torch,ort,graph", "--batch", f"1,{MAX_BATCH}", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "profile.json").read_text())
    measured = {(row["what"], row["variant"], row["batch"]) for row in report["rows"] if row["ms"]}
    assert measured >= {(w, b, n) for w in (*COMPONENTS, PAIR) for b in ("torch", "ort") for n in (1, MAX_BATCH)}
    assert {len(samples) for samples in report["samples"]} == {0, 2}
    table = rsd_trt(*command, "--backend", "torch,graph", "--out", tmp_path)
    assert table.exit_code == 0
    assert "not measured: graph draft" in table.stdout
    for what, ending in (("raw samples", "json"), ("page", "html"), ("chart", "png")):
        assert f"{what}: {tmp_path / 'profile'}.{ending}" in table.stdout
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert "Not measured" in Page(tmp_path / "profile.html").text


def test_stages_are_timed_printed_and_written(tiny_bundle: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    sizes = ("--images", "1,2", "--prompt-tokens", 30)
    result = rsd_trt("profile-query", tiny_bundle, *sizes, "--trace", trace, *QUICK, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / "profile_query.json").read_text())
    eager = [row for row in report["rows"] if row["backbone"] == "eager"]
    assert {(row["what"], row["images"], row["prompt_tokens"]) for row in eager} == {
        (what, images, 30) for what in (*STAGES, *QUERIES) for images in (1, 2)
    }
    assert {len(samples) for row, samples in zip(report["rows"], report["samples"], strict=True) if row["ms"]} == {2}
    assert len(report["host_overhead_samples"]) == len(report["rows"])
    assert report["machine"]["bytes_per_s"] > 0 and set(report["machine"]["flops_per_s"]) == {"fp32"}
    assert sorted(path.name for path in out.iterdir()) == [f"profile_query.{x}" for x in ("html", "json", "png")]
    page = Page(out / "profile_query.html")
    assert page.tags.count("img") == 1 and "script" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for text in ("1 image, 30 prompt tokens", "blocks <= k", "GB/s", str(report["hardware"]["cpu"])):
        assert text in page.text
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"accepted query", "rejected query", "aten::linear"}


def test_what_is_foreign_is_escaped(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rsd-trt", "profile-query", "<b>&amp;</b>"])
    printed = rsd_trt("profile-query", bundle_copy, *QUICK, "--out", tmp_path)
    assert printed.exit_code == 0, printed.output
    for text in ("blocks <= k", "rejected", "roofline bound: ", "start-up", "n = 2"):
        assert text in printed.stdout
    page = Page(tmp_path / "profile_query.html")
    assert "b" not in page.tags and "'<b>&amp;</b>'" in page.text


def test_decisions_are_replayed(tiny_bundle: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{mode}.json", made(mode)) for mode in ("baseline", "rsd")]
    out = tmp_path / "out"
    command = ("replay", *files, "--bundle", tiny_bundle, "--episodes", 2, "--device", "cpu", "--out", out)
    table = rsd_trt(*command)
    assert table.exit_code == 0, table.output
    for text in (
        "decisions of the runs below, clock of tiny, eager backbone",
        "made-up, rsd",
        "a replay: a query alone",
    ):
        assert text in table.stdout
    printed = rsd_trt(*command, "--prompt-tokens", 20, "--json")
    record = json.loads(printed.stdout)
    assert record == json.loads((out / "replay.json").read_text())
    assert [row["mode"] for row in record["rows"]] == ["baseline", "rsd"]
    assert (record["prompt_tokens"], record["rows"][1]["speedup"] > 0) == (20, True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("profile", "--batch", "0"), "'0' is not a list of sizes"),
        (("profile", "--batch", "1,-2"), "'1,-2' is not a list of sizes"),
        (("profile", "--batch", ","), "',' is not a list of sizes"),
        (("profile", "--backend", "torhc"), "'torhc' is unknown; did you mean 'torch'?"),
        (("profile", "--backend", ","), "the list is empty"),
        (("profile", "-n", "1"), "1 is not in the range"),
        (("profile", "--backbone", "graph"), "no such option"),
        (("profile", "--trace", "t.json"), "no such option"),
        (("profile", "more.json"), "unexpected extra argument (more.json)"),
        (("profile-query", "--batch", "8"), "no such option"),
        (("profile-query", "--backend", "torch"), "no such option"),
        (("profile-query", "--engines", "x"), "no such option"),
        (("profile-query", "--backbone", "garph"), "'garph' is unknown; did you mean 'graph'?"),
        (("profile-query", "--backbone-precision", "f8"), "'f8' is unknown; did you mean 'fp8'?"),
        (("profile-query", "--images", "0"), "'0' is not a list of sizes"),
        (("profile-query", "--prompt-tokens", "a"), "'a' is not a list of sizes"),
        (("replay", "--backbone", "eager,graph"), "'eager,graph' is unknown"),
        (("replay", "--prompt-tokens", "28,64"), "'28,64' is not a valid integer"),
        (("replay", "-n", "8"), "no such option"),
    ],
)
def test_wrong_usage_is_exit_code_two(tiny_bundle: Path, arguments: tuple[str, ...], text: str) -> None:
    name, *options = arguments
    result = rsd_trt(name, tiny_bundle, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert text in result.stderr.lower()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("profile", "--backend", "trt"), "nothing could be measured: TensorRT engines need an NVIDIA GPU"),
        (("profile-query", "--backbone", "graph"), "nothing could be measured: backbone graph needs a CUDA device"),
        (("profile-query", "--prompt-tokens", "1"), "no text gives a prompt of 1 tokens"),
        (("replay",), "none.json is not there"),
    ],
)
def test_what_cannot_be_timed_is_one_line(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = arguments
    given = ("none.json", "--bundle", tiny_bundle) if name == "replay" else (tiny_bundle,)
    result = rsd_trt(name, *given, *options, "--device", "cpu")
    assert (result.exit_code, result.stdout) == (1, "")
    message = result.stderr.partition("error: ")[2].strip()
    assert message.startswith(text) and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_decides_nothing_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "shadow.json", run("shadow", tasks=(0,), trials=1))
    result = rsd_trt("replay", path, "--bundle", tiny_bundle, "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "is a run of shadow: only baseline, rsd and random decide what is computed" in result.stderr
