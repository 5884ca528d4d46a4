"""The stages of a query, timed on a tiny bundle; graphs are stood in for by the calls that made them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm_double import TimmDouble

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision, Component
from rsd_trt.errors import UserError
from rsd_trt.eval.profile import roofline, stage_calls, stages
from rsd_trt.eval.profile.charts import stage_chart
from rsd_trt.eval.profile.inputs import InputSize, make_inputs
from rsd_trt.eval.profile.roofline import STAGES, Machine
from rsd_trt.eval.profile.stages import (
    FULL,
    ORACLE,
    Configuration,
    QueryProfile,
    QueryRequest,
    StageTiming,
    profile_query,
    trace_query,
)
from rsd_trt.eval.profile.tables import stage_tables
from rsd_trt.eval.verify import oracle
from rsd_trt.models.backbone import Backbone
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.runtime import backends, graph_backbone, session
from rsd_trt.runtime.session import GraphSession, Launch, Session

CPU = torch.device("cpu")
EVERYTHING = {*STAGES, FULL}
IMAGES = (1, 2)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "CPU_COPY", 1 << 20)
    monkeypatch.setattr(roofline, "CPU_SIDE", 64)
    monkeypatch.setattr(oracle, "timm_tower", TimmDouble)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the graph backbone run on the CPU."""

    def capture(launch: Launch, device: torch.device, pool: object = None) -> SimpleNamespace:
        launch()
        return SimpleNamespace(replay=lambda: torch.inference_mode()(launch)())

    for module in (graph_backbone, session, stage_calls):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(graph_backbone, "pinned", lambda shape, dtype: torch.zeros(tuple(shape), dtype=dtype))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", threading.get_ident)
    open_component = backends.Launcher.open

    def open_session(self: backends.Launcher, component: Component, batch: str) -> Session:
        if self.backend == "graph":
            return GraphSession(self.bundle.component(component), CPU)
        return open_component(self, component, batch)  # type: ignore[arg-type]

    def open_backbone(
        bundle: Bundle, device: torch.device, kind: BackboneKind, precision: BackbonePrecision
    ) -> Backbone | FusedBackbone:
        return bundle.backbone() if kind == "eager" else FusedBackbone(bundle.backbone())

    monkeypatch.setattr(backends.Launcher, "open", open_session)
    monkeypatch.setattr(stages, "open_backbone", open_backbone)


def request(
    *kinds: BackboneKind, precisions: tuple[BackbonePrecision, ...] = ("bundle",), images: tuple[int, ...] = ()
) -> QueryRequest:
    return QueryRequest(kinds, precisions, images, (28,) if images else (), CPU, "fp32", samples=2, warm_up=1)


def by_configuration(found: QueryProfile) -> dict[Configuration, dict[str, StageTiming]]:
    configurations: dict[Configuration, dict[str, StageTiming]] = {}
    for row in found.rows:
        assert row.what not in configurations.setdefault(row.configuration, {})
        configurations[row.configuration][row.what] = row
    return configurations


@pytest.mark.usefixtures("graphs")
def test_every_stage_and_query_of_every_configuration_is_timed(bundle: Bundle) -> None:
    found = profile_query(bundle, request("eager", "graph", images=IMAGES))
    configurations = by_configuration(found)
    assert list(configurations) == [
        Configuration(backbone, "fp32", images, 28)
        for backbones in ((ORACLE, "eager"), ("graph",))
        for images in IMAGES
        for backbone in backbones
    ]
    for configuration, rows in configurations.items():
        assert set(rows) == ({"vision", FULL} if configuration.backbone == ORACLE else EVERYTHING)
        for row in rows.values():
            assert len(row.ms) == 2 and min(row.ms) > 0 and row.reason is None
            captured = row.what == FULL and configuration.backbone == "graph"
            assert (row.host_overhead_ms is not None) == captured
    ours = [x for x in configurations if x.backbone != ORACLE]
    assert [startup.configuration for startup in found.startups] == ours
    assert all(startup.load_s > 0 and startup.first_s > 0 for startup in found.startups)
    tables = stage_tables(found)
    assert [table.title for table in tables] == ["1 image, 28 prompt tokens", "2 images, 28 prompt tokens"]
    assert sum(len(table.rows) for table in tables) == len(found.rows)


def test_a_query_has_the_work_and_the_bound_of_its_stages(bundle: Bundle) -> None:
    ((_, _), (_, rows)) = by_configuration(profile_query(bundle, request("eager"))).items()
    for name in ("bytes", "flops", "roofline_ms"):
        total = sum(getattr(rows[stage], name) for stage in STAGES)
        assert getattr(rows[FULL], name) == pytest.approx(total)
    assert rows["preprocess"].flops == 0 and rows["preprocess"].bound == "memory"


