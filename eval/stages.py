"""The stages of a query and whole queries, timed on every backbone in one run, on the same inputs, at batch 1.

A stage starts and ends on the device. Those of the graph backbones are captured each as a CUDA graph of its own, and
timed while the device is held up until the graph is in its queue; eager ones between two events, with what the host
takes to issue them. A whole query is timed by the host's clock, synchronised, from the uint8 image in the host's memory
to the actions there, through `Policy`; directly after, the same launches are timed on the device alone. What is left
of the host's time is the overhead outside the GPU.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from rsd_trt.bundle import Bundle
from rsd_trt.config import PROPRIO_DIM, BackboneKind, BackbonePrecision, ControlConfig, Precision
from rsd_trt.errors import UserError
from rsd_trt.eval.clock import Clock, Run
from rsd_trt.eval.floor import Bound, Floor, Machine, measure_machine
from rsd_trt.eval.statistics import percentiles
from rsd_trt.eval.work import STAGES, Number, Stage, Work, stage_work
from rsd_trt.models.backbone import Backbone, BackboneInputs, BackboneState
from rsd_trt.runtime.backends import Backend, Launcher, assemble, open_backbone
from rsd_trt.runtime.forward import EagerForward, Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.scripted import Decision, ScriptedPolicy

Query = Literal["accepted query", "rejected query", "forced query", "baseline query"]
# The stages of each, and how rsd comes to it. A forced full pass does not wait for the draft, a rejected one does.
QUERIES: dict[Query, tuple[Stage, ...]] = {
    "accepted query": tuple(stage for stage in STAGES if stage not in ("blocks > k", "chain")),
    "rejected query": STAGES,
    "forced query": STAGES,
    "baseline query": tuple(stage for stage in STAGES if stage != "accept"),
}
ORACLE = "timm + transformers"
TYPICAL = "pick up the black bowl between the plate and the ramekin and place it on the plate"
OBSERVATIONS = 16  # different images, so that no query finds the last one's
WORDS = " ".join([TYPICAL] * 40)
NUMBERS: dict[str, Number] = {"float32": "fp32", "bfloat16": "bf16"}
BOUNDARY = (
    "batch 1; stages: on the device; queries: host's clock, synchronised, from uint8 images in the host's memory to "
    "actions there"
)


@dataclass(frozen=True)
class Shape:
    """What is observed. None: as the bundle says, and for the prompt a typical instruction."""

    images: int | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class StagesRequest:
    """What to time."""

    backbones: tuple[tuple[BackboneKind, BackbonePrecision], ...]
    shapes: tuple[Shape, ...]
    device: torch.device
    precision: Precision  # of draft and head
    samples: int
    warm_up: int


@dataclass(frozen=True)
class StageTiming:
    """A stage or a query. The floor is that of the work which it has to do, whoever does it."""

    what: str
    backbone: str
    precision: str  # of the backbone's products
    images: int
    prompt_tokens: int
    ms: tuple[float, ...] = ()  # raw samples, in order
    outside_ms: tuple[float, ...] = ()  # of a query: the host's time beyond that of the device
    bytes: int | None = None
    flops: int | None = None
    floor_ms: float | None = None
    bound: Bound | None = None
    reason: str | None = None  # why there are no samples

    def summary(self) -> dict[str, object]:
        """The row without its raw samples."""
        ms = percentiles(self.ms)
        return {
            "what": self.what,
            "backbone": self.backbone,
            "precision": self.precision,
            "images": self.images,
            "prompt_tokens": self.prompt_tokens,
            "ms": ms,
            "outside_ms": percentiles(self.outside_ms),
            "bytes": self.bytes,
            "flops": self.flops,
            "floor_ms": self.floor_ms,
            "bound": self.bound,
            "times_floor": ms["p50"] / self.floor_ms if ms and self.floor_ms else None,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Startup:
    """What a backbone costs before its first query of a shape is answered."""

    backbone: str
    precision: str
    images: int
    prompt_tokens: int
    load_s: float  # weights onto the device, fused; the same for all shapes
    first_s: float  # the first query of each kind: capture, and compilation where there is one


@dataclass(frozen=True)
class StageProfile:
    """All rows, and what the floors are made from."""

    machine: Machine
    rows: tuple[StageTiming, ...]
    startups: tuple[Startup, ...]


@dataclass(frozen=True)
class Scene:
    """A bundle in one shape, with observations for it."""

    bundle: Bundle
    images: int
    prompt_tokens: int
    observations: tuple[Observation, ...]


def profile_stages(bundle: Bundle, request: StagesRequest) -> StageProfile:
    """Times everything. What cannot run here has a row that says why.

    Raises:
        UserError: a shape that the bundle cannot have, or the device has too little memory.
    """
    scenes = [make_scene(bundle, shape) for shape in request.shapes]
    numbers = {number_of(bundle, precision) for _, precision in request.backbones} | {request.precision}
    numbers |= {"fp32", "bf16"} if "fp8" in numbers else {"fp32"}
    if request.device.type != "cuda":
        numbers -= {"fp8"}
    machine = measure_machine(request.device, sorted(numbers))
    rows: list[StageTiming] = []
    startups: list[Startup] = []
    for kind, precision in request.backbones:
        number = number_of(bundle, precision)
        started = time.perf_counter()
        try:
            backbone = open_backbone(bundle, request.device, kind, precision)
        except UserError as error:
            rows += [_unmeasured("baseline query", kind, number, scene, str(error)) for scene in scenes]
            continue
        load = time.perf_counter() - started
        for scene in scenes:
            if isinstance(backbone, Backbone):
                rows += _time_oracle(backbone, scene, number, request, machine)
            first, found = _time_backbone(backbone, kind, scene, number, request, machine)
            rows += found
            startups.append(Startup(kind, number, scene.images, scene.prompt_tokens, load, first))
        del backbone
        _release(kind, request.device)
    return StageProfile(machine, tuple(rows), tuple(startups))


def number_of(bundle: Bundle, precision: BackbonePrecision) -> Number:
    """What the backbone's products are computed in."""
    return NUMBERS[bundle.config.backbone.dtype] if precision == "bundle" else precision


