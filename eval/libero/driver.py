"""What acts in a run, and what the run's settings say of it: a bundle's policy, which the simulators' processes ask,
or a script, which runs inside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import ControlConfig, VisionDraftConfig, protocol_name, with_protocol
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.request import EvalRequest, Script, with_options
from rsd_trt.eval.read import read_run
from rsd_trt.eval.results import BundleSettings, Results, Settings
from rsd_trt.load import fit_threads
from rsd_trt.runtime.backends import check_device, default_backbone
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.speculate import Checks, RandomAcceptance
from rsd_trt.suites import base_of


@dataclass(frozen=True)
class Driver:
    """Either `policy` or `script` is there."""

    settings: Settings
    policy: Policy | None = None
    batch: int = 1  # queries that share a forward at the most
    script: Script | None = None
    codec_round_trip_mse: float | None = None


def bundle_driver(request: EvalRequest, bundle: Bundle, tasks: tuple[int, ...], loaded: Policy | None = None) -> Driver:
    """The bundle's policy, on the parts of one that is `loaded`, if it is given.

    Raises:
        UserError: it cannot be loaded, or cannot act in that way or on that device.
    """
    config = bundle.config
    control = control_of(request, config.control)
    steps = max_steps(request, control)
    device = check_device(request.device)
    accept_rate = _accept_rate(request, bundle)
    rsd = with_options(config.rsd, request)
    bundle = dataclasses.replace(bundle, config=replace(config, control=control, rsd=rsd))
    batch = request.workers if device.type == "cuda" else 1  # the CPU gains nothing: see `rsd_trt.eval.libero.pool`
    backbone = request.backbone or default_backbone(request.backend, device)
    rule = None if accept_rate is None else RandomAcceptance(accept_rate, request.seed)
    if device.type == "cpu":
        fit_threads(request.workers)
    if loaded is not None:
        policy = loaded.beside(bundle.config, request.mode, rule)
    else:
        policy = Policy.load(
            bundle,
            request.mode,
            request.backend,
            str(device),
            environments=request.workers,
            batch=batch,
            precision=request.precision,
            engines=request.engines,
            backbone=backbone,
            backbone_precision=request.backbone_precision,
            rule=rule,
        )
    of_bundle = BundleSettings(
        mode=request.mode,
        backend=request.backend,
        precision=request.precision,
        backbone=backbone,
        exports_sha256=policy.exports,
        trained=config.trained,
        draft="vision" if isinstance(config.draft, VisionDraftConfig) else "hidden",
        levels=config.dims.K,
        rsd=rsd,
        training_actions=config.training_actions,
        backbone_precision=request.backbone_precision,
        accept_rate=accept_rate,
    )
    settings = _settings(
        request,
        tasks,
        control,
        steps,
        config.name,
        bundle.fingerprint,
        of_bundle,
        str(device),
        policy.n_action_steps,
    )
    mse = bundle.codec().round_trip_error() if bundle.has("codec") else None
    return Driver(settings, policy, batch, codec_round_trip_mse=mse)


def model_key(request: EvalRequest) -> tuple[object, ...]:
    """What the loaded model of a request's bundle depends on."""
    return (
        *(request.bundle, request.backend, request.device, request.precision, request.engines),
        *(request.backbone, request.backbone_precision, request.protocol, request.workers),
    )


def group_key(request: EvalRequest) -> tuple[object, ...]:
    """What requests have in common that are executed together: a model, simulators, and a seed."""
    return (*model_key(request), request.policy, request.suite, request.seed, request.timeout)


def script_control(request: EvalRequest) -> ControlConfig:
    """That of a script."""
    return with_protocol(ControlConfig(), request.protocol or "oft")


def script_driver(request: EvalRequest, script: Script, tasks: tuple[int, ...]) -> Driver:
    """The script, under protocol `oft` if none is asked for.

    Raises:
        UserError: it is not written for that suite.
    """
    if script.suites and request.suite not in script.suites:
        raise UserError(
            f"--policy {script.name} is written for {', '.join(script.suites)}, not for {request.suite}",
            f"Use: --suite {script.suites[0]}",
        )
    control = script_control(request)
    settings = _settings(request, tasks, control, max_steps(request, control), script.name, script.sha256)
    return Driver(settings, script=script)


def _settings(
    request: EvalRequest,
    tasks: tuple[int, ...],
    control: ControlConfig,
    max_steps: int,
    policy: str,
    sha256: str,
    bundle: BundleSettings | None = None,
    device: str = "cpu",
    n_action_steps: int = 1,
) -> Settings:
    return Settings(
        policy=policy,
        policy_sha256=sha256,
        bundle=bundle,
        suite=request.suite,
        tasks=tasks,
        trials=request.trials,
        timing="single" if request.workers == 1 else "batched",
        device=device,
        protocol=protocol_name(control),
        max_steps=max_steps,
        n_action_steps=n_action_steps,
        seed=request.seed,
        perturb=str(request.perturb) if request.perturb else None,
        control=control,
        hardware=host.hardware(device),
        versions=host.versions(),
    )


def _accept_rate(request: EvalRequest, bundle: Bundle) -> float | None:
    """How often the rule of mode `random` accepts, if need be as often as the draft did in a run of mode `rsd`.

    Raises:
        UserError: that run is of another mode, bundle or number of steps, or checked nothing.
    """
    if not isinstance(request.accept_rate, Path):
        return request.accept_rate
    path, results = request.accept_rate, read_run(request.accept_rate)
    found = results.settings
    wanted = with_options(bundle.config.rsd, request)
    if found.mode != "rsd":
        raise UserError(f"{path} is of mode {found.label}; the rate is that of a run of mode rsd")
    if found.policy_sha256 != bundle.fingerprint:
        raise UserError(f"{path} is of bundle {found.policy_sha256[:12]}, not of {bundle.fingerprint[:12]}")
    for name in ("n_action_steps", "check_steps", "refresh"):
        theirs, ours = getattr(found.of_bundle.rsd, name), getattr(wanted, name)
        if theirs != ours:
            raise UserError(f"{path} has {name} {theirs}, this run {ours}: --{name.replace('_', '-')}")
    return acceptance_rate(path, results)


def acceptance_rate(path: Path, results: Results) -> float:
    """How often the rule of a run accepted.

    Raises:
        UserError: it checked nothing.
    """
    counts = [results.routes.get(route, 0) for route in ("accepted", "partial", "rejected")]
    if (rate := Checks(*counts).acceptance_rate) is None:
        raise UserError(f"{path} has no check, and so no rate")
    return rate


def control_of(request: EvalRequest, control: ControlConfig) -> ControlConfig:
    """A bundle's conventions under the protocol that the request asks for."""
    return control if request.protocol is None else with_protocol(control, request.protocol)


def max_steps(request: EvalRequest, control: ControlConfig) -> int:
    base = base_of(request.suite) or request.suite
    steps = request.max_steps or control.max_steps.get(request.suite) or control.max_steps.get(base)
    if steps is None:
        raise UserError(f"the bundle's control.max_steps has no {base}", "Give --max-steps")
    return steps
