"""`rsd-trt profile` and `profile-query` as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import Result
from command import rsd_trt
from synthetic import run

from rsd_trt.config import COMPONENTS, MAX_BATCH
from rsd_trt.eval.profile import roofline
from rsd_trt.eval.profile.roofline import STAGES
from rsd_trt.eval.profile.stages import FULL
from rsd_trt.eval.report.cost import read_price

QUICK = ("--device", "cpu", "-n", 2, "--warm-up", 1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "CPU_COPY", 1 << 20)
    monkeypatch.setattr(roofline, "CPU_SIDE", 64)


def error(result: Result) -> str:
    """The line of a user error."""
    assert result.exit_code == 1, result.output
    return result.stderr.partition("error: ")[2].strip()


def test_a_backbone_that_is_asked_for_is_timed_or_an_error(tiny_bundle: Path, tmp_path: Path) -> None:
    some = (tiny_bundle, *QUICK, "--out", tmp_path)
    found = rsd_trt("profile", *some, "--backend", "torch", "--backbone", "graph")
    said = (
        "--backend torch --backbone graph was asked for and could not be measured: backbone graph needs a CUDA device"
    )
    assert error(found).startswith(said)
    found = rsd_trt("profile-query", *some, "--backbone", "eager,graph", "--json")
    assert error(found).startswith("--backbone graph was asked for and could not be measured: backbone graph needs")
    assert json.loads(found.stdout) == json.loads((tmp_path / "profile_query.json").read_text())


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
    assert error(result).startswith("--backend graph was asked for and could not be measured: backend graph needs")
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "profile.json").read_text())
    measured = {(row["what"], row["variant"], row["batch"]) for row in report["rows"] if row["ms"]}
    assert measured >= {(w, b, n) for w in COMPONENTS for b in ("torch", "ort") for n in (1, MAX_BATCH)}
    assert {len(samples) for samples in report["samples"]} == {0, 2}
    priced = {(row["what"], row["backend"], row["backbone"]): row["ms"] for row in report["costs"]}
    assert all(priced[what, backend, "eager"]["n"] == 2 for what in ("check", "full") for backend in ("torch", "ort"))
    assert [len(samples) for samples in report["cost_samples"]] == [2, 2, 2, 2, 0, 0]
    price = read_price(tmp_path / "profile.json", [run("rsd", backbone="eager")])
    assert (price.check, price.full) == tuple(priced[what, "ort", "eager"]["p50"] for what in ("check", "full"))
    table = rsd_trt(*command, "--pause", 1, "--out", tmp_path)  # of the default's backends, some cannot run here
    assert table.exit_code == 0
    assert "not measured: graph check query" in table.stdout
    assert "what queries cost" in table.stdout and "check /" in table.stdout
    assert "1 ms of pause before each; n = 2" in " ".join(table.stdout.split())
    for what, ending in (("raw samples", "json"), ("page", "html"), ("chart", "png")):
        assert f"{what}: {tmp_path / 'profile'}.{ending}" in table.stdout
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert "Not measured" in Page(tmp_path / "profile.html").text


def test_stages_are_timed_printed_and_written(tiny_bundle: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    sizes = ("--images", "2,1", "--prompt-tokens", 30)
    result = rsd_trt("profile-query", tiny_bundle, *sizes, "--trace", trace, *QUICK, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / "profile_query.json").read_text())
    eager = [row for row in report["rows"] if row["backbone"] == "eager"]
    assert {(row["what"], row["images"], row["prompt_tokens"]) for row in eager} == {
        (what, images, 30) for what in (*STAGES, FULL) for images in (1, 2)
    }
    assert {len(samples) for row, samples in zip(report["rows"], report["samples"], strict=True) if row["ms"]} == {2}
    assert {row["host_overhead_ms"] for row in report["rows"]} == {None}  # no stage is captured
    assert report["machine"]["bytes_per_s"] > 0 and set(report["machine"]["flops_per_s"]) == {"fp32"}
    assert sorted(path.name for path in out.iterdir()) == [f"profile_query.{x}" for x in ("html", "json", "png")]
    page = Page(out / "profile_query.html")
    assert page.tags.count("img") == 1 and "script" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for text in ("1 image, 30 prompt tokens", "blocks", "GB/s", str(report["hardware"]["cpu"])):
        assert text in page.text
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"check query", "full query", "aten::linear"}


def test_what_is_foreign_is_escaped(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rsd-trt", "profile-query", "<b>&amp;</b>"])
    printed = rsd_trt("profile-query", bundle_copy, *QUICK, "--out", tmp_path)
    assert printed.exit_code == 0, printed.output
    for text in ("blocks", "full query", "roofline bound: ", "start-up", "n = 2"):
        assert text in printed.stdout
    page = Page(tmp_path / "profile_query.html")
    assert "b" not in page.tags and "'<b>&amp;</b>'" in page.text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("profile", "--batch", "0"), "'0' is not a list of sizes"),
        (("profile", "--batch", "1,-2"), "'1,-2' is not a list of sizes"),
        (("profile", "--batch", ","), "',' is not a list of sizes"),
        (("profile", "--backend", "torhc"), "'torhc' is unknown; did you mean 'torch'?"),
        (("profile", "--backend", ","), "the list is empty"),
        (("profile", "-n", "1"), "1 is not in the range"),
        (("profile", "--backbone", "eager,graph"), "'eager,graph' is unknown"),
        (("profile", "--trace", "t.json"), "no such option"),
        (("profile", "more.json"), "unexpected extra argument (more.json)"),
        (("profile-query", "--batch", "8"), "no such option"),
        (("profile-query", "--backend", "torch"), "no such option"),
        (("profile-query", "--engines", "x"), "no such option"),
        (("profile-query", "--backbone", "garph"), "'garph' is unknown; did you mean 'graph'?"),
        (("profile-query", "--backbone-precision", "f8"), "'f8' is unknown; did you mean 'fp8'?"),
        (("profile-query", "--images", "0"), "'0' is not a list of sizes"),
        (("profile-query", "--prompt-tokens", "a"), "'a' is not a list of sizes"),
        (("replay",), "no such command 'replay'"),
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
    ],
)
def test_what_cannot_be_timed_is_one_line(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = arguments
    result = rsd_trt(name, tiny_bundle, *options, "--device", "cpu")
    assert (result.exit_code, result.stdout) == (1, "")
    message = error(result)
    assert message.startswith(text) and "\n" not in message
    assert list(tmp_path.iterdir()) == []
