"""The TensorRT run path: every name it uses exists in the installed bindings, and a double of them is driven right."""

from __future__ import annotations

import ast
import ctypes
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import rsd_trt
from rsd_trt.bundle import Bundle
from rsd_trt.config import MAX_BATCH
from rsd_trt.errors import UserError
from rsd_trt.models.signature import Signature
from rsd_trt.runtime import trt_session
from rsd_trt.runtime.session import Launch
from rsd_trt.runtime.trt_session import TrtSession
from rsd_trt.trt import Distribution

trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)

CPU = torch.device("cpu")
FILES = [Path(rsd_trt.__file__).parent / name for name in ("runtime/trt_session.py", "export/to_engine.py")]

# The class behind each variable of the two files.
CLASSES: dict[str, object] = {
    "trt": trt,
    "builder": trt.Builder,
    "network": trt.INetworkDefinition,
    "tensor": trt.ITensor,
    "parser": trt.OnnxParser,
    "config": trt.IBuilderConfig,
    "profile": trt.IOptimizationProfile,
    "cache": trt.ITimingCache,
    "serialised": trt.IHostMemory,
    "runtime": trt.Runtime,
    "loaded": trt.ICudaEngine,
    "inspector": trt.EngineInspector,
    "context": trt.IExecutionContext,
    "self.logger": trt.Logger,
    "self.runtime": trt.Runtime,
    "self.engine": trt.ICudaEngine,
}
RESULTS = {"get_timing_cache": trt.ITimingCache}  # of calls that are used without a name
TORCH = {"tensor.data_ptr"}  # torch's tensors have the name too


def owner(node: ast.expr) -> object | None:
    """The class, enum or module that an expression is, if it is one of TensorRT's."""
    if (name := ast.unparse(node)) in CLASSES:
        return CLASSES[name]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and owner(node.func.value) is not None:
        return RESULTS[node.func.attr]
    if isinstance(node, ast.Attribute) and (parent := owner(node.value)) is not None:
        return getattr(parent, node.attr, None)
    return None


def walk(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text("utf-8")))


def of_tensorrt(node: ast.AST) -> bool:
    """Whether a node takes an attribute from something of TensorRT's."""
    return isinstance(node, ast.Attribute) and owner(node.value) is not None and ast.unparse(node) not in TORCH


def overloads(function: object) -> list[list[tuple[str, bool]]]:
    """Parameters (name, required) of each signature in a binding's docstring, without `self`."""
    documented = function.__init__ if isinstance(function, type) else function
    found = []
    for text in re.findall(r"^(?:\d+\. )?\w+\(self: .*\) -> .+$", str(documented.__doc__), re.MULTILINE):
        inside = text[text.index("(") + 1 : text.rindex(") ->")]
        parts = re.split(r", (?=\w+: )", inside)[1:]
        found.append([(part.split(":")[0], " = " not in part) for part in parts])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_name_exists_in_the_installed_bindings(file: Path) -> None:
    used = [node for node in walk(file) if of_tensorrt(node)]
    assert [ast.unparse(node) for node in used if not hasattr(owner(node.value), node.attr)] == []
    assert len({node.attr for node in used}) > 10, "the walk found next to nothing"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_call_fits_a_signature_of_the_installed_bindings(file: Path) -> None:
    calls = [node for node in walk(file) if isinstance(node, ast.Call) and of_tensorrt(node.func)]
    assert len(calls) > 6, "the walk found next to nothing"
    for call in calls:
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            continue
        given, keywords = len(call.args), {keyword.arg for keyword in call.keywords}
        known = overloads(getattr(owner(call.func.value), call.func.attr))
        fits = [
            given <= len(parameters)
            and keywords <= {name for name, _ in parameters[given:]}
            and all(name in keywords for name, required in parameters[given:] if required)
            for parameters in known
        ]
        assert any(fits), f"{ast.unparse(call)} fits none of {known}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_variable_of_tensorrt_is_in_the_table(file: Path) -> None:
    for node in walk(file):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and of_tensorrt(node.value.func):
            (target,) = node.targets
            assert ast.unparse(target) in CLASSES, f"{ast.unparse(node)}: add the variable to CLASSES"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (trt.Runtime.deserialize_cuda_engine, ["serialized_engine"]),
        (trt.ICudaEngine.create_execution_context, []),
        (trt.ICudaEngine.get_tensor_name, ["index"]),
        (trt.IExecutionContext.set_input_shape, ["name", "shape"]),
        (trt.IExecutionContext.set_tensor_address, ["name", "memory"]),
        (trt.IExecutionContext.execute_async_v3, ["stream_handle"]),
        (trt.IOptimizationProfile.set_shape, ["input", "min", "opt", "max"]),
    ],
)
def test_the_required_parameters_of_the_run_path(function: object, parameters: list[str]) -> None:
    assert parameters in [[name for name, required in found if required] for found in overloads(function)]


