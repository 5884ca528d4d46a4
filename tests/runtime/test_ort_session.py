"""ONNX Runtime on the CPU: equal to PyTorch, on buffers that stay, and clear where it cannot run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, MAX_BATCH, Component
from rsd_trt.errors import UserError, installing, missing_extra
from rsd_trt.export.to_onnx import example_inputs
from rsd_trt.manifest import Batch, File, usable
from rsd_trt.models.signature import BATCH, Port, Signature
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.external_data import locations
from rsd_trt.runtime.ort_session import OrtSession
from rsd_trt.runtime.session import Session, TorchSession

CPU = torch.device("cpu")


Case = dict[Component, dict[str, Tensor]]


@pytest.fixture(scope="module")
def case(bundle: Bundle) -> Case:
    """Inputs of a batch of MAX_BATCH for every component."""
    return {name: example_inputs(bundle.component(name).signature, MAX_BATCH) for name in COMPONENTS}


@pytest.fixture(scope="module")
def open_ort(bundle: Bundle, exported: Callable[..., Path]) -> Callable[..., Session]:
    """open_ort(component, batch="dynamic") -> a session of the exported tiny bundle."""

    def make(component: Component, batch: Batch = "dynamic") -> Session:
        return Launcher(bundle, "ort", CPU, engines=exported("fp32")).open(component, batch)

    return make


def some(case: Case, component: Component, start: int, stop: int) -> dict[str, Tensor]:
    return {name: x[start:stop] for name, x in case[component].items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        exact = {"atol": 0.0, "rtol": 0.0}
        torch.testing.assert_close(
            found[name], value, **({"atol": 1e-5, "rtol": 0.0} if value.is_floating_point() else exact)
        )


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_equals_pytorch_at_any_batch_size(
    bundle: Bundle, case: Case, open_ort: Callable[..., Session], component: Component
) -> None:
    session, reference = open_ort(component), TorchSession(bundle.component(component))
    single = open_ort(component, "1")
    for start, stop in ((0, 1), (1, 4), (0, MAX_BATCH), (40, 43), (63, 64)):
        inputs = some(case, component, start, stop)
        expected = reference.run(inputs)
        assert_equal(session.run(inputs), expected)
        if stop - start == 1:
            assert_equal(single.run(inputs), expected)


def test_buffers_are_reused(case: Case, open_ort: Callable[..., Session]) -> None:
    session = open_ort("propose")
    first = session.run(some(case, "propose", 0, 3))
    before = {name: value.clone() for name, value in first.items()}
    session.run(some(case, "propose", 0, 5))  # another size has buffers of its own
    assert_equal(first, before)
    second = session.run(some(case, "propose", 3, 6))
    assert {name: x.data_ptr() for name, x in second.items()} == {name: x.data_ptr() for name, x in first.items()}
    assert not torch.equal(first["actions"], before["actions"]), "the second run did not overwrite the first"
    inputs = some(case, "propose", 0, 3)
    kept = inputs["frames"].clone()
    assert_equal(session.run(inputs), before)
    assert torch.equal(inputs["frames"], kept)


def test_what_does_not_fit_is_refused(open_ort: Callable[..., Session]) -> None:
    with pytest.raises(ValueError, match=r"hidden \[B, H=32\] float32 got \[2, 31\] torch.float32"):
        open_ort("head").run({"hidden": torch.zeros(2, 31)})


@pytest.fixture
def graph(bundle: Bundle, exported: Callable[..., Path]) -> Path:
    return usable(bundle, exported("fp32"), ("draft", "fp32", "1", "onnx"))[1]


@pytest.mark.parametrize(
    ("device", "available", "message"),
    [
        (
            "cpu",
            ["AzureExecutionProvider"],
            f"has no CPUExecutionProvider (it has AzureExecutionProvider). Install it: {installing('cpu')}",
        ),
        (
            "cuda",
            ["AzureExecutionProvider", "CPUExecutionProvider"],
            "has no CUDAExecutionProvider (it has AzureExecutionProvider, CPUExecutionProvider). "
            f"Install it: {installing('cuda')}",
        ),
    ],
)
def test_a_missing_provider_is_told(
    bundle: Bundle,
    graph: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    available: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    with pytest.raises(UserError) as error:
        OrtSession(graph, bundle.component("draft").signature, torch.device(device))
    assert str(error.value) == f"onnxruntime {onnxruntime.__version__} {message}"


def test_a_provider_that_was_not_taken_is_told(bundle: Bundle, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when CUDA's libraries cannot be loaded: ONNX Runtime then goes on with the CPU."""
    other = SimpleNamespace(get_providers=lambda: ["AzureExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: other)
    with pytest.raises(UserError) as error:
        OrtSession(graph, bundle.component("draft").signature, CPU)
    assert str(error.value) == (
        "onnxruntime took AzureExecutionProvider instead of CPUExecutionProvider, which cannot be loaded. "
        f"Install it: {installing('cpu')}"
    )


def test_what_onnxruntime_cannot_load_is_one_line(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "graph.onnx"
    for content, said in ((b"", f"onnxruntime {onnxruntime.__version__} cannot run {file}: "), (b"garbage", str(file))):
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            OrtSession(file, bundle.component("draft").signature, CPU)
        assert str(error.value).startswith(said)
        assert "\n" not in str(error.value)


def external(folder: Path, place: str, nested: bool = False) -> list[File]:
    """A graph y = x + w whose w lies in `place`, in a branch of an If if it is `nested`, and its files."""
    (folder / "w").write_bytes(np.ones(2, np.float32).tobytes())
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 2]) for name in "xy")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [], [y], [tensor])
    nodes = list(inner.node)
    if nested:
        true = onnx.helper.make_node("Constant", [], ["true"], value=onnx.helper.make_tensor("", 9, [], [1]))
        nodes = [true, onnx.helper.make_node("If", ["true"], ["y"], then_branch=inner, else_branch=inner)]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [] if nested else [tensor])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    return [File.of(folder / name) for name in ("graph.onnx", "w")]


