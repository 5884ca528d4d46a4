"""What to evaluate, and what acts. Read by the command line: nothing heavy is imported here."""

from __future__ import annotations

import hashlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from msgspec.structs import replace

from rsd_trt.config import (
    ACTION_DIMS,
    ARM_DIMS,
    DEFAULT_BUNDLE,
    DEFAULT_ENGINES,
    DEFAULT_RESULTS,
    RECORD_GB,
    RECORD_SIZE,
    BackboneKind,
    BackbonePrecision,
    Backend,
    Mode,
    Precision,
    RsdConfig,
    RuleName,
)
from rsd_trt.errors import UserError, did_you_mean, reason, shown
from rsd_trt.suites import SUITES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rsd_trt.eval.libero.perturb import PerturbSpec
    from rsd_trt.eval.libero.simulator import Simulator

MAX_TASK = 999  # more than any suite has; keeps a slip of the keyboard from filling the memory


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The bundle that acts, and how. None: the bundle's own, or what suits the backend."""

    bundle: Path = DEFAULT_BUNDLE
    mode: Mode = "rsd"
    backend: Backend = "torch"
    device: str = "auto"
    n_action_steps: int | None = None
    check_steps: int | None = None
    rule: RuleName | None = None
    tolerance: float | None = None  # of every arm dimension, environment units
    threshold: float | None = None  # of the rule likelihood, as `sure`
    sure: float | None = None
    refresh: int | None = None
    accept_rate: float | Path | None = None  # `random` only: how often it accepts, or an `rsd` run's results file
    precision: Precision = "fp32"
    engines: Path = DEFAULT_ENGINES
    backbone: BackboneKind | None = None
    backbone_precision: BackbonePrecision = "bundle"
    record_hidden: Path | None = None  # `shadow` only
    record: Path | None = None  # folder for what queries see and say
    record_size: int = RECORD_SIZE  # pixels a side of recorded frames
    record_limit: float = RECORD_GB


@dataclass(frozen=True, kw_only=True)
class EvalRequest(PolicyOptions):
    """The options of `rsd-trt eval`. None: the policy's own, or for `tasks` all of the suite's."""

    policy: str | None = None  # MODULE:FUNCTION that acts; the options of a bundle do not count then
    suite: str = SUITES[0]
    tasks: tuple[int, ...] | None = None
    trials: int = 50
    protocol: str | None = None
    max_steps: int | None = None
    seed: int = 7
    perturb: PerturbSpec | None = None
    out: Path = DEFAULT_RESULTS
    workers: int = 1  # simulator processes; with one, each query is answered alone
    timeout: float = 300.0  # s of a simulator's silence after which its process is replaced
    fresh: bool = False
    video: bool = False

    @property
    def name(self) -> str:
        """What the names of the run's files start with: `libero_spatial_rsd`, or `libero_spatial_scripted.act`."""
        acting = self.mode if self.policy is None else self.policy.rpartition(".")[2].replace(":", ".")
        return f"{self.suite}_{acting}"

    @property
    def results_file(self) -> Path:
        return self.out / f"{self.name}_results.json"

    def pictures(self, kind: str) -> Path:
        """The run's folder for `strips` or `videos`."""
        return self.out / kind / self.name


def with_options(rsd: RsdConfig, request: PolicyOptions) -> RsdConfig:
    """`rsd` with what the request says otherwise and its mode has an effect of."""
    given: dict[str, object] = {"n_action_steps": request.n_action_steps}
    if request.mode != "baseline":
        given |= {"check_steps": request.check_steps, "refresh": request.refresh}
    if request.mode in ("rsd", "shadow"):
        given |= {"rule": request.rule, "threshold": request.threshold, "sure": request.sure}
        given["tolerance"] = None if request.tolerance is None else (request.tolerance,) * ARM_DIMS
    return replace(rsd, **{name: value for name, value in given.items() if value is not None})


def task_numbers(text: str) -> tuple[int, ...] | None:
    """`0,3` or `0-4` or `all` -> task numbers, without repeats, in order; None: all.

    Raises:
        UserError: it names no task.
    """
    if text == "all":
        return None
    tasks: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            tasks.update(range(int(first), min(int(last or first), MAX_TASK) + 1))
    except ValueError:
        raise UserError(f"{shown(text)} is not a list such as 0,3 or 0-4 or all") from None
    if not tasks:
        raise UserError(f"{shown(text)} names no task")
    return tuple(sorted(tasks))


@dataclass(frozen=True)
class Script:
    """A function of a user's module in the place of a policy: `act(simulator) -> the next actions [n, A]`.

    It runs inside the simulators' processes, where it is imported anew, and sees no images.
    """

    name: str  # MODULE:FUNCTION
    sha256: str  # of the module's source
    suites: tuple[str, ...] = ()  # that it is written for, by the module's SUITE or SUITES; none: for any

    @classmethod
    def find(cls, name: str) -> Script:
        """The function of that name; modules are looked for in the current folder, too.

        Raises:
            UserError: there is no such module or function, or it cannot be imported or called.
        """
        module_name, _, function = name.partition(":")
        module = _imported(name, module_name)
        if not hasattr(module, function):
            there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise UserError(f"--policy {name}: {module_name} has no {function}{did_you_mean(function, there)}")
        if not callable(getattr(module, function)):
            raise UserError(f"--policy {name}: {function} is {type(getattr(module, function)).__name__}, no function")
        if module.__file__ is None:
            raise UserError(f"--policy {name}: {module_name} is a folder, no module")
        suites: str | tuple[str, ...] = getattr(module, "SUITES", getattr(module, "SUITE", ()))
        source = Path(module.__file__).read_bytes()
        return cls(name, hashlib.sha256(source).hexdigest(), (suites,) if isinstance(suites, str) else tuple(suites))

    def __call__(self, simulator: Simulator) -> NDArray[np.float32]:
        """The next actions [n, A] in the simulator's scene.

        Raises:
            UserError: what the function gives cannot be executed.
        """
        import numpy as np

        module_name, _, function = self.name.partition(":")
        actions = np.asarray(getattr(importlib.import_module(module_name), function)(simulator), np.float32)
        if actions.ndim != 2 or not len(actions) or actions.shape[1] != ACTION_DIMS or not np.isfinite(actions).all():
            raise UserError(
                f"--policy {self.name} gave actions {list(actions.shape)}, not finite ones [n, {ACTION_DIMS}]"
            )
        return actions


def _imported(name: str, module: str) -> ModuleType:
    """The module, imported.

    Raises:
        UserError: there is none, or it breaks.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # the simulators' processes get the same path
    try:
        return importlib.import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise UserError(
                f"--policy {name}: there is no module {missing} in {here}, nor among the packages"
            ) from None
        raise UserError(f"--policy {name} cannot be imported: {type(error).__name__}: {reason(error)}") from None