def test_the_real_bindings_refuse_a_file_that_is_no_engine(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "draft.engine"
    file.write_bytes(b"vtrt" + bytes(100))
    with pytest.raises(UserError) as error:
        TrtSession(file, bundle.component("draft").signature, CPU, Distribution("rtx", trt))
    assert str(error.value) == f"rtx {trt.__version__} cannot load {file}. Rebuild: rsd-trt export --force"


@dataclass
class Context:
    """An execution context: it enqueues an engine that writes ones wherever its outputs lie."""

    double: Double
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= MAX_BATCH

    def set_tensor_address(self, name: str, memory: int) -> None:
        self.addresses[name] = memory

    def execute_async_v3(self, stream: int) -> bool:
        self.double.enqueued.append((weakref.ref(self), stream))
        for port in self.double.signature.outputs:
            ctypes.memset(self.addresses[port.name], 1, 1)
        return self.double.enqueues


@dataclass
class Double:
    """The bindings' names. It keeps nothing that it hands out, as TensorRT and CUDA keep nothing."""

    signature: Signature
    ports: list[str] | None  # None: the engine cannot be deserialised
    enqueues: bool = True
    loaded: list[bytes] = field(default_factory=list)
    enqueued: list[tuple[weakref.ref[Context], int]] = field(default_factory=list)  # contexts and streams

    @property
    def distribution(self) -> Distribution:
        module = ModuleType("double")
        module.__version__ = "1.2.3"
        module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda *_: None})
        module.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=self.deserialize)
        return Distribution("rtx", module)

    def deserialize(self, content: bytes) -> object:
        self.loaded.append(content)
        if self.ports is None:
            return None
        return SimpleNamespace(
            num_io_tensors=len(self.ports),
            get_tensor_name=self.ports.__getitem__,
            create_execution_context=lambda: Context(self),
        )

    @property
    def context(self) -> Context:
        """The context that was enqueued last."""
        context = self.enqueued[-1][0]()
        assert context is not None, "a graph runs in the memory of an execution context that is gone"
        return context

    def capture(self, launch: Launch, _device: torch.device) -> SimpleNamespace:
        """A graph of what `launch` enqueues: like CUDA's, it knows addresses, and keeps neither launch nor context."""
        launch()
        recorded, stream = self.enqueued[-1]

        def replay() -> None:
            context = recorded()
            assert context is not None, "the graph is replayed in the memory of an execution context that is gone"
            context.execute_async_v3(stream)

        return SimpleNamespace(replay=replay)


@pytest.fixture
def open_double(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[TrtSession, Double]]:
    """open_double(ports, enqueues=True) -> a session of `predict` on the double."""

    def make(ports: list[str] | None, enqueues: bool = True) -> tuple[TrtSession, Double]:
        double = Double(bundle.component("predict").signature, ports, enqueues)
        monkeypatch.setattr(trt_session, "capture", double.capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
        file = tmp_path / "predict.engine"
        file.write_bytes(b"an engine")
        return TrtSession(file, double.signature, CPU, double.distribution), double

    return make


PORTS = ["finite", "hidden", "tokens", "actions"]


def test_an_engine_is_run_on_tensors_at_fixed_addresses(open_double: Callable[..., tuple[TrtSession, Double]]) -> None:
    session, double = open_double(PORTS)
    hidden = torch.randn(3, 32)
    outputs = session.run({"hidden": hidden})
    assert double.loaded == [b"an engine"]
    assert double.context.shapes == {"hidden": (3, 32)}
    buffers, _ = session._prepared[3]
    assert double.context.addresses == {name: x.data_ptr() for name, x in {**buffers.inputs, **outputs}.items()}
    assert torch.equal(buffers.inputs["hidden"], hidden)
    assert outputs["finite"][0], "what the engine wrote is not what the session returned"
    assert outputs["tokens"].flatten()[0] == 1
    session.run({"hidden": hidden})
    assert [stream for _, stream in double.enqueued] == [77] * 3  # the capture, then a replay for each run
    assert session.run({"hidden": hidden})["tokens"].data_ptr() == outputs["tokens"].data_ptr()


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        (None, "rtx 1.2.3 cannot load {file}. Rebuild: rsd-trt export --force"),
        (
            ["hidden", "tokens"],
            "{file} has the ports ['hidden', 'tokens'], not ['hidden', 'tokens', 'actions', 'finite']. "
            "Rebuild: rsd-trt export --force",
        ),
        (
            [*PORTS, "extra"],
            "{file} has the ports ['finite', 'hidden', 'tokens', 'actions', 'extra'], not "
            "['hidden', 'tokens', 'actions', 'finite']. Rebuild: rsd-trt export --force",
        ),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(
    open_double: Callable[..., tuple[TrtSession, Double]], tmp_path: Path, ports: list[str] | None, message: str
) -> None:
    with pytest.raises(UserError) as error:
        open_double(ports)
    assert str(error.value) == message.format(file=tmp_path / "predict.engine")


def test_a_larger_batch_than_an_engine_takes_is_refused(open_double: Callable[..., tuple[TrtSession, Double]]) -> None:
    session, _ = open_double(PORTS)
    with pytest.raises(UserError, match=r"the engine does not take a batch of 65 in hidden; exports take 1\.\.64"):
        session.run({"hidden": torch.zeros(MAX_BATCH + 1, 32)})


def test_each_batch_size_keeps_its_context(open_double: Callable[..., tuple[TrtSession, Double]]) -> None:
    session, double = open_double(PORTS)
    for batch in (1, 3, 1, 3):
        gc.collect()
        session.run({"hidden": torch.zeros(batch, 32)})
        assert double.context.shapes == {"hidden": (batch, 32)}


def test_a_failed_launch_is_not_silent(open_double: Callable[..., tuple[TrtSession, Double]]) -> None:
    session, _ = open_double(PORTS, enqueues=False)
    with pytest.raises(RuntimeError, match="could not enqueue"):
        session.run({"hidden": torch.zeros(1, 32)})
