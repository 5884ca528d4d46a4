"""The stages of a query and whole queries, timed on every backbone in one run, on the same inputs, at batch 1.

A stage starts and ends on the device. Those of the graph backbones are captured each as a CUDA graph of its own, and
timed while the device is held up until the graph is in its queue; eager ones between two events, with what the host
takes to issue them. A whole query is timed by the host's clock, synchronised, from the uint8 image in the host's memory
to the actions there, through `Policy`; directly after, the same launches are timed on the device alone. What is left
of the host's time is the overhead outside the GPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision, Precision
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.clock import Clock, Run
from rsd_trt.eval.profile.query_times import QUERIES, time_queries
from rsd_trt.eval.profile.roofline import Bound, Floor, Machine, measure_machine
from rsd_trt.eval.profile.shapes import Scene, Shape, make_scene
from rsd_trt.eval.profile.stage_calls import preprocessor, stage_calls
from rsd_trt.eval.profile.work import Number, Stage, Work, stage_work
from rsd_trt.eval.statistics import percentiles
from rsd_trt.eval.verify.oracle import Oracle
from rsd_trt.models.backbone import Backbone, BackboneInputs, BackboneState
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.runtime.backends import FP8_CAPABILITY, Launcher, assemble, open_backbone
from rsd_trt.runtime.forward import EagerForward

ORACLE = "timm + transformers"  # what people run who deploy nothing
NUMBERS: dict[str, Number] = {"float32": "fp32", "bfloat16": "bf16"}
BOUNDARY = (
    "batch 1; stages: on the device; queries: host's clock, synchronised, from uint8 images in the host's memory to "
    "actions there"
)


@dataclass(frozen=True)
class StagesRequest:
    """What to time: ways to run the backbone, and shapes of what is observed."""

    backbones: tuple[tuple[BackboneKind, BackbonePrecision], ...]
    shapes: tuple[Shape, ...]
    device: torch.device
    precision: Precision  # of draft and head
    samples: int
    warm_up: int


@dataclass(frozen=True)
class Way:
    """One backbone in one shape."""

    backbone: str
    precision: str  # of the backbone's products
    images: int
    prompt_tokens: int

    @property
    def name(self) -> str:
        """For people: `graph bf16`."""
        return f"{self.backbone} {self.precision}"

    @property
    def shape(self) -> str:
        """For people: `1 image, 28 prompt tokens`."""
        return f"{self.images} image{'' if self.images == 1 else 's'}, {self.prompt_tokens} prompt tokens"


@dataclass(frozen=True)
class StageTiming:
    """A stage or a query. The floor is that of the work which it has to do, whoever does it."""

    what: str
    way: Way
    ms: tuple[float, ...] = ()  # raw samples, in order
    outside_ms: tuple[float, ...] = ()  # of a query: the host's time beyond that of the device
    bytes: int | None = None
    flops: int | None = None
    roofline_ms: float | None = None
    bound: Bound | None = None
    reason: str | None = None  # why there are no samples

    def summary(self) -> dict[str, object]:
        """The row without its raw samples."""
        ms = percentiles(self.ms)
        return {
            "what": self.what,
            **asdict(self.way),
            "ms": ms,
            "outside_ms": percentiles(self.outside_ms),
            "bytes": self.bytes,
            "flops": self.flops,
            "roofline_ms": self.roofline_ms,
            "bound": self.bound,
            "times_roofline": ms["p50"] / self.roofline_ms if ms and self.roofline_ms else None,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Startup:
    """What a backbone costs before its first queries of a shape are answered."""

    way: Way
    load_s: float  # weights onto the device, fused; the same for all shapes
    first_s: float  # the first query of each kind: capture, and compilation where there is one


@dataclass(frozen=True)
class StageProfile:
    """All rows, and what the floors are made from."""

    machine: Machine
    rows: tuple[StageTiming, ...]
    startups: tuple[Startup, ...]


def profile_stages(bundle: Bundle, request: StagesRequest) -> StageProfile:
    """Times everything. What cannot run here has a row that says why.

    Raises:
        UserError: a shape that the bundle cannot have, or the device has too little memory.
    """
    scenes = [make_scene(bundle, shape) for shape in request.shapes]
    machine = measure_machine(request.device, _numbers(bundle, request))
    rows: list[StageTiming] = []
    startups: list[Startup] = []
    for kind, precision in request.backbones:
        number = number_of(bundle, precision)
        started = time.perf_counter()
        try:
            backbone = open_backbone(bundle, request.device, kind, precision)
        except UserError as error:
            ways = [_way(kind, number, scene) for scene in scenes]
            rows += [StageTiming("baseline query", way, reason=str(error)) for way in ways]
            continue
        load = time.perf_counter() - started
        for scene in scenes:
            timer = _Timer(scene, number, request, machine)
            if isinstance(backbone, Backbone):
                rows += timer.oracle(backbone)
            first, found = timer.backbone(backbone, kind)
            rows += found
            startups.append(Startup(_way(kind, number, scene), load, first))
        del backbone
        _release(kind, request.device)
    return StageProfile(machine, tuple(rows), tuple(startups))


def number_of(bundle: Bundle, precision: BackbonePrecision) -> Number:
    """What the backbone's products are computed in."""
    return NUMBERS[bundle.config.backbone.dtype] if precision == "bundle" else precision


