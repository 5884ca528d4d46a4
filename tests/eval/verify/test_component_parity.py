"""The proof of equality: what is equal passes, and a 1% error of any weight does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rsd_trt.bundle import HIDDEN_STATES, Bundle
from rsd_trt.config import COMPONENTS, PRECISIONS, Component, Dims, Precision
from rsd_trt.errors import UserError
from rsd_trt.eval.verify.components import TOLERANCES, VerifyRequest, flags_nan, parity, run_batches, verify
from rsd_trt.eval.verify.inputs import Case, hidden_states, make_case
from rsd_trt.eval.verify.result import NotMeasured, Parity
from rsd_trt.export.to_onnx import export_onnx
from rsd_trt.manifest import Batch
from rsd_trt.models.signature import Exportable, Signature
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.ort_session import OrtSession
from rsd_trt.runtime.session import TorchSession

CPU = torch.device("cpu")
ROWS = 64
NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass(frozen=True)
class Reference:
    """The clean bundle's inputs, and its outputs for every component."""

    case: Case
    outputs: dict[Component, dict[str, Tensor]]

    def compare(self, component: Component, found: dict[str, Tensor], precision: Precision = "fp32") -> Parity:
        return parity(component, "x", precision, "dynamic", self.case, self.outputs[component], found)


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Reference:
    launcher = Launcher(bundle, "torch", CPU)
    case = make_case(launcher, *hidden_states(bundle, ROWS, None, CPU))
    outputs = {c: run_batches(launcher.open(c, "dynamic"), case.inputs[c], ROWS) for c in COMPONENTS}
    return Reference(case, outputs)


def matrices(module: Exportable) -> dict[str, Tensor]:
    return {name: weight for name, weight in module.named_parameters() if weight.dim() == 2}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_equal_backend_passes(bundle: Bundle, exported: Callable[..., Path], precision: Precision) -> None:
    results = list(verify(bundle, VerifyRequest(("ort",), CPU, precision, exported(precision), ROWS)))
    assert [(r.component, r.batch) for r in results] == [(c, b) for c in COMPONENTS for b in get_args(Batch)]
    for result in results:
        assert isinstance(result, Parity)
        assert result.exceeded == (), result
        assert (result.backend, result.precision, result.inputs) == ("ort", precision, ROWS)
        assert (result.token_mismatch is None) == (result.component == "decoder")
        assert (result.decision_mismatch is None) == (result.component not in ("propose", "predict"))
        assert (result.action_max_abs is None) == (result.component in ("draft", "head"))
        assert result.mean_abs <= result.p99_abs <= result.max_abs
        assert result.cosine > 0.999
        assert result.status == "passed"


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_percent_more_of_any_weight_fails(bundle: Bundle, reference: Reference, component: Component) -> None:
    module = bundle.component(component)
    session, clean = TorchSession(module), {name: weight.clone() for name, weight in matrices(module).items()}
    for name, weight in matrices(module).items():
        weight.mul_(1.01)
        result = reference.compare(component, run_batches(session, reference.case.inputs[component], ROWS))
        assert result.exceeded, f"1% more of {name} is not noticed"
        weight.copy_(clean[name])
    assert not reference.compare(component, run_batches(session, reference.case.inputs[component], ROWS)).exceeded


