"""ONNX graphs: standard, of the signature's ports, of the asked precision, and equal to their module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, PRECISIONS, Component, HeadConfig, Precision
from rsd_trt.errors import UserError, missing_extra
from rsd_trt.export import to_onnx
from rsd_trt.export.to_onnx import OPSET, example_inputs, export_onnx
from rsd_trt.manifest import Batch, File, folder_of, read_manifest
from rsd_trt.models.codec import Codec, Decoder
from rsd_trt.models.components import ActionTransform, Predict
from rsd_trt.models.head import build_head
from rsd_trt.models.signature import Exportable, Signature
from rsd_trt.runtime.ort_session import OrtSession
from rsd_trt.runtime.session import TorchSession

CPU = torch.device("cpu")
ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
WEIGHTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def exported_file(bundle: Bundle, engines: Path, component: Component, precision: Precision, batch: Batch) -> Path:
    folder = folder_of(bundle, engines)
    artefact = read_manifest(folder, bundle).find(component, precision, batch, "onnx")
    assert artefact is not None
    (file,) = artefact.files  # weights of this size are embedded
    return folder / file.name


def wanted_ports(signature: Signature, batch: Batch) -> list[tuple[str, int, list[int | str]]]:
    first: int | str = 1 if batch == "1" else "B"
    return [
        (port.name, ELEMENTS[port.dtype], [first if dim == "B" else signature.sizes[dim] for dim in port.dims])
        for port in (*signature.inputs, *signature.outputs)
    ]


def found_ports(model: onnx.ModelProto) -> list[tuple[str, int, list[int | str]]]:
    found = []
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        found.append((value.name, tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "dynamic"])
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_graph_is_standard_and_has_the_ports_of_its_signature(
    bundle: Bundle, exported: Callable[..., Path], component: Component, precision: Precision, batch: Batch
) -> None:
    file = exported_file(bundle, exported(precision), component, precision, batch)
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert found_ports(model) == wanted_ports(bundle.component(component).signature, batch)
    content = file.read_bytes()
    for trace in (b".py", b'File "', str(Path(torch.__file__).parents[1]).encode(), str(Path.cwd()).encode()):
        assert trace not in content, "the graph tells about the machine that made it"


@pytest.mark.slow
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_is_in_the_graph_and_argmax_reads_float32(
    bundle: Bundle, exported: Callable[..., Path], component: Component, precision: Precision
) -> None:
    file = exported_file(bundle, exported(precision), component, precision, "dynamic")
    model = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.input)}
    read = {
        kind: {types[node.input[0]] for node in model.graph.node if node.op_type in kind}
        for kind in (("MatMul", "Gemm"), ("ArgMax",))
    }
    codec = {TensorProto.FLOAT} if component in ("decoder", "propose", "predict") else set()
    weights = {WEIGHTS[precision]} if component != "decoder" else set()
    assert read["MatMul", "Gemm"] == codec | weights
    assert read["ArgMax",] == ({TensorProto.FLOAT} if component in ("propose", "predict") else set())


def test_large_weights_stand_beside_the_graph(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = bundle.component("head")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (alone,) = export_onnx(module, "1", first / "alone.onnx")
    monkeypatch.setattr(to_onnx, "EMBED_BELOW", alone.stat().st_size // 2)
    files = export_onnx(module, "1", first / "head.onnx")
    assert [file.name for file in files] == ["head.onnx", "head.onnx.data"]
    assert files[0].stat().st_size < files[1].stat().st_size
    assert capfd.readouterr() == ("", ""), "the exporter is not quiet"
    model = onnx.load(files[0], load_external_data=False)
    places = {e.value for tensor in model.graph.initializer for e in tensor.external_data if e.key == "location"}
    assert places == {"head.onnx.data"}
    first.rename(second)
    inputs = example_inputs(module.signature, 1)
    moved = [File.of(second / file.name) for file in files]
    session = OrtSession(second / "head.onnx", module.signature, CPU, files=moved)
    torch.testing.assert_close(session.run(inputs), TorchSession(module).run(inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("component", ["head", "predict"])
def test_a_conditioned_head_gets_its_condition(
    bundle: Bundle, randomise: Callable[..., None], tmp_path: Path, component: str
) -> None:
    dims = bundle.config.dims
    head = build_head(HeadConfig("conditioned", feature=16, width=8, embedding=4), dims, bundle.config.hidden)
    randomise(head)
    predict = Predict(
        head, Decoder(Codec(bundle.config.codec, dims), dims), ActionTransform(bundle.config.control, dims)
    )
    module: Exportable = {"head": head, "predict": predict}[component].eval().requires_grad_(False)
    (file,) = export_onnx(module, "dynamic", tmp_path / "graph.onnx")
    assert found_ports(onnx.load(file)) == wanted_ports(module.signature, "dynamic")
    session = OrtSession(file, module.signature, CPU)
    inputs = example_inputs(module.signature, 3)
    results = []
    for level in (0, dims.K - 1):
        inputs["condition"] = torch.full_like(inputs["condition"], level)
        results.append({name: value.clone() for name, value in session.run(inputs).items()})
        torch.testing.assert_close(results[-1], TorchSession(module).run(inputs), atol=1e-5, rtol=1e-5)
    key = "logits" if component == "head" else "tokens"
    assert not torch.equal(results[0][key], results[1][key]), "the condition is idle"


def broken_graph(kind: str) -> onnx.ModelProto:
    """One node x -> y, wrong in one way."""
    domain = "com.acme" if kind == "domain" else ""
    node = helper.make_node("Mish" if kind == "type" else "Relu", ["x" if kind != "name" else "nothing"], ["y"])
    node.domain = domain
    element = TensorProto.BFLOAT16 if kind == "type" else TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, element, [2]) for name in "xy")
    opsets = [helper.make_opsetid("", OPSET + (kind == "opset"))]
    opsets += [helper.make_opsetid(domain, 1)] if domain else []
    return helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("name", "is not valid ONNX: "),
        ("type", "is not valid ONNX: "),
        ("domain", r"custom domains \['com.acme'\]; wanted opset 18 alone"),
        ("opset", r"has opsets {'': 19} and custom domains \[\]; wanted opset 18 alone"),
    ],
)
def test_a_graph_that_is_not_standard_is_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    program = SimpleNamespace(model_proto=broken_graph(kind))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    with pytest.raises(UserError, match=message) as error:
        export_onnx(bundle.component("decoder"), "1", tmp_path / "graph.onnx")
    assert str(error.value).startswith(f"{tmp_path / 'graph.onnx'} ")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_says_what_to_install(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        export_onnx(bundle.component("decoder"), "1", tmp_path / "graph.onnx")
    assert str(error.value) == str(missing_extra(package, "export"))


def test_example_inputs_repeat(bundle: Bundle) -> None:
    signature = bundle.component("predict").signature
    first, again, other = (example_inputs(signature, 2, seed) for seed in (0, 0, 1))
    assert {name: (tuple(x.shape), str(x.dtype)) for name, x in first.items()} == {
        port.name: (signature.shape(port, 2), f"torch.{port.dtype}") for port in signature.inputs
    }
    np.testing.assert_array_equal(first["hidden"], again["hidden"])
    assert not torch.equal(first["hidden"], other["hidden"])
