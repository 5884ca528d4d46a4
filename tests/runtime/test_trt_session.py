"""The TensorRT run path: a double of the bindings is driven right. Their names are test_bindings.py's."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Protocol

import pytest
import torch

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


def test_the_real_bindings_refuse_a_file_that_is_no_engine(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "draft.engine"
    file.write_bytes(b"vtrt" + bytes(100))
    with pytest.raises(UserError) as error:
        TrtSession(file, bundle.component("draft").signature, CPU, Distribution("rtx", trt))
    told = str(error.value)
    assert told.startswith(f"rtx {trt.__version__} cannot load {file}: ")
    assert told.endswith(". Rebuild: rsd-trt export --force")
    assert "\n" not in told


class Logger(Protocol):
    """What the session gives to the runtime."""

    def log(self, severity: int, message: str) -> None: ...


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
        module.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})
        module.Runtime = self.runtime
        return Distribution("rtx", module)

    def runtime(self, logger: Logger) -> SimpleNamespace:
        return SimpleNamespace(deserialize_cuda_engine=partial(self.deserialize, logger))

    def deserialize(self, logger: Logger, content: bytes) -> object:
        self.loaded.append(content)
        if self.ports is None:
            logger.log(2, "a warning")
            logger.log(1, "magic tag\n does not match")
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
        (None, "rtx 1.2.3 cannot load {file}: magic tag does not match. Rebuild: rsd-trt export --force"),
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
