"""The report on disk: what it holds, that it needs no network, and that nothing foreign becomes markup."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from command import rsd_trt
from msgspec import structs
from synthetic import TASKS, profile, run, throughput, write

from rsd_trt.errors import UserError, missing_extra
from rsd_trt.eval.report.page import code
from rsd_trt.eval.report.svg import INK
from rsd_trt.eval.report.write import PerformanceComparison, write_report
from rsd_trt.eval.results import Results
from rsd_trt.records import from_json, json_schema

SVG = "data:image/svg+xml;base64,"
VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "<script>alert(1)</script> | `a` *b* [c](d) & \" ' \n# e"
EVERYTHING = tuple((task, trial) for task in range(3) for trial in range(4))


class Checker(HTMLParser):
    """Checks that every element is closed in order, that ids are unique, and that links stay on the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fragments: set[str] = set()
        self.elements: list[str] = []
        self.text = ""
        self.charts: list[str] = []  # SVG files
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self._attributes(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def _attributes(self, attributes: dict[str, str | None]) -> None:
        if identity := attributes.get("id"):
            self.ids.append(identity)
        for name in ("href", "xlink:href", "src"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith(("#", "data:image/jpeg;base64,", SVG))
                if value.startswith("#"):
                    self.fragments.add(value[1:])
        if (source := attributes.get("src")) and source.startswith(SVG):
            self.charts.append(base64.b64decode(source.removeprefix(SVG)).decode())
            assert attributes["alt"]


def check(page: str) -> Checker:
    found = Checker(page)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert found.fragments <= set(found.ids)
    assert not {"script", "link", "iframe", "object"} & set(found.elements)
    assert not re.search(r"https?://|@import|url\(", page)
    return found


def make(folder: Path, *runs: Results, price: tuple[float, float] | None = None) -> Path:
    """Writes a report on these runs into `folder / "report"`; price: of a check and of a full query."""
    paths = [write(folder / f"{i}.json", results) for i, results in enumerate(runs)]
    priced = profile(folder / "profile.json", *price) if price else None
    write_report(paths, folder / "report", "rsd-trt report", priced)
    return folder / "report"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on a run of each mode, and on two runs of a series over workers, priced with a profile."""
    folder = tmp_path_factory.mktemp("whole")
    bad = {"success": 0.6, "acceptance": 0.4, "throughput": throughput(1, 1.0), "action_scale": 3.0}
    strip = folder / "strips" / "libero_spatial_rsd" / "task0_trial0.jpg"
    loops = [run("baseline", n_action_steps=n, **bad) for n in (1, 4, 8)]  # type: ignore[arg-type]
    runs = [*loops, run("rsd", broken=((2, 2),), **bad), run("shadow", **bad)]  # type: ignore[arg-type]
    failed = next(e for e in runs[3].episodes if not e.success and e.error is None)
    strip = strip.with_name(f"task{failed.task_id}_trial{failed.trial}.jpg")
    strip.parent.mkdir(parents=True)
    strip.write_bytes(b"\xff\xd8\xff\xe0 strip")
    series = [run("rsd", timing="batched", trials=2, throughput=throughput(n, float(n))) for n in (2, 16)]
    return make(folder, *runs, *series, price=(3.0, 20.0))


def test_the_html_page_needs_no_network(whole: Path) -> None:
    page = (whole / "report.html").read_text("utf-8")
    found = check(page)
    assert len(found.charts) >= 3
    assert "data:image/jpeg;base64," in page
    assert '<meta name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_charts_are_readable_on_light_and_dark(whole: Path) -> None:
    for svg in check((whole / "report.html").read_text("utf-8")).charts:
        assert INK in svg
        assert not re.search(r"<text(?![^>]*fill: #747c84)", svg)
        assert not re.search(r"fill: (#ffffff|white|#000000|black)", svg)


def test_the_html_page_has_every_part(whole: Path) -> None:
    found = check((whole / "report.html").read_text("utf-8"))
    for heading in ("Runs", "Tasks", "Acceptance", "Actions", "Latency", "Throughput", "Configuration", "Commands"):
        assert heading in found.text
    for heading in ("of 11 episodes of rsd, n = 4, single timing", "Against open loop", "Codec and gripper"):
        assert heading in found.text
    for said in (TASKS[0], "open loop of no higher cost: run ", "p, Holm", "bound by", "GPU busy", "odd: "):
        assert said in found.text
    for said in (
        "within 100 steps (95%)",
        "cost per action, ms",
        "made-up on made-up GPU, ort, graph",
        "false rejects",
        "would be shown by",
        "success within 100 steps",
    ):
        assert said in found.text
    for unit in ("success within 100 steps, %", "ms per action", "better", "checks accepted, %", "success, %", "20 Hz"):
        assert any(unit in svg for svg in found.charts)
    for fact in ("policy_sha256", "3f2a" * 16, "made-up GPU", "versions.torch", "rsd-trt eval bundles/made-up"):
        assert fact in found.text
    assert "Not shown of runs 7: shadow mode runs draft and main head at every query." in found.text
    assert {"svg", "details"} <= set(found.elements)


def test_the_markdown_page_has_the_same_tables(whole: Path) -> None:
    page = (whole / "report.md").read_text("utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    assert len(tables) == check((whole / "report.html").read_text("utf-8")).elements.count("table")
    for table in tables:
        lines = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert set(lines[1]) <= set("| -:")
    assert page.count("\n## ") == 10
    assert "\n\n\n" not in page


def test_the_json_file_is_typed(whole: Path) -> None:
    data = json.loads((whole / "performance_comparison.json").read_text("utf-8"))
    jsonschema.validate(data, json_schema(PerformanceComparison))
    found = from_json(PerformanceComparison, data, "file")
    names = [f"open loop, n = {n}" for n in (1, 4, 8)]
    assert [r.name for r in found.runs[:3]] == names
    assert (found.price.check, found.price.full, found.notice) == (3.0, 20.0, None)
    rsd = found.runs[3]
    assert rsd.name == "rsd, n = 4, single timing"
    assert [one.rival for one in rsd.against] == ["open loop, n = 1", "open loop of no higher cost"]
    assert rsd.against[0].versus.left_out == 1
    assert rsd.cost_per_action == pytest.approx((rsd.checks * 3 + rsd.full_queries * 20) / rsd.actions)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{mode}.json", run(mode)) for mode in ("baseline", "rsd")]  # type: ignore[arg-type]
    for out in ("a", "b"):
        write_report(paths, tmp_path / out, "rsd-trt report")
    for name in ("report.html", "report.md", "performance_comparison.json", "frontier.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_foreign_text_is_escaped(tmp_path: Path) -> None:
    def hostile(mode: str) -> Results:
        results = run(mode, success=0.5, policy=HOSTILE, hardware={HOSTILE: HOSTILE})  # type: ignore[arg-type]
        tasks = tuple(structs.replace(task, task_description=HOSTILE) for task in results.task_results)
        return structs.replace(results, task_results=tasks, command=HOSTILE)

    report = make(tmp_path, hostile("baseline"), hostile("rsd"))
    page = (report / "report.html").read_text("utf-8")
    assert "alert(1)" in check(page).text
    assert "<script" not in page
    markdown = (report / "report.md").read_text("utf-8")
    prose = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert "<script" not in prose
    assert "\\[c\\](d)" in prose
    assert "\n# e" not in markdown


def test_markdown_code_stays_on_its_line() -> None:
    assert code("rsd-trt\n# eval <x>") == "    rsd-trt # eval <x>"


@pytest.mark.parametrize(
    "runs",
    [
        [run("baseline")],
        [run("rsd")],
        [run("shadow")],
        [run("rsd", broken=EVERYTHING)],
        [run("baseline", broken=EVERYTHING), run("rsd", broken=EVERYTHING), run("shadow", broken=EVERYTHING)],
        [run("baseline", timing="batched"), run("rsd", timing="batched")],
        [run("baseline", seed=8), run("rsd"), run("shadow", backend="trt")],
        [run("baseline", tasks=(0,), trials=1), run("rsd", tasks=(0,), trials=1)],
        [run("baseline"), run("rsd", suite="libero_goal")],
        [run("shadow", success=0.2, training_actions=None, acceptance=0.1)],
        [run("rsd", change=lambda episode: structs.replace(episode, queries=(), actions=None, steps=0))],
        [run("baseline", trained=False), run("rsd", trained=False)],
        [run("random", success=0.2), run("rsd", success=0.3), run("random", accept_rate=0.2)],
    ],
    ids=[
        *(
            "baseline alone",
            "rsd alone",
            "shadow alone",
            "errors only",
            "errors only in all",
            "batched",
            "mixed settings",
        ),
        *("one episode", "two suites", "no training statistics", "no query", "untrained", "controls"),
    ],
)
def test_every_mix_of_runs_gives_a_whole_page(tmp_path: Path, runs: list[Results]) -> None:
    report = make(tmp_path, *runs)
    shown = check((report / "report.html").read_text("utf-8")).text
    markdown = (report / "report.md").read_text("utf-8")
    for page in (shown, markdown):
        assert not re.search(r"\b(None|nan|inf)\b", page)
    from_json(PerformanceComparison, json.loads((report / "performance_comparison.json").read_text()), "file")


def test_batched_runs_show_no_latency(tmp_path: Path) -> None:
    report = make(tmp_path, run("baseline", timing="batched"), run("rsd", timing="batched"))
    text = check((report / "report.html").read_text("utf-8")).text
    assert text.count("Not shown of runs 1, 2: queries that share a forward say nothing of one alone") == 1
    assert "measured per action, ms" not in text


def test_a_hidden_draft_is_told_first(tmp_path: Path) -> None:
    report = make(tmp_path, run("baseline", draft="hidden"), run("rsd", draft="hidden"))
    told = "The draft of made-up reads the backbone's hidden state"
    assert (report / "report.md").read_text("utf-8").splitlines()[2].startswith(f"**{told}")
    assert told.replace("'", "&#39;") in (report / "report.html").read_text("utf-8").split("</h1>")[1][:300]
    result = rsd_trt("report", *(tmp_path / f"{i}.json" for i in range(2)), "-o", tmp_path / "again")
    assert result.stdout.startswith(f"note: {told}")


def test_an_untrained_bundle_is_told_first(tmp_path: Path) -> None:
    page = (make(tmp_path, run("baseline", trained=False), run("rsd")) / "report.md").read_text("utf-8")
    assert "The bundle of open loop, n = 4 is untrained (random weights)" in page.replace("\n", " ").split("| run |")[0]


def test_a_report_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    report = make(tmp_path, run("baseline"))
    (report / "notes.txt").write_text("mine")
    before = (report / "report.html").read_bytes()
    make(tmp_path, run("baseline", success=0.2))
    assert (report / "report.html").read_bytes() != before
    assert sorted(path.name for path in report.iterdir()) == [
        *("frontier.png", "notes.txt", "performance_comparison.json", "report.html", "report.md")
    ]


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = make(tmp_path, run("baseline"))
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    source = write(tmp_path / "r.json", run("baseline", success=0.2))
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == len(before):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="report cannot be written: No space left on device"):
        write_report([source], report, "")
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before


@pytest.mark.parametrize(("module", "package"), [("matplotlib.figure", "matplotlib"), ("jinja2", "jinja2")])
def test_a_missing_extra_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        write_report([tmp_path / "absent.json"], tmp_path / "report", "")
    assert str(error.value) == str(missing_extra(package, "report"))


def test_report_command(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{mode}.json", run(mode)) for mode in ("baseline", "rsd")]  # type: ignore[arg-type]
    result = rsd_trt("report", *paths, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for name in ("performance_comparison.json", "report.md", "report.html"):
        assert str(tmp_path / "out" / name) in result.stdout.replace("\n", "")
    assert "full queries per action" in " ".join(result.stdout.split())
    as_json = rsd_trt("report", *paths, "-o", tmp_path / "out", "--json")
    assert json.loads(as_json.stdout) == json.loads((tmp_path / "out" / "performance_comparison.json").read_text())


def test_compare_command(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{mode}.json", run(mode, trained=False)) for mode in ("baseline", "rsd")]  # type: ignore[arg-type]
    result = rsd_trt("compare", *paths, "--profile", profile(tmp_path / "profile.json", 0.2, 2.0), "--within", 150)
    assert result.exit_code == 0, result.output
    for text in ("McNemar", "by task", "not shown", "within 150 steps", "ms per action"):
        assert text in " ".join(result.stdout.split())
    assert re.search(r"\d\.\d\dx \(\d\.\d\d to \d\.\d\d\)", result.stdout)
    assert "UNTRAINED" in result.stdout
    data = json.loads(rsd_trt("compare", *paths, "--json").stdout)
    assert (data["names"], data["within"]) == (["open loop, n = 4", "rsd, n = 4"], 100)


@pytest.mark.parametrize("command", ["compare", "report"])
def test_user_errors_are_one_line(tmp_path: Path, command: str) -> None:
    good, bad = write(tmp_path / "a.json", run("rsd")), tmp_path / "b.json"
    bad.write_text("{")
    for paths in ((good, bad), (good, tmp_path / "absent.json"), (good, tmp_path), (good, good)):
        result = rsd_trt(command, *paths)
        assert (result.exit_code, result.stdout) == (1, "")
        assert len(result.stderr.strip().splitlines()) == 1
    assert not Path("report").exists()


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", run("rsd"))
    result = rsd_trt("report", path, "-o", path)
    assert result.exit_code == 1
    assert "a.json cannot be written: " in result.stderr


def test_names_are_no_formulas(tmp_path: Path) -> None:
    """What matplotlib would read as mathematics is shown as it is."""
    names = [run("rsd", suite=suite) for suite in (r"$\frac{$", "$x$")]
    found = check((make(tmp_path, *names) / "report.html").read_text("utf-8"))
    assert r"$\frac{$" in found.text
    assert any(r"$\frac{$" in svg for svg in found.charts)
