"""Is a backend equal to PyTorch? Measured by what a robot would feel, with one table of tolerances.

The reference is eager PyTorch in float32 on the same device. Every component runs on the same hidden states, row
by row through the batch-1 variant and in batches through the dynamic one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rsd_trt.bundle import HIDDEN_STATES, Bundle
from rsd_trt.config import COMPONENTS, Component, Precision
from rsd_trt.errors import Unavailable, UserError
from rsd_trt.eval.verify.backbone_result import BackboneParity
from rsd_trt.manifest import Batch
from rsd_trt.models.signature import BATCH
from rsd_trt.runtime.backends import Backend, Launcher
from rsd_trt.runtime.forward import on_host
from rsd_trt.runtime.session import Session, Tensors
from rsd_trt.runtime.speculate import agreeing_prefix, agreeing_steps, agreeing_token_steps

DYNAMIC_ROWS = 16  # of a batch through the dynamic variant
EDGE = 1.2  # coarse actions differ from the plan by up to this many tolerances, so that agreement is a close call


@dataclass(frozen=True)
class Tolerance:
    """The largest difference from the reference that passes.

    logits: maximum absolute error over the reference's standard deviation. actions: maximum absolute error in
    environment units, of steps whose tokens are equal. flips: share of different tokens in any layer. decisions:
    share of rows whose agreeing prefix differs.
    """

    logits: float
    actions: float
    flips: float
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


@dataclass(frozen=True)
class Parity:
    """One component on one backend. Errors are of logits where there are some, else of actions."""

    component: Component
    backend: str
    precision: Precision
    batch: Batch
    rows: int
    max_abs: float
    mean_abs: float
    p99_abs: float
    cosine: float
    flips: tuple[float, ...] | None  # share of different tokens, for each RFSQ layer
    decision_flips: float | None  # share of rows whose agreeing prefix differs
    action_max_abs: float | None  # environment units, all steps
    exceeded: tuple[str, ...]  # which tolerances, with both values; empty: passed


@dataclass(frozen=True)
class NotMeasured:
    """What could not be compared, and why. `failed`: the machine could, but the export is missing or damaged."""

    component: str
    backend: str
    precision: str
    batch: Batch
    reason: str
    failed: bool = False


def verify(
    bundle: Bundle,
    backends: Sequence[Backend],
    device: torch.device,
    precision: Precision,
    engines: Path,
    rows: int,
    hidden: Path | None = None,
) -> Iterator[Parity | NotMeasured]:
    """Every component on every backend, one result at a time.

    Raises:
        UserError: hidden states that do not fit the bundle.
    """
    prefix, final = hidden_states(bundle, rows, hidden, device)
    references = Launcher(bundle, "torch", device)
    case = make_case(references, prefix, final, torch.tensor(bundle.config.rsd.tolerance, device=device))
    for component in COMPONENTS:
        reference = references.open(component, "dynamic")
        expected = run_rows(reference, case.inputs[component], len(final))
        for backend in backends:
            launcher = Launcher(bundle, backend, device, precision, engines)
            for batch in ("1", "dynamic"):
                try:
                    session = launcher.open(component, batch)
                except Unavailable as error:
                    yield NotMeasured(component, backend, precision, batch, str(error))
                    continue
                except UserError as error:
                    yield NotMeasured(component, backend, precision, batch, str(error), failed=True)
                    continue
                step = 1 if batch == "1" else DYNAMIC_ROWS
                found = run_rows(session, case.inputs[component], step)
                result = measure(component, backend, precision, batch, case, expected, found)
                if "finite" in found and not flags_nan(session, case.inputs[component], step):
                    result = replace(result, exceeded=(*result.exceeded, "a NaN in a hidden state is not flagged"))
                yield result


def hidden_states(bundle: Bundle, rows: int, file: Path | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states [rows, H] after block k and after block N: recorded ones if there are any, else seeded.

    Raises:
        UserError: the file lacks them, or holds too few or of another width.
    """
    recorded = file or bundle.path / HIDDEN_STATES
    if file is None and not recorded.is_file():
        generator = torch.Generator().manual_seed(0)
        seeded = torch.randn(2, rows, bundle.config.hidden, generator=generator).to(device)
        return seeded[0], seeded[1]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        states = load_file(recorded)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{recorded} cannot be read as safetensors: {error}") from None
    found = []
    for name in ("prefix", "final"):
        state = states.get(name)
        if state is None or state.dim() != 2 or state.shape[1] != bundle.config.hidden or len(state) < rows:
            shape = "nothing" if state is None else list(state.shape)
            raise UserError(f"{recorded} has {shape} as {name!r}, not [>= {rows}, {bundle.config.hidden}]")
        spread = torch.linspace(0, len(state) - 1, rows).long()  # neighbouring queries are nearly alike
        found.append(state[spread].float().to(device))
    return found[0], found[1]


