"""What came of a distillation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision, Backend, RsdConfig, VisionDraftConfig
from rsd_trt.errors import UserError, reason
from rsd_trt.eval.profile.components import ProfileRequest
from rsd_trt.eval.profile.costs import costs
from rsd_trt.eval.statistics import percentiles
from rsd_trt.records import to_json
from rsd_trt.training.codec import CodecErrors
from rsd_trt.training.measure import HeldOut

SAMPLES, WARM_UP = {"cuda": 60, "cpu": 15}, {"cuda": 10, "cpu": 2}  # of the costs
EXECUTED = (1, 2, 4)  # n, of the expected costs


@dataclass(frozen=True)
class Cost:
    """ms of a check and of a full query on this machine (medians), or why they are not known."""

    check: float | None = None
    full: float | None = None
    backend: str = ""
    reason: str | None = None

    def expected(self, acceptance: float, steps: int) -> dict[int, float]:
        """By n, the cost of an action in full queries if checks are accepted with that probability, each independently:
        (1 + f S / a) / (n (1 + S)), S = a + a^2 + ... + a^(T / n - 1), f = check / full. Open loop costs 1 / n."""
        if self.check is None or self.full is None:
            return {}
        found = {}
        for n in (n for n in EXECUTED if n <= steps):
            checks = sum(acceptance**i for i in range(steps // n - 1))
            accepted = acceptance * checks
            found[n] = (1 + self.check / self.full * checks) / (n * (1 + accepted))
        return found


@dataclass(frozen=True)
class Distilled:
    """What came of a distillation."""

    bundle: Path
    folder: Path  # with report, metrics and picture
    curve: Path | None
    episodes: int
    frames: int
    unlabelled: int  # queries of recordings that asked no main head
    label_rate: float | None  # frames/s that the main model labelled; None for recordings
    draft: VisionDraftConfig
    parameters: int
    steps: int
    seconds: float
    samples_per_second: float | None
    gpu_busy: float | None  # share of the training phase
    held_out: HeldOut
    rsd: RsdConfig
    codec: CodecErrors
    new_codec: bool
    cost: Cost
    device: str

    def to_json(self) -> dict[str, object]:
        """For programs, and for report.json."""
        found = asdict(self) | {"bundle": str(self.bundle), "folder": str(self.folder), "draft": to_json(self.draft)}
        found["rsd"] = to_json(self.rsd)
        found["curve"] = None if self.curve is None else str(self.curve)
        chance = self.held_out.shown[0]
        found["expected_cost_per_action"] = self.cost.expected(chance, len(self.held_out.by_step))
        return json.loads(json.dumps(found))


def measured_cost(
    bundle: Bundle, device: torch.device, backbone: BackboneKind | None, precision: BackbonePrecision
) -> Cost:
    """The two costs of a bundle on this machine, or why there are none: the bundle is there, and stays."""
    backend: Backend = "graph" if device.type == "cuda" else "torch"
    request = ProfileRequest(
        backends=(backend,),
        batches=(1,),
        device=device,
        precision="fp32",
        engines=Path(),
        samples=SAMPLES[device.type],
        warm_up=WARM_UP[device.type],
        backbone=backbone,
        backbone_precision=precision,
    )
    try:
        rows = list(costs(bundle, request))
    except UserError as error:
        return Cost(reason=str(error))
    except RuntimeError as error:  # of a GPU, such as one whose memory is full
        return Cost(reason=reason(error))
    ms = {row.what: percentiles(row.ms) for row in rows}
    check, full = (None if (found := ms.get(what)) is None else found["p50"] for what in ("check", "full"))
    return Cost(check, full, backend, next((row.reason for row in rows if row.reason), None))
