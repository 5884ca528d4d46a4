"""What an evaluation leaves on disk, as typed records.

`<suite>_<mode>_settings.json`: one `Settings`, all that the run's results depend on.
`<suite>_<mode>_episodes.jsonl`: one `Episode` a line, in the order in which they finished.
`<suite>_<mode>_results.json`: one `Results`, under the original experiment's names and more. Its JSON Schema is
`results.schema.json` beside this file, made from the records here; what is read is checked against them.
A script's runs have its name in the place of the mode.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from rsd_trt.config import ACTION_DIMS, ARM_DIMS, MAX_COUNT, SEEDS_APART, ControlConfig, Mode, Quantiles, RsdConfig
from rsd_trt.errors import UserError, require, shown
from rsd_trt.load import Steadiness
from rsd_trt.records import Natural, Positive, Record, json_schema, told
from rsd_trt.runtime.chunk import Query
from rsd_trt.runtime.speculate import Route

SCHEMA_VERSION: Literal[3] = 3
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")
RATE_INTERVAL = (
    "95%: Wilson's score, or, where several episodes begin in one initial state, a bootstrap over the states; null for "
    "too few of them"
)
HISTOGRAM_BINS = 20  # of executed actions, over [-1, 1]

EpisodeKey = tuple[int, int]  # task, trial
Timing = Literal["single", "batched"]
DraftKind = Literal["vision", "hidden"]
Rate = Annotated[float, Meta(ge=0, le=1)]
Layers = Annotated[tuple[float, ...], Meta(min_length=1)]
ByDim = Annotated[tuple[float, ...], Meta(min_length=ACTION_DIMS, max_length=ACTION_DIMS)]


class QueryRecord(Record, frozen=True):
    """A query: what it decided and what it cost."""

    step: Annotated[Natural, told("of the episode, before the query's first action")]
    route: Annotated[Route, told("how the query went; accepted, partial and rejected checked a live chunk")]
    committed: Annotated[Natural, told("actions handed to the simulator; the episode may end before all are executed")]
    ms: Annotated[float, told("synchronised wall time of the forward that answered the query")]
    checked: Annotated[bool, told("whether the draft was run to judge what was left of a chunk")]
    full_query: Annotated[bool, told("whether the backbone and the main head were run")]
    batch: Annotated[Positive, told("queries that shared that forward")] = 1
    prefix: Annotated[
        Natural | None,
        told("steps of the old chunk that pass the rule; null without a check, or where the draft was not finite"),
    ] = None
    score: Annotated[
        float | None, told("what the rule compared with its threshold; null where that is no single finite number")
    ] = None
    clipped: Annotated[Natural, told("steps of which an action was clipped to the controller's limits")] = 0
    token_agreement: Annotated[
        Layers | None, told("share of equal draft and main tokens, an entry for each coarse layer")
    ] = None
    draft_gap: Annotated[
        tuple[ByDim, ...] | None,
        told("shadow mode: |draft - old chunk| of each step left of it; gripper: 1 if the signs differ"),
    ] = None
    main_gap: Annotated[
        tuple[ByDim, ...] | None, told("shadow mode: the same between the main head's new chunk and the old one")
    ] = None

    def __post_init__(self) -> None:
        """Raises UserError: gaps of other lengths, or actions of a query that neither checked nor asked main."""
        if self.draft_gap is not None and self.main_gap is not None:
            steps = len(self.draft_gap), len(self.main_gap)
            require(steps[0] == steps[1], f"draft_gap has {steps[0]} steps and main_gap {steps[1]}")
        cheap = self.checked and self.route in ("accepted", "partial")
        require(
            self.full_query or cheap or not self.committed,
            f"full_query is false, checked {self.checked} and route {self.route!r}",
        )

    @classmethod
    def of(cls, query: Query, step: int, batch: int) -> QueryRecord:
        finite = query.score is not None and math.isfinite(query.score)
        return cls(
            step=step,
            route=query.route,
            committed=len(query.actions),
            ms=round(query.ms, 4),
            checked=query.checked,
            full_query=query.full_query,
            batch=batch,
            prefix=query.prefix if query.checked and query.draft_finite else None,
            score=round(query.score, 5) if query.score is not None and finite else None,
            clipped=query.clipped,
            token_agreement=query.token_agreement,
            draft_gap=query.draft_gap,
            main_gap=query.main_gap,
        )

    @property
    def unusable(self) -> bool:
        """Whether the draft of a check was not finite."""
        return self.checked and self.prefix is None


class ActionStatistics(Record, frozen=True):
    """The executed actions of an episode, in environment units."""

    minimum: ByDim
    maximum: ByDim
    mean: ByDim
    histogram: Annotated[
        tuple[Annotated[tuple[Natural, ...], Meta(min_length=HISTOGRAM_BINS, max_length=HISTOGRAM_BINS)], ...],
        Meta(min_length=ACTION_DIMS, max_length=ACTION_DIMS),
        told("by dimension, counts in equal bins over [-1, 1], outliers at its ends"),
    ]
    gripper_switches: Annotated[Natural, told("times that the gripper command changed its sign")]
    closed: Annotated[
        tuple[tuple[Natural, Natural], ...] | None,
        told("spans of steps, the first and the one after the last, that closed the gripper; null: not recorded"),
    ] = None

    def __post_init__(self) -> None:
        """Raises UserError: a minimum above its maximum."""
        for low, high in zip(self.minimum, self.maximum, strict=True):
            require(low <= high, f"actions.minimum {low} is above actions.maximum {high}")

    @classmethod
    def of(cls, actions: NDArray[np.float32]) -> ActionStatistics:
        """actions [n, A], n >= 1."""
        edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
        counts = [np.histogram(column.clip(-1, 1), edges)[0].tolist() for column in actions.T]
        closed = actions[:, ARM_DIMS] > 0
        ends = np.flatnonzero(np.diff(closed, prepend=False, append=False)).reshape(-1, 2)
        return cls(
            minimum=_rounded(actions.min(0)),
            maximum=_rounded(actions.max(0)),
            mean=_rounded(actions.mean(0)),
            histogram=tuple(map(tuple, counts)),
            gripper_switches=int((closed[1:] != closed[:-1]).sum()),
            closed=tuple((int(start), int(end)) for start, end in ends),
        )


class Episode(Record, frozen=True):
    """One finished trial. An `error` (the simulator or the policy broke) is neither a success nor a failure."""

    task_id: Natural
    trial: Annotated[Natural, told("the number of the suite's initial state")]
    success: bool
    steps: Annotated[Natural, told("executed actions, settling steps not counted")]
    seconds: Annotated[float, told("wall time of the whole episode, simulation included")]
    queries: tuple[QueryRecord, ...]
    actions: Annotated[ActionStatistics | None, told("null when none was executed")] = None
    error: Annotated[str | None, told("what broke")] = None
    run: Annotated[str, told("which run the episode is of: the start of the sha256 of its settings")] = ""
    perturbed_at: Annotated[Natural | None, told("the step before which the scene was perturbed")] = None
    displacement: Annotated[
        tuple[float, float] | None, told("of the object that was moved, along x and y of the world, in m")
    ] = None
    others: Annotated[
        float | None, told("mean number of cores that other processes kept busy meanwhile; null: not measured")
    ] = None
    perturbed_by: Annotated[
        str | None,
        told("what perturbed it: displace, late or moving (of the target), distractor, light, frozen (cameras)"),
    ] = None

    @property
    def key(self) -> EpisodeKey:
        return self.task_id, self.trial

    @property
    def policy_ms(self) -> float:
        """ms of all its queries."""
        return sum(query.ms for query in self.queries)


class BundleSettings(Record, frozen=True):
    """What a result depends on where a bundle acts, and only there."""

    mode: Mode
    backend: str
    precision: Annotated[str, told("of draft and head")]
    backbone: Annotated[str, told("how the backbone runs: eager, graph or compiled")]
    exports_sha256: dict[str, str]
    trained: bool
    draft: Annotated[
        DraftKind,
        told("vision: it has eyes of its own; hidden: it reads the backbone's last hidden state"),
    ]
    levels: Annotated[int, Meta(ge=2, le=MAX_COUNT), told("K, of an RFSQ layer; 1/K of the tokens agree by chance")]
    rsd: RsdConfig
    training_actions: Annotated[Quantiles | None, told("of the actions that the policy was trained on")]
    backbone_precision: Annotated[str, told("bundle: what its weights are stored in")] = "bundle"
    accept_rate: Annotated[
        Rate | None,
        told("random mode only: how often it accepts a check"),
    ] = None

    def __post_init__(self) -> None:
        """Raises UserError: a rate in another mode, or quantiles of other lengths."""
        rate = self.accept_rate
        require((rate is not None) == (self.mode == "random"), f"settings.accept_rate {rate} in mode {self.mode}")
        for name in ("q01", "q99", "mask") if self.training_actions else ():
            length = len(getattr(self.training_actions, name))
            require(
                length == ACTION_DIMS,
                f"settings.bundle.training_actions.{name} has {length} entries, not {ACTION_DIMS}",
            )

    @property
    def backbone_name(self) -> str:
        """How the backbone ran, for people: `graph fp8`."""
        precision = self.backbone_precision
        return self.backbone if precision == "bundle" else f"{self.backbone} {precision}"


class Settings(Record, frozen=True):
    """All that a result depends on. A run resumes only where it is the same."""

    policy: Annotated[str, told("what acts: the bundle's name, or the function of a script")]
    policy_sha256: Annotated[str, told("of the bundle, or of what decides the script's actions")]
    bundle: Annotated[BundleSettings | None, told("null for a script: it runs no model")]
    suite: str
    tasks: tuple[Natural, ...]
    trials: Natural
    timing: Annotated[Timing, told("single: each query alone; batched: their times say nothing of one")]
    device: str
    protocol: str
    max_steps: Natural
    n_action_steps: Positive
    seed: Natural
    perturb: Annotated[str | None, told("KIND:SEEDS or KIND:SEEDS:LOW-HIGH, as --perturb takes it")]
    control: ControlConfig
    hardware: dict[str, str | int]
    versions: dict[str, str]
    suite_sha256: Annotated[str, told("of the tasks' files and initial states; empty where it was not recorded")] = ""

    def __post_init__(self) -> None:
        """Raises UserError: a suite that may lead anywhere."""
        require(
            Path(self.suite).name == self.suite, f"settings.suite {shown(self.suite)} is no name: it names a folder"
        )

    @property
    def seeds(self) -> int:
        """How many the perturbation has; see `rsd_trt.config.state_and_seed`."""
        return self.perturb.count(SEEDS_APART) + 1 if self.perturb else 1

    @property
    def of_bundle(self) -> BundleSettings:
        """What only the run of a bundle has.

        Raises:
            UserError: it is the run of a script.
        """
        if self.bundle is None:
            raise UserError(f"this is a run of {self.policy}, a script; it says nothing of a bundle")
        return self.bundle

    @property
    def mode(self) -> Mode | None:
        """Of a bundle's run; None for a script."""
        return None if self.bundle is None else self.bundle.mode

    @property
    def label(self) -> str:
        """The mode of a bundle's run, or the script."""
        return self.mode or self.policy

    @property
    def run(self) -> str:
        """The name that the run's episodes carry."""
        return run_name(self)