@pytest.mark.parametrize(
    ("component", "name", "exceeded"),
    [
        ("draft", "input_projection.weight", {"logits", "token mismatch"}),
        ("head", "feature_proj.0.weight", {"logits", "token mismatch"}),
        ("decoder", "decoder.2.weight", {"actions of equal tokens"}),
        ("propose", "draft.decoder.decoder_layer.linear2.weight", {"token mismatch", "decision mismatch"}),
        ("predict", "head.layer_heads.7.3.weight", {"token mismatch"}),
        ("predict", "decoder.decoder.0.weight", {"actions of equal tokens", "decision mismatch"}),
    ],
)
def test_one_percent_more_of_an_exported_weight_fails(
    bundle: Bundle, reference: Reference, tmp_path: Path, component: Component, name: str, exceeded: set[str]
) -> None:
    module = bundle.component(component)
    matrices(module)[name].mul_(1.01)
    (graph,) = export_onnx(module, "1", tmp_path / "graph.onnx")
    session = OrtSession(graph, module.signature, CPU)
    result = reference.compare(component, run_batches(session, reference.case.inputs[component], batch=1))
    assert {text.rsplit(" ", 3)[0] for text in result.exceeded} == exceeded
    assert result.status == "failed"


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_value_that_is_not_finite_fails(reference: Reference, component: Component, value: float) -> None:
    found = {name: x.clone() for name, x in reference.outputs[component].items()}
    found["logits" if "logits" in found else "actions"][5, 0, 0] = value
    assert "values that are not finite 1 > 0" in reference.compare(component, found).exceeded


@pytest.mark.parametrize("component", ["propose", "predict"])
def test_a_wrong_finite_flag_fails(reference: Reference, component: Component) -> None:
    found = {name: x.clone() for name, x in reference.outputs[component].items()}
    found["finite"][:2] = False
    assert reference.compare(component, found).exceeded == ("finite flags 0.031 > 0",)


def test_token_mismatch_is_counted_for_each_layer(reference: Reference) -> None:
    dims = Dims()
    found = {name: x.clone() for name, x in reference.outputs["predict"].items()}
    for layer, count in ((0, 3), (7, 64)):
        tokens = found["tokens"][..., layer].flatten()
        tokens[:count] = (tokens[:count] + 1) % dims.K
        found["tokens"][..., layer] = tokens.view(ROWS, dims.T, dims.D)
    result = reference.compare("predict", found)
    share = 1 / (ROWS * dims.T * dims.D)
    assert result.token_mismatch == pytest.approx((3 * share, 0, 0, 0, 0, 0, 0, 64 * share))
    assert result.exceeded == (f"token mismatch {64 * share:.2g} > 0.001",)


def test_token_mismatch_of_logits_is_that_of_their_argmax(reference: Reference) -> None:
    found = {"logits": reference.outputs["draft"]["logits"].clone()}
    best = found["logits"][:32, 1].argmax(-1, keepdim=True)  # half of the rows of L1
    found["logits"][:32, 1] = found["logits"][:32, 1].scatter(-1, best, -1e3)
    assert reference.compare("draft", found).token_mismatch == (0, 0.5, 0)


def test_errors_are_those_of_hand_made_logits(reference: Reference) -> None:
    expected = reference.outputs["draft"]["logits"]
    found = expected.clone()
    found[0, 0, 0, 0] += 0.5
    result = reference.compare("draft", {"logits": found})
    assert result.max_abs == pytest.approx(0.5)
    assert result.mean_abs == pytest.approx(0.5 / expected.numel(), rel=1e-4)
    assert result.p99_abs == 0
    assert f"logits {0.5 / float(expected.std()):.2g} > 0.001" in result.exceeded
    assert reference.compare("draft", {"logits": 2 * expected}).cosine == pytest.approx(1)
    assert reference.compare("draft", {"logits": -expected}).cosine == pytest.approx(-1)


@pytest.mark.parametrize(
    ("rows", "step", "share"),
    [
        ((), 0, 0),
        ((0, 1, 2, 3), 0, 4 / ROWS),
        ((0,), Dims().T - 1, 1 / ROWS),
    ],
)
def test_decision_mismatch_is_rows_with_another_prefix(
    reference: Reference, rows: tuple[int, ...], step: int, share: float
) -> None:
    found = {name: x.clone() for name, x in reference.outputs["predict"].items()}
    assert found["agreement"][:4].all(), "these rows agree in full"
    for row in rows:
        found["agreement"][row, step] = False
    assert reference.compare("predict", found).decision_mismatch == pytest.approx(share)
    coarse = {name: x.clone() for name, x in reference.outputs["propose"].items()}
    for row in rows:
        coarse["actions"][row, step, 0] += 1
    assert reference.compare("propose", coarse).decision_mismatch == pytest.approx(share)


