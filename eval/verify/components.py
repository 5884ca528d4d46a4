"""Is a backend equal to PyTorch? Judged by what a robot would feel, with one table of tolerances.

The reference is eager PyTorch in float32 on the same device. Every component runs on the same inputs, one by one
through the batch-1 variant and in batches through the dynamic one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, COMPONENTS, DEFAULT_ENGINES, Backend, Component, Precision, RsdConfig
from rsd_trt.errors import Unavailable, UserError
from rsd_trt.eval.verify.inputs import Case, clone, hidden_states, make_case
from rsd_trt.eval.verify.result import NotMeasured, Parity, differ, share_interval
from rsd_trt.manifest import Batch
from rsd_trt.models.signature import BATCH
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.forward import on_host
from rsd_trt.runtime.session import Session, Tensors
from rsd_trt.runtime.speculate import Check, rule_of

GRIPPER_MIDDLE = 0.5  # of OpenVLA's gripper, 0 to 1; the environment's has its signs to either side, too
BATCHES: dict[Batch, int] = {"1": 1, "dynamic": 16}  # how many inputs each variant is given at a time


@dataclass(frozen=True)
class VerifyRequest:
    """What to compare, and on how many inputs. hidden: a file of recorded hidden states; None: the bundle's, if it has
    some, else seeded ones."""

    backends: tuple[Backend, ...]
    device: torch.device
    precision: Precision = "fp32"
    engines: Path = DEFAULT_ENGINES
    inputs: int = 512
    hidden: Path | None = None


@dataclass(frozen=True)
class Tolerance:
    """The largest difference from the reference that passes.

    logits: maximum absolute error over the reference's standard deviation, of logits, and of the arm's actions that a
    head gives without tokens. actions: maximum absolute error in environment units, of steps whose tokens are equal.
    tokens: share of different tokens in any layer, or of gripper's signs that a head gives without tokens. decisions:
    share of inputs whose accepted prefix differs. Shares are judged by the upper end of their intervals.
    """

    logits: float
    actions: float
    tokens: float
    decisions: float


# The rounding of each precision, with room for the order of summation. Only float32's is tight enough to show a 1%
# error of a weight. The decoder computes in float32 always. How many decisions may change is the same for both halves.
FULL, HALF, BRAIN = (
    Tolerance(1e-3, 1e-4, 1e-3, 0.02),
    Tolerance(2e-2, 1e-4, 2e-2, 0.05),
    Tolerance(1e-1, 1e-4, 2e-2, 0.05),
)
TOLERANCES: dict[tuple[Component, Precision], Tolerance] = {
    **{(component, "fp32"): FULL for component in COMPONENTS},
    **{(component, "fp16"): FULL if component == "decoder" else HALF for component in COMPONENTS},
    **{(component, "bf16"): FULL if component == "decoder" else BRAIN for component in COMPONENTS},
}


def verify(bundle: Bundle, request: VerifyRequest) -> Iterator[Parity | NotMeasured]:
    """Every component on every backend, one result at a time.

    Raises:
        UserError: hidden states that do not fit the bundle.
    """
    device, precision = request.device, request.precision
    references = Launcher(bundle, "torch", device)
    case = make_case(references, hidden_states(bundle, request.inputs, request.hidden, device))
    for component, inputs in case.inputs.items():
        expected: Tensors | None = None  # not computed before there is something to compare
        for backend in request.backends:
            launcher = Launcher(bundle, backend, device, precision, request.engines)
            for variant, batch in BATCHES.items():
                try:
                    session = launcher.open(component, variant)
                except UserError as error:
                    failed = not isinstance(error, Unavailable)
                    yield NotMeasured(component, backend, precision, variant, str(error), failed)
                    continue
                if expected is None:
                    expected = run_batches(references.open(component, "dynamic"), inputs, request.inputs)
                found = run_batches(session, inputs, batch)
                result = parity(component, backend, precision, variant, bundle.config.rsd, case, expected, found)
                if "finite" in found and not flags_nan(session, inputs, batch):
                    result = replace(result, exceeded=(*result.exceeded, "a NaN in its input is not flagged"))
                yield result


def run_batches(session: Session, inputs: Tensors, batch: int) -> dict[str, Tensor]:
    """The session's outputs for all inputs, `batch` of them at a time."""
    batched = {port.name for port in session.signature.inputs if port.dims[0] == BATCH}
    count = max(len(inputs[name]) for name in batched)
    parts = []
    for start in range(0, count, batch):
        part = {name: x[start : start + batch] if name in batched else x for name, x in inputs.items()}
        parts.append(clone(session.run(part)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def flags_nan(session: Session, inputs: Tensors, batch: int) -> bool:
    """Whether the session says, by `finite`, which input has a NaN in it: the robot's safety stop."""
    name = "hidden" if "hidden" in inputs else "instruction"
    broken = inputs[name].clone()
    broken[0, 0] = torch.nan
    finite = run_batches(session, {**inputs, name: broken}, batch)["finite"]
    return not bool(finite[0]) and bool(finite[1:].all())


def parity(
    component: Component,
    backend: str,
    precision: Precision,
    batch: Batch,
    rsd: RsdConfig,
    case: Case,
    expected: Tensors,
    found: Tensors,
) -> Parity:
    """The outputs for all inputs, beside the reference's."""
    tolerance = TOLERANCES[component, precision]
    main = "logits" if "logits" in expected else "actions"
    error = (found[main] - expected[main]).abs().flatten()
    mismatch = _token_mismatch(expected, found)
    token_interval = None
    if mismatch:
        layer = expected["tokens"][..., 0] if "tokens" in expected else expected["logits"][:, 0, :, 0]
        token_interval = share_interval(max(mismatch), layer.numel())
    decisions = _decision_mismatch(component, case, expected, found, rsd)
    decision_interval = share_interval(decisions, len(case.actions))
    exceeded = differ("tokens", token_interval, tolerance.tokens)
    exceeded += differ("decisions", decision_interval, tolerance.decisions)
    checks: dict[str, tuple[float, float]] = {}
    by_step: Tensor | None = None
    if "logits" in expected:
        checks["logits"] = (float(error.max() / expected["logits"].std()), tolerance.logits)
    if "actions" in expected:
        by_step = (found["actions"] - expected["actions"]).abs().amax(-1)  # [B, T]
    if by_step is not None and component in ("head", "predict") and "tokens" not in expected:
        theirs, ours = (x["actions"].split(ARM_DIMS, dim=-1) for x in (expected, found))
        checks["arm's actions"] = (float((ours[0] - theirs[0]).abs().max() / theirs[0].std()), tolerance.logits)
        switched = (ours[1] > GRIPPER_MIDDLE) != (theirs[1] > GRIPPER_MIDDLE)
        signs = share_interval(float(switched.float().mean()), switched.numel())
        exceeded += differ("gripper's signs", signs, tolerance.tokens)
    elif by_step is not None:
        alike = by_step
        if "tokens" in expected:
            alike = by_step[(expected["tokens"] == found["tokens"]).all(3).all(2)]
        checks["actions of equal tokens"] = (float(alike.max()) if alike.numel() else 0.0, tolerance.actions)
    if "finite" in expected:
        checks["finite flags"] = (float((expected["finite"] != found["finite"]).float().mean()), 0.0)
    if not all(bool(torch.isfinite(x).all()) for x in found.values() if x.is_floating_point()):
        checks["values that are not finite"] = (1.0, 0.0)
    exceeded += [f"{name} {value:.2g} > {limit:g}" for name, (value, limit) in checks.items() if value > limit]
    return Parity(
        component=component,
        backend=backend,
        precision=precision,
        batch=batch,
        inputs=len(expected[main]),
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        p99_abs=float(torch.quantile(error[:: max(1, len(error) // 1_000_000)], 0.99)),
        cosine=float(torch.cosine_similarity(found[main].double().flatten(), expected[main].double().flatten(), dim=0)),
        token_mismatch=mismatch,
        decision_mismatch=decisions,
        action_max_abs=None if by_step is None else float(by_step.max()),
        token_interval=token_interval,
        decision_interval=decision_interval,
        exceeded=tuple(exceeded),
    )


def _token_mismatch(expected: Tensors, found: Tensors) -> tuple[float, ...] | None:
    """Share of different tokens for each layer, from tokens or from logits."""
    if "tokens" in expected:
        different = expected["tokens"] != found["tokens"]  # [B, T, D, n]
        return tuple(different.float().mean((0, 1, 2)).tolist())
    if "logits" in expected:
        different = expected["logits"].argmax(-1) != found["logits"].argmax(-1)  # [B, n, T*D]
        return tuple(different.float().mean((0, 2)).tolist())
    return None


def _decision_mismatch(
    component: Component, case: Case, expected: Tensors, found: Tensors, rsd: RsdConfig
) -> float | None:
    """Share of inputs of which the bundle's rule accepts another number of steps of `case`'s chunks."""
    if component != "propose":
        return None
    rule = rule_of(rsd)
    assert case.tokens is not None  # there is a codec, which `propose` decodes by
    actions, tokens = on_host({"actions": case.actions, "tokens": case.tokens}, len(case.actions)).values()

    def accepted(outputs: Tensors, i: int) -> int:
        guess = {name: value[i].cpu().numpy() for name, value in outputs.items()}
        steps, depth = guess["tokens"].shape[:2]
        logits = guess["logits"].reshape(steps, depth, -1)
        check = Check(actions[i], tokens[i], guess["actions"], guess["tokens"], logits, steps, age=0, query=(i,))
        return rule(check).steps

    different = [accepted(expected, i) != accepted(found, i) for i in range(len(actions))]
    return sum(different) / len(different)
