"""The stages of a query, timed on a tiny bundle; graphs are stood in for by the calls that made them."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm_double import TimmDouble

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision, Component
from rsd_trt.errors import UserError
from rsd_trt.eval.profile import floor, query_times, stage_calls, stages
from rsd_trt.eval.profile.clock import Clock
from rsd_trt.eval.profile.query_times import QUERIES
from rsd_trt.eval.profile.roofline import Machine
from rsd_trt.eval.profile.shapes import Shape, make_scene
from rsd_trt.eval.profile.stages import ORACLE, StageProfile, StagesRequest, StageTiming, Way, profile_stages, speedups
from rsd_trt.eval.profile.work import STAGES, Stage
from rsd_trt.eval.report.plots import draw_stages, stage_chart
from rsd_trt.eval.verify import oracle
from rsd_trt.models.backbone import Backbone
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.runtime import backends, graph_forward, graph_session
from rsd_trt.runtime.graph_forward import GraphForward
from rsd_trt.runtime.graph_session import GraphSession
from rsd_trt.runtime.session import Launch, Session

CPU = torch.device("cpu")
EVERYTHING = {*STAGES, *QUERIES}
SHAPES = (Shape(1, 28), Shape(2, 40))


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "CPU_COPY", 1 << 20)
    monkeypatch.setattr(floor, "CPU_SIDE", 64)
    monkeypatch.setattr(oracle, "timm_tower", TimmDouble)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the graph backbone run on the CPU."""

    def capture(launch: Launch, device: torch.device, pool: object = None) -> SimpleNamespace:
        launch()
        return SimpleNamespace(replay=lambda: torch.inference_mode()(launch)())

    for module in (graph_forward, graph_session, stage_calls):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(graph_forward, "pinned", lambda shape, dtype: torch.zeros(tuple(shape), dtype=dtype))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", threading.get_ident)
    monkeypatch.setattr(GraphForward, "_wait", lambda self: None)
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
    *backbones: tuple[BackboneKind, BackbonePrecision], shapes: tuple[Shape, ...] = (Shape(),)
) -> StagesRequest:
    return StagesRequest(backbones, shapes, CPU, "fp32", samples=2, warm_up=1)


def by_way(found: StageProfile) -> dict[Way, dict[str, StageTiming]]:
    ways: dict[Way, dict[str, StageTiming]] = {}
    for row in found.rows:
        assert row.what not in ways.setdefault(row.way, {})
        ways[row.way][row.what] = row
    return ways


@pytest.mark.usefixtures("graphs")
def test_every_stage_and_query_of_every_way_is_timed(bundle: Bundle) -> None:
    found = profile_stages(bundle, request(("eager", "bundle"), ("graph", "bundle"), shapes=SHAPES))
    ways = by_way(found)
    assert list(ways) == [
        Way(backbone, "fp32", *vars(shape).values())
        for backbones in ((ORACLE, "eager"), ("graph",))
        for shape in SHAPES
        for backbone in backbones
    ]
    for way, rows in ways.items():
        assert set(rows) == ({"vision", "baseline query"} if way.backbone == ORACLE else EVERYTHING)
        for row in rows.values():
            assert len(row.ms) == 2 and min(row.ms) > 0 and row.reason is None
            assert row.outside_ms == ()  # no GPU
    assert [startup.way for startup in found.startups] == [way for way in ways if way.backbone != ORACLE]
    assert all(startup.load_s > 0 and startup.first_s > 0 for startup in found.startups)


def test_a_query_has_the_work_and_the_floor_of_its_stages(bundle: Bundle) -> None:
    ((_, _), (_, rows)) = by_way(profile_stages(bundle, request(("eager", "bundle")))).items()
    for query, parts in QUERIES.items():
        for name in ("bytes", "flops", "roofline_ms"):
            total = sum(getattr(rows[stage], name) for stage in parts)
            assert getattr(rows[query], name) == pytest.approx(total)
    assert set(QUERIES["accepted query"]) < set(QUERIES["baseline query"]) | {"propose"}
    assert rows["preprocess"].flops == 0 and rows["preprocess"].bound == "memory"


@pytest.mark.usefixtures("graphs")
def test_a_stage_computes_what_the_eager_one_does(bundle: Bundle) -> None:
    """Both cut the query at the same places."""
    scene = make_scene(bundle, Shape(2, 30))
    compared: list[Stage] = ["blocks <= k", "blocks > k"]
    eager = stage_calls.stage_calls(bundle.backbone(), backends.Launcher(scene.bundle, "torch", CPU), scene)
    with torch.inference_mode():
        expected = [eager[stage]() for stage in compared]
    captured: list[object] = []

    def keep(run: stage_calls.Run, device: torch.device) -> stage_calls.Run:
        captured.append(run())
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_calls, "_replayed", keep)
        fused = FusedBackbone(bundle.backbone())
        stage_calls.stage_calls(fused, backends.Launcher(scene.bundle, "graph", CPU), scene)
    for value, wanted in zip(captured[2:], expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-4)