def test_decisions_behind_the_first_disagreement_do_not_count(reference: Reference) -> None:
    found = {name: x.clone() for name, x in reference.outputs["predict"].items()}
    stopped = (~found["agreement"][:, 0]).nonzero().flatten()
    assert len(stopped)
    found["agreement"][stopped, 1:] = ~found["agreement"][stopped, 1:]
    assert reference.compare("predict", found).decision_mismatch == 0


def test_with_the_rule_tokens_decisions_are_those_of_token_shares(reference: Reference) -> None:
    for component, other in (("propose", "chunk_tokens"), ("predict", "draft_tokens")):
        expected = reference.outputs[component]
        coarse = expected["tokens"][..., : Dims().C]  # as if draft and plan had agreed in every token
        case = dataclasses.replace(reference.case, token_share=1.0, **{other: coarse})
        found = {name: x.clone() for name, x in expected.items()}
        found["tokens"][:3, 2, 0, 0] = (found["tokens"][:3, 2, 0, 0] + 1) % Dims().K
        found["tokens"][:, :, :, Dims().C :] = 0  # fine layers have no say
        result = parity(component, "x", "fp32", "dynamic", case, expected, found)
        assert result.decision_mismatch == pytest.approx(3 / ROWS)


@dataclasses.dataclass
class Liar:
    """A session whose `finite` says the same of every row, as when a compiler takes the test away."""

    session: TorchSession
    says: bool

    @property
    def signature(self) -> Signature:
        return self.session.signature

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.session.run(inputs)
        return outputs | {"finite": torch.full_like(outputs["finite"], self.says)}


@pytest.mark.parametrize("component", ["propose", "predict"])
def test_a_backend_that_does_not_flag_nan_fails(
    bundle: Bundle, reference: Reference, monkeypatch: pytest.MonkeyPatch, component: Component
) -> None:
    honest, inputs = TorchSession(bundle.component(component)), reference.case.inputs[component]
    assert flags_nan(honest, inputs, 1)
    assert flags_nan(honest, inputs, 16)
    assert not flags_nan(Liar(honest, says=True), inputs, 16)
    assert not flags_nan(Liar(honest, says=False), inputs, 16)
    real = Launcher.open

    def lie(launcher: Launcher, name: Component, batch: Batch) -> object:
        session = real(dataclasses.replace(launcher, backend="torch"), name, batch)
        return Liar(session, says=True) if launcher.backend == "ort" and name == component else session

    monkeypatch.setattr(Launcher, "open", lie)
    exceeded = {r.component: r.exceeded for r in verify(bundle, VerifyRequest(("ort",), CPU, "fp32", Path(), 8))}
    assert exceeded == {c: () for c in COMPONENTS} | {component: ("a NaN in a hidden state is not flagged",)}


def test_actions_of_other_tokens_are_not_held_against_the_decoder(reference: Reference) -> None:
    found = {name: x.clone() for name, x in reference.outputs["propose"].items()}
    found["tokens"][0, 0, 0, 0] = (found["tokens"][0, 0, 0, 0] + 1) % Dims().K
    found["actions"][0, 0] += 0.01
    result = reference.compare("propose", found)
    assert result.exceeded == ()
    assert result.action_max_abs == pytest.approx(0.01, rel=1e-3)
    found["actions"][0, 1] += 0.01
    assert reference.compare("propose", found).exceeded == ("actions of equal tokens 0.01 > 0.0001",)


def test_the_cases_are_close_calls(reference: Reference) -> None:
    """Prefixes of several lengths, so that a backend's rounding has decisions to change."""
    prefixes = reference.outputs["predict"]["agreement"].int().cumprod(1).sum(1)
    assert len(set(prefixes.tolist())) >= 4