@pytest.mark.usefixtures("graphs")
def test_a_stage_computes_what_the_eager_one_does(bundle: Bundle) -> None:
    """Both cut the query at the same places."""
    given = make_inputs(bundle, InputSize(2, 30))
    eager = stage_calls.stage_calls(bundle.backbone(), backends.Launcher(given.bundle, "torch", CPU), given)
    with torch.inference_mode():
        expected = eager["blocks"]()
    captured: list[object] = []

    def keep(run: stage_calls.Call, device: torch.device) -> stage_calls.Call:
        captured.append(run())
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_calls, "_replayed", keep)
        fused = FusedBackbone(bundle.backbone())
        stage_calls.stage_calls(fused, backends.Launcher(given.bundle, "graph", CPU), given)
    torch.testing.assert_close(captured[-1], expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_run_is_a_row_with_the_reason(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise UserError("timm is not installed. Install it: pip install timm transformers")

    monkeypatch.setattr(stages, "Oracle", missing)
    found = by_configuration(profile_query(bundle, request("eager", "compiled", precisions=("bf16", "fp8"))))
    reasons = {x.name: rows[FULL].reason for x, rows in found.items()}
    needs_cuda = "backbone compiled needs a CUDA device, not cpu. Use: --backbone eager"
    assert reasons == {
        "compiled bf16": needs_cuda,
        "compiled fp8": needs_cuda,
        "eager fp8": "backbone precision fp8 does not go with --backbone eager: only what is compiled is "
        "faster than bf16. Use: --backbone compiled",
        f"{ORACLE} bf16": "timm is not installed. Install it: pip install timm transformers",
        "eager bf16": None,
    }


def test_a_prompt_has_the_tokens_that_were_asked_for(bundle: Bundle) -> None:
    for tokens in (2, 28, 64, 200):
        given = make_inputs(bundle, InputSize(3, tokens))
        assert (given.images, given.prompt_tokens) == (3, tokens)
        assert {observation.images.shape[0] for observation in given.observations} == {3}
    assert make_inputs(bundle, InputSize()).bundle.config.control == bundle.config.control
    with pytest.raises(UserError, match="no text gives a prompt of 1 tokens with the tokenizer of"):
        make_inputs(bundle, InputSize(None, 1))


@pytest.mark.usefixtures("graphs")
def test_host_overhead_is_what_a_query_takes_beyond_its_stages(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "time_queries", lambda *_, **__: {"full": (9.0, 5.0, 5.0)})
    monkeypatch.setattr(stages._Timer, "_stage", lambda *_: (1.0, 1.0, 7.0))
    (rows,) = by_configuration(profile_query(bundle, request("graph"))).values()
    assert {what: row.host_overhead_ms for what, row in rows.items()} == dict.fromkeys(STAGES) | {FULL: 5 - len(STAGES)}


def test_a_trace_has_a_check_only_of_what_the_draft_sees(bundle: Bundle, tmp_path: Path) -> None:
    """Its weights are of the bundle's number of cameras."""
    for images, kinds in (((), {"check query", "full query"}), ((1,), {"full query"})):
        trace_query(bundle, request("eager", images=images), tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        assert {event["name"] for event in events if event["name"].endswith(" query")} == kinds


MACHINE = Machine(1e11, {"fp32": 1e12}, 64, 1 << 20)


def made_up(backbone: str, images: int = 1, **ms: float) -> list[StageTiming]:
    configuration = Configuration(backbone, "fp32", images, 28)
    return [
        StageTiming(what.replace("_", " "), configuration, (p50, p50), roofline_ms=p50 / 2) for what, p50 in ms.items()
    ]


MADE_UP = [
    *made_up(ORACLE, vision=4, full_query=12),
    *made_up("graph", preprocess=1, vision=2, predict=0.2, full_query=4),
    *made_up("graph", images=2, vision=3, full_query=5),
    StageTiming(FULL, Configuration("compiled", "fp8", 1, 28), reason="no GPU"),
]


def test_speedups_are_over_the_eager_stack_at_the_same_size() -> None:
    found = QueryProfile(MACHINE, tuple(MADE_UP), ()).speedups()
    assert found == [1, 1, None, 2, None, 3, None, None, None]


def test_a_row_is_summed_up() -> None:
    row = made_up("graph", vision=2)[0].summary()
    assert row["ms"]["p50"] == 2 and row["times_roofline"] == 2  # type: ignore[index]
    assert MADE_UP[-1].summary()["ms"] is None
    json.dumps(row)


def test_every_panel_of_the_chart_is_as_wide_as_the_longest_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Figure] = []
    real = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        real(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    stage_chart([*MADE_UP, *made_up("graph", images=3, vision=40)], "a made-up GPU", tmp_path / "stages.png")
    (figure,) = saved
    assert [axes.get_xlim()[0] for axes in figure.axes] == [0, 0, 0]
    assert min(axes.get_xlim()[1] for axes in figure.axes) > 40
    with Image.open(tmp_path / "stages.png") as chart:
        chart.verify()
        assert min(chart.size) > 200
