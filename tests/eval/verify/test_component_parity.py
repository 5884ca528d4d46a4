"""The proof of equality: what is equal passes, and a 1% error of any weight does not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from msgspec import structs
from safetensors.torch import save_file
from torch import Tensor

from rsd_trt.bundle import HIDDEN_STATES, Bundle, copy_with
from rsd_trt.config import COMPONENTS, PRECISIONS, Component, Dims, Precision, RsdConfig, RuleName
from rsd_trt.errors import UserError
from rsd_trt.eval.statistics import wilson
from rsd_trt.eval.verify.components import TOLERANCES, VerifyRequest, flags_nan, parity, run_batches, verify
from rsd_trt.eval.verify.inputs import Case, hidden_states, make_case
from rsd_trt.eval.verify.result import NotMeasured, Parity, differ
from rsd_trt.export.to_onnx import export_onnx
from rsd_trt.manifest import Batch
from rsd_trt.models.components import agreeing_steps
from rsd_trt.models.signature import Exportable, Signature
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.ort_session import OrtSession
from rsd_trt.runtime.session import TorchSession

CPU = torch.device("cpu")
ROWS = 192  # of fewer, no share of decisions is known well enough to pass
NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass(frozen=True)
class Reference:
    """The clean bundle's inputs, and its outputs for every component."""

    rsd: RsdConfig
    case: Case
    outputs: dict[Component, dict[str, Tensor]]

    def compare(self, component: Component, found: dict[str, Tensor], rsd: RsdConfig | None = None) -> Parity:
        return parity(component, "x", "fp32", "dynamic", rsd or self.rsd, self.case, self.outputs[component], found)


