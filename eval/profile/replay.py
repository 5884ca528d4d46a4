"""Replays the decisions recorded in evaluations on any bundle, and measures the time that they cost.

A small policy's decisions and a large one's clock give the time that the large one would take if it decided so. Each
recorded query is answered anew through `Policy`, alone and with a synchronised clock, on a random image that is
uploaded for it: an accepted one runs the early blocks and waits for the draft, a rejected one goes on from there, a
forced one runs everything at once, a baseline's has no draft. Several runs are replayed in one go, an episode of each
in turn, so that clocks that drift do so for all. A few episodes are replayed, and price the decisions of all.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
from msgspec import structs

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.inputs import InputSize, QueryInputs, make_inputs
from rsd_trt.eval.profile.replay_record import Replay, ReplayRow
from rsd_trt.eval.read import read_run
from rsd_trt.eval.results import Episode, EpisodeKey, Results
from rsd_trt.eval.statistics import bootstrap_share, bootstrap_speedup
from rsd_trt.files import write_atomically
from rsd_trt.records import to_json
from rsd_trt.runtime.backends import Launcher, open_forward
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.scripted import Decision, ScriptedPolicy
from rsd_trt.runtime.speculate import Route

log = logging.getLogger(__name__)

BOUNDARY = (
    "a query alone, host's clock, synchronised, from a uint8 image in the host's memory to actions there, its decision "
    "replayed from the results files; without simulation. All queries are priced by the replayed ones of their route"
)
WARM_UP = 20  # queries of each kind and prompt
WARM_UP_ROUTES: tuple[Route, ...] = ("start", "accepted", "rejected")
Group = Literal["baseline", "draft"]  # queries without a draft, or with one
Prices = dict[Group, dict[Route, float]]  # ms of a query
Advance = Callable[[int, int], None]  # episodes done, episodes in all


@dataclass(frozen=True)
class ReplayRequest:
    """What to replay, and on what. size: its prompt_tokens is None for the tasks' own prompts."""

    paths: tuple[Path, ...]
    episodes: int  # of each suite, at most; and those that it takes to meet every route
    launcher: Launcher
    backbone: BackboneKind
    backbone_precision: BackbonePrecision
    size: InputSize
    seed: int = 0


@dataclass
class Track:
    """A run, and what its replay has measured."""

    path: Path
    results: Results
    episodes: dict[EpisodeKey, Episode]  # those without an error
    policy: ScriptedPolicy
    episode_ms: list[float] = field(default_factory=list)
    route_ms: dict[Route, list[float]] = field(default_factory=dict)

    @property
    def suite(self) -> str:
        return self.results.task_suite

    @property
    def group(self) -> Group:
        return "baseline" if self.results.settings.mode == "baseline" else "draft"

    def priced(self, prices: Prices) -> dict[EpisodeKey, tuple[float, int]]:
        """(ms at these prices, executed actions) of every episode whose routes all have one."""
        of = prices[self.group]
        return {
            key: (sum(of[q.route] for q in e.queries), e.steps)
            for key, e in self.episodes.items()
            if all(q.route in of for q in e.queries)
        }


def replay(request: ReplayRequest, command: str, advance: Advance = lambda done, total: None) -> Replay:
    """Replays every results file.

    Raises:
        UserError: a results file cannot be replayed, or the bundle cannot run like that here.
    """
    runs = [(path, _read(path, request.launcher.bundle)) for path in request.paths]
    names = [results.settings.run for _, results in runs]
    for (path, _), name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{path} holds run {name}, which is given twice")
    chosen = {
        suite: choose([r for _, r in runs if r.task_suite == suite], suite, request.episodes, request.seed)
        for suite in dict.fromkeys(results.task_suite for _, results in runs)
    }
    given = make_inputs(request.launcher.bundle, request.size)
    launcher = replace(request.launcher, bundle=given.bundle)
    forward = open_forward(launcher, "1", request.backbone, request.backbone_precision)
    tracks = [_track(path, results, given, forward) for path, results in runs]
    prompts = {track.path: _prompts(track.results, given, request.size) for track in tracks}
    _warm_up(forward, given, sorted({text for texts in prompts.values() for text in texts.values()}))
    seen = itertools.cycle(given.observations)
    total = sum(len(chosen[track.suite]) for track in tracks)
    done = itertools.count(1)
    for i in range(max(map(len, chosen.values()))):
        for track in tracks:
            if i < len(chosen[track.suite]):
                key = chosen[track.suite][i]
                _replay_episode(track, track.episodes[key], prompts[track.path][key[0]], seen)
                advance(next(done), total)
    prices = price(tracks, chosen)
    rows = [_row(track, chosen[track.suite], prices, request) for track in tracks]
    bundle = request.launcher.bundle
    return Replay(
        command=command,
        bundle=bundle.config.name,
        bundle_sha256=bundle.fingerprint,
        hardware=dict(host.hardware(str(request.launcher.device))),
        versions=host.versions(),
        boundary=BOUNDARY,
        rows=tuple(_compared(row, track, rows, tracks, prices) for row, track in zip(rows, tracks, strict=True)),
        prices={group: {str(route): ms for route, ms in of.items()} for group, of in prices.items()},
        images=given.images,
        prompt_tokens=request.size.prompt_tokens,
        replayed=dict(chosen),
    )