def test_a_late_draft_has_no_blocks_after_it(bundle: Bundle) -> None:
    rsd = dataclasses.replace(bundle.config.rsd, draft_block=bundle.config.backbone.language.blocks)
    late = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, rsd=rsd))
    *_, rows = by_way(profile_stages(late, request(("eager", "bundle")))).values()
    assert set(rows) == EVERYTHING - {"blocks > k"}


def test_what_cannot_run_is_a_row_with_the_reason(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise UserError("timm is not installed. Install it: pip install timm transformers")

    monkeypatch.setattr(stages, "Oracle", missing)
    found = by_way(profile_stages(bundle, request(("graph", "bundle"), ("eager", "fp8"), ("eager", "bf16"))))
    reasons = {way.name: rows["baseline query"].reason for way, rows in found.items()}
    assert reasons == {
        "graph fp32": "backbone graph needs a CUDA device, not cpu. Use: --backbone eager",
        "eager fp8": "backbone precision fp8 needs --backbone graph or compiled: eager is the reference",
        f"{ORACLE} bf16": "timm is not installed. Install it: pip install timm transformers",
        "eager bf16": None,
    }


def test_a_prompt_has_the_tokens_that_were_asked_for(bundle: Bundle) -> None:
    for tokens in (2, 28, 64, 200):
        scene = make_scene(bundle, Shape(3, tokens))
        assert (scene.images, scene.prompt_tokens) == (3, tokens)
        assert {observation.images.shape[0] for observation in scene.observations} == {3}
    assert make_scene(bundle, Shape()).bundle.config.control == bundle.config.control
    with pytest.raises(UserError, match="no text gives a prompt of 1 tokens with the tokenizer of"):
        make_scene(bundle, Shape(None, 1))


def test_the_hosts_share_of_a_query_is_what_the_device_does_not_need(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []

    class Fake(Clock):
        def __init__(self) -> None:
            self.cuda = True

        def wall(self, run: stage_calls.Run) -> float:
            run()
            return 5.0

        def queued(self, run: stage_calls.Run) -> float:
            return 4.0

    monkeypatch.setattr(query_times, "launch", lambda forward, kind, observation: launched.append(kind))
    monkeypatch.setattr(query_times, "EagerForward", FusedBackbone)  # so that this one's device has a time of its own
    scene = make_scene(bundle, Shape())
    forward = backends.open_forward(backends.Launcher(scene.bundle, "torch", CPU), "1")
    times = query_times.time_queries(forward, scene, Fake(), samples=2, warm_up=1)
    assert {kind: (t.wall, t.outside) for kind, t in times.items()} == dict.fromkeys(QUERIES, ((5, 5), (1, 1)))


MACHINE = Machine(1e11, {"fp32": 1e12}, 64, 1 << 20)


def made_up(backbone: str, images: int = 1, **ms: float) -> list[StageTiming]:
    way = Way(backbone, "fp32", images, 28)
    return [StageTiming(what.replace("_", " "), way, (p50, p50), roofline_ms=p50 / 2) for what, p50 in ms.items()]


MADE_UP = [
    *made_up(ORACLE, vision=4, baseline_query=12),
    *made_up("graph", preprocess=1, vision=2, propose=0.1, predict=0.2, accepted_query=3.4, baseline_query=4),
    *made_up("graph", images=2, vision=3, baseline_query=5),
    StageTiming("baseline query", Way("compiled", "fp8", 1, 28), reason="no GPU"),
]


def test_speedups_are_over_the_eager_stack_in_the_same_shape() -> None:
    assert speedups(MADE_UP) == [1, 1, None, 2, None, None, None, 3, None, None, None]


def test_a_row_is_summed_up() -> None:
    row = made_up("graph", vision=2)[0].summary()
    assert row["ms"]["p50"] == 2 and row["times_roofline"] == 2  # type: ignore[index]
    assert MADE_UP[-1].summary()["ms"] is None
    json.dumps(row)


def test_the_chart_shows_what_was_measured(tmp_path: Path) -> None:
    stage_chart(MADE_UP, "a made-up GPU", tmp_path / "stages.png")
    with Image.open(tmp_path / "stages.png") as chart:
        chart.verify()
        assert min(chart.size) > 200


def test_every_panel_of_the_chart_is_as_wide_as_the_longest_bar() -> None:
    figure = Figure()
    draw_stages(figure, [*made_up("graph", vision=3, baseline_query=4), *made_up("graph", images=2, vision=40)])
    assert [axes.get_xlim()[0] for axes in figure.axes] == [0, 0]
    assert min(axes.get_xlim()[1] for axes in figure.axes) > 40
