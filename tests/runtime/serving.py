"""Servers in a thread of the tests' own process, a stub policy, and a client of openpi's protocol."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from websockets.sync.client import ClientConnection, connect

from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, ControlConfig, Dims, Mode, RsdConfig
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.loop import Guess, Loop, Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve import server
from rsd_trt.runtime.serve.arrays import arrays, pack, unpack
from rsd_trt.runtime.serve.interface import Interface
from rsd_trt.runtime.serve.launch import ServedPolicy, open_service
from rsd_trt.runtime.serve.service import ServeOptions, Service
from rsd_trt.runtime.speculate import Tokens

SIDE = 8  # pixels, of the stub
STUB_DIMS = Dims(T=8, D=1, L=1, C=1, K=2)
STUB_RSD = RsdConfig(n_action_steps=2, tolerance=(0.005,) * ARM_DIMS)
STUB_CONTROL = ControlConfig(cameras=("front", "wrist"), camera_size=SIDE, rotate_images=True)


class Stub:
    """A policy without weights, in the real loop. The main head's chunk counts on from the first pixel; the draft says
    what the main head would, and disagrees where the second pixel is 255. `seconds`: of a full query. `closes`: the
    step of a chunk at which its gripper closes."""

    batch = 4

    def __init__(
        self, mode: Mode = "rsd", seconds: float = 0.0, rsd: RsdConfig | None = None, closes: int = STUB_DIMS.T
    ) -> None:
        rsd = rsd or STUB_RSD
        self.loop = Loop(STUB_DIMS, rsd, STUB_CONTROL.limits, mode, self.check, self.full)
        self.seconds, self.closes = seconds, closes
        self.full_queries: list[int] = []  # how many shared each
        self.warmed: list[str] = []
        self.hold = threading.Event()  # full queries wait for it
        self.hold.set()

    def answer(self, observations: Sequence[Observation], chunks: Sequence[Chunk]) -> list[Query]:
        return self.loop.query(observations, chunks)

    def warm_up(self, instruction: str) -> None:
        self.warmed.append(instruction)

    def instruction_rows(self, instruction: str) -> NDArray[np.float32]:
        return np.zeros((1, 1), np.float32)

    def check(self, observations: Sequence[Observation]) -> Guess:
        chunks = np.stack([_counted(x) for x in observations])
        for chunk, observation in zip(chunks, observations, strict=True):
            chunk[:, 0] += observation.images[0, 0, 1, 0] == 255
        size = len(observations)
        tokens = np.zeros((size, STUB_DIMS.T, 1, 1), np.int64)
        logits = np.zeros((size, STUB_DIMS.T, 1, STUB_DIMS.K), np.float32)
        return Guess(tokens, chunks, logits, np.ones(size, bool))

    def full(self, observations: Sequence[Observation], condition: Tokens | None) -> Main:
        if any(x.instruction == "break" for x in observations):
            raise RuntimeError("secret of the server")
        self.full_queries.append(len(observations))
        time.sleep(self.seconds)
        self.hold.wait(10)
        size = len(observations)
        tokens = np.zeros((size, STUB_DIMS.T, 1, 1), np.int64)
        chunks = np.stack([_counted(x) for x in observations])
        chunks[:, self.closes :, ARM_DIMS] = 1
        return Main(tokens, chunks, np.array([x.instruction != "nan" for x in observations]))


def _counted(observation: Observation) -> NDArray[np.float32]:
    """[T, A]: the first pixel / 1000, and 0.01 more a step; the gripper stays open."""
    chunk = np.zeros((STUB_DIMS.T, STUB_DIMS.A), np.float32)
    chunk[:, 0] = observation.images[0, 0, 0, 0] / 1000 + 0.01 * np.arange(STUB_DIMS.T)
    chunk[:, ARM_DIMS] = -1
    return chunk


def stub_service(stub: Stub | None = None, n: int = 2, mode: Mode = "rsd", **options: object) -> Service:
    interface = Interface(
        "stub",
        "stub",
        mode,
        n,
        STUB_DIMS,
        STUB_RSD,
        STUB_CONTROL,
        SIDE,
        reads_state=True,
        frames="rendered",
    )
    policy = stub or Stub(mode)
    return Service(interface, lambda: policy, ServeOptions(port=0, **options))  # type: ignore[arg-type]


def bundle_service(bundle: Bundle, **choices: object) -> Service:
    served = ServedPolicy(bundle=bundle.path, device="cpu", **choices)  # type: ignore[arg-type]
    return open_service(served, ServeOptions(port=0))


@contextlib.contextmanager
def running(service: Service) -> Iterator[int]:
    """The port of a server that is ready."""
    listening = server.listen(service.options)
    port: int = listening.getsockname()[1]
    running = server.build(service)
    service.worker.start()
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    try:
        assert service.worker.ready.wait(120)
        if service.worker.error is not None:
            raise service.worker.error
        while not running.started:
            time.sleep(0.005)
        yield port
    finally:
        running.should_exit = True
        thread.join(20)
        service.worker.stop()
        assert not thread.is_alive()


class Client:
    """openpi's protocol, as its client speaks it."""

    def __init__(self, port: int, path: str = "", headers: Mapping[str, str] | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self.socket: ClientConnection = self._stack.enter_context(
            connect(f"ws://127.0.0.1:{port}{path}", compression=None, max_size=None, additional_headers=headers)
        )
        self.metadata = arrays(unpack(self.socket.recv()))  # type: ignore[arg-type]

    def send(self, message: object) -> str | dict[str, object]:
        self.socket.send(message if isinstance(message, (bytes, str)) else pack(message))
        reply = self.socket.recv(20)
        return reply if isinstance(reply, str) else arrays(unpack(reply))  # type: ignore[return-value]

    def infer(self, message: object) -> dict[str, object]:
        reply = self.send(message)
        assert isinstance(reply, dict), reply
        return reply

    def close(self) -> None:
        self._stack.close()


def request(first: int = 0, second: int = 0, prompt: str = "go", **more: object) -> dict[str, object]:
    """A request to the stub."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[0, 0, 0], image[0, 1, 0] = first, second
    wrist = np.zeros((SIDE, SIDE, 3), np.uint8)
    state = np.zeros(8)
    return {
        "observation/image": image,
        "observation/wrist_image": wrist,
        "observation/state": state,
        "prompt": prompt,
        **more,
    }


def as_request(observation: Observation, control: ControlConfig) -> dict[str, object]:
    """An observation as LIBERO's clients send it: upright."""
    images = observation.images[:, ::-1, ::-1] if control.rotate_images else observation.images
    names = ("image", "wrist_image")
    return {
        **{f"observation/{name}": np.ascontiguousarray(x) for name, x in zip(names, images, strict=False)},
        "observation/state": observation.proprio.astype(np.float64),
        "prompt": observation.instruction,
    }


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A stub server in a process of its own: its port, and the process. arguments: `main` below."""
    command = [sys.executable, __file__, *arguments]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline()), server
            errors.seek(0)
            assert "Traceback" not in errors.read()
        finally:
            server.kill()


def first(reply: dict[str, object]) -> list[float]:
    """The first arm dimension of a reply's actions."""
    actions = reply["actions"]
    assert isinstance(actions, np.ndarray)
    return [round(float(x), 4) for x in actions[:, 0]]


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def main() -> None:
    """python serving.py [SECONDS OF A FULL QUERY]: serves a stub until a signal ends it."""
    service = stub_service(Stub(seconds=float(sys.argv[1]) if len(sys.argv) > 1 else 0.0), sessions=256)
    with server.listen(service.options) as listening:
        port = listening.getsockname()[1]
        threading.Thread(target=lambda: service.worker.ready.wait() and print(port, flush=True)).start()
        print(server.serve(service, listening))


if __name__ == "__main__":
    main()
