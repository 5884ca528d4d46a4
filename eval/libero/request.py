"""What to evaluate, and what acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import DEFAULT_ENGINES, BackboneKind, BackbonePrecision, Mode, PolicyKind, Precision

if TYPE_CHECKING:
    from rsd_trt.eval.libero.simulator import Simulator


@dataclass(frozen=True)
class Scripted:
    """A policy that is a function of the scene. It acts inside the simulators' processes, and sees no images."""

    kind: PolicyKind
    suite: str  # the one that it is written for
    act: Callable[[Simulator], NDArray[np.float32]]  # the next actions [n, A]; a picklable function
    sha256: str  # of what decides its actions


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate. None: the policy's own, or for `tasks` all of the suite's."""

    policy: Path | Scripted  # a bundle's folder, or what acts in its place: then only what is not of a bundle counts
    suite: str = "libero_spatial"
    tasks: tuple[int, ...] | None = None
    trials: int = 50
    mode: Mode = "rsd"
    backend: str = "torch"
    device: str = "auto"
    n_action_steps: int | None = None
    tolerance: float | None = None  # of every arm dimension, environment units; `rsd` and `shadow` only
    accept_rate: float | Path | None = None  # `random` only: of its coin, or an `rsd` run's results file that has it
    protocol: str | None = None
    max_steps: int | None = None
    seed: int = 7
    perturb: int | None = None  # seed of the displacements of the target; None: there are none
    out: Path = Path("results")
    fresh: bool = False
    video: bool = False
    precision: Precision = "fp32"
    engines: Path = DEFAULT_ENGINES
    backbone: BackboneKind | None = None  # None: what suits the backend
    backbone_precision: BackbonePrecision = "bundle"
    record_hidden: Path | None = None  # `shadow` only
    workers: int = 1  # simulator processes; with one, each query is answered alone
    timeout: float = 300.0  # s of a simulator's silence after which its process is replaced

    @property
    def name(self) -> str:
        """What the names of the run's files start with."""
        return f"{self.suite}_{self.policy.kind if isinstance(self.policy, Scripted) else self.mode}"

    @property
    def results_file(self) -> Path:
        return self.out / f"{self.name}_results.json"

    def pictures(self, kind: str) -> Path:
        """The run's folder for `failures` or `videos`."""
        return self.out / kind / self.name