@pytest.fixture(scope="module")
def small(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with frames of 64 pixels: to shrink larger ones takes longer than all that follows."""
    control = structs.replace(bundle.config.control, camera_size=64)
    return copy_with(bundle, structs.replace(bundle.config, control=control), tmp_path_factory.mktemp("small") / "tiny")


@pytest.fixture(scope="module")
def reference(small: Bundle) -> Reference:
    launcher = Launcher(small, "torch", CPU)
    case = make_case(launcher, hidden_states(small, ROWS, None, CPU))
    outputs = {c: run_batches(launcher.open(c, "dynamic"), case.inputs[c], ROWS) for c in COMPONENTS}
    return Reference(small.config.rsd, case, outputs)


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
        assert (result.decision_mismatch is None) == (result.component != "propose")
        assert (result.action_max_abs is None) == (result.component in ("draft", "head"))
        assert result.mean_abs <= result.p99_abs <= result.max_abs
        assert result.cosine > 0.999
        assert result.status == "passed"


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_percent_more_of_any_weight_fails(small: Bundle, reference: Reference, component: Component) -> None:
    """Of every other row: more of all of a classifier's last layer changes no argmax."""
    module = small.component(component)
    session, clean = TorchSession(module), {name: weight.clone() for name, weight in matrices(module).items()}
    for name, weight in matrices(module).items():
        weight[::2].mul_(1.01)
        result = reference.compare(component, run_batches(session, reference.case.inputs[component], ROWS))
        assert result.exceeded, f"1% more of {name} is not noticed"
        weight.copy_(clean[name])
    assert not reference.compare(component, run_batches(session, reference.case.inputs[component], ROWS)).exceeded


@pytest.mark.parametrize(
    ("component", "name", "exceeded"),
    [
        ("draft", "patch_embed.weight", {"logits", "tokens"}),
        ("head", "feature_proj.0.weight", {"logits", "tokens"}),
        ("decoder", "decoder.2.weight", {"actions of equal tokens"}),
        ("propose", "draft.blocks.1.attn.proj.weight", {"logits", "tokens", "decisions"}),
        ("predict", "head.layer_heads.7.3.weight", {"tokens"}),
        ("predict", "decoder.decoder.0.weight", {"actions of equal tokens"}),
    ],
)
def test_one_percent_more_of_an_exported_weight_fails(
    small: Bundle, reference: Reference, tmp_path: Path, component: Component, name: str, exceeded: set[str]
) -> None:
    module = small.component(component)
    matrices(module)[name].mul_(1.01)
    (graph,) = export_onnx(module, "1", tmp_path / "graph.onnx")
    session = OrtSession(graph, module.signature, CPU)
    result = reference.compare(component, run_batches(session, reference.case.inputs[component], batch=1))
    assert {re.split(" that differ:| [^ ]+ > ", text)[0] for text in result.exceeded} == exceeded
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
    assert reference.compare(component, found).exceeded == ("finite flags 0.01 > 0",)


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
    assert result.token_interval == pytest.approx(wilson(64, ROWS * dims.T * dims.D))
    assert result.exceeded == ("tokens that differ: up to 0.332% > 0.1%",)
    assert differ("tokens", (0.0, 0.001), 0.001) == []  # the limit itself passes


def test_token_mismatch_of_logits_is_that_of_their_argmax(reference: Reference) -> None:
    found = {"logits": reference.outputs["draft"]["logits"].clone()}
    best = found["logits"][: ROWS // 2, 1].argmax(-1, keepdim=True)  # half of the rows of L1
    found["logits"][: ROWS // 2, 1] = found["logits"][: ROWS // 2, 1].scatter(-1, best, -1e3)
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
    ("rsd", "port", "step"),
    [
        (RsdConfig("first"), "actions", 0),
        (RsdConfig("actions"), "actions", Dims().T - 1),
        (RsdConfig("path"), "actions", Dims().T - 1),
        (RsdConfig("tokens", token_share=1.0), "tokens", 2),
        (RsdConfig("likelihood", threshold=-3.0), "logits", 0),
    ],
    ids=lambda value: value.rule if isinstance(value, RsdConfig) else None,
)
def test_decision_mismatch_is_rows_of_which_the_rule_accepts_another_number(
    reference: Reference, rsd: RsdConfig, port: str, step: int
) -> None:
    expected = reference.outputs["propose"]
    own = dataclasses.replace(reference.case, actions=expected["actions"], tokens=expected["tokens"])
    for rows in ((), (0, 5, 9)):
        found = {name: x.clone() for name, x in expected.items()}
        for row in rows:
            if port == "tokens":
                found[port][row, step, 0, 0] = (found[port][row, step, 0, 0] + 1) % Dims().K
            else:
                found[port][row] *= -1e3 if port == "logits" else 1
                found[port][row, step] += 1
        result = parity("propose", "x", "fp32", "dynamic", rsd, own, expected, found)
        assert result.decision_mismatch == pytest.approx(len(rows) / ROWS)
        few = result.decision_mismatch < TOLERANCES["propose", "fp32"].decisions  # and yet not shown to be
        assert few and ("decisions that differ: up to 4.492% > 2.0%" in result.exceeded) == (rows != ())


def test_what_the_rule_does_not_read_changes_no_decision(reference: Reference) -> None:
    found = {name: x.clone() for name, x in reference.outputs["propose"].items()}
    found["actions"][:, 1:] += 1
    assert reference.compare("propose", found, RsdConfig("first")).decision_mismatch == 0
    assert (reference.compare("propose", found, RsdConfig("actions")).decision_mismatch or 0) > 0.5


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
    small: Bundle, reference: Reference, monkeypatch: pytest.MonkeyPatch, component: Component
) -> None:
    honest, inputs = TorchSession(small.component(component)), reference.case.inputs[component]
    assert flags_nan(honest, inputs, 1)
    assert flags_nan(honest, inputs, 16)
    assert not flags_nan(Liar(honest, says=True), inputs, 16)
    assert not flags_nan(Liar(honest, says=False), inputs, 16)
    real = Launcher.open

    def lie(launcher: Launcher, name: Component, batch: Batch) -> object:
        session = real(dataclasses.replace(launcher, backend="torch"), name, batch)
        return Liar(session, says=True) if launcher.backend == "ort" and name == component else session

    monkeypatch.setattr(Launcher, "open", lie)
    results = list(verify(small, VerifyRequest(("ort",), CPU, "fp32", Path(), 8)))
    assert {r.component for r in results if "a NaN in its input is not flagged" in r.exceeded} == {component}


def test_actions_of_other_tokens_are_not_held_against_the_decoder(reference: Reference) -> None:
    found = {name: x.clone() for name, x in reference.outputs["propose"].items()}
    found["tokens"][0, 0, 0, 0] = (found["tokens"][0, 0, 0, 0] + 1) % Dims().K
    found["actions"][0, 0] += 0.01
    result = reference.compare("propose", found)
    assert result.exceeded == ()
    assert result.action_max_abs == pytest.approx(0.01, rel=1e-3)
    found["actions"][0, 1] += 0.01
    assert reference.compare("propose", found).exceeded == ("actions of equal tokens 0.01 > 0.0001",)


@pytest.mark.parametrize("rule", ["actions", "tokens"])
def test_the_cases_are_close_calls(reference: Reference, rule: RuleName) -> None:
    """Prefixes of several lengths, so that a backend's rounding has decisions to change."""
    guess, case = reference.outputs["propose"], reference.case
    rsd = RsdConfig(rule)
    if rule == "tokens":
        passes = (guess["tokens"] == case.tokens[..., : Dims().C]).float().mean((2, 3)) >= rsd.token_share
    else:
        passes = agreeing_steps(guess["actions"], case.actions, torch.tensor(rsd.tolerance))
    assert len(set(passes.int().cumprod(1).sum(1).tolist())) >= 4


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
            assert all("that differ: up to" in told for told in result.exceeded)  # of 4 inputs no share is known
            continue
        assert isinstance(result, NotMeasured)
        missing = f"nothing of {bundle.path} is exported in {tmp_path}/tiny. Export it: "
        assert result.reason.startswith(reasons.get(result.backend, missing))
        # A missing export is the user's to build; a missing GPU is not.
        assert result.status == ("failed" if result.backend == "ort" else "not measured")


def recorded(rows: int = 8, width: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_hidden_states_are_used(bundle_copy: Path, dtype: torch.dtype) -> None:
    bundle = Bundle.open(bundle_copy)
    seeded = hidden_states(bundle, 8, None, CPU)
    assert torch.equal(seeded, hidden_states(bundle, 8, None, CPU))
    save_file({"hidden": recorded(dtype=dtype)}, bundle_copy / HIDDEN_STATES)
    for rows, file in ((8, None), (5, None), (8, bundle_copy / HIDDEN_STATES)):
        spread = torch.linspace(0, 7, rows).long()
        assert torch.equal(hidden_states(bundle, rows, file, CPU), recorded(dtype=dtype)[spread].float())


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"hidden": recorded(rows=7)}, "has [7, 32] as 'hidden', not [>= 8, 32]"),
        ({"hidden": recorded(width=16)}, "has [8, 16] as 'hidden', not [>= 8, 32]"),
        ({"hidden": torch.zeros(8, 1, 32)}, "has [8, 1, 32] as 'hidden', not [>= 8, 32]"),
        ({"final": torch.zeros(8, 32)}, "has nothing as 'hidden', not [>= 8, 32]"),
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
