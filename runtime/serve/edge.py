"""The policy at the robot's side: the draft checks here, and only full queries cross the network.

It needs NumPy, ONNX Runtime, a websocket client and msgpack, and no torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.config import DEFAULT_ENGINES, PROPRIO_DIM, ControlConfig, Dims, Mode, Precision, RsdConfig
from rsd_trt.errors import PolicyFault, UserError, missing_extra, reason, shown
from rsd_trt.manifest import MANIFEST, Manifest, intact
from rsd_trt.recorder import EpisodeRecorder, Recorder
from rsd_trt.recordings import Facts
from rsd_trt.records import from_json, read_record
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.loop import Guess, Loop, Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.arrays import BadMessage, arrays, pack, unpack
from rsd_trt.runtime.serve.interface import Frames, image_keys, no_state
from rsd_trt.runtime.serve.sessions import Alarm
from rsd_trt.runtime.speculate import Tokens

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

log = logging.getLogger(__name__)

MAX_REPLY = 64 << 20  # bytes
TOKEN_RULES = ("tokens", "likelihood")
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
        self._number = 0
        self.metadata: dict[str, object] = {}

    @property
    def ours(self) -> bool:
        """Whether the server is one of `rsd-trt serve`."""
        return self.metadata.get("server") == "rsd-trt"

    def connect(self) -> None:
        """Raises Unreachable, or UserError if another policy is served than before."""
        try:
            from websockets.exceptions import WebSocketException
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
        except (OSError, ValueError, WebSocketException) as error:
            self.close()
            raise Unreachable(f"{self.url} cannot be reached: {reason(error)}") from None
        before, here = self.metadata.get("fingerprint"), metadata.get("fingerprint")
        if self.metadata and before != here:
            self.close()
            raise UserError(
                f"{self.url} serves {here!s:.12}, and served {before!s:.12} before", "Start the client anew"
            )
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
        from websockets.exceptions import WebSocketException

        end = time.monotonic() + self.timeout_s
        if self._socket is None:
            self.connect()
        assert self._socket is not None
        self._number += 1
        numbered = {**message, "request": self._number} if self.ours else message
        try:
            self._socket.send(pack(numbered))
            while True:
                reply = _decoded(self._socket.recv(max(0.001, end - time.monotonic())))
                if not self.ours or reply.get("request") == self._number:
                    break
        except BadMessage:
            raise
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


class OrtDraft:
    """The exported component `propose` in ONNX Runtime, on NumPy arrays."""

    def __init__(self, file: Path, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0) -> None:
        """threads: 0 leaves it to ONNX Runtime.

        Raises:
            UserError: ONNX Runtime is not installed, or cannot run it.
        """
        try:
            import onnxruntime
        except ImportError:
            raise missing_extra("onnxruntime", "edge") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other work wants the cores
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, list(providers), enable_fallback=False)
        except Exception as error:  # the library's exceptions share no base class
            raise UserError(f"onnxruntime {onnxruntime.__version__} cannot run {file}: {reason(error)}") from None
        self._inputs = {port.name for port in self._session.get_inputs()}
        self._outputs = [port.name for port in self._session.get_outputs()]

    def __call__(self, observation: Observation, rows: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
        """The outputs of a check, each with a batch of one."""
        if observation.proprio is None and "state" in self._inputs:
            raise UserError("the observation has no proprio, and the draft reads the robot's state")
        state = no_state() if observation.proprio is None else observation.proprio
        given = {
            "frames": observation.images[None],
            "state": state[None].astype(np.float32),
            "instruction": rows[None],
        }
        values = self._session.run(self._outputs, {name: given[name] for name in self._inputs})
        return dict(zip(self._outputs, values, strict=True))


def exported_draft(engines: Path, bundle: str, fingerprint: str, precision: Precision = "fp32") -> Path:
    """The ONNX graph of `propose` in a folder of exports, if it is the one that the server's policy was made with.

    Raises:
        UserError: there is none, or it is another.
    """
    folder, remedy = engines / bundle, f"rsd-trt export BUNDLE --target onnx --precision {precision}"
    try:
        manifest = read_record(Manifest, folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no exports", f"Make them, and copy the folder here: {remedy}") from None
    artefact = manifest.find("propose", precision, "1", "onnx")
    if artefact is None:
        raise UserError(f"{folder} has no propose {precision} batch 1 (onnx)", f"Make it: {remedy}")
    ok, why = intact(artefact, folder, fingerprint)
    if not ok:
        raise UserError(why, f"Make it anew, and copy the folder here: {remedy}")
    return folder / artefact.files[0].name


@dataclass
class Timing:
    """What queries took, in ms."""

    check: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)  # with the network
    server: list[float] = field(default_factory=list)  # of those, what the server says that it needed

    KEPT = 1000

    def add(self, values: list[float], ms: float) -> None:
        values.append(ms)
        del values[: -self.KEPT]


@dataclass(frozen=True)
class Known:
    """What the client has to know of the policy that it asks: `rsd-trt serve` tells it, of any other server's it is to
    be given.

    dims.T: the longest chunk that is used. propose: fingerprint of the draft's component; None: no draft. main: what
    the chunks are made by, for recordings. request(observation): the server's keys; by default those of openpi's LIBERO
    policies. rows(instruction): what the draft reads of it, [P, E].
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


