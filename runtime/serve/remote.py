"""The main model behind an openpi server, as the loop of a client asks it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.config import ControlConfig, Dims, RsdConfig
from rsd_trt.errors import UserError, reason, shown
from rsd_trt.records import from_json
from rsd_trt.runtime.loop import Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.interface import Frames, image_keys
from rsd_trt.runtime.serve.line import Line, Message
from rsd_trt.runtime.speculate import Tokens

KEPT = 1000  # queries


@dataclass(frozen=True)
class Known:
    """What the client has to know of the policy that it asks: `rsd-trt serve` tells it, of any other server's it is to
    be given.

    dims.T: the longest chunk that is used, and the length that is recorded. propose: fingerprint of the draft's
    component; None: no draft. main: what the chunks are made by, for recordings. request(observation): the server's
    keys; by default those of openpi's LIBERO policies. rows(instruction): what the draft reads of it, [P, E].
    """

    name: str = "policy"
    dims: Dims = field(default_factory=Dims)
    rsd: RsdConfig = field(default_factory=RsdConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    frames: Frames = "upright"
    propose: str | None = None
    main: str | None = None
    request: Callable[[Observation], Message] | None = None
    rows: Callable[[str], NDArray[np.float32]] | None = None

    @classmethod
    def told(cls, metadata: Message) -> Known:
        """What `rsd-trt serve` says.

        Raises:
            UserError: it is of another version.
        """
        try:
            texts = {name: metadata[name] for name in ("frames", "propose", "main")}
            return cls(
                str(metadata["policy"]),
                from_json(Dims, metadata["dims"], "dims"),
                from_json(RsdConfig, metadata["rsd"], "rsd"),
                from_json(ControlConfig, metadata["control"], "control"),
                **texts,  # type: ignore[arg-type]
            )
        except (KeyError, UserError) as error:
            raise UserError(
                f"the server's metadata cannot be read: {reason(error)}", "Is it of this version?"
            ) from None


@dataclass
class Timing:
    """What the last queries took, in ms."""

    check: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    full: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))  # with the network
    server: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))  # of those, what the server says it needed


class Remote:
    """Full queries over a line."""

    def __init__(self, line: Line, known: Known | None, n_action_steps: int | None, timing: Timing) -> None:
        """known: of the policy of a server that is not `rsd-trt serve`. n_action_steps: None: the policy's own.

        Raises:
            UserError: the server cannot be reached, or is one of ours of another version.
        """
        line.connect()
        self._line, self._timing = line, timing
        self.known = Known.told(line.metadata) if line.ours else known or Known()
        if n_action_steps is not None:
            rsd = structs.replace(self.known.rsd, n_action_steps=n_action_steps)
            self.known = replace(self.known, rsd=rsd)

    def full(self, observations: Sequence[Observation], condition: Tokens | None, since: float | None = None) -> Main:
        """The main model's chunk for one observation. since: of `time.monotonic()`, when the time for it began.

        Raises:
            Unreachable: it cannot be had.
            UserError: the answer is not what the policy's would be.
        """
        started = time.perf_counter()
        message = self._request(observations[0])
        if self._line.ours:
            message["endpoint"] = "full"
            if self._line.metadata.get("conditioned") and condition is not None:
                message["condition"] = condition[0].astype(np.uint16)
        reply = self._line.ask(message, since)
        self._timing.full.append((time.perf_counter() - started) * 1e3)
        timing = reply.get("server_timing")
        if isinstance(timing, dict) and isinstance(timing.get("infer_ms"), float):
            self._timing.server.append(timing["infer_ms"])
        return self._main(reply)

    def rows(self, instruction: str) -> NDArray[np.float32]:
        """What the draft reads of an instruction, [P, E]."""
        if self.known.rows is not None:
            return self.known.rows(instruction)
        if not self._line.ours:
            raise UserError(f"{self._line.url} cannot say what the draft reads of an instruction", "Give Known(rows=)")
        rows = self._line.ask({"endpoint": "instruction", "prompt": instruction}).get("rows")
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype != np.float32:
            raise UserError(f"{self._line.url} gave no rows of the instruction")
        return rows

    def _request(self, observation: Observation) -> dict[str, object]:
        """openpi's keys for an observation."""
        known = self.known
        if known.request is not None:
            return dict(known.request(observation))
        turned = known.frames == "upright" and known.control.rotate_images
        images = observation.images[:, ::-1, ::-1] if turned else observation.images
        named = zip(image_keys(known.control.cameras), images, strict=True)
        frames = {f"observation/{name}": image for name, image in named}
        state = {} if observation.proprio is None else {"observation/state": observation.proprio}
        return {**frames, **state, "prompt": observation.instruction}

    def _main(self, reply: Message) -> Main:
        """A reply's chunk: a server of ours gives the whole of it, another one as long a chunk as it has."""
        dims, actions, tokens = self.known.dims, reply.get("actions"), reply.get("tokens")
        steps = len(actions) if isinstance(actions, np.ndarray) and actions.ndim == 2 else 0
        enough = steps == dims.T if self._line.ours else steps >= self.known.rsd.n_action_steps
        if not isinstance(actions, np.ndarray) or not enough or actions.shape[1] != dims.A or actions.dtype.kind != "f":
            there = list(actions.shape) if isinstance(actions, np.ndarray) else type(actions).__name__
            raise UserError(f"{self._line.url} answered with actions {shown(there)}, not [{dims.T}, {dims.A}]")
        chunk = actions[: dims.T].astype(np.float32)
        known: Tokens | None = None
        if isinstance(tokens, np.ndarray) and tokens.shape == (dims.T, dims.D, dims.L):
            known = tokens.astype(np.int64)[None]
        return Main(known, chunk[None], np.array([np.isfinite(chunk).all()]))
