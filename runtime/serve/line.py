"""A connection to an openpi server, from a client's side."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
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

    Requests to a server of ours are numbered, and late replies dropped by their numbers; with any other server a reply
    that was not awaited to its end takes the connection with it.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.url, self.timeout_s = url, timeout_s
        self._headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        self._stack = ExitStack()
        self._socket: ClientConnection | None = None
        self._number, self._packed = 0, b""
        self._turn = threading.Lock()  # a request is one thread's at a time
        self.metadata: dict[str, object] = {}

    @property
    def ours(self) -> bool:
        """Whether the server is one of `rsd-trt serve`."""
        return self.metadata.get("server") == "rsd-trt"

    def connect(self) -> None:
        """Raises Unreachable, or UserError if another policy is served than before, or in another way."""
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
                    open_timeout=self.timeout_s,
                    close_timeout=0.5,
                    additional_headers=self._headers,
                )
            )
            metadata = _decoded(self._socket.recv(self.timeout_s))
        except (OSError, ValueError, WebSocketException, BadMessage) as error:
            self.close()
            why = reason(error)
            if isinstance(error, InvalidStatus) and error.response.body:
                why += f": {reason(ValueError(error.response.body.decode(errors='replace')))}"
            raise Unreachable(f"{self.url} cannot be reached: {why}") from None
        before, here = ({name: given.get(name) for name in TOLD} for given in (self.metadata or metadata, metadata))
        for name, old, new in differing(before, here):
            self.close()
            why = f"{self.url} serves {name} {shown(new)}, and served {shown(old)} before"
            raise UserError(why, "Start the client anew")
        self.metadata = metadata

    def close(self) -> None:
        self._stack.close()
        self._socket = None

    def ask(self, message: Message) -> dict[str, object]:
        """The reply to a request.

        Raises:
            Unreachable: none came in time.
            UserError: the server says that it cannot answer.
        """
        with self._turn:
            return self._ask(message)

    def _ask(self, message: Message) -> dict[str, object]:
        from websockets.exceptions import WebSocketException

        end = time.monotonic() + self.timeout_s
        if self._socket is None:
            self.connect()
        assert self._socket is not None
        self._number += 1
        numbered = {**message, "request": self._number} if self.ours else message
        try:
            self._packed = pack(numbered)  # kept: memory that goes back to the system with each query costs 0.4 ms
            self._socket.send(self._packed)
            while True:
                reply = _decoded(self._socket.recv(max(0.001, end - time.monotonic())))
                if not self.ours or reply.get("request") == self._number:
                    break
        except TimeoutError:
            if not self.ours:
                self.close()
            raise Unreachable(f"{self.url} did not answer within {self.timeout_s:g} s") from None
        except (OSError, WebSocketException) as error:
            self.close()
            raise Unreachable(f"{self.url} hung up: {reason(error)}") from None
        if reply.get("type") == "error":
            raise UserError(f"{self.url} says: {str(reply.get('message'))[:400]}")
        return reply


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