class EdgePolicy:
    """`reset` and `act` as `rsd_trt.Policy` has them, for one robot: the same loop and the same decisions.

    An accepted chunk goes on while the network is away. Where a full query is due and cannot be had, `act` raises
    `Unreachable`: nothing is repeated.
    """

    def __init__(
        self,
        url: str,
        engines: Path | str = DEFAULT_ENGINES,
        *,
        mode: Mode = "rsd",
        n_action_steps: int | None = None,
        api_key: str | None = None,
        timeout_s: float = 5.0,
        precision: Precision = "fp32",
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        expected_rejections: float | None = None,
        on_alarm: Callable[[float], None] | None = None,
        record: Path | None = None,
        known: Known | None = None,
    ) -> None:
        """engines: the folder of exports with the draft's ONNX graph; mode `baseline` needs none. timeout_s: for a full
        query. on_alarm(share of rejected checks): called when many more of the recent checks were rejected than
        `expected_rejections`: stop the robot there. record: a folder for recordings. known: of the policy of a server
        that is not `rsd-trt serve`.

        Raises:
            UserError: the server cannot be reached, or draft and server do not fit each other.
        """
        self._line = Line(url, api_key, timeout_s)
        self._line.connect()
        metadata = self._line.metadata
        known = Known.told(metadata) if self._line.ours else known or Known()
        self._known = known
        self.control, self.dims, self.name = known.control, known.dims, known.name
        rsd = known.rsd if n_action_steps is None else structs.replace(known.rsd, n_action_steps=n_action_steps)
        self._frames: Frames = known.frames
        self._conditioned = self._line.ours and bool(metadata.get("conditioned"))
        if mode not in ("rsd", "baseline"):
            raise UserError(f"mode {mode!r} is not one of the client's: rsd, baseline")
        self._draft: OrtDraft | None = None
        if mode == "rsd":
            if known.propose is None:
                raise UserError(f"{url} serves a policy without a draft that could check here", "Use: mode='baseline'")
            if not self._line.ours and rsd.rule in TOKEN_RULES:
                raise UserError(f"the rule {rsd.rule} needs the main model's tokens, and {url} gives none")
            file = exported_draft(Path(engines), known.name, known.propose, precision)
            self._draft = OrtDraft(file, providers, threads)
        self._loop = Loop(known.dims, rsd, known.control.limits, mode, self._check, self._full)
        self.n_action_steps = self._loop.n_action_steps
        self._rows: dict[str, NDArray[np.float32]] = {}
        self._chunk = Chunk()
        self._alarm = Alarm(expected_rejections)
        self._on_alarm = on_alarm
        self._record, self._steps = record, 0
        self._recorder: Recorder | None = None
        self._episode: EpisodeRecorder | None = None
        self.timing = Timing()

    def __enter__(self) -> EdgePolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def checks(self) -> bool:
        """Whether a draft checks here."""
        return self._draft is not None

    def close(self) -> None:
        """Hangs up, and writes the episode that is being recorded."""
        self._save(None)
        self._line.close()

    def prepare(self, instruction: str) -> None:
        """Gets what the draft reads of an instruction, so that the first check need not."""
        if self._draft is not None and instruction not in self._rows:
            self._rows[instruction] = self._instruction_rows(instruction)

    def reset(self, success: bool | None = None) -> None:
        """A new episode. success: of the one before, for its recording."""
        self._save(success)
        self._chunk = Chunk()
        self._alarm.recent.clear()
        self._steps = 0

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next actions [n, A], in environment units.

        Raises:
            Unreachable: a full query is due and cannot be had.
            PolicyFault: the main model's answer is not finite.
        """
        query = self.query(observation)
        if query.fault is not None:
            raise PolicyFault(query.fault)
        return query.actions

    def query(self, observation: Observation) -> Query:
        """As `act`, with how the query went."""
        self.prepare(observation.instruction)
        started = time.perf_counter()
        before = replace(self._chunk)
        try:
            [query] = self._loop.query([observation], [self._chunk])
        except UserError as error:
            self._chunk = before
            if isinstance(error, Unreachable):
                raise Unreachable(f"a full query is due, and {error}") from None
            raise
        if query.checked:
            self._alarm.recent.append(query.route == "rejected")
            if self._alarm.raised and self._on_alarm is not None:
                self._on_alarm(self._alarm.share or 0.0)
        if query.fault is None:
            self._keep(observation, query)
        self._steps += len(query.actions)
        return replace(query, ms=(time.perf_counter() - started) * 1e3)

    def _check(self, observations: Sequence[Observation]) -> Guess:
        assert self._draft is not None
        started = time.perf_counter()
        out = self._draft(observations[0], self._rows[observations[0].instruction])
        self.timing.add(self.timing.check, (time.perf_counter() - started) * 1e3)
        dims = self.dims
        logits = out["logits"].reshape(-1, dims.T, dims.D, dims.K)
        return Guess(out["tokens"], out["actions"], logits, out["finite"])  # type: ignore[arg-type]

    def _full(self, observations: Sequence[Observation], condition: Tokens | None) -> Main:
        started = time.perf_counter()
        message = self._request(observations[0])
        if self._line.ours:
            message["endpoint"] = "full"
            if self._conditioned and condition is not None:
                message["condition"] = condition[0].astype(np.uint16)
        reply = self._line.ask(message)
        self.timing.add(self.timing.full, (time.perf_counter() - started) * 1e3)
        timing = reply.get("server_timing")
        if isinstance(timing, dict) and isinstance(timing.get("infer_ms"), float):
            self.timing.add(self.timing.server, timing["infer_ms"])
        return self._main(reply)

    def _main(self, reply: Message) -> Main:
        """A reply's chunk.

        Raises:
            UserError: it is not what the policy's would be.
        """
        dims, actions, tokens = self.dims, reply.get("actions"), reply.get("tokens")
        steps = len(actions) if isinstance(actions, np.ndarray) and actions.ndim == 2 else 0
        whole = steps == dims.T if self._line.ours else steps >= self.n_action_steps
        if not isinstance(actions, np.ndarray) or not whole or actions.shape[1] != dims.A or actions.dtype.kind != "f":
            there = list(actions.shape) if isinstance(actions, np.ndarray) else type(actions).__name__
            raise UserError(f"{self._line.url} answered with actions {shown(there)}, not [{dims.T}, {dims.A}]")
        chunk = actions[: dims.T].astype(np.float32)
        known: Tokens | None = None
        if isinstance(tokens, np.ndarray) and tokens.shape == (dims.T, dims.D, dims.L):
            known = tokens.astype(np.int64)
        return Main(None if known is None else known[None], chunk[None], np.array([np.isfinite(chunk).all()]))

    def _request(self, observation: Observation) -> dict[str, object]:
        """openpi's keys for an observation."""
        if self._known.request is not None:
            return dict(self._known.request(observation))
        turned = self._frames == "upright" and self.control.rotate_images
        images = observation.images[:, ::-1, ::-1] if turned else observation.images
        named = zip(image_keys(self.control.cameras), images, strict=True)
        frames = {f"observation/{name}": np.ascontiguousarray(image) for name, image in named}
        state = {} if observation.proprio is None else {"observation/state": observation.proprio}
        return {**frames, **state, "prompt": observation.instruction}

    def _instruction_rows(self, instruction: str) -> NDArray[np.float32]:
        if self._known.rows is not None:
            return self._known.rows(instruction)
        if not self._line.ours:
            raise UserError(f"{self._line.url} cannot say what the draft reads of an instruction", "Give Known(rows=)")
        rows = self._line.ask({"endpoint": "instruction", "prompt": instruction}).get("rows")
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype != np.float32:
            raise UserError(f"{self._line.url} gave no rows of the instruction")
        return rows

    def _keep(self, observation: Observation, query: Query) -> None:
        """Adds a query to the recording."""
        if self._record is None:
            return
        if self._recorder is None:
            size = min(128, observation.images.shape[1])
            steps = self.dims.T if query.chunk is None else len(query.chunk)
            known = self._known
            facts = Facts(known.name, known.main or f"server {self._line.url}", self.control.cameras, size, steps)
            self._recorder = Recorder(self._record, facts)
        if self._episode is None:
            self._episode = self._recorder.episode()
        state = no_state() if observation.proprio is None else observation.proprio
        seen = observation.images, state, observation.instruction
        self._episode.add(self._steps, *seen, query.actions, query.chunk, query.tokens)

    def _save(self, success: bool | None) -> None:
        episode, self._episode = self._episode, None
        if episode is not None:
            name = f"edge_{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}_{time.monotonic_ns() % 10**9}"
            episode.save(name, success)


def measure(edge: EdgePolicy, instruction: str, samples: int, warm_up: int = 5) -> Timing:
    """Times checks and full queries alone, on noise. Nothing is executed."""
    control, random = edge.control, np.random.default_rng(0)
    shape = (len(control.cameras), control.camera_size, control.camera_size, 3)
    state = np.zeros(PROPRIO_DIM, np.float32)
    edge.prepare(instruction)
    for i in range(warm_up + samples):
        if i == warm_up:
            edge.timing = Timing()
        observation = Observation(random.integers(0, 256, shape, np.uint8), state, instruction)
        if edge.checks:
            edge._check([observation])
        edge._full([observation], None)
    return edge.timing
