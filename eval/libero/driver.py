"""What acts in a run: a bundle's policy, which the simulators' processes ask, or a script, which runs inside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, ControlConfig, Dims, RsdConfig, protocol_name, with_protocol
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.request import EvalRequest, Scripted
from rsd_trt.eval.read import read_run
from rsd_trt.eval.results import Settings
from rsd_trt.runtime.backends import check_backend, default_backbone
from rsd_trt.runtime.policy import Policy, check_device
from rsd_trt.runtime.speculate import Coin, acceptance_rate

if TYPE_CHECKING:
    from rsd_trt.eval.libero.simulator import Simulator

NONE = "none"  # what a script's settings say where a bundle's name a backend


@dataclass(frozen=True)
class Driver:
    """What acts, and what a run's settings say of it. Either `policy` or `script` is there."""

    settings: Settings
    policy: Policy | None = None
    rows: int = 1  # queries that share a forward at the most
    script: Callable[[Simulator], NDArray[np.float32]] | None = None
    codec_round_trip_mse: float | None = None


def bundle_driver(request: EvalRequest, bundle: Bundle, tasks: tuple[int, ...]) -> Driver:
    """The bundle's policy, loaded.

    Raises:
        UserError: it cannot be loaded, or cannot act in that way or on that device.
    """
    config = bundle.config
    control = config.control if request.protocol is None else with_protocol(config.control, request.protocol)
    max_steps = _max_steps(request, control)
    device = check_device(request.device)
    accept_rate = _accept_rate(request, bundle)
    rsd = _with_tolerance(config.rsd, request.tolerance)
    bundle = dataclasses.replace(bundle, config=dataclasses.replace(config, control=control, rsd=rsd))
    rows = request.workers if device.type == "cuda" else 1  # the CPU gains nothing: see `rsd_trt.eval.libero.pool`
    backbone = request.backbone or default_backbone(check_backend(request.backend), device)
    policy = Policy.load(
        bundle,
        request.mode,
        request.backend,
        str(device),
        request.n_action_steps,
        slots=request.workers,
        rows=rows,
        precision=request.precision,
        engines=request.engines,
        backbone=backbone,
        backbone_precision=request.backbone_precision,
        coin=None if accept_rate is None else Coin(accept_rate, request.seed),
    )
    settings = Settings(
        suite=request.suite,
        tasks=tasks,
        trials=request.trials,
        mode=request.mode,
        timing="single" if request.workers == 1 else "batched",
        backend=request.backend,
        precision=request.precision,
        backbone=backbone,
        device=str(device),
        protocol=protocol_name(control),
        max_steps=max_steps,
        n_action_steps=policy.n_action_steps,
        seed=request.seed,
        bundle=config.name,
        bundle_sha256=bundle.fingerprint,
        exports_sha256=policy.exports,
        trained=config.trained,
        backbone_blocks=config.backbone.language.blocks,
        levels=config.dims.K,
        rsd=rsd,
        control=control,
        training_actions=config.training_actions,
        hardware=dict(host.hardware(str(device))),
        versions=host.versions(),
        perturb=request.perturb,
        backbone_precision=request.backbone_precision,
        accept_rate=accept_rate,
    )
    return Driver(settings, policy, rows, codec_round_trip_mse=bundle.codec().round_trip_error())


def scripted_driver(request: EvalRequest, script: Scripted, tasks: tuple[int, ...]) -> Driver:
    """The script, under protocol `oft` if none is asked for.

    Raises:
        UserError: it is not for that suite.
    """
    if request.suite != script.suite:
        raise UserError(f"--policy {script.kind} knows {script.suite} only, not {request.suite}")
    control = with_protocol(ControlConfig(), request.protocol or "oft")
    settings = Settings(
        suite=request.suite,
        tasks=tasks,
        trials=request.trials,
        mode="baseline",
        timing="single" if request.workers == 1 else "batched",
        backend=NONE,
        precision=NONE,
        backbone=NONE,
        device="cpu",
        protocol=protocol_name(control),
        max_steps=_max_steps(request, control),
        n_action_steps=1,
        seed=request.seed,
        bundle=script.kind,
        bundle_sha256=script.sha256,
        exports_sha256={},
        trained=True,
        backbone_blocks=0,
        levels=Dims().K,
        rsd=RsdConfig(draft_block=0, n_action_steps=1),
        control=control,
        training_actions=None,
        hardware=dict(host.hardware("cpu")),
        versions=host.versions(),
        policy=script.kind,
        perturb=request.perturb,
    )
    return Driver(settings, script=script.act)


def _accept_rate(request: EvalRequest, bundle: Bundle) -> float | None:
    """How often the coin of mode `random` accepts, if need be as often as the draft did in a run of mode `rsd`.

    Raises:
        UserError: that run is of another mode, bundle or n_action_steps, or tested no live plan.
    """
    if not isinstance(request.accept_rate, Path):
        return request.accept_rate
    path, results = request.accept_rate, read_run(request.accept_rate)
    found = results.settings
    wanted = request.n_action_steps or bundle.config.rsd.n_action_steps
    if found.mode != "rsd":
        raise UserError(f"{path} is of mode {found.mode}; the rate is that of a run of mode rsd")
    if found.bundle_sha256 != bundle.fingerprint:
        raise UserError(f"{path} is of bundle {found.bundle_sha256[:12]}, not of {bundle.fingerprint[:12]}")
    if found.n_action_steps != wanted:
        raise UserError(f"{path} has n_action_steps {found.n_action_steps}, this run {wanted}: --n-action-steps")
    counts = [results.routes.get(route, 0) for route in ("accepted", "partial", "rejected")]
    if (rate := acceptance_rate(*counts)) is None:
        raise UserError(f"{path} has no query that tested a live plan, and so no rate")
    return rate


def _with_tolerance(rsd: RsdConfig, tolerance: float | None) -> RsdConfig:
    """`rsd` with that tolerance in every arm dimension; with its own for None.

    Raises:
        UserError: its rule compares tokens.
    """
    if tolerance is None:
        return rsd
    if rsd.rule != "actions":
        raise UserError(f"--tolerance {tolerance:g}: the bundle's rsd.rule is {rsd.rule}; only actions has a tolerance")
    return dataclasses.replace(rsd, tolerance=(tolerance,) * ARM_DIMS)


def _max_steps(request: EvalRequest, control: ControlConfig) -> int:
    max_steps = request.max_steps or control.max_steps.get(request.suite)
    if max_steps is None:
        raise UserError(f"the bundle's control.max_steps has no {request.suite}; give --max-steps")
    return max_steps
