"""Made-up runs for tests of the statistics and the report. Their numbers mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec import structs

from rsd_trt.config import ControlConfig, Mode, Quantiles, RsdConfig
from rsd_trt.eval.results import ActionStatistics, BundleSettings, Episode, QueryRecord, Results, Settings, Throughput
from rsd_trt.eval.summary import summarise
from rsd_trt.records import to_json
from rsd_trt.runtime.chunk import Gap
from rsd_trt.runtime.speculate import Route

TASKS = (
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "pick up the black bowl next to the ramekin and place it on the plate",
    "pick up the black bowl from table center and place it on the plate",
    "pick up the black bowl on the cookie box and place it on the plate",
    "pick up the black bowl in the top drawer of the wooden cabinet and place it on the plate",
    "pick up the black bowl on the ramekin and place it on the plate",
    "pick up the black bowl next to the cookie box and place it on the plate",
    "pick up the black bowl on the stove and place it on the plate",
    "pick up the black bowl next to the plate and place it on the plate",
    "pick up the black bowl on the wooden cabinet and place it on the plate",
)
TRAINING = Quantiles(
    q01=(-0.75, -0.65, -0.94, -0.11, -0.2, -0.18, -1.0),
    q99=(0.94, 0.86, 0.94, 0.13, 0.17, 0.17, 1.0),
    mask=(True,) * 6 + (False,),
)
N_ACTION_STEPS = 4
OF_BUNDLE = set(BundleSettings.__struct_fields__)


def settings(mode: Mode = "rsd", **changes: object) -> Settings:
    """The settings of a run of 3 tasks with 4 trials, but for `changes`, of the run's or the bundle's."""
    of_bundle = {name: changes.pop(name) for name in OF_BUNDLE & changes.keys()}
    base = Settings(
        policy="made-up",
        policy_sha256="3f2a" * 16,
        bundle=BundleSettings(
            mode=mode,
            backend="ort",
            precision="fp32",
            backbone="graph",
            exports_sha256={"propose": "a1" * 32, "predict": "b2" * 32},
            trained=True,
            draft="vision",
            levels=7,
            rsd=RsdConfig(rule="first"),
            training_actions=TRAINING,
            accept_rate=0.7 if mode == "random" else None,
        ),
        suite="libero_spatial",
        tasks=(0, 1, 2),
        trials=4,
        timing="single",
        device="cuda",
        protocol="oft",
        max_steps=220,
        n_action_steps=N_ACTION_STEPS,
        seed=7,
        perturb=None,
        control=ControlConfig(),
        hardware={"cpu": "made-up processor", "cores": 16, "gpu": "made-up GPU"},
        versions={"python": "3.11.7", "torch": "2.13.0", "rsd-trt": "0.1.0"},
    )
    base = structs.replace(base, bundle=structs.replace(base.of_bundle, **of_bundle))  # type: ignore[arg-type]
    return structs.replace(base, **changes)  # type: ignore[arg-type]


def run(
    mode: Mode = "rsd",
    success: float = 0.9,
    acceptance: float = 0.7,
    full_ms: float = 20.0,
    draft_ms: float = 7.0,
    broken: tuple[tuple[int, int], ...] = (),
    throughput: Throughput | None = None,
    change: Callable[[Episode], Episode] = lambda episode: episode,
    codec_mse: float = 1e-7,
    action_scale: float = 1.0,
    **changes: object,
) -> Results:
    """A run whose episodes are drawn from generators of their own, so that runs are paired: the same (task, trial) is
    as hard in each. `broken`: the keys of the episodes that end in an error. `change`: what to do to each episode."""
    chosen = settings(mode, **changes)
    episodes = []
    for task in chosen.tasks:
        for trial in range(chosen.trials):
            made = _episode(chosen, task, trial, success, acceptance, (full_ms, draft_ms), action_scale)
            if (task, trial) in broken:
                made = structs.replace(made, success=False, error="RuntimeError: the GL context is lost")
            episodes.append(structs.replace(change(made), run=chosen.run))
    tasks = {task: TASKS[task % len(TASKS)] for task in chosen.tasks}
    command = f"rsd-trt eval bundles/made-up --mode {mode} --trials {chosen.trials}"
    return summarise(chosen, episodes, tasks, codec_mse, command, throughput)


def outcome(*succeeded: tuple[int, int]) -> Callable[[Episode], Episode]:
    """A `change` after which these episodes succeed and all others fail."""
    return lambda episode: structs.replace(episode, success=episode.key in succeeded)


def write(path: Path, results: Results) -> Path:
    """A results file."""
    path.write_text(json.dumps(to_json(results)))
    return path


def profile(path: Path, check: float, full: float, **changes: object) -> Path:
    """A profile of the made-up bundle, in what a report reads of it."""
    row = {"backend": "ort", "backbone": "graph", "backbone_precision": "bundle"}
    costs = [{**row, "what": what, "ms": {"p50": ms, "n": 100}} for what, ms in (("check", check), ("full", full))]
    chosen = settings()
    data = {"bundle": chosen.policy, "bundle_sha256": chosen.policy_sha256, "hardware": chosen.hardware}
    path.write_text(json.dumps({**data, "costs": costs, "rows": []} | changes))
    return path


def throughput(workers: int, per_second: float) -> Throughput:
    """Of a run on `workers` processes."""
    share = min(0.95, 0.05 * workers)
    return Throughput(
        workers=workers,
        wall_seconds=500 / per_second,
        episodes_per_second=per_second,
        policy_share=share,
        rows_per_forward=max(1.0, workers / 3),
        bound="policy" if share > 0.5 else "simulator",
        gpu_utilisation=share * 0.9,
    )


def _episode(
    settings: Settings,
    task: int,
    trial: int,
    success: float,
    acceptance: float,
    costs: tuple[float, float],
    action_scale: float,
) -> Episode:
    hard = np.random.default_rng([task, trial]).random() + 0.04 * (task % 5 - 2)
    own = np.random.default_rng([task, trial, len(settings.label)])
    succeeded = bool(hard + own.normal(0, 0.02) < success)
    steps = int(own.integers(70, 160)) if succeeded else settings.max_steps
    queries: list[QueryRecord] = []
    step = 0
    while step < steps:
        query = _query(settings, step, own, acceptance * (1.1 - 0.3 * step / steps), costs)
        queries.append(query)
        step += query.committed
    return Episode(
        task_id=task,
        trial=trial,
        success=succeeded,
        steps=steps,
        seconds=steps * 0.03,
        queries=tuple(queries),
        actions=_actions(own, steps, action_scale),
    )


def _query(
    settings: Settings, step: int, random: np.random.Generator, acceptance: float, costs: tuple[float, float]
) -> QueryRecord:
    full_ms, draft_ms = (cost * random.gamma(400, 1 / 400) for cost in costs)
    most = settings.n_action_steps
    if settings.mode == "baseline":
        return QueryRecord(step, "full", most, full_ms, checked=False, full_query=True)
    if step == 0:
        return QueryRecord(step, "start", most, full_ms, checked=False, full_query=True)
    draw = random.random()
    route: Route = "accepted" if draw < acceptance else "partial" if draw < acceptance + 0.12 else "rejected"
    prefix = {"accepted": most, "partial": int(random.integers(1, max(2, most))), "rejected": 0}[route]
    agreement = tuple(float(x) for x in random.binomial(112, (0.86, 0.55, 0.21)) / 112)
    if settings.mode == "shadow":
        draft, main = _gap(random, 0.035), _gap(random, 0.025)
        return QueryRecord(
            step,
            route,
            most,
            full_ms + draft_ms,
            checked=True,
            full_query=True,
            prefix=prefix,
            score=round(max(x / 0.1 for x in draft[0][:6]), 5),
            token_agreement=agreement,
            draft_gap=draft,
            main_gap=main,
        )
    if route == "rejected":
        ms = full_ms + draft_ms
        return QueryRecord(step, route, most, ms, True, True, prefix=0, token_agreement=agreement)
    return QueryRecord(step, route, prefix, draft_ms, checked=True, full_query=False, prefix=prefix)


def _gap(random: np.random.Generator, spread: float, left: int = 6) -> Gap:
    growth = 1 + 0.4 * np.arange(left)[:, None]
    arm = np.abs(random.normal(0, spread, (left, 6))) * growth * (1.5, 1.2, 2.2, 0.5, 0.7, 1.0)
    gripper = random.random((left, 1)) < 0.02
    return tuple(tuple(round(float(x), 4) for x in step) for step in np.hstack([arm, gripper]))


def _actions(random: np.random.Generator, steps: int, scale: float) -> ActionStatistics:
    low, high = np.array(TRAINING.q01[:6]), np.array(TRAINING.q99[:6])
    arm = random.normal((low + high) / 2, (high - low) / 4.7, (steps, 6)) * scale
    gripper = np.where((np.arange(steps) > steps * 0.3) & (np.arange(steps) < steps * 0.95), 1.0, -1.0)[:, None]
    return ActionStatistics.of(np.hstack([arm, gripper]).astype(np.float32))
