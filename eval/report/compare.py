"""Two runs side by side, if they may be compared at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Literal

from rsd_trt.config import state_and_seed
from rsd_trt.errors import UserError
from rsd_trt.eval.report.cost import COUNTED, Price
from rsd_trt.eval.results import Episode, Results, Settings
from rsd_trt.eval.statistics import (
    CONFIDENCE,
    Interval,
    McNemar,
    bootstrap_share,
    bootstrap_speedup,
    groups_to_show,
    mcnemar_exact,
    pairs_to_show,
    sign_flip,
    smallest_provable_loss,
)
from rsd_trt.records import to_json

Difference = Literal["above", "below", "not shown"]
WITHIN = {"libero_spatial": 100}  # steps of the endpoint; other suites: all that an episode may take

SHOWN = 3  # settings in which runs differ that a message names
# What must be equal. The mode, the rule and the numbers of steps are what differs; the hardware may.
SAME = (
    *("policy_sha256", "suite", "suite_sha256", "tasks", "trials", "perturb", "device", "protocol", "max_steps"),
    *("seed", "control", "versions"),
    *("backend", "precision", "backbone", "backbone_precision", "exports_sha256"),  # of the bundle's
)


@dataclass(frozen=True)
class Endpoint:
    """Success within so many steps. A failure counts as that many, and so does a later success."""

    within: int

    @classmethod
    def of(cls, settings: Settings, within: int | None = None) -> Endpoint:
        """That of a suite, if none is asked for."""
        return cls(min(within or WITHIN.get(settings.suite, settings.max_steps), settings.max_steps))

    def reached(self, episode: Episode) -> bool:
        return episode.success and episode.steps <= self.within

    def steps(self, episode: Episode) -> int:
        """Restricted steps to success."""
        return min(episode.steps, self.within) if episode.success else self.within


@dataclass(frozen=True)
class SpeedUp:
    """How many times less an executed action costs."""

    value: float
    interval: Annotated[Interval | None, "95%, bootstrap over episodes; null for too few of them"]


@dataclass(frozen=True)
class Comparison:
    """The second run against the first, on the episodes that ended without an error in both."""

    names: tuple[str, str]
    pairs: Annotated[int, "episodes that both runs ended without an error"]
    left_out: Annotated[int, "episodes asked for that are not among the pairs"]
    success: Annotated[tuple[float, float], "success rates over the pairs"]
    within: Annotated[int, "steps of the endpoint, which the tests are of"]
    reached: Annotated[tuple[float, float], "rates of success within so many steps"]
    points: Annotated[float, "the second of these less the first, in percentage points"]
    points_interval: Annotated[Interval | None, "95%, bootstrap over initial states; null for too few of them"]
    mcnemar: McNemar
    by_task_p: Annotated[float, "two-sided, sign-flip test of the tasks' sums of differences"]
    by_task: Annotated[tuple[float, ...], "episodes gained less those lost, of each task"]
    difference: Annotated[Difference, "of the second run's success within the steps: what both tests show at 5%"]
    provable_loss: Annotated[int | None, "fewest episodes lost, none gained, that would show; null: none would"]
    steps: Annotated[tuple[float, float], "restricted mean steps to success"]
    steps_p: Annotated[float, "two-sided, sign-flip test of the paired differences"]
    cost: Annotated[tuple[float, float] | None, "per action, over the pairs; null beside shadow mode"]
    cost_unit: str
    speedup: SpeedUp | None
    other_hardware: Annotated[tuple[str, ...], "in what the machines differ, with both values; empty: in nothing"]


def compare(
    a: Results,
    b: Results,
    price: Price = COUNTED,
    within: int | None = None,
    names: tuple[str, str] | None = None,
) -> Comparison:
    """Two runs of the same episodes. names: of the runs, else their modes.

    Raises:
        UserError: the runs differ in something that makes their figures incomparable, or share no episode.
    """
    if different := differences(a.settings, b.settings):
        more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise UserError(f"these runs cannot be compared: {'; '.join(different[:SHOWN])}{more}")
    pairs = list(_pairs(a, b))
    if not pairs:
        raise UserError("these runs cannot be compared: no episode ended without an error in both")
    endpoint = Endpoint.of(a.settings, within)
    outcomes = [(endpoint.reached(x), endpoint.reached(y)) for x, y in pairs]
    test = mcnemar_exact(sum(y and not x for x, y in outcomes), sum(x and not y for x, y in outcomes))
    lefts, rights = [x for x, _ in pairs], [y for _, y in pairs]
    seeds = a.settings.seeds
    by_task: dict[int, float] = {}
    by_state: dict[tuple[int, int], list[float]] = {}
    for episode, (before, after) in zip(lefts, outcomes, strict=True):
        one = float(after) - float(before)
        by_task[episode.task_id] = by_task.get(episode.task_id, 0.0) + one
        by_state.setdefault((episode.task_id, state_and_seed(episode.trial, seeds)[0]), []).append(one)
    gained = [sum(ones) for ones in by_state.values()]
    if seeds > 1:
        test = replace(test, p=sign_flip(gained))
    spread = bootstrap_share(gained, [len(ones) for ones in by_state.values()])
    steps = [endpoint.steps(x) for x in lefts], [endpoint.steps(y) for y in rights]
    cost, speedup = _cost(a, b, lefts, rights, price)
    return Comparison(
        names=names or (a.settings.label, b.settings.label),
        pairs=len(pairs),
        left_out=len(a.settings.tasks) * a.settings.trials - len(pairs),
        success=(fmean(x.success for x in lefts), fmean(y.success for y in rights)),
        within=endpoint.within,
        reached=(fmean(x for x, _ in outcomes), fmean(y for _, y in outcomes)),
        points=sum(gained) / len(pairs) * 100,
        points_interval=None if spread is None else (spread[0] * 100, spread[1] * 100),
        mcnemar=test,
        by_task_p=(by_task_p := sign_flip(list(by_task.values()))),
        by_task=tuple(by_task.values()),
        difference=judge(test, test.p, by_task_p),
        provable_loss=smallest_provable_loss(len(pairs)),
        steps=(fmean(steps[0]), fmean(steps[1])),
        steps_p=sign_flip([y - x for x, y in zip(*steps, strict=True)]),
        cost=cost,
        cost_unit=price.unit,
        speedup=speedup,
        other_hardware=tuple(_differences("hardware", a.settings.hardware, b.settings.hardware)),
    )


def judge(test: McNemar, *ps: float) -> Difference:
    """What a test shows at 5%, if all of these p do."""
    if max(ps) >= 1 - CONFIDENCE:
        return "not shown"
    return "above" if test.gained > test.lost else "below"


@dataclass(frozen=True)
class Needed:
    """What would show a difference as large as that measured: by both tests, with 80% power."""

    episodes: Annotated[int, "rounded up to two digits"]
    tasks: Annotated[int, "that they have to be of, at least"]

    def __str__(self) -> str:
        return f"{self.episodes:,} episodes of {self.tasks} tasks"


def needed(found: Comparison, p: float, by_task_p: float, tests: int = 1) -> Needed | None:
    """What it would take to show the difference by the tests that do not, together with so many others; None: no
    difference was measured."""
    pairs = pairs_to_show(found.pairs, found.mcnemar.gained, found.mcnemar.lost, tests)
    groups = groups_to_show(found.by_task, tests)
    if pairs is None or groups is None:
        return None
    now = len(found.by_task)
    tasks = now if by_task_p < 1 - CONFIDENCE else max(groups, now + 1)
    episodes = max(math.ceil(tasks * found.pairs / now), 0 if p < 1 - CONFIDENCE else max(pairs, found.pairs + 1))
    unit = 10 ** max(0, len(str(episodes)) - 2)
    return Needed(math.ceil(episodes / unit) * unit, tasks)


def differences(a: Settings, b: Settings) -> list[str]:
    """Why two runs may not be compared: each setting that must not differ and does, with both values; empty if they
    may be."""
    if a.run == b.run:
        return [f"both are run {a.run}"]
    left, right = _comparable(a), _comparable(b)
    scripts = a.bundle is None and b.bundle is None  # what differs is what acts
    same = [name for name in SAME if not (scripts and name == "policy_sha256")]
    return [line for name in same for line in _differences(name, left[name], right[name])]


def _comparable(settings: Settings) -> dict[str, object]:
    """The settings that must be equal, by the names in `SAME`."""
    told = to_json(settings) | (to_json(settings.bundle) if settings.bundle is not None else {})
    if told.get("backend") not in ("ort", "trt"):  # what runs exports took no part
        told["versions"] = {x: y for x, y in settings.versions.items() if not x.startswith(("onnx", "tensorrt"))}
    return {name: told.get(name) for name in SAME}


def _differences(name: str, left: object, right: object) -> Iterator[str]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in {**left, **right}:
            yield from _differences(f"{name}.{key}", left.get(key), right.get(key))
    elif left != right:
        yield f"{name} is {left!r} and {right!r}"


def _pairs(a: Results, b: Results) -> Iterator[tuple[Episode, Episode]]:
    """The episodes that ended without an error in both runs."""
    others = {episode.key: episode for episode in b.episodes if episode.error is None}
    for episode in a.episodes:
        if episode.error is None and episode.key in others:
            yield episode, others[episode.key]


def _cost(
    a: Results, b: Results, lefts: Sequence[Episode], rights: Sequence[Episode], price: Price
) -> tuple[tuple[float, float] | None, SpeedUp | None]:
    """The cost per action of both, and their ratio; None beside shadow mode, or where nothing was executed."""
    if "shadow" in (a.settings.mode, b.settings.mode):
        return None, None
    before, after = price.of(lefts), price.of(rights)
    steps = [x.steps for x in lefts], [y.steps for y in rights]
    if not (sum(before) and sum(after) and sum(steps[0]) and sum(steps[1])):
        return None, None
    cost = sum(before) / sum(steps[0]), sum(after) / sum(steps[1])
    spread = bootstrap_speedup(list(zip(before, steps[0], strict=True)), list(zip(after, steps[1], strict=True)))
    return cost, SpeedUp(cost[0] / cost[1], spread)
