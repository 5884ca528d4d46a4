"""What a comparison with a reference found: the differences, the limits that they keep or exceed, and a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneConfig, BackbonePrecision, Precision
from rsd_trt.eval.statistics import Interval, wilson
from rsd_trt.eval.table import Column, Measured, Table, number
from rsd_trt.manifest import Batch

Status = Literal["passed", "failed", "not measured"]
INFINITE = float("inf")


def computed_in(backbone: BackboneConfig, precision: BackbonePrecision) -> Precision:
    """What the backbone's products are computed in."""
    return backbone.precision if precision == "bundle" else precision


@dataclass(frozen=True)
class Limit:
    """What passes: the largest error of a hidden state, its smallest cosine, and which shares of a layer's tokens and
    of the chunks' steps may differ. A share is judged by the upper end of its interval: few inputs show nothing."""

    max_abs: float
    cosine: float
    tokens: float = 1.0
    steps: float = 1.0

    def exceeded(
        self, max_abs: float, cosine: float, tokens: Interval | None = None, steps: Interval | None = None
    ) -> tuple[str, ...]:
        """What does not pass, with both values. NaN passes nothing."""
        large = [] if max_abs <= self.max_abs else [f"max abs {max_abs:.2g} > {self.max_abs:g}"]
        small = [] if cosine >= self.cosine else [f"cosine {cosine:.6f} < {self.cosine:g}"]
        return (*large, *small, *differ("tokens", tokens, self.tokens), *differ("steps", steps, self.steps))


def differ(what: str, share: Interval | None, limit: float) -> list[str]:
    """What does not pass of the share of something that differs, with both values. None: there is none to differ."""
    if share is None or share[1] <= limit:
        return []
    return [f"{what} that differ: up to {number(share[1], 'rate')} > {number(limit, '%')}"]


def share_interval(share: float | None, count: int) -> Interval | None:
    """95% interval (Wilson) of a share of `count` things, taken as independent."""
    return None if share is None else wilson(round(share * count), count)


@dataclass(frozen=True)
class Subject:
    """What is compared with a reference."""

    component: str  # of the backbone: backbone, language, towers.0, towers.1 or preprocessing
    backend: str  # of the backbone: how it runs
    precision: Precision
    batch: Batch


@dataclass(frozen=True)
class NotMeasured(Subject):
    """What could not be compared, and why. `failed`: the machine could, but the export is missing or damaged."""

    reason: str
    failed: bool = False

    @property
    def status(self) -> Status:
        return "failed" if self.failed else "not measured"


@dataclass(frozen=True)
class Parity(Subject):
    """One component on one backend. Errors are of logits where there are some, else of actions."""

    inputs: int
    max_abs: float
    mean_abs: float
    p99_abs: float
    cosine: float
    token_mismatch: tuple[float, ...] | None  # share of different tokens, for each RFSQ layer
    decision_mismatch: float | None  # share of inputs whose accepted prefix differs
    action_max_abs: float | None  # environment units, all steps
    token_interval: Interval | None  # 95% (Wilson), of the layer with the most; tokens are counted as independent
    decision_interval: Interval | None  # 95% (Wilson)
    exceeded: tuple[str, ...]  # which tolerances, with both values; empty: passed

    @property
    def status(self) -> Status:
        return "failed" if self.exceeded else "passed"


@dataclass(frozen=True)
class BackboneParity(Subject):
    """One way of running the backbone, or a part of it, beside a reference. Errors are the worst of all inputs.

    Of `preprocessing`, max_abs is in levels of 8 bits.
    """

    reference: str
    inputs: int
    max_abs: float
    cosine: float
    token_mismatch: tuple[float, ...] | None = None  # share of the main head's tokens that differ, for each layer
    action_max_abs: float | None = None  # of the chunks, in environment units
    action_mean_abs: float | None = None
    steps_beyond_tolerance: float | None = None  # share of the chunks' steps that differ by more than the bundle's
    token_interval: Interval | None = None  # as of `Parity`
    steps_interval: Interval | None = None  # 95% (Wilson)
    exceeded: tuple[str, ...] = ()  # which limits, with both values; empty: passed

    @property
    def status(self) -> Status:
        return "failed" if self.exceeded else "passed"


Result = Parity | BackboneParity | NotMeasured


def to_json(result: Result) -> dict[str, object]:
    """A result as plain values, with its status."""
    return {**asdict(result), "status": result.status}


def record(bundle: Bundle, device: torch.device, command: str, **content: object) -> dict[str, object]:
    """Measurements as plain values, with all that it takes to make them again."""
    return {
        "command": command,
        "bundle": bundle.config.name,
        "bundle_sha256": bundle.fingerprint,
        "hardware": host.hardware(str(device)),
        "versions": host.versions(),
        **content,
    }


def worst(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The largest error, and the smallest cosine of two rows [n, width]; NaN if any value is none."""
    errors, cosines = [], []
    for found, expected in pairs:
        x, y = found.double(), expected.double()
        errors.append((x - y).abs().max())
        cosines.append(cosine_similarity(x, y, dim=-1).min())
    return float(torch.stack(errors).max()), float(torch.stack(cosines).min())


def parity_table(results: Sequence[Parity]) -> Table:
    """A row for each component, backend and variant."""
    columns = (
        Column("component"),
        Column("backend"),
        Column("batch", rank=3),
        Column("max abs", "error"),
        Column("p99 abs", "error", rank=2),
        Column("cosine", "cosine", rank=1),
        Column("token mismatch", "rate"),
        Column("worst layer", rank=4),
        Column("decision mismatch", "%"),
        Column("action max abs", "error"),
        Column("result", "verdict"),
    )
    rows = [
        (
            x.component,
            f"{x.backend} {x.precision}",
            x.batch,
            x.max_abs,
            x.p99_abs,
            x.cosine,
            Measured(_worst_layer(x.token_mismatch)[0], x.token_interval),
            _worst_layer(x.token_mismatch)[1],
            Measured(x.decision_mismatch, x.decision_interval),
            x.action_max_abs,
            _told(x),
        )
        for x in results
    ]
    return Table("against eager PyTorch in float32", columns, tuple(rows))


def backbone_table(results: Sequence[BackboneParity], shown: str) -> Table:
    """A row for each way of running it, or a part of it, and each reference. shown: what it was shown."""
    columns = (
        Column("what"),
        Column("batch", rank=1),
        Column("against"),
        Column("max abs", "error"),
        Column("cosine", "cosine"),
        Column("token mismatch", "rate"),
        Column("action max abs", "error", rank=5),
        Column("steps beyond tolerance", "%"),
        Column("result", "verdict"),
    )
    rows = [
        (
            f"{x.backend if x.component == 'backbone' else x.component} {x.precision}",
            x.batch,
            x.reference,
            x.max_abs,
            x.cosine,
            Measured(_worst_layer(x.token_mismatch)[0], x.token_interval),
            x.action_max_abs,
            Measured(x.steps_beyond_tolerance, x.steps_interval),
            _told(x),
        )
        for x in results
    ]
    note = f"{shown}; worst of all inputs and layers; of the whole backbone: after the last block and the final norm"
    return Table("the backbone beside its references", columns, tuple(rows), note)


def _worst_layer(mismatch: tuple[float, ...] | None) -> tuple[float | None, str | None]:
    """The largest token mismatch rate, and the layer that has it."""
    if mismatch is None:
        return None, None
    rate = max(mismatch)
    return rate, f"L{mismatch.index(rate)}" if rate else None


def _told(result: Parity | BackboneParity) -> str:
    return f"FAILED: {'; '.join(result.exceeded)}" if result.exceeded else "passed"