def make_scene(bundle: Bundle, shape: Shape, instruction: str = TYPICAL) -> Scene:
    """The bundle with as many cameras, and observations of random images with a prompt of as many tokens.

    Raises:
        UserError: no text gives such a prompt.
    """
    control = bundle.config.control
    if shape.images is not None:
        control = replace(control, cameras=tuple(f"camera {i}" for i in range(shape.images)))
    if shape.prompt_tokens is not None:
        control = replace(control, prompt="{instruction}", lowercase=False)
        instruction = _text_of(bundle, control, shape.prompt_tokens)
    config = replace(bundle.config, control=control)
    random = np.random.default_rng(0)
    side = control.camera_size
    observations = tuple(
        Observation(
            random.integers(0, 256, (len(control.cameras), side, side, 3), dtype=np.uint8),
            random.uniform(-1, 1, PROPRIO_DIM).astype(np.float32),
            instruction,
        )
        for _ in range(OBSERVATIONS)
    )
    tokens = len(_preprocessor(bundle, control).prompt_tokens(instruction))
    return Scene(replace(bundle, config=config), len(control.cameras), tokens, observations)


def _text_of(bundle: Bundle, control: ControlConfig, tokens: int) -> str:
    """The start of a text that makes a prompt of so many tokens. A letter more adds one at most, as a rule."""
    preprocess = _preprocessor(bundle, control)
    for end in range(1, len(WORDS)):
        count = len(preprocess.prompt_tokens(WORDS[:end]))
        if count == tokens:
            return WORDS[:end]
        if count > 2 * tokens + 8:
            break
    raise UserError(f"no text gives a prompt of {tokens} tokens with the tokenizer of {bundle.path}")


def _preprocessor(bundle: Bundle, control: ControlConfig) -> Preprocessor:
    return Preprocessor(control, bundle.config.backbone, bundle.tokenizer(), torch.device("cpu"))


def _time_backbone(
    backbone: Backbone | torch.nn.Module,
    kind: BackboneKind,
    scene: Scene,
    number: Number,
    request: StagesRequest,
    machine: Machine,
) -> tuple[float, list[StageTiming]]:
    """Seconds until the first queries are answered, and all rows of one backbone in one shape."""
    clock = Clock(request.device)
    launcher = _launcher(scene, kind, request)
    forward = assemble(launcher, "1", backbone)  # type: ignore[arg-type]
    started = time.perf_counter()
    queries = time_queries(forward, scene, clock, StagesRequest((), (), request.device, request.precision, 0, 1))
    first = time.perf_counter() - started
    queries = time_queries(forward, scene, clock, request)
    work = stage_work(scene.bundle.config, scene.images, scene.prompt_tokens, number, request.precision)
    calls = stage_calls(backbone, launcher, scene)
    rows = []
    with torch.inference_mode():
        for stage, run in calls.items():
            ms = time_stage(run, clock, request, captured=not isinstance(backbone, Backbone))
            rows.append(_row(stage, kind, number, scene, ms, (), [work[stage]], machine))
    for query, (wall, outside) in queries.items():
        parts = [work[stage] for stage in QUERIES[query] if stage in work]
        rows.append(_row(query, kind, number, scene, wall, outside, parts, machine))
    return first, rows


