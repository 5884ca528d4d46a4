"""The server: one port, several protocols, drained at its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hmac
import logging
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from rsd_trt.errors import UserError
from rsd_trt.runtime.serve.protocols import Openpi, VlaEval, act
from rsd_trt.runtime.serve.service import ServeOptions, Service
from rsd_trt.runtime.serve.worker import Broken

log = logging.getLogger(__name__)

VLA_EVAL = "/vla-eval"
PATIENCE = 10.0  # s that a client may take for the head of a request
DRAINING = 30.0  # s that requests under way may take at the end
KEPT = 32 << 20  # bytes of free memory that are kept
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
PING = 20.0  # s between pings
PONG = 120.0  # s that a client may be silent: it is not read from while its query is computed, which warms up at first
PART = 64 << 10  # bytes of what was read that are looked at before frames are counted
MOST_QUEUED = 1000  # frames of a client that does not wait for its replies


class PatientHttp(H11Protocol):
    """uvicorn's HTTP, which waits for the head of a request for ever, with an end to its patience."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._before: object = self  # the request at the last look: none is this
        self.loop.call_later(PATIENCE / 2, self._hurry)

    def _hurry(self) -> None:
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        waiting = self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)
        if waiting and self._before is self.cycle:
            self.transport.close()
            return
        self._before = self.cycle
        self.loop.call_later(PATIENCE / 2, self._hurry)


class Websocket:
    """uvicorn's websocket, which reads into memory that is there already, and more than 256 kB at a time.

    Non-obvious: no subclass of uvicorn's. An asyncio.Protocol is never asked for its buffer by uvloop.
    """

    _read = memoryview(bytearray(1 << 20))  # of all connections: it is emptied before anything else is read

    def __init__(self, **given: Any) -> None:
        self._protocol = WebSocketsSansIOProtocol(**given)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._read

    def buffer_updated(self, nbytes: int) -> None:
        protocol = self._protocol
        for start in range(0, nbytes, PART):
            protocol.data_received(self._read[start : min(start + PART, nbytes)])  # type: ignore[arg-type]  # copies it
            if protocol.queue.qsize() > MOST_QUEUED:  # of tiny frames one read holds 175,000: a second's work
                protocol.transport.abort()
            if protocol.transport.is_closing():
                return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol, name)


class Server(uvicorn.Server):
    """uvicorn, which drains at the first signal and leaves at the second."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self.unanswered = 0  # requests that the end cut off

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.unanswered = self._service.worker.working
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._watch_loading())

    async def _watch_loading(self) -> None:
        """Ends the server if the policy cannot be loaded."""
        while not self._service.worker.ready.is_set():
            await asyncio.sleep(0.02)
        if self._service.worker.error is not None:
            self.should_exit = True
        else:
            log.info("ready")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.stopping or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._service.stopping = True
        self._loop.call_soon_threadsafe(lambda: self._loop and self._loop.create_task(self._drain()))

    async def _drain(self) -> None:
        """Answers what is under way, then ends."""
        end = asyncio.get_running_loop().time() + DRAINING
        while self._service.worker.working and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # for the last replies to be written
        self.should_exit = True


def application(service: Service) -> Starlette:
    """The ASGI application."""

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            why = refusal(request, service.options)
            try:
                return await answer(request) if why is None else PlainTextResponse(f"{why[1]}\n", why[0])
            except Exception:
                log.exception("a request broke")
                return PlainTextResponse(f"{service.failed(Broken('the server broke on this request'))}\n", 500)

        return checked

    async def alive(request: Request) -> Response:
        return PlainTextResponse("OK\n")

    async def ready(request: Request) -> Response:
        return PlainTextResponse("ready\n") if service.ready else PlainTextResponse("not ready\n", 503)

    async def health(request: Request) -> Response:  # vla-eval's
        return JSONResponse({"status": "ok"}) if service.ready else JSONResponse({"status": "loading"}, 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    async def post_act(request: Request) -> Response:
        return await act(service, request)

    async def connect(websocket: WebSocket) -> None:
        why = refusal(websocket, service.options)
        try:
            if why is None:
                service.check_ready()
                service.sessions.connect(websocket)
        except UserError as error:
            why = 503, service.failed(error)
        if why is not None:
            await websocket.send_denial_response(PlainTextResponse(f"{why[1]}\n", why[0]))
            return
        try:
            await websocket.accept()
            protocol = VlaEval if websocket.url.path.rstrip("/") == VLA_EVAL else Openpi
            await protocol(service, websocket).run()
        except WebSocketDisconnect:
            log.debug("the other end hung up")
        except Exception:
            log.exception("a connection broke")
            service.failed(Broken("the server broke on this connection"))
        finally:
            await service.disconnect(websocket)

    return Starlette(
        routes=[
            Route("/healthz", alive),
            Route("/readyz", ready),
            Route("/health", health),
            Route("/metrics", guarded(metrics)),
            Route("/act", guarded(post_act), methods=["POST"]),
            WebSocketRoute("/{path:path}", connect),
        ]
    )


def refusal(connection: HTTPConnection, options: ServeOptions) -> tuple[int, str] | None:
    """Status and reason, where a connection is not to be served: it has no key, or comes from a web page."""
    if "origin" in connection.headers:
        return 403, "web pages are not served"
    given = connection.headers.get("authorization", "")
    if options.api_key is not None and not any(
        hmac.compare_digest(given.encode(), f"{scheme} {options.api_key}".encode()) for scheme in ("Api-Key", "Bearer")
    ):
        return 401, "the header Authorization: Api-Key KEY is missing or wrong"
    return None


def listen(options: ServeOptions) -> socket.socket:
    """The port, taken.

    Raises:
        UserError: it cannot be.
    """
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listening = socket.create_server((options.host, options.port), family=family, backlog=512)
        # asyncio does so for sockets that it made. Without it a reply may wait 40 ms until the one before is confirmed.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{options.host}:{options.port} cannot be listened on: {reason}", "Choose another --port"
        ) from None


def build(service: Service) -> Server:
    """The server, whose `run([socket])` blocks until it is ended."""
    config = uvicorn.Config(
        application(service),
        http=PatientHttp,
        ws=Websocket,  # type: ignore[arg-type]
        ws_max_size=service.options.max_message,
        ws_ping_interval=PING,
        ws_ping_timeout=PONG,
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        log_level="critical",  # what others send is counted, and not worth a line each; our own logger tells bugs
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    return Server(config, service)


def keep_memory() -> None:
    """Has glibc keep the memory of a request for the next. By default it goes back to the system with each: with two
    frames of 256 pixels 70 page faults a query, a fifth of the server's time."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, KEPT)


def serve(service: Service, listening: socket.socket) -> tuple[bool, int]:
    """Serves until a signal ends it, or until the policy turns out not to be loadable -> whether the policy's thread
    has ended, too: it may be in the middle of loading; and how many requests were under way and not answered.

    Raises:
        UserError: the policy cannot be loaded.
    """
    keep_memory()
    service.worker.start()
    server = build(service)
    try:
        server.run([listening])
    finally:
        service.stopping = True
        ended = service.worker.stop()
    if service.worker.error is not None:
        raise service.worker.error
    return ended, server.unanswered
