"""A network in between: passes bytes on, half a round trip later, in either direction.

python -m examples.serving.proxy --to 127.0.0.1:8000 --port 8001 --rtt 50
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial


@contextlib.asynccontextmanager
async def proxy(host: str, port: int, rtt_ms: float, listen: int = 0) -> AsyncIterator[int]:
    """The port of a proxy on loopback to host:port. A connection ends when either end of it does."""

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        later = partial(asyncio.get_running_loop().call_later, rtt_ms / 2e3)
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 20):
                later(target.write, data)
        later(target.close)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, port)
        await asyncio.gather(forward(reader, back), forward(there, writer))

    async with await asyncio.start_server(connected, "127.0.0.1", listen) as server:
        yield server.sockets[0].getsockname()[1]


async def run(host: str, port: int, rtt_ms: float, listen: int) -> None:
    """Until it is ended."""
    async with proxy(host, port, rtt_ms, listen) as here:
        print(f"127.0.0.1:{here} -> {host}:{port}, {rtt_ms:g} ms a round trip", flush=True)
        await asyncio.Event().wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, help="HOST:PORT of the server")
    parser.add_argument("--port", type=int, default=0, help="listen here; 0: any that is free")
    parser.add_argument("--rtt", type=float, default=50, help="ms that a round trip takes longer")
    given = parser.parse_args(arguments)
    host, _, port = given.to.rpartition(":")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(host, int(port), given.rtt, given.port))


if __name__ == "__main__":
    main()
