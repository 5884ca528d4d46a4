"""Success against policy time per action: what a run costs, and what the baseline that costs the same does.

A run's milliseconds are those of its replay or, without one, its own if each query was timed alone. Only runs that were
timed alike (hardware, backend, backbone, precision) are set against each other. Of runs of one bundle, suite, mode,
tolerance or rate, n_action_steps and perturbation the one with most episodes counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Literal

from rsd_trt.config import Mode
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.replay_record import Replay, ReplayRow
from rsd_trt.eval.report.compare import Comparison, SpeedUp, compare, differences
from rsd_trt.eval.report.runs import Run, replayed, variant
from rsd_trt.eval.results import BundleSettings, Results
from rsd_trt.eval.statistics import CONFIDENCE, Interval, bootstrap_share, sign_flip

FREE = ("n_action_steps",)  # the runs of a curve differ in it

Judgement = Literal["above", "below", "not shown", "not measured"]
RULE = (
    "The baseline that costs the same divides the episodes between two runs of mode baseline, the cheapest that takes "
    "as long per action or longer and the dearest that takes as long or less (the first alone where there is no "
    "second), in the proportion that gives the same time. A run is above or below it if the paired differences of "
    "success say so (sign-flip test, p < 0.05)."
)


@dataclass(frozen=True)
class Point:
    """A run by what it costs and how often it succeeds."""

    run: Annotated[str, "its name"]
    suite: str
    bundle: str
    mode: Mode
    variant: Annotated[str, "what decides acceptance: rsd's tolerance, random's rate; empty for baseline"]
    n_action_steps: int
    perturb: str | None
    episodes: int
    success: float
    success_interval: Annotated[Interval, "95%, Wilson's score"]
    ms: Annotated[float, "policy time per action"]
    ms_interval: Annotated[Interval | None, "95%, bootstrap over episodes"]
    replayed: Annotated[bool, "the time is that of a replay; else the run's own"]
    speedup: Annotated[SpeedUp | None, "over the baseline of as many actions a query; null where there is none"]
    timed_on: Annotated[str, "hardware, backend, backbone, precisions"]


@dataclass(frozen=True)
class Neighbour:
    """A baseline run beside the one that it is set against."""

    run: str
    ms: float
    share: Annotated[float, "of the episodes that it has in the baseline that costs the same"]
    versus: Annotated[Comparison, "the other run against it"]


@dataclass(frozen=True)
class SameCost:
    """A run of mode rsd or random against the baseline that costs the same."""

    run: str
    mode: Mode
    n_action_steps: int
    perturb: str | None
    neighbours: Annotated[tuple[Neighbour, ...], "the baseline runs that enclose the cost, the dearer one first"]
    pairs: Annotated[int, "episodes that ended without an error in all of them"]
    success: Annotated[tuple[float, float] | None, "success rates over the pairs: that baseline's, the run's"]
    p: Annotated[float | None, "two-sided, sign-flip test of the paired differences"]
    verdict: Annotated[Judgement, RULE]


@dataclass(frozen=True)
class Tradeoff:
    """Every run whose cost is known, and the baseline of the same cost."""

    points: tuple[Point, ...]
    same_cost: tuple[SameCost, ...]
    left_out: Annotated[tuple[str, ...], "runs that are not among the points, and why"]


def tradeoff(runs: Sequence[Run], replay: Replay | None) -> Tradeoff:
    """What the runs cost and what they are worth.

    Raises:
        UserError: the replay is not of these runs.
    """
    if replay is not None:
        check_replay(replay, runs)
    by_name = {run.name: run.results for run in runs}
    found, left_out = [], []
    for run in runs:
        point = _point(run, replay)
        if isinstance(point, Point):
            found.append(point)
        else:
            left_out.append(f"{run.name}: {point}")
    kept = found
    if found:
        kind, _ = Counter(point.timed_on for point in found).most_common(1)[0]
        kept = [point for point in found if point.timed_on == kind]
        left_out += [f"{p.run}: timed on {p.timed_on}, not on {kind}" for p in found if p.timed_on != kind]
    points = _largest(kept, by_name)
    left_out += [f"{point.run}: another run of its kind has more episodes" for point in kept if point not in points]
    baselines = [point for point in points if point.mode == "baseline"]
    others = [point for point in points if point.mode != "baseline"]
    return Tradeoff(tuple(points), tuple(_same_cost(point, baselines, by_name) for point in others), tuple(left_out))


def check_replay(replay: Replay, runs: Sequence[Run]) -> None:
    """Raises UserError unless every row is of one of the runs, as it is now."""
    settings = {run.results.settings.run: run.results.settings for run in runs}
    for row in replay.rows:
        if (of := settings.get(row.run)) is None:
            raise UserError(
                f"the replay times {row.results} as run {row.run}, which is none of the results given "
                f"({', '.join(settings)}). Give its results file, or replay again"
            )
        for name in ("mode", "n_action_steps", "perturb"):
            if getattr(of, name) != getattr(row, name):
                raise UserError(
                    f"the replay says of run {row.run} that its {name} is {getattr(row, name)!r}, its results "
                    f"{getattr(of, name)!r}. Replay again"
                )
        if of.policy_sha256 != replay.bundle_sha256:
            raise UserError(
                f"the replay is of bundle {replay.bundle_sha256[:12]}, {row.results} of {of.policy_sha256[:12]}. "
                "Replay it with its own bundle"
            )


def enclosing(ms: float, costs: Mapping[str, float]) -> tuple[str | None, str | None]:
    """(the cheapest that costs at least `ms`, the dearest that costs at most `ms`), by name; None where none does."""
    dearer = min((name for name in costs if costs[name] >= ms), key=lambda name: costs[name], default=None)
    cheaper = max((name for name in costs if costs[name] <= ms), key=lambda name: costs[name], default=None)
    return dearer, cheaper


def shares(ms: float, dearer: float, cheaper: float) -> tuple[float, float]:
    """How to divide the episodes between a dearer and a cheaper run, so that an action takes `ms` in the mean."""
    dear = (ms - cheaper) / (dearer - cheaper) if dearer > cheaper else 1.0
    return dear, 1.0 - dear


def judge_same_cost(success: tuple[float, float] | None, p: float | None) -> Judgement:
    """`RULE`, from (the baseline's success, the run's) and the test's p."""
    if success is None or p is None:
        return "not measured"
    if p >= 1 - CONFIDENCE:
        return "not shown"
    return "above" if success[1] > success[0] else "below"


