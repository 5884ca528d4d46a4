"""What TensorRT is told to compute equals what we compute: every component, batch and precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("tensorrt_rtx", exc_type=ImportError)

import onnx
from onnx import TensorProto, helper
from trt_network import CLASSES, Network

from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, Component, HeadConfig, HiddenDraftConfig, Precision
from rsd_trt.eval.verify.components import parity, run_batches
from rsd_trt.eval.verify.inputs import Case, hidden_states, make_case
from rsd_trt.export.to_onnx import OPSET, example_inputs, export_onnx
from rsd_trt.manifest import Batch, usable
from rsd_trt.models.codec import Decoder
from rsd_trt.models.components import ActionTransform, Predict, Propose
from rsd_trt.models.draft import DraftModel
from rsd_trt.models.head import build_head
from rsd_trt.models.signature import Exportable, Signature
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.ort_session import OrtSession
from rsd_trt.runtime.session import Tensors, batch_size

CPU = torch.device("cpu")
INPUTS = 192  # whole batches of 1, 3 and 8, and enough for verify's intervals


class NetworkSession:
    """Runs what TensorRT's parser makes of a file, as a session runs a component."""

    def __init__(self, file: Path, signature: Signature) -> None:
        self.file, self.signature = file, signature
        self.networks: dict[int, Network] = {}

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        batch = batch_size(self.signature, inputs)
        if batch not in self.networks:
            shapes = {port.name: self.signature.shape(port, batch) for port in self.signature.inputs}
            self.networks[batch] = Network(self.file, shapes)
        return self.networks[batch].run(inputs)


@pytest.fixture(scope="module")
def case(bundle: Bundle) -> Case:
    """Inputs for every component."""
    return make_case(Launcher(bundle, "torch", CPU), hidden_states(bundle, INPUTS, None, CPU))


@pytest.mark.parametrize(("variant", "batch"), [("1", 1), ("dynamic", 1), ("dynamic", 3), ("dynamic", 8)])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(half, marks=pytest.mark.slow) for half in ("fp16", "bf16"))]
)
def test_tensorrt_is_told_to_compute_what_we_compute(
    bundle: Bundle,
    exported: Callable[..., Path],
    case: Case,
    component: Component,
    precision: Precision,
    variant: Batch,
    batch: int,
) -> None:
    """Dtype and shape of every tensor are those that TensorRT infers; the outputs lie within verify's tolerances of
    ONNX Runtime's, or in bfloat16, which it has no kernels for, of PyTorch's. In float32 no token differs. `pytest -s`
    shows the table."""
    signature, engines = bundle.component(component).signature, exported(precision)
    _, file = usable(bundle, engines, (component, precision, variant, "onnx"))
    session = NetworkSession(file, signature)
    ours = Launcher(bundle, "torch" if precision == "bf16" else "ort", CPU, precision, engines)
    with torch.inference_mode():
        found = run_batches(session, case.inputs[component], batch)  # type: ignore[arg-type]
        expected = run_batches(ours.open(component, variant), case.inputs[component], batch)
    result = parity(component, "trt", precision, variant, bundle.config.rsd, case, expected, found)
    mismatch = max(result.token_mismatch or (0.0,))
    layers = sum(session.networks[batch].kinds.values())
    row = component, precision, variant, batch, layers, f"{result.max_abs:.1e}", f"{100 * mismatch:.2f}"
    print("\n|", *(f"{cell} |" for cell in row))
    assert not result.exceeded, result
    assert precision != "fp32" or mismatch == 0


@pytest.mark.slow
def test_every_kind_of_layer_that_is_given_a_meaning_is_met(bundle: Bundle, exported: Callable[..., Path]) -> None:
    met: set[str] = set()
    for component in COMPONENTS:
        signature = bundle.component(component).signature
        _, file = usable(bundle, exported("fp16"), (component, "fp16", "dynamic", "onnx"))
        met |= set(Network(file, {port.name: signature.shape(port, 3) for port in signature.inputs}).kinds)
    assert met == set(CLASSES)


@pytest.mark.parametrize("kind", ["draft", "head"])
def test_the_original_experiments_parts_are_understood_too(
    bundle: Bundle, randomise: Callable[..., None], tmp_path: Path, kind: str
) -> None:
    config = bundle.config
    decoder, transform = Decoder(bundle.codec(), config.dims), ActionTransform(config.control, config.dims)
    module: Exportable
    if kind == "draft":
        draft = DraftModel(HiddenDraftConfig(width=16, mlp_width=32), config.dims, config.hidden)
        module = Propose(draft, decoder, transform)
    else:
        head = build_head(HeadConfig("conditioned", feature=16, width=8, embedding=4), config.dims, config.hidden)
        module = Predict(head, decoder, transform)
    randomise(module)
    module.eval().requires_grad_(False)
    (file,) = export_onnx(module, "dynamic", tmp_path / "graph.onnx")
    inputs = example_inputs(module.signature, 3)
    if kind == "head":
        inputs["condition"] = torch.randint(0, config.dims.K, inputs["condition"].shape)
    found = NetworkSession(file, module.signature).run(inputs)
    torch.testing.assert_close(found, OrtSession(file, module.signature, CPU).run(inputs), atol=1e-4, rtol=1e-5)


def test_a_wrong_shape_is_seen(tmp_path: Path) -> None:
    """The comparison with what TensorRT infers is not idle."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    file = tmp_path / "graph.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]), file)
    network = Network(file, {"x": (3, 4)})
    assert network.run({"x": -torch.ones(3, 4)})["y"].abs().max() == 0
    with pytest.raises(AssertionError, match=r"x is \(torch.float32, \(2, 4\)\); TensorRT infers"):
        network.run({"x": torch.ones(2, 4)})
    with pytest.raises(AssertionError, match=r"x is \(torch.float16, \(3, 4\)\); TensorRT infers"):
        network.run({"x": torch.ones(3, 4, dtype=torch.float16)})
