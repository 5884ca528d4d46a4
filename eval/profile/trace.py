"""A Chrome trace of single queries: what the host and the device do when. Open it in https://ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision, Precision
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.shapes import Shape, make_scene
from rsd_trt.files import replacing
from rsd_trt.runtime.backends import Launcher, open_forward
from rsd_trt.runtime.scripted import Decision, ScriptedPolicy

WARM_UP = 3  # of each query
TRACED = {"accepted query": Decision("accepted", 1), "rejected query": Decision("rejected", 1)}


def write_trace(
    bundle: Bundle,
    device: torch.device,
    backbone: tuple[BackboneKind, BackbonePrecision],
    precision: Precision,
    shape: Shape,
    path: Path,
) -> None:
    """Records an accepted and a rejected (full) query, after others of their kind. Not while anything is timed: the
    profiler slows what it records.

    Raises:
        UserError: the backbone cannot run like that here, or `path` cannot be written.
    """
    scene = make_scene(bundle, shape)
    kind, number = backbone
    launcher = Launcher(scene.bundle, "torch" if kind == "eager" else "graph", device, precision)
    policy = ScriptedPolicy(scene.bundle.config, open_forward(launcher, "1", kind, number), "rsd", 1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    first, second = scene.observations[:2]
    for _ in range(WARM_UP):
        policy.reset()
        for decision in (Decision("start", 1), *TRACED.values()):
            policy.follow(decision, first)
    policy.follow(Decision("start", 1), first)
    with profile(activities=activities) as found:
        for name, decision in TRACED.items():
            with record_function(name):
                policy.follow(decision, second)
    try:
        with replacing(path) as temporary:
            found.export_chrome_trace(str(temporary))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