def run_name(settings: object) -> str:
    """The name that the episodes of a run with these settings carry: of the record, or of its JSON as it was written,
    which a later version may read with more fields."""
    return hashlib.sha256(msgspec.json.encode(settings, order="sorted")).hexdigest()[:12]


class RsdStats(Record, frozen=True):
    """Shares of the checks; they add up to 1. Null without a check."""

    draft_acceptance_rate: float | None
    partial_acceptance_rate: float | None
    full_rejection_rate: float | None


class TaskResult(Record, frozen=True):
    """A task's episodes that ended without an error."""

    task_id: Natural
    task_description: str
    success_rate: float | None
    success_interval: Annotated[tuple[float, float] | None, told(RATE_INTERVAL)]
    successes: Natural
    episodes: Natural
    errors: Natural


class Throughput(Record, frozen=True):
    """How fast a run that was not interrupted was as a whole, or several that shared a model were together."""

    workers: Annotated[Positive, told("simulator processes")]
    wall_seconds: Annotated[float, told("from the first episode's start to the last one's end, building included")]
    episodes_per_second: float
    policy_share: Annotated[float, told("of the wall time in which the policy computed")]
    rows_per_forward: Annotated[float, told("mean number of queries that shared a forward")]
    bound: Annotated[Literal["policy", "simulator"], told("policy: it computed for more than half of the time")]
    gpu_utilisation: Annotated[float | None, told("mean share of time with a kernel on the GPU")] = None
    cores: Annotated[float | None, told("mean number of CPU cores that the run had")] = None
    gpus: Annotated[float | None, told("mean number of GPUs that the run had")] = None
    runs: Annotated[Positive, told("that shared model and simulators, and that these figures are of together")] = 1


