"""What to distil. Read by the command line: nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsd_trt.config import BackboneKind, BackbonePrecision

DraftSize = Literal["small", "large"]


@dataclass(frozen=True, kw_only=True)
class DistillRequest:
    """The options of `rsd-trt distill`. None: as suits the bundle and the device."""

    bundle: Path
    data: Path
    out: Path
    work: Path | None = None  # what is kept between two commands; None: beside `out`
    camera: tuple[str, ...] = ()  # BUNDLE'S=DATA SET'S
    state: tuple[str, ...] = ()
    turn: bool = False
    draft: DraftSize | None = None
    live: bool = False  # the main model labels every augmented batch
    minutes: float = 10.0
    steps: int | None = None  # in place of minutes
    batch: int | None = None
    lr: float = 1e-3
    seed: int = 0
    device: str = "auto"
    backbone: BackboneKind | None = None
    backbone_precision: BackbonePrecision = "bundle"
    label_batch: int = 32
    fresh: bool = False

    @property
    def folder(self) -> Path:
        """What is kept between two commands: frames, labels, checkpoints, metrics."""
        return self.work or self.out.with_name(f"{self.out.name}.distill")
