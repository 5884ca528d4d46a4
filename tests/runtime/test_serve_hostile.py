"""Hostile frames over all protocols: the server lives, tells nothing of its insides, keeps no memory, and answers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import SIDE, Client, process, request
from websockets.exceptions import ConnectionClosed, InvalidMessage
from websockets.sync.client import connect

from rsd_trt.errors import UserError
from rsd_trt.runtime.serve.arrays import arrays, pack, to_json, unpack

GROWTH = 20 << 20  # bytes, from a tenth of the frames to all
UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)

Random = np.random.Generator


def array(random: Random) -> object:
    """An array's map that lies."""
    keys = (
        [b"__ndarray__", b"data", b"dtype", b"shape"]
        if random.random() < 0.5
        else ["__ndarray__", "data", "dtype", "shape"]
    )
    pick = lambda *values: values[random.integers(len(values))]  # noqa: E731
    data = pick(b"", bytes(3 * SIDE * SIDE), b"x" * 7, "text", 5, None)
    dtype = pick("|u1", "<f8", "|O", "|V8", "<c16", "<M8[s]", "u1,u1", "<U4", "", 3, b"|u1", "|u1" * 99)
    shape = pick([SIDE, SIDE, 3], [-1], [1 << 40], [1 << 31] * 6, [0, 1 << 31], [2.5], "3", None, [[3]], [], [1] * 9)
    return dict(zip(keys, (True, data, dtype, shape), strict=True))


def frame(random: Random) -> bytes | str:
    """A frame of openpi's protocol, made hostile."""
    kind = random.integers(12)
    good = pack(request(int(random.integers(256)), prompt="go"))
    if kind == 0:
        return good[: random.integers(len(good))]
    if kind == 1:
        damaged = bytearray(good)
        for place in random.integers(0, len(good), random.integers(1, 9)):
            damaged[place] = random.integers(256)
        return bytes(damaged)
    if kind == 2:
        return random.bytes(random.integers(0, 200))
    if kind == 3:
        depth = int(random.choice([5, 20, 500, 5000]))
        return bytes([random.choice([0x91, 0x81])]) * depth + b"\x01"
    if kind == 4:
        head = random.choice([0xC6, 0xDD, 0xDF, 0xDB, 0xC9])
        return bytes([head]) + struct.pack(">I", int(random.choice([1 << 30, (1 << 32) - 1]))) + b"x" * 10
    if kind == 5:
        return random.choice(["", "hello", "{}", '{"endpoint": "infer"}', "\x00" * 50])
    if kind == 6:
        return pack(
            request() | {str(random.choice(["observation/image", "observation/state", "prompt"])): array(random)}
        )
    if kind == 7:
        image = {
            "__image__": True,
            "format": str(random.choice(["png", "jpeg", "raw", "gif"])),
            "data": random.bytes(50),
        }
        return pack(request() | {"observation/image": image})
    if kind == 8:
        wrong = random.choice([-1, 1 << 62, 3])
        return pack(request() | {str(random.choice(["executed", "request", "session_id", "condition"])): int(wrong)})
    if kind == 9:
        return pack(request() | {"endpoint": str(random.choice(["", "kill", "full", "reset", "__class__"]))})
    if kind == 10:
        return pack(random.choice([0, 1]).item()) if random.random() < 0.5 else pack([[]] * 50)
    return pack({str(i): None for i in range(int(random.choice([10, 4000])))})


def vla_eval(random: Random) -> bytes | str:
    """A frame of vla-eval's."""
    inner = frame(random)
    if isinstance(inner, str) or random.random() < 0.3:
        return inner
    kind = str(random.choice(["hello", "observation", "episode_start", "action", ""]))
    try:
        payload = unpack(inner)
        return pack({"type": kind, "payload": payload, "seq": int(random.integers(-2, 5)), "timestamp": 0.0}, keys=str)
    except (UserError, TypeError, ValueError, OverflowError):
        return inner


