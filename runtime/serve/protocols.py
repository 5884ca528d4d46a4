"""The wire protocols: openpi's websocket, vla-eval's websocket, and `POST /act` of OpenVLA and OpenVLA-OFT."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from rsd_trt import __version__
from rsd_trt.errors import UserError, shown
from rsd_trt.runtime.loop import NOTHING, Main
from rsd_trt.runtime.serve.arrays import BadMessage, arrays, pack, parse, to_json, unpack
from rsd_trt.runtime.serve.interface import openvla_gripper
from rsd_trt.runtime.serve.service import Reply, Service
from rsd_trt.runtime.serve.sessions import Full
from rsd_trt.runtime.speculate import Tokens

VLA_EVAL_VERSION = 1  # of its protocol
BODY_SECONDS = 30.0  # for the whole of a request's body
IDLE, REFUSED = 1000, 1008  # websocket's codes of a normal end, and of what is against a server's policy
MOST_REFUSED = 100  # frames one behind the other that are no messages
Message = Mapping[str, object]


class Openpi:
    """A connection that speaks openpi's protocol. The first frame is the policy's metadata; then a reply for each
    request, which is a map: the observation, and beside it optional keys of vLLM-Omni's and ours.

        endpoint     infer (the default), reset, full (the whole chunk of a full query), instruction (its rows)
        session_id   which of the connection's sessions
        executed     actions of the last reply that were executed, if not all
        request      a number that the reply repeats
        condition    with `full`: the draft's tokens, for a conditioned head

    An error is a text frame, as openpi's server sends it; for a request with an `endpoint` it is a map.
    """

    def __init__(self, service: Service, websocket: WebSocket) -> None:
        self.service, self.websocket = service, websocket
        self._total_ms: float | None = None  # of the query before

    async def run(self) -> None:
        await self.websocket.send_bytes(pack(self.service.interface.metadata()))
        frames = Frames(self.websocket, self.service.options.idle_s)
        async for frame in frames:
            message: Message = {}
            try:
                if isinstance(frame, str):
                    raise BadMessage("a text frame came; requests are binary frames of msgpack")
                decoded = arrays(unpack(frame))
                if not isinstance(decoded, dict):
                    raise BadMessage(f"a request is a map, not {type(decoded).__name__}")
                message = decoded
                await self.websocket.send_bytes(pack(await self._answer(message)))
                frames.refused = 0
            except UserError as error:
                frames.refused += isinstance(error, BadMessage)
                told = self.service.failed(error)
                if "endpoint" in message:
                    reply = {"type": "error", "message": told, "request": message.get("request")}
                    await self.websocket.send_bytes(pack(reply))
                else:
                    await self.websocket.send_text(told)

    async def _answer(self, message: Message) -> dict[str, object]:
        endpoint, name = message.get("endpoint", "infer"), message.get("session_id", "")
        if not isinstance(name, str) or len(name) > 200:
            raise BadMessage(f"session_id is {shown(name)}, not a text of at most 200 characters")
        number = _optional_int(message, "request")
        reply: dict[str, object] = {} if number is None else {"request": number}
        if endpoint == "reset":
            await self.service.reset(await self.service.session(self.websocket, name))
            return reply | {"status": "reset successful"}
        if endpoint == "instruction":
            instruction = message.get("prompt")
            if not isinstance(instruction, str):
                raise BadMessage("the endpoint instruction needs a prompt")
            return reply | {"rows": await self.service.rows(instruction)}
        if endpoint not in ("infer", "full"):
            raise BadMessage(f"the endpoint {shown(endpoint)} is unknown: infer, reset, full, instruction")
        observation = self.service.interface.openpi(message)
        if endpoint == "full":
            started = time.perf_counter()
            main = await self.service.full(observation, self._condition(message))
            return reply | _whole(main, (time.perf_counter() - started) * 1e3)
        session = await self.service.session(self.websocket, name)
        answer = await self.service.act(session, observation, _optional_int(message, "executed"))
        reply |= {"actions": answer.query.actions, **answer.report()}
        return reply | self._timing(answer)

    def _timing(self, answer: Reply) -> dict[str, object]:
        server = {"infer_ms": answer.policy_ms, "queue_ms": answer.queue_ms}
        if self._total_ms is not None:
            server["prev_total_ms"] = self._total_ms
        self._total_ms = answer.total_ms
        return {"server_timing": server, "policy_timing": {"infer_ms": answer.policy_ms}}

    def _condition(self, message: Message) -> Tokens | None:
        tokens, interface = message.get("condition"), self.service.interface
        if tokens is None or not interface.conditioned:
            return None
        dims = interface.dims
        shape = (dims.T, dims.D, dims.C)
        if not isinstance(tokens, np.ndarray) or tokens.shape != shape or tokens.dtype.kind not in "iu":
            raise BadMessage(f"condition is not tokens {list(shape)}")
        if not (tokens.min() >= 0 and tokens.max() < dims.K):
            raise BadMessage(f"condition has tokens outside of 0..{dims.K - 1}")
        return tokens.astype(np.int64)


class VlaEval:
    """A connection that speaks vla-eval's protocol: one action for each observation. The rest of what a query committed
    waits here, and of observations in between only the task is looked at: another one ends the waiting."""

    def __init__(self, service: Service, websocket: WebSocket) -> None:
        self.service, self.websocket = service, websocket

    async def run(self) -> None:
        self.session = await self.service.session(self.websocket)
        self.session.fixed = self.session.chunk.fixed = None  # it may be any number of actions
        frames = Frames(self.websocket, self.service.options.idle_s)
        async for frame in frames:
            seq = 0
            try:
                kind, payload, seq = self._read(frame)
                if kind == "hello":
                    await self._send("hello", self._hello(), seq)
                elif kind == "observation":
                    await self._send("action", {"actions": await self._action(payload)}, seq)
                else:
                    await self.service.reset(self.session)
                frames.refused = 0
            except UserError as error:
                frames.refused += isinstance(error, BadMessage)
                await self._send("error", {"error": f"observation_failed: {self.service.failed(error)}"}, seq)

    def _read(self, frame: str | bytes) -> tuple[str, Message, int]:
        """Type, payload (not looked at yet) and number of a message."""
        message = unpack(frame) if isinstance(frame, bytes) else None
        if not isinstance(message, dict) or not {"type", "payload", "seq", "timestamp"} <= set(message):
            raise BadMessage("a message is a msgpack map of type, payload, seq and timestamp")
        kind, payload, seq = message["type"], message["payload"], message["seq"]
        if kind not in ("hello", "observation", "episode_start", "episode_end"):
            raise BadMessage(f"the message type {shown(kind)} is unknown")
        if not isinstance(payload, dict) or type(seq) is not int or not 0 <= seq < 1 << 63:
            raise BadMessage("a message has a map for its payload, and a number")
        return kind, payload, seq

    async def _action(self, payload: Message) -> NDArray[np.float32]:
        session = self.session
        waiting = NOTHING if session.waiting is None else session.waiting
        if not len(waiting) or payload.get("task_description") != session.chunk.instruction:
            observation = self.service.interface.vla_eval(cast(Message, arrays(payload)))
            session.waiting = None
            reply = await self.service.act(session, observation, session.answered - len(waiting))
            waiting = reply.query.actions
        action, session.waiting = waiting[0], waiting[1:]
        return action

    def _hello(self) -> dict[str, object]:
        interface = self.service.interface
        return {
            "harness_version": __version__,
            "protocol_version": VLA_EVAL_VERSION,
            "model_server": f"rsd-trt:{interface.name}",
            "capabilities": {},
            "observation_params": {
                "send_wrist_image": len(interface.control.cameras) > 1,
                "send_state": interface.reads_state,
                "env_seed": 0,
                "quat_no_antipodal": interface.control.rotation == "robosuite",
            },
        }

    async def _send(self, kind: str, payload: Message, seq: int) -> None:
        message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
        await self.websocket.send_bytes(pack(message, keys=str))


async def act(service: Service, request: Request) -> Response:
    """OpenVLA's `POST /act` (one action [7]) and OpenVLA-OFT's (a list of n of them): stateless open loop. An error is
    a JSON string that begins with `error`, where their servers send nothing but that word."""
    encoded = False
    try:
        if service.posts.locked():
            raise Full(f"{service.options.sessions} requests to /act are under way", "Start the server with --sessions")
        async with service.posts:
            body = parse(await _body(request, service.options.max_message))
            if isinstance(body, dict) and set(body) == {"encoded"} and isinstance(body["encoded"], str):
                encoded, body = True, parse(body["encoded"])
            body = arrays(body)
            if not isinstance(body, dict):
                raise BadMessage("the body is no JSON object")
            actions = openvla_gripper(await service.first_actions(service.interface.openvla(body)))
            content = to_json(list(actions) if "full_image" in body else actions[0])
        status = 200
    except UserError as error:
        content, status = to_json(f"error: {service.failed(error)}"), 400 if isinstance(error, BadMessage) else 503
    return Response(to_json(content.decode()) if encoded else content, status, media_type="application/json")


class Frames:
    """The frames of a connection, until it ends: after `idle_s` of silence, or too many that were `refused`, it is
    closed.

    Non-obvious: one timer for all of them. `asyncio.wait_for` around each would cost a task and two turns of the loop.
    And a turn of the loop behind each: neither receiving nor sending waits while there are more.
    """

    def __init__(self, websocket: WebSocket, idle_s: float) -> None:
        self._websocket, self._idle_s = websocket, idle_s
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._waiting = False  # for a frame: while a query is computed nobody is idle
        self._timer = self._loop.call_later(idle_s, self._look)
        self._closing: asyncio.Task[None] | None = None
        self.refused = 0  # frames, since one was answered

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        try:
            while True:
                self._heard, self._waiting = self._loop.time(), True
                message = await self._websocket.receive()
                self._waiting = False
                if message["type"] == "websocket.disconnect":
                    return
                yield message.get("bytes") or message.get("text") or b""
                if self.refused >= MOST_REFUSED:
                    await self._websocket.close(REFUSED, "too many frames were no messages")
                    return
                await asyncio.sleep(0)
        finally:
            self._timer.cancel()

    def _look(self) -> None:
        left = self._heard + self._idle_s - self._loop.time()
        if left <= 0 and self._waiting:
            self._closing = self._loop.create_task(self._websocket.close(IDLE, "idle"))
        else:
            self._timer = self._loop.call_later(max(left, self._idle_s / 10), self._look)


async def _body(request: Request, limit: int) -> bytes:
    """A request's body.

    Raises:
        BadMessage: it is too large, too slow, or breaks off.
    """

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise BadMessage(f"the body is larger than {limit} bytes")
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise BadMessage(f"the body took more than {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise BadMessage("the body broke off") from None


def _optional_int(message: Message, name: str) -> int | None:
    value = message.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 63):
        raise BadMessage(f"{name} is {shown(value)}, not a whole number")
    return value


def _whole(main: Main, ms: float) -> dict[str, object]:
    """A full query's reply: the chunk before the limits."""
    tokens = None if main.tokens is None else main.tokens[0].astype(np.uint16)
    return {"actions": main.actions[0], "tokens": tokens, "server_timing": {"infer_ms": ms}}
