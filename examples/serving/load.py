"""How fast a server answers, and whether it stays as it is: clients of openpi's protocol on loopback.

    python -m examples.serving.load --stub --clients 1 --queries 5000
    python -m examples.serving.load --clients 16 --seconds 30 --device cuda --backend graph
    python -m examples.serving.load --clients 8 --seconds 600 --rate 5

With --stub the policy takes no time: what is measured is the server, the protocol and the loopback. Each client is a
process of its own, which asks again as soon as it is answered, or --rate times a second. Prints one line of JSON:
milliseconds from before a request is packed until its reply is unpacked, over all clients and by tenth of the run, and
the server's memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rsd_trt.config import ControlConfig, Dims, RsdConfig

SIDE = 256
INSTRUCTIONS = ("pick up the black bowl on the stove and place it on the plate", "pick up the bowl")


def serve_stub() -> None:
    """Serves a policy that has its answer ready."""
    from rsd_trt.runtime.chunk import Chunk, Query
    from rsd_trt.runtime.loop import Main
    from rsd_trt.runtime.observation import Observation
    from rsd_trt.runtime.serve import server
    from rsd_trt.runtime.serve.interface import Interface
    from rsd_trt.runtime.serve.service import ServeOptions, Service
    from rsd_trt.runtime.speculate import Tokens

    class Stub:
        batch = 1
        actions = np.zeros((4, 7), np.float32)

        def answer(self, observations: Sequence[Observation], chunks: Sequence[Chunk]) -> list[Query]:
            return [Query(self.actions, "full") for _ in observations]

        def full(self, observations: Sequence[Observation], condition: Tokens | None) -> Main:
            raise NotImplementedError

        def instruction_rows(self, instruction: str) -> np.ndarray:
            raise NotImplementedError

        def warm_up(self, instruction: str) -> None:
            pass

    interface = Interface("stub", None, "baseline", 4, Dims(), RsdConfig(), ControlConfig(), SIDE, reads_state=True)
    service = Service(interface, Stub, ServeOptions(port=0, sessions=64))
    with server.listen(service.options) as listening:
        print(f"stub: ws://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        server.serve(service, listening)


@contextmanager
def started(stub: bool, options: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Address and process number of a server that is ready."""
    if stub:
        command = [sys.executable, "-m", "examples.serving.load", "--serve-stub"]
    else:
        run = "from rsd_trt.cli import main; main(prog_name='rsd-trt')"
        warm = [word for instruction in INSTRUCTIONS for word in ("--instruction", instruction)]
        command = [sys.executable, "-c", run, "serve", "--port", "0", *warm, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[1]
            while True:
                try:
                    urllib.request.urlopen(url.replace("ws:", "http:") + "/readyz", timeout=5)
                    break
                except OSError:
                    if server.poll() is not None:
                        raise SystemExit("the server ended") from None
                    time.sleep(0.1)
            yield url, server.pid
        finally:
            server.terminate()
            server.wait(60)


def ask(
    url: str,
    seed: int,
    queries: int | None,
    seconds: float | None,
    rate: float | None,
    out: multiprocessing.Queue,  # type: ignore[type-arg]
) -> None:
    """One client: when each of its queries was answered, how long that took, and without its own packing, in ms."""
    from websockets.sync.client import connect

    from rsd_trt.runtime.serve.arrays import arrays, pack, unpack

    random = np.random.default_rng(seed)
    frames = random.integers(0, 256, (8, 2, SIDE, SIDE, 3), np.uint8)
    state = random.uniform(-0.2, 0.2, 8)
    found: list[tuple[float, float, float]] = []
    with connect(url, compression=None, max_size=None) as line:
        line.recv()
        started = time.perf_counter()
        while len(found) < queries if queries else time.perf_counter() - started < (seconds or 0):
            seen = frames[len(found) // 3 % len(frames)]
            message = {
                "observation/image": seen[0],
                "observation/wrist_image": seen[1],
                "observation/state": state,
                "prompt": INSTRUCTIONS[seed % len(INSTRUCTIONS)],
            }
            if rate:
                time.sleep(max(0.0, started + len(found) / rate - time.perf_counter()))
            before = time.perf_counter()
            packed = pack(message)
            sending = time.perf_counter()
            line.send(packed)
            reply = line.recv()
            received = time.perf_counter()
            assert isinstance(reply, bytes), reply
            arrays(unpack(reply))
            after = time.perf_counter()
            found.append((after - started, (after - before) * 1e3, (received - sending) * 1e3))
    out.put(found)


def resident(pid: int) -> float:
    """MiB of memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def measure(
    url: str, pid: int, clients: int, queries: int | None, seconds: float | None, rate: float | None
) -> dict[str, object]:
    """What the clients found."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    processes = [context.Process(target=ask, args=(url, seed, queries, seconds, rate, out)) for seed in range(clients)]
    for process in processes:
        process.start()
    memory: list[float] = []
    waiting = len(processes)
    found: list[list[tuple[float, float, float]]] = []
    next_look = time.monotonic()
    while waiting:
        if time.monotonic() >= next_look:
            memory.append(round(resident(pid), 1))
            next_look += max(1.0, (seconds or 10) / 20)
        if not out.empty():
            found.append(out.get())
            waiting -= 1
        time.sleep(0.02)
    for process in processes:
        process.join()
    skipped = 20  # queries of each client, which meet new sockets and cold caches
    moments = np.concatenate([np.array(one[skipped:]) for one in found])
    moments = moments[moments[:, 0].argsort()]
    tenths = [part[:, 1] for part in np.array_split(moments, 10)]
    lasted = float(moments[-1, 0] - moments[0, 0])
    return {
        "clients": clients,
        "queries": len(moments),
        "p50_ms": round(float(np.percentile(moments[:, 1], 50)), 4),
        "p99_ms": round(float(np.percentile(moments[:, 1], 99)), 4),
        "p50_without_packing_ms": round(float(np.percentile(moments[:, 2], 50)), 4),
        "max_ms": round(float(moments[:, 1].max()), 3),
        "queries_per_s": round(len(moments) / lasted, 2),
        "p50_ms_by_tenth": [round(float(np.median(part)), 3) for part in tenths],
        "p99_ms_by_tenth": [round(float(np.percentile(part, 99)), 3) for part in tenths],
        "server_memory_mib": memory,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stub", action="store_true", help="a policy that takes no time")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--queries", type=int, help="of each client")
    parser.add_argument("--seconds", type=float, help="instead: how long")
    parser.add_argument("--rate", type=float, help="queries a second of each client; default: no pause")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--serve-stub", action="store_true", help="be the stub's server")
    given = parser.parse_args(arguments)
    if given.serve_stub:
        serve_stub()
        return
    if not given.queries and not given.seconds:
        given.queries = 5000
    with started(given.stub, ("--device", given.device, "--backend", given.backend)) as (url, pid):
        print(json.dumps(measure(url, pid, given.clients, given.queries, given.seconds, given.rate)))


if __name__ == "__main__":
    main()
