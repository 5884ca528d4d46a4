"""The two costs of a bundle on each backend: of a check, and of a full query. What a run costs follows from its counts.

The timing boundary: uint8 frames in the host's memory, actions there, batch 1, warm, the clock read after a
synchronisation on both sides.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision, Backend, Precision
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.components import ProfileRequest
from rsd_trt.eval.profile.inputs import InputSize, make_inputs
from rsd_trt.eval.profile.queries import KINDS, QueryKind, time_queries
from rsd_trt.eval.statistics import percentiles
from rsd_trt.runtime.backends import Launcher, default_backbone, open_forward


@dataclass(frozen=True)
class Cost:
    """One kind of query on one backend."""

    what: QueryKind
    backend: Backend
    precision: Precision  # of draft and head
    backbone: BackboneKind
    backbone_precision: BackbonePrecision
    ms: tuple[float, ...] = ()  # raw samples, in order
    reason: str | None = None  # why there are no samples

    def summary(self) -> dict[str, object]:
        """The row without its raw samples."""
        return {**asdict(self), "ms": percentiles(self.ms)}


def cost_boundary(request: ProfileRequest) -> str:
    """How a query is timed."""
    paused = f", {request.pause:g} ms of pause before each" if request.pause else ""
    return f"batch 1, on the host's clock, from uint8 frames in the host's memory to actions there{paused}"


def costs(bundle: Bundle, request: ProfileRequest) -> Iterator[Cost]:
    """Both kinds on every backend. What cannot run here has rows that say why, and so has a check without a draft."""
    given = make_inputs(bundle, InputSize())
    for backend in request.backends:
        kind = request.backbone or default_backbone(backend, request.device)
        how = (backend, request.precision, kind, request.backbone_precision)
        launcher = Launcher(bundle, backend, request.device, request.precision, request.engines)
        try:
            forward = open_forward(launcher, "1", kind, request.backbone_precision)
        except UserError as error:
            yield from (Cost(what, *how, reason=str(error)) for what in KINDS)
            continue
        kinds = KINDS if bundle.has("draft") else KINDS[1:]
        found = time_queries(forward, given, request.samples, request.warm_up, kinds, request.pause)
        del forward
        release(request.device, backend, kind)
        for what in KINDS:
            reason = None if what in found else f"{bundle.path} has no draft"
            yield Cost(what, *how, ms=found.get(what, ()), reason=reason)


def release(device: torch.device, *ways: Backend | BackboneKind) -> None:
    """Gives the device's memory back, and forgets what was compiled. ways: that were run."""
    if "compiled" in ways:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