def test_every_component_has_a_tolerance_in_every_precision() -> None:
    assert set(TOLERANCES) == {(component, precision) for component in COMPONENTS for precision in PRECISIONS}
    for component in COMPONENTS:
        fp32, fp16, bf16 = (dataclasses.astuple(TOLERANCES[component, p]) for p in PRECISIONS)
        assert all(a <= b <= c for a, b, c in zip(fp32, fp16, bf16, strict=True))


def test_an_unavailable_backend_is_not_measured_with_the_reason(bundle: Bundle, tmp_path: Path) -> None:
    results = list(verify(bundle, VerifyRequest(("graph", "ort", "trt", "torch"), CPU, "fp32", tmp_path, 4)))
    assert len(results) == 4 * 2 * len(COMPONENTS)
    reasons = {
        "graph": "backend graph needs a CUDA device, not cpu. Use: --backend torch or ort",
        "trt": "TensorRT engines need an NVIDIA GPU, and none is usable here. Use: --backend ort",
    }
    for result in results:
        if result.backend == "torch":
            assert isinstance(result, Parity)
            assert result.exceeded == ()
            continue
        assert isinstance(result, NotMeasured)
        missing = f"{tmp_path}/tiny has no {result.component} fp32 batch {result.batch} (onnx). Build it: "
        assert result.reason.startswith(reasons.get(result.backend, missing))
        # A missing export is the user's to build; a missing GPU is not.
        assert result.status == ("failed" if result.backend == "ort" else "not measured")


def recorded(rows: int = 8, width: int = 32, dtype: torch.dtype = torch.float32, **others: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(2, rows, width, generator=generator).to(dtype)
    return {"prefix": states[0].clone(), "final": states[1].clone()} | others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_hidden_states_are_used(bundle_copy: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    bundle = Bundle.open(bundle_copy)
    seeded = hidden_states(bundle, 8, None, CPU)
    assert torch.equal(seeded[0], hidden_states(bundle, 8, None, CPU)[0])
    save_file(recorded(dtype=dtype), bundle_copy / HIDDEN_STATES)
    for rows, file in ((8, None), (5, None), (8, bundle_copy / HIDDEN_STATES)):
        prefix, final = hidden_states(bundle, rows, file, CPU)
        spread = torch.linspace(0, 7, rows).long()
        assert torch.equal(prefix, recorded(dtype=dtype)["prefix"][spread].float())
        assert torch.equal(final, recorded(dtype=dtype)["final"][spread].float())
        assert not torch.equal(prefix, seeded[0][:rows])


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (recorded(rows=7), "has [7, 32] as 'prefix', not [>= 8, 32]"),
        (recorded(width=16), "has [8, 16] as 'prefix', not [>= 8, 32]"),
        (recorded(final=torch.zeros(8, 33)), "has [8, 33] as 'final', not [>= 8, 32]"),
        (recorded(prefix=torch.zeros(8, 1, 32)), "has [8, 1, 32] as 'prefix', not [>= 8, 32]"),
        ({"final": torch.zeros(8, 32)}, "has nothing as 'prefix', not [>= 8, 32]"),
        (None, "cannot be read as safetensors: "),
    ],
)
def test_hidden_states_that_do_not_fit_are_refused(
    bundle: Bundle, tmp_path: Path, states: dict[str, Tensor] | None, message: str
) -> None:
    file = tmp_path / "states.safetensors"
    if states is None:
        file.write_bytes(b"no safetensors")
    else:
        save_file(states, file)
    with pytest.raises(UserError) as error:
        list(verify(bundle, VerifyRequest(("torch",), CPU, "fp32", tmp_path, 8, file)))
    assert str(error.value).startswith(f"{file} {message}")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        hidden_states(bundle, 8, tmp_path / "missing", CPU)