@dataclass(frozen=True)
class Case:
    """What the components are given, and the chunks [rows, T, A] beside which the draft's actions are judged."""

    inputs: dict[Component, dict[str, Tensor]]
    plans: Tensor
    tolerance: Tensor
    draft_tokens: Tensor  # [rows, T, D, C]
    plan_tokens: Tensor  # [rows, T, D, C]
    token_share: float | None  # with the rule `tokens`; None with the rule `actions`


def make_case(launcher: Launcher, prefix: Tensor, final: Tensor, tolerance: Tensor) -> Case:
    """Inputs for every component. Chunks to agree with lie around the reference's by up to EDGE tolerances."""
    rows, dims = len(final), launcher.bundle.config.dims
    generator = torch.Generator().manual_seed(1)
    zeros = torch.zeros(rows, dims.T, dims.A, device=final.device)
    draft = _clone(launcher.open("propose", "dynamic").run({"hidden": prefix}))
    predict: dict[str, Tensor] = {"hidden": final, "coarse_actions": zeros, "tolerance": tolerance}
    head: dict[str, Tensor] = {"hidden": final}
    if launcher.bundle.config.head.kind == "conditioned":
        predict["condition"] = head["condition"] = draft["tokens"]
    plan = _clone(launcher.open("predict", "dynamic").run(predict))
    # One scale a row, from none to EDGE tolerances: prefixes of every length.
    scale = torch.linspace(0, EDGE, rows)[:, None, None]
    noise = (torch.rand(plan["actions"].shape, generator=generator) * 2 - 1) * scale
    noise[..., : len(tolerance)] *= tolerance.cpu()
    noise[..., len(tolerance) :] = 0
    predict["coarse_actions"] = plan["actions"] + noise.to(final.device)
    inputs: dict[Component, dict[str, Tensor]] = {
        "draft": {"hidden": prefix},
        "head": head,
        "decoder": {"tokens": plan["tokens"]},
        "propose": {"hidden": prefix},
        "predict": predict,
    }
    rsd, coarse = launcher.bundle.config.rsd, plan["tokens"][..., : dims.C]
    share = rsd.token_share if rsd.rule == "tokens" else None
    return Case(inputs, draft["actions"] + noise.to(final.device), tolerance, draft["tokens"], coarse, share)