def body(random: Random) -> bytes:
    """A body for /act."""
    good = to_json({"full_image": np.zeros((SIDE, SIDE, 3), np.uint8), "state": np.zeros(8), "instruction": "go"})
    kind = random.integers(6)
    if kind == 0:
        return good[: random.integers(len(good))]
    if kind == 1:
        return b"[" * int(random.choice([10, 100_000]))
    if kind == 2:
        return random.bytes(random.integers(0, 100))
    if kind == 3:
        return json.dumps({"encoded": random.choice(["{", "[]", "null", good.decode()[:-3]])}).encode()
    if kind == 4:
        return json.dumps({"full_image": {"__numpy__": "AAA", "dtype": "|O", "shape": [1 << 40]}}).encode()
    return b'{"full_image": ' + b"9" * 6000 + b"}"


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024


class Attack:
    """Sends hostile frames, and looks at what comes back."""

    def __init__(self, port: int) -> None:
        self.port, self.sent = port, 0

    def frames(self, path: str, make: Callable[[Random], bytes | str], random: Random, count: int) -> None:
        """On one connection after the other, as the server closes them."""
        while count > 0:
            with contextlib.ExitStack() as stack:
                line = stack.enter_context(
                    connect(f"ws://127.0.0.1:{self.port}{path}", compression=None, max_size=None)
                )
                with contextlib.suppress(ConnectionClosed):
                    if not path:
                        line.recv(20)
                    while count > 0:
                        count, self.sent = count - 1, self.sent + 1
                        line.send(make(random))
                        if path:  # not everything is answered there: what comes behind it is
                            line.send(pack({"type": "hello", "payload": {}, "seq": 1 << 40, "timestamp": 0}, keys=str))
                            while self.harmless(line.recv(20)).get("seq") != 1 << 40:
                                pass
                        else:
                            self.harmless(line.recv(20))

    def harmless(self, reply: str | bytes) -> dict[str, object]:
        text = reply if isinstance(reply, str) else reply.decode("latin-1")
        assert "Traceback" not in text
        assert 'File "' not in text
        return {} if isinstance(reply, str) else arrays(unpack(reply))  # type: ignore[return-value]

    def bodies(self, random: Random, count: int) -> None:
        for _ in range(count):
            self.sent += 1
            content = body(random)
            head = f"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            with socket.create_connection(("127.0.0.1", self.port), 20) as raw:
                raw.sendall(head.encode() + content)
                answer = b"".join(iter(lambda: raw.recv(65536), b""))
            assert b"Traceback" not in answer
            assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 503"))

    def raw(self, random: Random, count: int) -> None:
        """What no library sends: 1 GiB announced, frames that break the protocol, sockets that fall silent."""
        for i in range(count):
            self.sent += 1
            with socket.create_connection(("127.0.0.1", self.port), 20) as raw:
                if i % 4 == 0:
                    raw.sendall(random.bytes(100))
                else:
                    raw.sendall(UPGRADE.format(path="/" if i % 4 == 1 else "/vla-eval").encode())
                    raw.recv(4096)
                    frames = (
                        b"\x82\xff" + struct.pack(">Q", 1 << 30) + bytes(100),
                        b"\x82\xff" + struct.pack(">Q", (1 << 63) - 1) + bytes(8),
                        b"\x02\x81\x00\x00\x00\x00a" * 50,
                        b"\xf2\x81" + random.bytes(20),
                        b"\x82\x05hello",
                        b"\x81\x84\x00\x00\x00\x00\xff\xfe\xff\xfe",
                    )
                    raw.sendall(frames[random.integers(len(frames))])
                if i % 3 == 0:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed

    def answers(self) -> None:
        """A well-behaved client is served as ever."""
        client = Client(self.port)
        actions = client.infer(request(30))["actions"]
        assert isinstance(actions, np.ndarray)
        np.testing.assert_allclose(actions[:, 0], [0.03, 0.04], atol=1e-6)
        client.close()

    def round(self, seed: int, count: int) -> None:
        random = np.random.default_rng(seed)
        self.frames("", frame, random, count * 5 // 10)
        self.frames("/vla-eval", vla_eval, random, count * 3 // 10)
        self.bodies(random, count // 10)
        with contextlib.suppress(InvalidMessage):
            self.raw(random, count // 10)
        self.answers()


@contextlib.contextmanager
def lingering(port: int, count: int) -> Iterator[None]:
    """Sockets that say nothing, or a letter of a request now and then."""
    sockets = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(count)]
    stop = threading.Event()

    def drip() -> None:
        for letter in "GET / HTTP/1.1\r\nX-Slow: " + "x" * 10_000:
            if stop.wait(0.2):
                return
            for one in sockets[::2]:
                with contextlib.suppress(OSError):
                    one.sendall(letter.encode())

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for one in sockets:
            one.close()


@pytest.mark.parametrize("frames", [pytest.param(1000), pytest.param(100_000, marks=pytest.mark.slow)])
def test_hostile_frames(frames: int) -> None:
    with process() as (port, server), lingering(port, 50):
        attack = Attack(port)
        attack.answers()
        part = frames // 10
        sizes = []
        for i in range(10):
            attack.round(i, part)
            sizes.append(resident(server.pid))
        assert server.poll() is None
        assert attack.sent >= frames
        assert sizes[-1] - sizes[0] < GROWTH, sizes
        print(f"{attack.sent} hostile frames; memory {sizes[0] >> 20} MiB after a tenth, {sizes[-1] >> 20} after all")


@pytest.mark.slow
def test_a_socket_that_never_says_what_it_wants_is_closed() -> None:
    with process() as (port, _), socket.create_connection(("127.0.0.1", port), 20) as raw:
        raw.sendall(b"GET / HT")
        raw.settimeout(30)
        started = time.monotonic()
        assert raw.recv(100) == b""
        assert 4 < time.monotonic() - started < 20


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains(how: signal.Signals) -> None:
    """What is under way is answered; what comes behind it is refused; the process ends."""
    with process("0.6") as (port, server):
        client, other = Client(port), Client(port)
        client.infer(request())
        answer: dict[str, object] = {}
        asking = threading.Thread(target=lambda: answer.update(client.infer(request(100, 255))))
        asking.start()
        time.sleep(0.2)
        os.kill(server.pid, how)
        time.sleep(0.1)
        assert other.send(request()) == "the server is stopping"
        asking.join(10)
        assert answer["outcome"] == "rejected"
        assert server.wait(10) == 0


def test_a_second_signal_cuts_off_what_is_under_way() -> None:
    """And says so, instead of a traceback."""
    with process("1") as (port, server):
        client = Client(port)
        client.socket.send(pack(request()))
        time.sleep(0.3)
        os.kill(server.pid, signal.SIGINT)
        time.sleep(0.1)
        os.kill(server.pid, signal.SIGINT)
        with pytest.raises(ConnectionClosed):
            client.socket.recv(10)
        assert server.wait(10) == 0
        assert server.stdout is not None
        assert server.stdout.read() == "(True, 1)\n"


def test_a_killed_server_leaves_no_wrong_chunk() -> None:
    """Killed and started again under load: clients get an error, or what they asked for."""
    with process("0.05") as (port, server):
        clients = [Client(port) for _ in range(4)]
        wrong: list[object] = []

        def ask(client: Client, first: int) -> None:
            with contextlib.suppress(ConnectionClosed, ConnectionError, TimeoutError, EOFError):
                while True:
                    actions = client.infer(request(first, 255))["actions"]
                    assert isinstance(actions, np.ndarray)
                    if abs(actions[0, 0] - first / 1000) > 1e-6:
                        wrong.append(actions)

        threads = [threading.Thread(target=ask, args=(client, 10 * i)) for i, client in enumerate(clients)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        server.kill()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert not wrong
    with process() as (port, _):
        assert Client(port).infer(request())["outcome"] == "start"