def _point(run: Run, replay: Replay | None) -> Point | str:
    """The run as a point, or why it is none."""
    results, settings = run.results, run.results.settings
    if results.final_success_rate is None or results.final_success_interval is None:
        return "no episode ended without an error"
    timed: BundleSettings | ReplayRow = settings.of_bundle
    row = replay.row(settings.run) if replay is not None else None
    if row is not None and replay is not None:
        ms, ms_interval, hardware, timed = row.ms_per_action, row.ms_per_action_interval, replay.hardware, row
        faster = replayed(row)
    elif settings.mode == "shadow":
        return "shadow mode computes all that rsd would save"
    elif settings.timing == "batched":
        return "batched timing, and no replay"
    elif results.avg_inference_time_ms is None:
        return "no action was executed"
    else:
        done = [episode for episode in results.episodes if episode.error is None]
        ms = results.avg_inference_time_ms
        ms_interval = bootstrap_share([e.policy_ms for e in done], [e.steps for e in done])
        hardware = settings.hardware
        faster = run.versus.speedup if run.versus is not None else None
    stored = "" if timed.backbone_precision == "bundle" else f" {timed.backbone_precision}"
    machine = ", ".join(str(hardware[part]) for part in ("gpu", "cpu") if part in hardware)
    return Point(
        run=run.name,
        suite=settings.suite,
        bundle=settings.policy,
        mode=settings.of_bundle.mode,
        variant=variant(settings.of_bundle),
        n_action_steps=settings.n_action_steps,
        perturb=settings.perturb,
        episodes=results.total_episodes,
        success=results.final_success_rate,
        success_interval=results.final_success_interval,
        ms=ms,
        ms_interval=ms_interval,
        replayed=row is not None,
        speedup=faster,
        timed_on=f"{machine}, {timed.backend} {timed.precision}, {timed.backbone}{stored} backbone",
    )


def _largest(points: Sequence[Point], results: Mapping[str, Results]) -> list[Point]:
    """The point with most episodes of each kind of run; where two have as many, one that was replayed."""
    kinds: dict[tuple[object, ...], Point] = {}
    for point in points:
        settings = results[point.run].settings
        condition = (point.suite, settings.policy_sha256, point.perturb)
        kind = (*condition, point.mode, point.variant, point.n_action_steps)
        kinds[kind] = max(kinds.get(kind, point), point, key=lambda p: (p.episodes, p.replayed))
    return list(kinds.values())


def _same_cost(point: Point, baselines: Sequence[Point], results: Mapping[str, Results]) -> SameCost:
    mine = results[point.run]
    alike = {b.run: b.ms for b in baselines if not differences(results[b.run].settings, mine.settings, FREE)}
    dearer, cheaper = enclosing(point.ms, alike)
    parts: dict[str, float] = {}
    if dearer is not None:  # where none takes as little, the baseline is that one alone, which costs more
        parts = {dearer: 1.0}
        if cheaper is not None and cheaper != dearer:
            parts = dict(zip((dearer, cheaper), shares(point.ms, alike[dearer], alike[cheaper]), strict=True))
    pairs = paired_success(mine, [(results[name], share) for name, share in parts.items()]) if parts else []
    success, p = None, None
    if pairs:
        success = (fmean(expected for expected, _ in pairs), fmean(own for _, own in pairs))
        p = sign_flip([own - expected for expected, own in pairs])
    return SameCost(
        run=point.run,
        mode=point.mode,
        n_action_steps=point.n_action_steps,
        perturb=point.perturb,
        neighbours=tuple(Neighbour(n, alike[n], s, compare(results[n], mine, FREE)) for n, s in parts.items() if pairs),
        pairs=len(pairs),
        success=success,
        p=p,
        verdict=judge_same_cost(success, p),
    )


def paired_success(mine: Results, parts: Sequence[tuple[Results, float]]) -> list[tuple[float, float]]:
    """(how often runs of these shares are expected to succeed, whether `mine` does) for each episode that ended without
    an error in all of them."""
    done = [
        {e.key: float(e.success) for e in run.episodes if e.error is None} for run in (mine, *(r for r, _ in parts))
    ]
    keys = [key for key in done[0] if all(key in other for other in done[1:])]
    weights = [share for _, share in parts]
    return [
        (sum(w * other[key] for w, other in zip(weights, done[1:], strict=True)), done[0][key]) for key in sorted(keys)
    ]