def time_stage(run: Run, clock: Clock, request: StagesRequest, captured: bool) -> tuple[float, ...]:
    """Milliseconds of each launch of a stage after the warm-up."""
    for _ in range(request.warm_up):
        run()
    found = []
    for _ in range(request.samples):
        ms = clock.queued(run) if captured else None
        found.append(clock.issued(run) if ms is None else ms)
    return tuple(found)


def time_queries(
    forward: Forward, scene: Scene, clock: Clock, request: StagesRequest, whole_only: bool = False
) -> dict[Query, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The host's milliseconds of each kind of query, one of each in turn, and what of them is not the device's."""
    config = scene.bundle.config
    baseline = ScriptedPolicy(config, forward, "baseline", 1)
    rsd = ScriptedPolicy(config, forward, "rsd", 1)
    turns: list[tuple[Query, ScriptedPolicy, Decision]] = [("baseline query", baseline, Decision("full", 1))]
    if not whole_only:
        turns += [
            ("forced query", rsd, Decision("start", 1)),
            ("accepted query", rsd, Decision("accepted", 1)),
            ("rejected query", rsd, Decision("rejected", 1)),
        ]
    walls: dict[Query, list[float]] = {query: [] for query, _, _ in turns}
    outsides: dict[Query, list[float]] = {query: [] for query, _, _ in turns}
    seen = itertools.cycle(scene.observations)
    for i in range(request.warm_up + request.samples):
        for query, policy, decision in turns:
            observation = next(seen)
            wall = clock.wall(lambda p=policy, d=decision, o=observation: p.follow(d, o))  # type: ignore[misc]
            busy = None
            if clock.cuda and not isinstance(forward, EagerForward):  # what is eager waits for the device
                busy = clock.queued(lambda q=query, o=observation: _launch(forward, q, o))  # type: ignore[misc]
            if i >= request.warm_up:
                walls[query].append(wall)
                outsides[query] += [] if busy is None else [wall - busy]
    return {query: (tuple(walls[query]), tuple(outsides[query])) for query in walls}


@torch.inference_mode()
def _launch(forward: Forward, query: Query, observation: Observation) -> None:
    """Enqueues what the device does for a query."""
    if query == "baseline query":
        forward.whole([observation])
        return
    forward.early([observation])
    if query != "accepted query":
        forward.late(range(1))


def stage_calls(backbone: torch.nn.Module, launcher: Launcher, scene: Scene) -> dict[Stage, Run]:
    """What computes each stage, on inputs that are on the device (but for the image), kept by the calls."""
    config, device = scene.bundle.config, launcher.device
    k, blocks = config.rsd.draft_block, config.backbone.language.blocks
    accept, chain = launcher.open("accept", "1"), launcher.open("chain", "1")
    dtype: torch.dtype = next(backbone.parameters()).dtype
    preprocess = Preprocessor(config.control, config.backbone, scene.bundle.tokenizer(), device, dtype)
    observation = scene.observations[0]
    dims = config.dims
    with torch.inference_mode():
        inputs = preprocess([observation])
        draft_in = {"hidden": torch.randn(1, config.hidden, device=device)}
        main_in = {
            "hidden": draft_in["hidden"].clone(),
            "coarse_actions": torch.zeros(1, dims.T, dims.A, device=device),
            "tolerance": torch.tensor(config.rsd.tolerance, device=device),
        }
        if config.head.kind == "conditioned":
            main_in["condition"] = torch.zeros(1, dims.T, dims.D, dims.C, dtype=torch.int64, device=device)
        if isinstance(backbone, Backbone):
            embedded = backbone.embed(inputs)
            early = backbone.resume(embedded, k)
            calls: dict[Stage, Run] = {
                "preprocess": lambda: preprocess([observation]),
                "vision": lambda: backbone.embed(inputs),
                "blocks <= k": lambda: backbone.hidden(backbone.resume(embedded, k)).float(),
                "blocks > k": lambda: backbone.hidden(backbone.resume(early, blocks)).float(),
                "accept": lambda: accept.run(draft_in),
                "chain": lambda: chain.run(main_in),
            }
        else:
            from rsd_trt.eval.captured import captured_calls

            calls = captured_calls(backbone, preprocess, inputs, observation, config)
            calls |= {"accept": lambda: accept.run(draft_in), "chain": lambda: chain.run(main_in)}
    if k == blocks:
        del calls["blocks > k"]
    return calls


class _Whole:
    """The oracle in a backbone's place, for queries that run all of it."""

    def __init__(self, oracle: object) -> None:
        self.oracle = oracle

    def run(self, inputs: BackboneInputs, until: int) -> BackboneState:
        hidden = self.oracle.hidden(inputs)  # type: ignore[attr-defined]
        return BackboneState(hidden[:, None], torch.zeros_like(inputs.lengths), until)

    def resume(self, state: BackboneState, until: int) -> BackboneState:
        return state

    def hidden(self, state: BackboneState) -> torch.Tensor:
        return state.stream[:, 0]


def _time_oracle(
    backbone: Backbone, scene: Scene, number: Number, request: StagesRequest, machine: Machine
) -> list[StageTiming]:
    """The same weights in timm's towers and transformers' Llama, as people run them: towers, and whole queries."""
    try:
        oracle = importlib.import_module("rsd_trt.eval.oracle").Oracle(backbone)
    except (ImportError, UserError) as error:
        return [_unmeasured("baseline query", ORACLE, number, scene, str(error))]
    clock = Clock(request.device)
    launcher = _launcher(scene, "eager", request)
    sessions = launcher.open("accept", "1"), launcher.open("chain", "1")
    config = scene.bundle.config
    preprocess = Preprocessor(
        config.control, config.backbone, scene.bundle.tokenizer(), request.device, next(backbone.parameters()).dtype
    )
    forward = EagerForward(config, _Whole(oracle), *sessions, preprocess)  # type: ignore[arg-type]
    work = stage_work(config, scene.images, scene.prompt_tokens, number, request.precision)
    with torch.inference_mode():
        inputs = preprocess(scene.observations[:1])
        towers = time_stage(lambda: oracle.embed(inputs), clock, request, captured=False)
    ((wall, outside),) = time_queries(forward, scene, clock, request, whole_only=True).values()
    parts = [work[stage] for stage in QUERIES["baseline query"] if stage in work]
    return [
        _row("vision", ORACLE, number, scene, towers, (), [work["vision"]], machine),
        _row("baseline query", ORACLE, number, scene, wall, outside, parts, machine),
    ]


def _launcher(scene: Scene, kind: BackboneKind, request: StagesRequest) -> Launcher:
    backend: Backend = "torch" if kind == "eager" else "graph"
    return Launcher(scene.bundle, backend, request.device, request.precision)


def _row(
    what: str,
    backbone: str,
    number: Number,
    scene: Scene,
    ms: tuple[float, ...],
    outside: tuple[float, ...],
    work: Sequence[Work],
    machine: Machine,
) -> StageTiming:
    floors = [machine.floor(part) for part in work]
    total = sum(work, Work())
    return StageTiming(
        what,
        backbone,
        number,
        scene.images,
        scene.prompt_tokens,
        ms,
        outside,
        total.bytes,
        total.total_flops,
        sum(floor.ms for floor in floors),
        _bound(floors),
    )


def _bound(floors: Sequence[Floor]) -> Bound:
    """What most of the floors' time is bound by."""
    compute = sum(floor.ms for floor in floors if floor.bound == "compute")
    return "compute" if compute > sum(floor.ms for floor in floors) / 2 else "memory"


def _unmeasured(what: str, backbone: str, number: str, scene: Scene, reason: str) -> StageTiming:
    return StageTiming(what, backbone, number, scene.images, scene.prompt_tokens, reason=reason)


def _release(kind: BackboneKind, device: torch.device) -> None:
    """Gives the device's memory back, and forgets what was compiled."""
    if kind == "compiled":
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows_of(rows: Sequence[StageTiming]) -> Iterator[tuple[tuple[str, str, int, int], list[StageTiming]]]:
    """The rows of each backbone and shape."""
    for key in dict.fromkeys((row.backbone, row.precision, row.images, row.prompt_tokens) for row in rows):
        yield key, [r for r in rows if (r.backbone, r.precision, r.images, r.prompt_tokens) == key]