ADD = Signature((Port("x", (BATCH, "two")),), (Port("y", (BATCH, "two")),), {"two": 2})


def test_external_weights_are_loaded_from_the_bytes_that_were_hashed(tmp_path: Path) -> None:
    files = external(tmp_path, "w")
    run = OrtSession(tmp_path / "graph.onnx", ADD, CPU, files=files).run
    assert run({"x": torch.ones(1, 2)})["y"].tolist() == [[2, 2]]
    (tmp_path / "w").write_bytes(np.zeros(2, np.float32).tobytes())  # after freshness was checked
    with pytest.raises(UserError, match=r"w was exchanged while it was loaded: its sha256 is .* Rebuild: "):
        OrtSession(tmp_path / "graph.onnx", ADD, CPU, files=files)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "w/../../secret", "v", ""])
def test_weights_outside_are_refused_by_us(place: str, nested: bool, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(8))
    files = external(tmp_path / "in", place, nested)
    with pytest.raises(UserError, match="which is no file of it"):
        OrtSession(tmp_path / "in" / "graph.onnx", ADD, CPU, files=files)


PLACES: dict[str, Callable[[onnx.ModelProto], onnx.TensorProto]] = {
    "an initializer": lambda m: m.graph.initializer.add(),
    "sparse values": lambda m: m.graph.sparse_initializer.add().values,
    "sparse indices": lambda m: m.graph.sparse_initializer.add().indices,
    "an attribute": lambda m: m.graph.node.add().attribute.add(f=1.5).t,
    "a list": lambda m: m.graph.node.add().attribute.add().tensors.add(),
    "a graph": lambda m: m.graph.node.add().attribute.add().g.initializer.add(),
    "graphs": lambda m: m.graph.node.add().attribute.add().graphs.add().initializer.add(),
    "a sparse attribute": lambda m: m.graph.node.add().attribute.add().sparse_tensor.values,
    "sparse attributes": lambda m: m.graph.node.add().attribute.add().sparse_tensors.add().values,
    "a function": lambda m: m.functions.add().node.add().attribute.add().t,
    "a function's default": lambda m: m.functions.add().attribute_proto.add().t,
    "training": lambda m: m.training_info.add().initialization.initializer.add(),
    "a training step": lambda m: m.training_info.add().algorithm.initializer.add(),
}


@pytest.mark.parametrize("place", PLACES)
def test_files_are_found_wherever_a_tensor_may_stand(place: str) -> None:
    model = onnx.ModelProto(ir_version=10)
    tensor = PLACES[place](model)
    tensor.external_data.add(key="offset", value="3")
    tensor.external_data.add(key="location", value="there")
    fixed = b"\x09" + bytes([0x3A] * 8) + b"\x0d" + bytes([0x3A] * 4)  # fields of 8 and 4 bytes that nobody knows
    assert locations(fixed + model.SerializeToString()) == {"there"}
    assert locations(onnx.ModelProto(ir_version=10).SerializeToString()) == set()


def test_what_is_no_graph_is_refused() -> None:
    nested = onnx.GraphProto()
    for _ in range(30):
        outer = onnx.GraphProto()
        outer.node.add().attribute.add().g.CopyFrom(nested)
        nested = outer
    deep = onnx.ModelProto(graph=nested).SerializeToString()
    for content, said in ((deep, "too deeply"), (b"\x3a\x05ab", "ends early"), (b"\x3a", "ends early")):
        with pytest.raises(ValueError, match=said):
            locations(content)
    with pytest.raises(ValueError, match="more than ten bytes"):
        locations(b"\xff" * 20)
    with pytest.raises(ValueError, match="of type 3"):
        locations(b"\x3b")


@given(data=st.data())
def test_a_damaged_graph_names_its_files(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    external(folder := tmp_path_factory.getbasetemp(), "w", nested=True)
    damaged = data.draw(damaged_bytes((folder / "graph.onnx").read_bytes()))
    try:
        found = locations(damaged)
    except ValueError:
        return
    try:
        model = onnx.ModelProto.FromString(damaged)
    except Exception:  # protobuf's decoder is stricter than ours has to be
        return
    tensors = [*model.graph.initializer, *(t for n in model.graph.node for a in n.attribute for t in a.g.initializer)]
    theirs = {e.value for tensor in tensors for e in tensor.external_data if e.key == "location"}
    assert theirs <= found


def test_onnxruntime_that_is_not_installed_is_told(
    bundle: Bundle, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for device, extra in (("cpu", "cpu"), ("cuda", "cuda")):
        with pytest.raises(UserError) as error:
            OrtSession(graph, bundle.component("draft").signature, torch.device(device))
        assert str(error.value) == str(missing_extra("onnxruntime", extra))
