"""What an evaluation leaves on disk, as typed records.

`<suite>_<mode>_settings.json`: one `Settings`, all that the run's results depend on.
`<suite>_<mode>_episodes.jsonl`: one `Episode` a line, in the order in which they finished.
`<suite>_<mode>_results.json`: one `Results`, under the original experiment's names and more. Its JSON Schema is
`results.schema.json` beside this file, made from the records here; what is read is checked against them.
The expert's runs have `expert` in the place of the mode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS, ControlConfig, Dims, Mode, PolicyKind, Quantiles, RsdConfig
from rsd_trt.errors import UserError
from rsd_trt.jsonio import json_schema, shown, to_json
from rsd_trt.runtime.plan import Query, Verdict
from rsd_trt.runtime.speculate import Route

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")
HISTOGRAM_BINS = 20  # of executed actions, over [-1, 1]

LATER_CONTROL = ("resize", "statistics")  # settings below `control` that did not exist when runs were first named

Key = tuple[int, int]  # task, trial
Timing = Literal["single", "batched"]


@dataclass(frozen=True)
class QueryRecord:
    """A query: what it decided and what it cost."""

    step: Annotated[int, "of the episode, before the query's first action"]
    route: Annotated[Route, "how the query went; accepted, partial and rejected tested a live plan"]
    committed: Annotated[int, "actions handed to the simulator; the episode may end before all are executed"]
    ms: Annotated[float, "synchronised wall time of the forward that answered the query"]
    full_query: Annotated[bool, "whether the whole backbone was run"]
    rows: Annotated[int, "queries that shared that forward"] = 1
    prefix: Annotated[
        int | None,
        "leading steps on which draft and plan agree, or in random mode that the coin let pass; null without a draft",
    ] = None
    token_agreement: Annotated[tuple[float, ...] | None, "share of equal draft and main tokens, per coarse layer"] = (
        None
    )
    verdict: Annotated[Verdict | None, "shadow mode: whether the draft's decision was right"] = None
    draft_gap: Annotated[
        tuple[tuple[float, ...], ...] | None,
        "shadow mode: |draft - plan| for each step that could be committed, by dimension; gripper: 1 if signs differ",
    ] = None
    main_gap: Annotated[
        tuple[tuple[float, ...], ...] | None, "shadow mode: the same between the main head's new plan and the old one"
    ] = None

    def __post_init__(self) -> None:
        """Raises UserError: out of range, or lists of other lengths."""
        _require(self.step >= 0, f"a query's step {self.step} must be >= 0")
        _require(self.token_agreement != (), "a query's token_agreement must have an entry for each coarse layer")
        for name, gap in (("draft_gap", self.draft_gap), ("main_gap", self.main_gap)):
            for row in gap or ():
                _require(len(row) == Dims.A, f"a row of {name} has {len(row)} entries, not {Dims.A}")
        if self.draft_gap is not None and self.main_gap is not None:
            steps = len(self.draft_gap), len(self.main_gap)
            _require(steps[0] == steps[1], f"draft_gap has {steps[0]} steps and main_gap {steps[1]}")

    @classmethod
    def of(cls, query: Query, step: int, rows: int) -> QueryRecord:
        return cls(
            step=step,
            route=query.route,
            committed=len(query.actions),
            ms=round(query.ms, 4),
            full_query=query.full_query,
            rows=rows,
            prefix=query.prefix,
            token_agreement=query.token_agreement,
            verdict=query.verdict,
            draft_gap=query.draft_gap,
            main_gap=query.main_gap,
        )


@dataclass(frozen=True)
class ActionStatistics:
    """The executed actions of an episode, in environment units."""

    minimum: Annotated[tuple[float, ...], "by dimension"]
    maximum: Annotated[tuple[float, ...], "by dimension"]
    mean: Annotated[tuple[float, ...], "by dimension"]
    histogram: Annotated[
        tuple[tuple[int, ...], ...],
        f"by dimension, counts in {HISTOGRAM_BINS} equal bins over [-1, 1], outliers at its ends",
    ]
    gripper_switches: Annotated[int, "times that the gripper command changed its sign"]

    def __post_init__(self) -> None:
        """Raises UserError: out of range, or lists of other lengths."""
        for name in ("minimum", "maximum", "mean", "histogram"):
            found = len(getattr(self, name))
            _require(found == Dims.A, f"actions.{name} has {found} entries, not {Dims.A}")
        for low, high in zip(self.minimum, self.maximum, strict=True):
            _require(low <= high, f"actions.minimum {low} is above actions.maximum {high}")
        for row in self.histogram:
            _require(len(row) == HISTOGRAM_BINS, f"a row of actions.histogram has {len(row)} entries")

    @classmethod
    def of(cls, actions: NDArray[np.float32]) -> ActionStatistics:
        """actions [n, A], n >= 1."""
        edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
        counts = [np.histogram(column.clip(-1, 1), edges)[0].tolist() for column in actions.T]
        closed = actions[:, ARM_DIMS] > 0
        return cls(
            minimum=_rounded(actions.min(0)),
            maximum=_rounded(actions.max(0)),
            mean=_rounded(actions.mean(0)),
            histogram=tuple(map(tuple, counts)),
            gripper_switches=int((closed[1:] != closed[:-1]).sum()),
        )


@dataclass(frozen=True)
class Episode:
    """One finished trial. An `error` (the simulator or the policy broke) is neither a success nor a failure."""

    task_id: int
    trial: Annotated[int, "the number of the suite's initial state"]
    success: bool
    steps: Annotated[int, "executed actions, settling steps not counted"]
    seconds: Annotated[float, "wall time of the whole episode, simulation included"]
    queries: tuple[QueryRecord, ...]
    actions: Annotated[ActionStatistics | None, "null when none was executed"] = None
    error: Annotated[str | None, "what broke"] = None
    run: Annotated[str, "which run the episode is of: the start of the sha256 of its settings"] = ""
    perturbed_at: Annotated[int | None, "the step before which the target was displaced; null if it was not"] = None
    displacement: Annotated[tuple[float, float] | None, "of the target, along x and y of the world, in m"] = None

    def __post_init__(self) -> None:
        """Raises UserError: out of range."""
        _require(self.steps >= 0, f"an episode's steps {self.steps} must be >= 0")

    @property
    def key(self) -> Key:
        return self.task_id, self.trial

    @property
    def policy_ms(self) -> float:
        """ms of all its queries."""
        return sum(query.ms for query in self.queries)


@dataclass(frozen=True)
class Settings:
    """All that a result depends on. A run resumes only where it is the same."""

    suite: str
    tasks: tuple[int, ...]
    trials: int
    mode: Mode
    timing: Annotated[Timing, "single: one simulator, each query alone; batched: many, whose times say nothing of one"]
    backend: str
    precision: str
    backbone: Annotated[str, "how the backbone runs: eager, graph or compiled"]
    device: str
    protocol: str
    max_steps: int
    n_action_steps: int
    seed: int
    bundle: Annotated[str, "the bundle's name; that of a policy in its place"]
    bundle_sha256: Annotated[str, "of the bundle, or of the source of the policy in its place"]
    exports_sha256: dict[str, str]
    trained: bool
    backbone_blocks: Annotated[int, "N; the draft reads after block rsd.draft_block"]
    levels: Annotated[int, "K, levels of an RFSQ layer: tokens agree by chance in a share of 1/K"]
    rsd: RsdConfig
    control: ControlConfig
    training_actions: Annotated[Quantiles | None, "of the actions that the policy was trained on"]
    hardware: dict[str, object]
    versions: dict[str, str]
    policy: Annotated[PolicyKind, "expert: it acts by the scene's state, step by step, and no model is run"] = "bundle"
    perturb: Annotated[int | None, "the seed of the target's displacements; null if there are none"] = None
    backbone_precision: Annotated[str, "bundle: what its weights are stored in"] = "bundle"
    accept_rate: Annotated[
        float | None, "random mode: how often its coin accepts where a live plan is tested; null in the other modes"
    ] = None

    def __post_init__(self) -> None:
        """Raises UserError: out of range, or lists of other lengths."""
        rate = self.accept_rate
        _require((rate is not None) == (self.mode == "random"), f"settings.accept_rate {rate} in mode {self.mode}")
        _require(rate is None or 0 <= rate <= 1, f"settings.accept_rate {rate} must be in 0..1")
        _require(
            Path(self.suite).name == self.suite, f"settings.suite {shown(self.suite)} is no name: it names a folder"
        )
        for name, least in (("trials", 0), ("n_action_steps", 1), ("backbone_blocks", 0), ("levels", 2)):
            found = getattr(self, name)
            _require(found >= least, f"settings.{name} {found} must be >= {least}")
        _require(len(self.rsd.tolerance) == ARM_DIMS, f"settings.rsd.tolerance has {len(self.rsd.tolerance)} entries")
        for name in ("q01", "q99", "mask") if self.training_actions else ():
            length = len(getattr(self.training_actions, name))
            _require(length == Dims.A, f"settings.training_actions.{name} has {length} entries, not {Dims.A}")

    @property
    def label(self) -> str:
        """The mode of a bundle's run, or the policy in its place."""
        return self.mode if self.policy == "bundle" else self.policy

    @property
    def backbone_name(self) -> str:
        """How the backbone ran, for people: `graph fp8`."""
        precision = self.backbone_precision
        return self.backbone if precision == "bundle" else f"{self.backbone} {precision}"

    @property
    def run(self) -> str:
        """The name that the run's episodes carry. A setting at its default is left out, so that a setting which did
        not exist when a run was made does not change the run's name."""
        data = to_json(self)
        data["control"] = _without_defaults(to_json(self.control), self.control, LATER_CONTROL)
        told = {f.name: data[f.name] for f in dataclasses.fields(self) if data[f.name] != f.default}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class RsdStats:
    """Shares of the queries that tested a live plan; they add up to 1. Null when none did."""

    draft_acceptance_rate: float | None
    partial_acceptance_rate: float | None
    full_rejection_rate: float | None