class Results(Record, frozen=True):
    """A run: its summary, settings and episodes. Figures are over episodes that ended without an error."""

    task_suite: str
    use_speculative_decoding: bool
    total_episodes: Natural
    total_successes: Natural
    final_success_rate: float | None
    final_success_interval: Annotated[tuple[float, float] | None, told(RATE_INTERVAL)]
    errors: Natural
    avg_inference_time_ms: Annotated[
        float | None, told("policy time per executed action; null without queries or unless timing is single")
    ]
    rsd_stats: RsdStats
    routes: Annotated[dict[str, Natural], told("queries by route")]
    token_agreement: Annotated[Layers | None, told("share of equal draft and main tokens, per coarse layer")]
    token_agreement_chance: Annotated[float | None, told("null for a script")]
    query_ms: Annotated[dict[str, float] | None, told("n, mean, p50, p90, p95, p99, max; null unless timing is single")]
    queries: Natural
    checks: Annotated[Natural, told("queries that ran the draft to judge what was left of a chunk")]
    full_queries: Annotated[Natural, told("queries that ran the backbone and the main head; a rejected check is both")]
    unusable_drafts: Annotated[Natural, told("checks rejected since the draft was not finite")]
    steps: Annotated[Natural, told("executed actions")]
    clipped_steps: Annotated[Natural, told("committed actions that were clipped to the controller's limits")]
    actions_per_query: float | None
    steps_per_second: Annotated[float | None, told("simulation and policy included; null unless timing is single")]
    throughput: Annotated[Throughput | None, told("null when the run was interrupted")]
    codec_round_trip_mse: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        told("decode(tokens(x)) against its own reconstruction; null without a codec"),
    ]
    task_results: tuple[TaskResult, ...]
    settings: Settings
    episodes: tuple[Episode, ...]
    command: str
    schema_version: Literal[3]
    clock: Annotated[Steadiness | None, told("how far the times can be trusted; null: not recorded")] = None

    def __post_init__(self) -> None:
        """Raises UserError: queries of other numbers of coarse layers."""
        layers = {len(q.token_agreement) for e in self.episodes for q in e.queries if q.token_agreement is not None}
        require(len(layers) <= 1, f"the queries' token_agreement has {sorted(layers)} entries: it must have as many")


def results_schema() -> dict[str, object]:
    """The JSON Schema of a results file."""
    return json_schema(Results)


def _rounded(values: NDArray[np.float32]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)
