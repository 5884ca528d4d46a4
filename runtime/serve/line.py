"""A connection to an openpi server, from a client's side."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from rsd_trt.errors import UserError, missing_extra, reason, shown
from rsd_trt.records import differing
from rsd_trt.runtime.serve.arrays import BadMessage, arrays, pack, unpack

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

# Of the metadata: what a client goes by for as long as it runs.
TOLD = ("server", "fingerprint", "policy", "dims", "rsd", "control", "frames", "propose", "main", "conditioned")
MAX_REPLY = 64 << 20  # bytes
Message = Mapping[str, object]


class Unreachable(UserError):
    """The server cannot be reached, or did not answer in time."""


class Line:
    """A connection to an openpi server. It is made when it is needed, and again after it broke.

    A reply that was not awaited to its end takes the connection with it: it would be the next request's, and a server
    need not compute it.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.url, self.timeout_s = url, timeout_s
        self._headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        self._stack = ExitStack()
        self._socket: ClientConnection | None = None
        self._packed = b""
        self._turn = threading.Lock()  # a request is one thread's at a time
        self.metadata: dict[str, object] = {}

    @property
    def ours(self) -> bool:
        """Whether the server is one of `rsd-trt serve`."""
        return self.metadata.get("server") == "rsd-trt"

    def connect(self, end: float | None = None) -> None:
        """Whoever calls it closes the line where it fails. end: of `time.monotonic()`, until when; None: `timeout_s`
        from here.

        Raises:
            Unreachable: there is no server, or none that says what it serves.
            UserError: another policy is served than before, or in another way.
        """
        end = time.monotonic() + self.timeout_s if end is None else end
        try:
            from websockets.exceptions import InvalidStatus, WebSocketException
            from websockets.sync.client import connect
        except ImportError:
            raise missing_extra("websockets", "edge") from None
        try:
            self._socket = self._stack.enter_context(
                connect(
                    self.url,
                    compression=None,
                    max_size=MAX_REPLY,
                    open_timeout=_left(end),
                    close_timeout=0.5,
                    additional_headers=self._headers,
                )
            )
            metadata = _decoded(self._socket.recv(_left(end)))
        except (OSError, ValueError, WebSocketException, BadMessage) as error:
            why = reason(error)
            if isinstance(error, InvalidStatus) and error.response.body:
                why += f": {reason(ValueError(error.response.body.decode(errors='replace')))}"
            raise Unreachable(f"{self.url} cannot be reached: {why}") from None
        before, here = ({name: given.get(name) for name in TOLD} for given in (self.metadata or metadata, metadata))
        for name, old, new in differing(before, here):
            why = f"{self.url} serves {name} {shown(new)}, and served {shown(old)} before"
            raise UserError(why, "Start the client anew")
        self.metadata = metadata

    def close(self) -> None:
        self._stack.close()
        self._socket = None

    def hang_up(self) -> None:
        """Ends a request that is under way in another thread, whether it is being sent or its reply awaited."""
        if (line := self._socket) is not None:
            with suppress(OSError):  # it is over
                line.socket.shutdown(socket.SHUT_RDWR)

    def _break(self) -> None:
        """Closes it without a goodbye, which would be waited for."""
        self.hang_up()
        self.close()

    def ask(self, message: Message, since: float | None = None) -> dict[str, object]:
        """The reply to a request.

        since: of `time.monotonic()`, when the time for it began; None: here.

        Raises:
            Unreachable: none came in time.
            UserError: the server says that it cannot answer.
        """
        end = (time.monotonic() if since is None else since) + self.timeout_s
        with self._turn:
            try:
                reply = _decoded(self._answer(message, end))
            except BadMessage:  # it is an answer
                raise
            except BaseException:
                self._break()
                raise
        if reply.get("type") == "error":
            raise UserError(f"{self.url} says: {str(reply.get('message'))[:400]}")
        return reply

    def _answer(self, message: Message, end: float) -> str | bytes:
        from websockets.exceptions import WebSocketException
        from websockets.protocol import State

        if self._socket is not None and self._socket.protocol.state is not State.OPEN:
            self._break()  # the server did, while nothing was asked
        if self._socket is None:
            self.connect(end)
        assert self._socket is not None
        limit = threading.Timer(_left(end), self.hang_up)  # also of sending, which has none of its own
        limit.daemon = True
        limit.start()
        try:
            self._packed = pack(message)  # kept: memory that goes back to the system with each query costs 0.4 ms
            self._socket.send(self._packed)
            return self._socket.recv()
        except (OSError, WebSocketException) as error:
            if time.monotonic() >= end:
                raise Unreachable(f"{self.url} did not answer within {self.timeout_s:g} s") from None
            raise Unreachable(f"{self.url} hung up: {reason(error)}") from None
        finally:
            limit.cancel()


def _left(end: float) -> float:
    """Seconds until `end`; never none, which a library may take for no limit."""
    return max(0.001, end - time.monotonic())


def _decoded(frame: str | bytes) -> dict[str, object]:
    """A reply, or the metadata. Text is an error of the server's.

    Raises:
        BadMessage: it is no message, or an error.
    """
    if isinstance(frame, str):
        raise BadMessage(f"the server says: {frame.strip().splitlines()[-1][:400] if frame.strip() else 'nothing'}")
    message = arrays(unpack(frame))
    if not isinstance(message, dict):
        raise BadMessage(f"the server sent {type(message).__name__}, not a map")
    return message