@dataclass(frozen=True)
class TaskResult:
    """A task's episodes that ended without an error."""

    task_id: int
    task_description: str
    success_rate: float | None
    success_interval: Annotated[tuple[float, float] | None, "95%, Wilson's score"]
    successes: int
    episodes: int
    errors: int


@dataclass(frozen=True)
class Throughput:
    """How fast a run that was not interrupted was as a whole."""

    workers: Annotated[int, "simulator processes"]
    wall_seconds: Annotated[float, "from the first episode's start to the last one's end, building included"]
    episodes_per_second: float
    policy_share: Annotated[float, "of the wall time in which the policy computed"]
    rows_per_forward: Annotated[float, "mean number of queries that shared a forward"]
    bound: Annotated[Literal["policy", "simulator"], "policy: it computed for more than half of the time"]
    gpu_utilisation: Annotated[float | None, "mean share of time with a kernel on the GPU; null without a GPU"] = None

    def __post_init__(self) -> None:
        """Raises UserError: out of range."""
        _require(self.workers >= 1, f"throughput.workers {self.workers} must be >= 1")


@dataclass(frozen=True)
class Results:
    """A run: its summary, settings and episodes. Figures are over episodes that ended without an error."""

    task_suite: str
    use_speculative_decoding: bool
    total_episodes: int
    total_successes: int
    final_success_rate: float | None
    final_success_interval: Annotated[tuple[float, float] | None, "95%, Wilson's score"]
    errors: int
    avg_inference_time_ms: Annotated[
        float | None, "policy time per executed action; null without queries or unless timing is single"
    ]
    rsd_stats: RsdStats
    routes: Annotated[dict[str, int], "queries by route"]
    verdicts: Annotated[dict[str, int], "shadow mode: queries by verdict"]
    token_agreement: Annotated[tuple[float, ...] | None, "share of equal draft and main tokens, per coarse layer"]
    token_agreement_chance: float
    query_ms: Annotated[dict[str, float] | None, "n, mean, p50, p90, p95, p99, max; null unless timing is single"]
    queries: int
    full_queries: int
    steps: int
    actions_per_query: float | None
    steps_per_second: Annotated[float | None, "simulation and policy included; null unless timing is single"]
    throughput: Annotated[Throughput | None, "null when the run was interrupted"]
    codec_round_trip_mse: Annotated[
        float | None, "decode(tokens(x)) against the codec's own reconstruction; null without a codec"
    ]
    task_results: tuple[TaskResult, ...]
    settings: Settings
    episodes: tuple[Episode, ...]
    command: str
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Raises UserError: out of range, or lists of other lengths."""
        mse = self.codec_round_trip_mse
        _require(mse is None or mse >= 0, f"codec_round_trip_mse {mse} must be >= 0")
        layers = {len(q.token_agreement) for e in self.episodes for q in e.queries if q.token_agreement is not None}
        _require(len(layers) <= 1, f"the queries' token_agreement has {sorted(layers)} entries: it must have as many")


def results_schema() -> dict[str, object]:
    """The JSON Schema of a results file."""
    return json_schema(Results)


def _without_defaults(data: dict[str, object], config: ControlConfig, names: tuple[str, ...]) -> dict[str, object]:
    """`data` without those of the named fields that are at their default."""
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name in names}
    return {name: value for name, value in data.items() if name not in defaults or value != defaults[name]}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _rounded(values: NDArray[np.float32]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)
