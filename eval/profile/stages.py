"""The stages of a full query and the query itself, timed on every backbone in one run, on the same inputs, at batch 1.

A stage starts and ends on the device. Those of the graph backbones are captured each as a CUDA graph of its own, and
timed while the device is held up until the graph is in its queue; eager ones between two events, with what the host
takes to issue them. The query is timed by the host's clock, synchronised, from the uint8 frames in the host's memory
to the chunk there. Where its stages are captured, what its p50 has beyond theirs is the host overhead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import BACKBONES, BackboneKind, BackbonePrecision, Precision
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.clock import Call, Clock
from rsd_trt.eval.profile.costs import release
from rsd_trt.eval.profile.inputs import InputSize, QueryInputs, make_inputs
from rsd_trt.eval.profile.queries import KINDS, time_queries, write_trace
from rsd_trt.eval.profile.roofline import STAGES, Machine, Resource, Stage, Work, measure_machine, stage_work
from rsd_trt.eval.profile.stage_calls import preprocessor, stage_calls
from rsd_trt.eval.statistics import percentiles
from rsd_trt.eval.verify.backbone import ORACLE
from rsd_trt.eval.verify.oracle import Oracle
from rsd_trt.eval.verify.result import computed_in
from rsd_trt.models.backbone import Backbone
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.runtime.backends import FP8_CAPABILITY, Launcher, assemble, open_backbone, open_forward
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.observation import Observation

FULL = "full query"
JPEG = "jpeg"  # on the host, before the device begins
BOUNDARY = (
    "batch 1; stages: on the device; queries: host's clock, synchronised, from uint8 images in the host's memory to "
    "actions there"
)


@dataclass(frozen=True)
class QueryRequest:
    """What to time: every backbone in every precision, at every input size. Empty: all backbones that may run here;
    the bundle's number of images; a typical instruction's number of prompt tokens."""

    backbones: tuple[BackboneKind, ...]
    backbone_precisions: tuple[BackbonePrecision, ...]
    images: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    device: torch.device
    precision: Precision  # of draft and head
    samples: int
    warm_up: int

    def pairs(self) -> list[tuple[BackboneKind, BackbonePrecision]]:
        """Each backbone with each precision."""
        usual = BACKBONES if self.device.type == "cuda" else BACKBONES[:1]
        return list(product(self.backbones or usual, self.backbone_precisions))

    def sizes(self) -> list[InputSize]:
        """Each number of images with each number of prompt tokens."""
        return [InputSize(*size) for size in product(self.images or (None,), self.prompt_tokens or (None,))]


@dataclass(frozen=True)
class Configuration:
    """One backbone at one input size."""

    backbone: str
    precision: Precision  # of the backbone's products
    images: int
    prompt_tokens: int

    @property
    def name(self) -> str:
        """For people: `graph bf16`."""
        return f"{self.backbone} {self.precision}"

    @property
    def size(self) -> str:
        """For people: `1 image, 28 prompt tokens`."""
        return f"{self.images} image{'' if self.images == 1 else 's'}, {self.prompt_tokens} prompt tokens"


@dataclass(frozen=True)
class StageTiming:
    """A stage or a query. The roofline bound is that of the work which it has to do, whoever does it."""

    what: str
    configuration: Configuration
    ms: tuple[float, ...] = ()  # raw samples, in order
    bytes: int | None = None
    flops: int | None = None
    roofline_ms: float | None = None
    bound: Resource | None = None
    host_overhead_ms: float | None = None  # of a query whose stages are captured: its p50 beyond theirs
    reason: str | None = None  # why there are no samples

    @property
    def times_roofline(self) -> float | None:
        """p50 over the roofline bound."""
        ms = percentiles(self.ms)
        return ms["p50"] / self.roofline_ms if ms and self.roofline_ms else None

    def summary(self) -> dict[str, object]:
        """The row without its raw samples."""
        return {
            "what": self.what,
            **asdict(self.configuration),
            "ms": percentiles(self.ms),
            "host_overhead_ms": self.host_overhead_ms,
            "bytes": self.bytes,
            "flops": self.flops,
            "roofline_ms": self.roofline_ms,
            "bound": self.bound,
            "times_roofline": self.times_roofline,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Startup:
    """What a backbone costs before its first queries of an input size are answered."""

    configuration: Configuration
    load_s: float  # weights onto the device, fused; the same for all sizes
    first_s: float  # the first full query: capture, and compilation where there is one


@dataclass(frozen=True)
class QueryProfile:
    """All rows, and what the roofline bounds are made from."""

    machine: Machine
    rows: tuple[StageTiming, ...]
    startups: tuple[Startup, ...]

    def speedups(self) -> list[float | None]:
        """p50 of `timm + transformers` over that of each row of the same size."""

        def key(row: StageTiming) -> tuple[str, str]:
            return row.what, row.configuration.size

        medians = [p["p50"] if (p := percentiles(row.ms)) else None for row in self.rows]
        pairs = list(zip(self.rows, medians, strict=True))
        base = {key(row): ms for row, ms in pairs if row.configuration.backbone == ORACLE}
        return [b / ms if ms and (b := base.get(key(row))) else None for row, ms in pairs]


def profile_query(bundle: Bundle, request: QueryRequest) -> QueryProfile:
    """Times everything. What cannot run here has a row that says why.

    Raises:
        UserError: a size that the bundle cannot have, or the device has too little memory.
    """
    inputs = [make_inputs(bundle, size) for size in request.sizes()]
    machine = measure_machine(request.device, _dtypes(bundle, request))
    rows: list[StageTiming] = []
    startups: list[Startup] = []
    for kind, precision in request.pairs():
        dtype = computed_in(bundle.config.backbone, precision)
        started = time.perf_counter()
        try:
            backbone = open_backbone(bundle, request.device, kind, precision)
        except UserError as error:
            configurations = [_configuration(kind, dtype, given) for given in inputs]
            rows += [StageTiming(FULL, x, reason=str(error)) for x in configurations]
            continue
        load = time.perf_counter() - started
        for given in inputs:
            timer = _Timer(given, dtype, request, machine)
            if isinstance(backbone, Backbone):
                rows += timer.oracle(backbone)
            first, found = timer.backbone(backbone, kind)
            rows += found
            startups.append(Startup(_configuration(kind, dtype, given), load, first))
        del backbone
        release(request.device, kind)
    return QueryProfile(machine, tuple(rows), tuple(startups))


def trace_query(bundle: Bundle, request: QueryRequest, path: Path) -> None:
    """A Chrome trace of a check, if there is a draft for as many images, and of a full query, on the last backbone that
    can run here, at the first size.

    Raises:
        UserError: no backbone can run here, or `path` cannot be written.
    """
    given = make_inputs(bundle, request.sizes()[0])
    checks = bundle.has("draft") and given.images == len(bundle.config.control.cameras)
    for kind, precision in reversed(request.pairs()):
        try:
            forward = open_forward(_launcher(given, kind, request), "1", kind, precision, checks)
        except UserError as error:
            problem = error
            continue
        write_trace(forward, given, request.device, path, KINDS if checks else KINDS[1:])
        return
    raise problem


def _dtypes(bundle: Bundle, request: QueryRequest) -> list[Precision]:
    """Those whose rates the roofline bounds are made from: the codec's, and all that is asked for and can run."""
    asked = {computed_in(bundle.config.backbone, precision) for _, precision in request.pairs()}
    found: set[Precision] = {"fp32", request.precision, *asked}
    if "fp8" in found:
        found |= {"bf16"}
        if request.device.type != "cuda" or torch.cuda.get_device_capability(request.device) < FP8_CAPABILITY:
            found -= {"fp8"}
    return sorted(found)