def _numbers(bundle: Bundle, request: StagesRequest) -> list[Number]:
    """The precisions whose rates floors are made from: the codec's, and all that is asked for and can run."""
    asked = {number_of(bundle, precision) for _, precision in request.backbones}
    numbers: set[Number] = {"fp32", request.precision, *asked}
    if "fp8" in numbers:
        numbers |= {"bf16"}
        if request.device.type != "cuda" or torch.cuda.get_device_capability(request.device) < FP8_CAPABILITY:
            numbers -= {"fp8"}
    return sorted(numbers)


def _way(kind: str, number: Number, scene: Scene) -> Way:
    return Way(kind, number, scene.images, scene.prompt_tokens)


class _Timer:
    """Times one precision in one scene."""

    def __init__(self, scene: Scene, number: Number, request: StagesRequest, machine: Machine) -> None:
        self.scene, self.number, self.request, self.machine = scene, number, request, machine
        self.clock = Clock(request.device)
        config = scene.bundle.config
        self.work = stage_work(config, scene.images, scene.prompt_tokens, number, request.precision)

    def backbone(self, backbone: Backbone | FusedBackbone, kind: BackboneKind) -> tuple[float, list[StageTiming]]:
        """Seconds until the first queries are answered, and all rows."""
        launcher, request = self._launcher(kind), self.request
        forward = assemble(launcher, "1", backbone)
        started = time.perf_counter()
        time_queries(forward, self.scene, self.clock, samples=0, warm_up=1)
        first = time.perf_counter() - started
        queries = time_queries(forward, self.scene, self.clock, request.samples, request.warm_up)
        way, captured = _way(kind, self.number, self.scene), not isinstance(backbone, Backbone)
        rows = [
            self._row(stage, way, [stage], self._stage(run, captured))
            for stage, run in stage_calls(backbone, launcher, self.scene).items()
        ]
        rows += [self._row(query, way, QUERIES[query], t.wall, t.outside) for query, t in queries.items()]
        return first, rows

    def oracle(self, backbone: Backbone) -> list[StageTiming]:
        """The same weights in timm's towers and transformers' Llama, as people run them: vision, and whole queries."""
        way, request = _way(ORACLE, self.number, self.scene), self.request
        try:
            oracle = Oracle(backbone)
        except UserError as error:
            return [StageTiming("baseline query", way, reason=str(error))]
        launcher = self._launcher("eager")
        sessions = launcher.open("propose", "1"), launcher.open("predict", "1")
        preprocess = preprocessor(self.scene, backbone, request.device)
        whole = _Whole(oracle)
        forward = EagerForward(self.scene.bundle.config, whole, *sessions, preprocess)  # type: ignore[arg-type]
        with torch.inference_mode():
            inputs = preprocess(self.scene.observations[:1])
        vision = self._stage(lambda: oracle.embed(inputs), captured=False)
        times = time_queries(forward, self.scene, self.clock, request.samples, request.warm_up, baseline_only=True)
        query = times["baseline query"]
        return [
            self._row("vision", way, ["vision"], vision),
            self._row("baseline query", way, QUERIES["baseline query"], query.wall, query.outside),
        ]

    @torch.inference_mode()
    def _stage(self, run: Run, captured: bool) -> tuple[float, ...]:
        """ms of each launch of a stage after the warm-up."""
        for _ in range(self.request.warm_up):
            run()
        found = []
        for _ in range(self.request.samples):
            ms = self.clock.queued(run) if captured else None
            found.append(self.clock.issued(run) if ms is None else ms)
        return tuple(found)

    def _launcher(self, kind: BackboneKind) -> Launcher:
        backend = "torch" if kind == "eager" else "graph"
        return Launcher(self.scene.bundle, backend, self.request.device, self.request.precision)  # type: ignore[arg-type]

    def _row(
        self, what: str, way: Way, stages: Sequence[Stage], ms: tuple[float, ...], outside: tuple[float, ...] = ()
    ) -> StageTiming:
        parts = [self.work[stage] for stage in stages if stage in self.work]
        total, floors = sum(parts, Work()), [self.machine.floor(part) for part in parts]
        floor = sum(floor.ms for floor in floors)
        return StageTiming(what, way, ms, outside, total.bytes, total.total_flops, floor, bound_of(floors))


def bound_of(floors: Sequence[Floor]) -> Bound:
    """What most of the floors' time is bound by."""
    compute = sum(floor.ms for floor in floors if floor.bound == "compute")
    return "compute" if compute > sum(floor.ms for floor in floors) / 2 else "memory"


class _Whole:
    """The oracle in a backbone's place, for queries that run all of it."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle

    def run(self, inputs: BackboneInputs, until: int) -> BackboneState:
        hidden = self.oracle.hidden(inputs)  # [B, H]
        return BackboneState(hidden[:, None], torch.zeros_like(inputs.lengths), until)

    def resume(self, state: BackboneState, until: int) -> BackboneState:
        return state

    def hidden(self, state: BackboneState) -> torch.Tensor:
        return state.stream[:, 0]


def _release(kind: BackboneKind, device: torch.device) -> None:
    """Gives the device's memory back, and forgets what was compiled."""
    if kind == "compiled":
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def speedups(rows: Sequence[StageTiming]) -> list[float | None]:
    """p50 of `timm + transformers` over that of each row of the same shape."""
    medians = {
        (row.what, row.way.images, row.way.prompt_tokens): p["p50"]
        for row in rows
        if row.way.backbone == ORACLE and (p := percentiles(row.ms))
    }
    found = []
    for row in rows:
        base, own = medians.get((row.what, row.way.images, row.way.prompt_tokens)), percentiles(row.ms)
        found.append(base / own["p50"] if base and own else None)
    return found