def run_rows(session: Session, inputs: Tensors, step: int) -> dict[str, Tensor]:
    """The session's outputs for all rows, `step` rows at a time."""
    batched = {port.name for port in session.signature.inputs if port.dims[0] == BATCH}
    rows = max(len(inputs[name]) for name in batched)
    parts = []
    for start in range(0, rows, step):
        part = {name: x[start : start + step] if name in batched else x for name, x in inputs.items()}
        parts.append(_clone(session.run(part)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def flags_nan(session: Session, inputs: Tensors, step: int) -> bool:
    """Whether the session says, by `finite`, which row has a NaN in its hidden state: the robot's safety stop."""
    hidden = inputs["hidden"].clone()
    hidden[0, 0] = torch.nan
    finite = run_rows(session, {**inputs, "hidden": hidden}, step)["finite"]
    return not bool(finite[0]) and bool(finite[1:].all())


def measure(
    component: Component,
    backend: str,
    precision: Precision,
    batch: Batch,
    case: Case,
    expected: Tensors,
    found: Tensors,
) -> Parity:
    """Compares the outputs of all rows."""
    tolerance = TOLERANCES[component, precision]
    main = "logits" if "logits" in expected else "actions"
    error = (found[main] - expected[main]).abs().flatten()
    flips = _token_flips(expected, found)
    steps_equal = torch.ones(expected[main].shape[:2], dtype=torch.bool, device=error.device)
    if "tokens" in expected:
        steps_equal = (expected["tokens"] == found["tokens"]).all(3).all(2)  # [B, T]
    decisions = _decision_flips(component, case, expected, found)
    checks = {
        "token flips": (max(flips) if flips else 0.0, tolerance.flips),
        "decision flips": (decisions or 0.0, tolerance.decisions),
    }
    if main == "logits":
        checks["logits"] = (float(error.max() / expected["logits"].std()), tolerance.logits)
    else:
        by_step = (found["actions"] - expected["actions"]).abs().amax(-1)[steps_equal]
        checks["actions of equal tokens"] = (float(by_step.max()) if len(by_step) else 0.0, tolerance.actions)
    if "finite" in expected:
        checks["finite flags"] = (float((expected["finite"] != found["finite"]).float().mean()), 0.0)
    if not all(bool(torch.isfinite(x).all()) for x in found.values() if x.is_floating_point()):
        checks["values that are not finite"] = (1.0, 0.0)
    return Parity(
        component=component,
        backend=backend,
        precision=precision,
        batch=batch,
        rows=len(expected[main]),
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        p99_abs=float(torch.quantile(error[:: max(1, len(error) // 1_000_000)], 0.99)),
        cosine=float(torch.cosine_similarity(found[main].double().flatten(), expected[main].double().flatten(), dim=0)),
        flips=flips,
        decision_flips=decisions,
        action_max_abs=float(error.max()) if main == "actions" else None,
        exceeded=tuple(f"{name} {value:.2g} > {limit:g}" for name, (value, limit) in checks.items() if value > limit),
    )


def to_json(result: Parity | BackboneParity | NotMeasured) -> dict[str, object]:
    """A result as plain values, with `status`: passed, failed or not measured."""
    if isinstance(result, NotMeasured):
        return {**asdict(result), "status": "failed" if result.failed else "not measured"}
    return {**asdict(result), "status": "failed" if result.exceeded else "passed"}


def _token_flips(expected: Tensors, found: Tensors) -> tuple[float, ...] | None:
    """Share of different tokens for each layer, from tokens or from logits."""
    if "tokens" in expected:
        different = expected["tokens"] != found["tokens"]  # [B, T, D, n]
        return tuple(different.float().mean((0, 1, 2)).tolist())
    if "logits" in expected:
        different = expected["logits"].argmax(-1) != found["logits"].argmax(-1)  # [B, n, T*D]
        return tuple(different.float().mean((0, 2)).tolist())
    return None


def _decision_flips(component: Component, case: Case, expected: Tensors, found: Tensors) -> float | None:
    """Share of rows whose agreeing prefix differs: `predict` decides itself, `propose` beside `case.plans`."""
    if component not in ("propose", "predict"):
        return None
    prefixes = []
    for outputs in (expected, found):
        if case.token_share is not None:
            other = case.plan_tokens if component == "propose" else case.draft_tokens
            coarse = outputs["tokens"][..., : other.shape[-1]]
            steps = agreeing_token_steps(on_host(other), on_host(coarse), case.token_share)
        elif component == "propose":
            steps = agreeing_steps(*(on_host(x) for x in (outputs["actions"], case.plans, case.tolerance)))
        else:
            steps = on_host(outputs["agreement"])
        prefixes.append(agreeing_prefix(steps))
    return float((prefixes[0] != prefixes[1]).mean())


def _clone(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in outputs.items()}