def _configuration(kind: str, dtype: Precision, given: QueryInputs) -> Configuration:
    return Configuration(kind, dtype, given.images, given.prompt_tokens)


def _launcher(given: QueryInputs, kind: BackboneKind, request: QueryRequest) -> Launcher:
    return Launcher(given.bundle, "torch" if kind == "eager" else kind, request.device, request.precision)


class _Timer:
    """Times one precision at one input size."""

    def __init__(self, given: QueryInputs, dtype: Precision, request: QueryRequest, machine: Machine) -> None:
        self.given, self.dtype, self.request, self.machine = given, dtype, request, machine
        self.clock = Clock(request.device)
        config = given.bundle.config
        self.work = stage_work(config, given.images, given.prompt_tokens, dtype, request.precision)

    def backbone(self, backbone: Backbone | FusedBackbone, kind: BackboneKind) -> tuple[float, list[StageTiming]]:
        """Seconds until the first queries are answered, and all rows."""
        launcher, request = _launcher(self.given, kind, self.request), self.request
        forward = assemble(launcher, "1", backbone, checks=False)
        started = time.perf_counter()
        time_queries(forward, self.given, samples=0, warm_up=1, kinds=("full",))
        first = time.perf_counter() - started
        whole = time_queries(forward, self.given, request.samples, request.warm_up, ("full",))["full"]
        configuration, captured = _configuration(kind, self.dtype, self.given), not isinstance(backbone, Backbone)
        rows = [
            self._row(stage, configuration, [stage], self._stage(call, captured))
            for stage, call in stage_calls(backbone, launcher, self.given).items()
        ]
        control = self.given.bundle.config.control
        if captured and control.jpeg_quality is not None:  # eager preprocessing has it among the rest
            frames, images = (
                preprocessor(self.given, backbone, request.device).frames,
                self.given.observations[0].images,
            )
            ms = tuple(self.clock.wall(lambda: frames(images)) for _ in range(request.warm_up + request.samples))
            rows.insert(0, self._row(JPEG, configuration, [], ms[request.warm_up :]))
        query = self._row(FULL, configuration, STAGES, whole)
        if captured:
            query = replace(query, host_overhead_ms=_p50(whole) - sum(_p50(row.ms) for row in rows))
        return first, [*rows, query]

    def oracle(self, backbone: Backbone) -> list[StageTiming]:
        """The same weights in timm's towers and transformers' Llama, as people run them: vision, and the query."""
        configuration, request = _configuration(ORACLE, self.dtype, self.given), self.request
        try:
            oracle = Oracle(backbone)
        except UserError as error:
            return [StageTiming(FULL, configuration, reason=str(error))]
        launcher = _launcher(self.given, "eager", request)
        preprocess = preprocessor(self.given, backbone, request.device)

        def run(observations: Sequence[Observation]) -> Tensor:
            return oracle.hidden(preprocess(observations)).float()

        predict, embed_tokens = launcher.open("predict", "1"), backbone.llama.embed_tokens
        forward = Forward(self.given.bundle.config, run, embed_tokens, None, predict, preprocess)
        with torch.inference_mode():
            inputs = preprocess(self.given.observations[:1])
        vision = self._stage(lambda: oracle.embed(inputs), captured=False)
        times = time_queries(forward, self.given, request.samples, request.warm_up, ("full",))["full"]
        return [
            self._row("vision", configuration, ["vision"], vision),
            self._row(FULL, configuration, STAGES, times),
        ]

    @torch.inference_mode()
    def _stage(self, call: Call, captured: bool) -> tuple[float, ...]:
        """ms of each launch of a stage after the warm-up."""
        for _ in range(self.request.warm_up):
            call()
        found = []
        for _ in range(self.request.samples):
            ms = self.clock.queued(call) if captured else None
            found.append(self.clock.issued(call) if ms is None else ms)
        return tuple(found)

    def _row(
        self, what: str, configuration: Configuration, stages: Sequence[Stage], ms: tuple[float, ...]
    ) -> StageTiming:
        parts = [self.work[stage] for stage in stages if stage in self.work]
        total, bound = sum(parts, Work()), self.machine.bound(parts)
        return StageTiming(what, configuration, ms, total.bytes, total.total_flops, bound.ms, bound.by)


def _p50(ms: Sequence[float]) -> float:
    found = percentiles(ms)
    assert found is not None
    return found["p50"]