def write_replay(
    request: ReplayRequest, out: Path, command: str, advance: Advance = lambda done, total: None
) -> Replay:
    """Replays every results file, and writes `replay.json` into `out`.

    Raises:
        UserError: as `replay`, or `out` cannot be written.
    """
    record = replay(request, command, advance)
    try:
        write_atomically(out / "replay.json", json.dumps(to_json(record)) + "\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return record


def choose(runs: Sequence[Results], suite: str, count: int, seed: int) -> tuple[EpisodeKey, ...]:
    """At most `count` of the episodes that all runs of a suite hold and none ended with an error in, and as many more
    as it takes to meet every route that a run took in any of those.

    Raises:
        UserError: there is none.
    """
    routes = [{e.key: {q.route for q in e.queries} for e in _replayable(run)} for run in runs]
    common = sorted(set.intersection(*map(set, routes)))
    if not common:
        raise UserError(f"no episode of {suite} is in every results file, and without an error: nothing to replay")
    order = [common[i] for i in np.random.default_rng(seed).permutation(len(common))]
    picked = order[:count]
    for taken in routes:
        left = set().union(*taken.values()).difference(*(taken[key] for key in picked))
        for key in order:
            if left & taken[key]:
                picked.append(key)
                left -= taken[key]
    return tuple(picked)


def _replayable(run: Results) -> list[Episode]:
    return [e for e in run.episodes if e.error is None and e.steps and e.queries]


def _read(path: Path, bundle: Bundle) -> Results:
    """A results file whose decisions the bundle can follow."""
    results = read_run(path)
    settings, steps = results.settings, bundle.config.dims.T
    if settings.mode in (None, "shadow"):
        raise UserError(f"{path} is a run of {settings.label}: only baseline, rsd and random decide what is computed")
    if settings.n_action_steps > steps:
        raise UserError(
            f"{path} has {settings.n_action_steps} actions a query, the chunk of {bundle.path} {steps} steps: "
            "they cannot be replayed"
        )
    for episode in results.episodes:
        left = 0
        for query in episode.queries:
            left = (left if query.route in ("accepted", "partial") else steps) - query.committed
            if left < 0:
                raise UserError(
                    f"{path}, task {episode.task_id}, trial {episode.trial}, step {query.step}: a plan has more steps "
                    f"than the chunk of {bundle.path}, {steps}: they cannot be replayed"
                )
    return results


def _track(path: Path, results: Results, given: QueryInputs, forward: Forward) -> Track:
    settings = results.settings
    mode: Literal["baseline", "rsd"] = "baseline" if settings.mode == "baseline" else "rsd"
    policy = ScriptedPolicy(given.bundle.config, forward, mode, settings.n_action_steps)
    return Track(path, results, {e.key: e for e in _replayable(results)}, policy)


def _prompts(results: Results, given: QueryInputs, size: InputSize) -> dict[int, str]:
    """Each task's instruction."""
    fixed = given.observations[0].instruction
    return {
        task.task_id: task.task_description if size.prompt_tokens is None else fixed for task in results.task_results
    }


def _warm_up(forward: Forward, given: QueryInputs, prompts: Sequence[str]) -> None:
    """Queries of every kind and prompt: graphs are captured, kernels chosen, and clocks have risen."""
    baseline = ScriptedPolicy(given.bundle.config, forward, "baseline", 1)
    rsd = ScriptedPolicy(given.bundle.config, forward, "rsd", 1)
    for prompt, _ in itertools.product(prompts, range(WARM_UP)):
        observation = replace(given.observations[0], instruction=prompt)
        baseline.follow(Decision("full", 1), observation)
        for route in WARM_UP_ROUTES:
            rsd.follow(Decision(route, 1), observation)


def _replay_episode(track: Track, episode: Episode, prompt: str, seen: Iterator[Observation]) -> None:
    track.policy.reset()
    total = 0.0
    for record in episode.queries:
        observation = replace(next(seen), instruction=prompt)
        query = track.policy.follow(Decision(record.route, record.committed), observation)
        track.route_ms.setdefault(record.route, []).append(query.ms)
        total += query.ms
    track.episode_ms.append(total)


def price(tracks: Sequence[Track], chosen: Mapping[str, Sequence[EpisodeKey]]) -> Prices:
    """ms of a query by route, from the replays of all runs of a kind: they launch the same.

    The p50s of the runs are averaged by how many queries they are of, and scaled by one factor so that the replayed
    episodes cost together what was measured: a p50 leaves out what slow queries add.
    """
    prices: Prices = {}
    for group in dict.fromkeys(track.group for track in tracks):
        alike = [track for track in tracks if track.group == group]
        medians: dict[Route, list[float]] = {}  # a run's as often as it took the route
        for track in alike:
            for route, ms in track.route_ms.items():
                medians.setdefault(route, []).extend([float(np.median(ms))] * len(ms))
        prices[group] = {route: fmean(ms) for route, ms in medians.items()}
        replayed = [track.priced(prices)[key][0] for track in alike for key in chosen[track.suite]]
        scale = sum(sum(track.episode_ms) for track in alike) / sum(replayed)
        prices[group] = {route: ms * scale for route, ms in prices[group].items()}
    return prices


def _row(track: Track, chosen: Sequence[EpisodeKey], prices: Prices, request: ReplayRequest) -> ReplayRow:
    priced, settings = track.priced(prices), track.results.settings
    if left_out := len(track.episodes) - len(priced):
        log.warning("%s: %d episodes took routes that no replayed episode took, and are left out", track.path, left_out)
    queries = [query for key in priced for query in track.episodes[key].queries]
    costs, actions = list(priced.values()), sum(steps for _, steps in priced.values())
    replayed = sum(track.episodes[key].steps for key in chosen)
    return ReplayRow(
        results=str(track.path),
        run=settings.run,
        mode=settings.of_bundle.mode,
        n_action_steps=settings.n_action_steps,
        perturb=settings.perturb,
        backend=request.launcher.backend,
        backbone=request.backbone,
        precision=request.launcher.precision,
        episodes=len(costs),
        queries=len(queries),
        full_queries=sum(query.full_query for query in queries),
        actions=actions,
        ms_per_action=sum(ms for ms, _ in costs) / actions,
        ms_per_action_interval=bootstrap_share([ms for ms, _ in costs], [steps for _, steps in costs]),
        suite=track.suite,
        decisions_of=settings.policy,
        backbone_precision=request.backbone_precision,
        route_ms={route: float(np.median(ms)) for route, ms in track.route_ms.items()},
        route_queries={route: len(ms) for route, ms in track.route_ms.items()},
        episode_ms=tuple(round(ms, 4) for ms in track.episode_ms),
        replayed_ms_per_action=sum(track.episode_ms) / replayed,
        priced_ms_per_action=sum(priced[key][0] for key in chosen) / replayed,
    )


def _compared(
    row: ReplayRow, track: Track, rows: Sequence[ReplayRow], tracks: Sequence[Track], prices: Prices
) -> ReplayRow:
    """The row with its speed-up over the baseline of the same suite, actions a query and displacements."""
    if row.mode == "baseline":
        return row
    for other, base in zip(rows, tracks, strict=True):
        alike = (other.suite, other.n_action_steps, other.perturb) == (row.suite, row.n_action_steps, row.perturb)
        if other.mode == "baseline" and alike:
            slow, fast = base.priced(prices), track.priced(prices)
            keys = sorted(slow.keys() & fast.keys())
            before, after = [slow[key] for key in keys], [fast[key] for key in keys]
            per_action = [sum(ms for ms, _ in costs) / sum(steps for _, steps in costs) for costs in (before, after)]
            return structs.replace(
                row,
                baseline=other.run,
                speedup=per_action[0] / per_action[1],
                speedup_interval=bootstrap_speedup(before, after),
            )
    return row
