"""From a bundle, or recordings, to a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsd_trt.bundle import Bundle
from rsd_trt.config import DEFAULT_BUNDLE, DEFAULT_ENGINES, BackboneKind, BackbonePrecision, Backend, Mode, Precision
from rsd_trt.errors import UserError
from rsd_trt.recorder import Recorder
from rsd_trt.recordings import Facts, Recordings, main_fingerprint
from rsd_trt.runtime.serve.interface import Frames, Interface
from rsd_trt.runtime.serve.service import ServeOptions, Service
from rsd_trt.runtime.serve.worker import Answering

MOST_SHARED = 16  # queries that share a forward on a GPU


@dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """The bundle that is served, and how it runs; or `replay`, recordings in its place. None: the bundle's own, or what
    suits the backend."""

    bundle: Path = DEFAULT_BUNDLE
    replay: Path | None = None
    mode: Mode = "rsd"
    backend: Backend = "torch"
    device: str = "auto"
    n_action_steps: int | None = None
    precision: Precision = "fp32"
    engines: Path = DEFAULT_ENGINES
    backbone: BackboneKind | None = None
    backbone_precision: BackbonePrecision = "bundle"
    frames: Frames = "upright"
    resize: bool = False


def open_service(served: ServedPolicy, options: ServeOptions) -> Service:
    """A service whose policy is loaded when it starts.

    Raises:
        UserError: what can be known before that: no bundle, an unknown mode, a folder that cannot be written.
    """
    if served.replay is not None:
        return _replaying(Recordings(served.replay), served, options)
    bundle = Bundle.open(served.bundle)
    config = bundle.config
    n = served.n_action_steps or config.rsd.n_action_steps
    if not 0 < n <= config.dims.T:
        raise UserError(f"--n-action-steps is {n}; a chunk of {config.name} has 1..{config.dims.T} steps")
    propose = bundle.component_fingerprint("propose") if bundle.has("draft") else None
    interface = Interface.of(
        config,
        served.mode,
        n,
        bundle.fingerprint,
        propose,
        main=main_fingerprint(bundle),
        frames=served.frames,
        resize=served.resize,
    )

    def load() -> Answering:
        from rsd_trt.load import fit_threads
        from rsd_trt.runtime.backends import check_device
        from rsd_trt.runtime.policy import Policy

        device = check_device(served.device)
        if device.type == "cpu":
            fit_threads(1)  # a core is left for the network
        return Policy.load(
            bundle,
            served.mode,
            served.backend,
            str(device),
            n,
            batch=min(options.sessions, MOST_SHARED) if device.type == "cuda" else 1,  # the CPU gains nothing
            precision=served.precision,
            engines=served.engines,
            backbone=served.backbone,
            backbone_precision=served.backbone_precision,
        )

    recorder = None if options.record is None else Recorder(options.record, Facts.of(bundle))
    return Service(interface, load, options, recorder)


def _replaying(recordings: Recordings, served: ServedPolicy, options: ServeOptions) -> Service:
    from rsd_trt.runtime.serve.replay import Replay, replay_interface

    n = served.n_action_steps or min(4, recordings.facts.chunk)
    replay = Replay(recordings, n)
    return Service(replay_interface(recordings, n), lambda: replay, options)
