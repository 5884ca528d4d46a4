"""The policy at the robot's side: the draft checks here, and only full queries cross the network.

It needs NumPy, ONNX Runtime, a websocket client and msgpack, and no torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.config import DEFAULT_ENGINES, PROPRIO_DIM, RECORD_SIZE, Mode, Precision
from rsd_trt.errors import PolicyFault, UserError
from rsd_trt.recorder import EpisodeRecorder, Recorder
from rsd_trt.recordings import SERVER, Facts
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.loop import Guess, Loop, Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.ahead import Ahead, Asked
from rsd_trt.runtime.serve.edge_draft import OrtDraft, exported_draft
from rsd_trt.runtime.serve.line import Line, Unreachable
from rsd_trt.runtime.serve.remote import Known, Remote, Timing
from rsd_trt.runtime.serve.sessions import Alarm
from rsd_trt.runtime.speculate import Tokens

log = logging.getLogger(__name__)

TOKEN_RULES = ("tokens", "likelihood")
INSTRUCTIONS = 16  # that are remembered: what the draft reads of one is 1 MiB for 7B


class EdgePolicy:
    """`reset` and `act` as `rsd_trt.Policy` has them, for one robot: the same loop and the same decisions.

    An accepted chunk goes on while the network is away. Where a full query is due and cannot be had, `act` raises
    `Unreachable`: nothing is repeated.

    With `ahead` the robot does not wait for a full query. It is asked for that many steps before the chunk ends or its
    gripper switches, or when a check is rejected. Until it is answered the old chunk goes on, one action an `act`: what
    a check has just rejected is executed, as in asynchronous open loop. Where nothing is left of it, or its gripper
    would switch, `act` waits. An answer that does not come within `timeout_s` is an error of the next `act`. One query
    at a time is under way; `reset` or another instruction drops its answer and the old chunk.
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
        ahead: int = 0,
        record: Path | None = None,
        known: Known | None = None,
    ) -> None:
        """engines: the folder of exports with the draft's ONNX graph; mode `baseline` needs none. timeout_s: for a full
        query. on_alarm(share of rejected checks): called when many more of the recent checks were rejected than
        `expected_rejections`: stop the robot there. ahead: control steps that a full query takes, rounded up; 0: the
        robot waits for it. record: a folder for recordings; a query that cannot be recorded is logged. known: of the
        policy of a server that is not `rsd-trt serve`.

        Raises:
            UserError: the server cannot be reached, or draft, server and recordings do not fit each other.
        """
        if mode not in ("rsd", "baseline"):
            raise UserError(f"mode {mode!r} is not one of the client's: rsd, baseline")
        self.timing = Timing()
        self._line = Line(url, api_key, timeout_s)
        with ExitStack() as failed:
            failed.callback(self._line.close)
            self._main = Remote(self._line, known, n_action_steps, self.timing)
            known = self._main.known
            self.control, self.name = known.control, known.name
            self._draft: OrtDraft | None = None
            if mode == "rsd":
                if known.propose is None:
                    why = f"{url} serves a policy without a draft that could check here"
                    raise UserError(why, "Use: mode='baseline'")
                if not self._line.ours and known.rsd.rule in TOKEN_RULES:
                    why = f"the rule {known.rsd.rule} needs the main model's tokens, and {url} gives none"
                    raise UserError(why, "Give the policy's settings the rule first, actions or path")
                file = exported_draft(Path(engines), known.name, known.propose, precision)
                self._draft = OrtDraft(file, known.control, providers, threads)
            self._loop = Loop(known.dims, known.rsd, known.control.limits, mode, self._check, self._full)
            self.n_action_steps = self._loop.n_action_steps
            if not 0 <= ahead <= (left := known.dims.T - self.n_action_steps):
                raise UserError(f"ahead is {ahead}, and a full query leaves {left} steps of its chunk")
            self._recorder: Recorder | None = None
            if record is not None:
                size = min(RECORD_SIZE, known.control.camera_size)
                main = known.main or f"{SERVER}{url}"
                self._recorder = Recorder(record, Facts(self.name, main, self.control.cameras, size, known.dims.T))
            failed.pop_all()
        self._rows = lru_cache(INSTRUCTIONS)(self._main.rows)
        self._thread = ThreadPoolExecutor(1, "query") if ahead else None
        self._reached = threading.Event()  # of the query under way: the main model is asked, or it is over
        self._since = 0.0  # when this call of `query` began
        self._ahead = Ahead(self._loop, self._begin, ahead, self._ended)
        self._alarm = Alarm(expected_rejections)
        self._on_alarm = on_alarm
        self._checking = self._judged = False  # the query under way makes a check; this call of `query` has counted one
        self._steps = 0
        self._episode: EpisodeRecorder | None = None

    def __enter__(self) -> EdgePolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up, and writes the episode that is being recorded."""
        self._ahead.reset()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._line.close()
        self._save(None)

    def prepare(self, instruction: str) -> None:
        """Gets what the draft reads of an instruction, so that the first check need not."""
        if self._draft is not None:
            self._rows(instruction)

    def reset(self, success: bool | None = None) -> None:
        """A new episode. success: of the one before, for its recording."""
        self._ahead.reset()
        self._save(success)
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
        self._since = time.monotonic()
        if self._thread is not None:  # the caller may overwrite them meanwhile
            state = None if observation.proprio is None else observation.proprio.copy()
            observation = replace(observation, images=observation.images.copy(), proprio=state)
        self._judged = False
        try:
            query = self._ahead.query(observation)
        except Unreachable as error:
            raise Unreachable(f"a full query is due, and {error}") from None
        finally:
            if self._judged and self._alarm.raised and self._on_alarm is not None:
                self._on_alarm(self._alarm.share or 0.0)
        return structs.replace(query, ms=(time.monotonic() - self._since) * 1e3)

    def measure(self, instruction: str, samples: int, warm_up: int = 5) -> Timing:
        """Times checks and full queries alone, on noise. Nothing is executed."""
        random = np.random.default_rng(0)
        shape = (len(self.control.cameras), self.control.camera_size, self.control.camera_size, 3)
        state = np.zeros(PROPRIO_DIM, np.float32)
        self.prepare(instruction)
        for i in range(warm_up + samples):
            if i == warm_up:
                for kept in (self.timing.check, self.timing.full, self.timing.server):
                    kept.clear()
            observation = Observation(random.integers(0, 256, shape, np.uint8), state, instruction)
            if self._draft is not None:
                self._check([observation])
            self._main.full([observation], None)
        return self.timing

    def _begin(self, observation: Observation, chunk: Chunk) -> Future[tuple[Query, Chunk]]:
        """Asks the loop, and waits until it is answered or asks the main model, where that need not be waited for."""
        self.prepare(observation.instruction)
        if self._thread is None:
            answered: Future[tuple[Query, Chunk]] = Future()
            answered.set_result(self._answer(observation, chunk))
            return answered
        self._reached = reached = threading.Event()
        future = self._thread.submit(self._answer, observation, chunk)
        future.add_done_callback(lambda _: reached.set())
        reached.wait()
        return future

    def _answer(self, observation: Observation, chunk: Chunk) -> tuple[Query, Chunk]:
        self._checking = False
        [query] = self._loop.query([observation], [chunk])
        if query.checked and not query.full_query:
            self._judge(rejected=False)
        return query, chunk

    def _judge(self, rejected: bool) -> None:
        """Counts a check."""
        self._alarm.recent.append(rejected)
        self._judged = True

    def _full(self, observations: Sequence[Observation], condition: Tokens | None) -> Main:
        if self._checking:  # and here it is: what the check said does not wait for an answer
            self._judge(rejected=True)
        since = self._since
        self._reached.set()
        return self._main.full(observations, condition, since)

    def _check(self, observations: Sequence[Observation]) -> Guess:
        assert self._draft is not None
        self._checking = True
        started = time.perf_counter()
        out = self._draft(observations[0], self._rows(observations[0].instruction))
        self.timing.check.append((time.perf_counter() - started) * 1e3)
        dims = self._main.known.dims
        logits = out["logits"].reshape(-1, dims.T, dims.D, dims.K)
        return Guess(out["tokens"], out["actions"], logits, out["finite"])  # type: ignore[arg-type]

    def _ended(self, asked: Asked, query: Query | None) -> None:
        if not asked.coming.done():  # nobody waits for it, and the next has the line to itself
            self._line.hang_up()
        self._keep(asked, query)

    def _keep(self, asked: Asked, query: Query | None) -> None:
        """Adds a query to the recording, with all actions since its frames."""
        given = asked.late if query is None or query.fault is not None else [*asked.late, query.actions]
        if self._recorder is None or not given:
            return
        observation = asked.observation
        chunk, tokens = (None, None) if query is None else (query.chunk, query.tokens)
        self._episode = self._episode or self._recorder.episode()
        seen = observation.images, observation.proprio, observation.instruction
        actions = np.concatenate(given)
        with _logged("a query"):
            self._episode.add(self._steps, *seen, actions, chunk, tokens)
        self._steps += len(actions)

    def _save(self, success: bool | None) -> None:
        episode, self._episode = self._episode, None
        if episode is not None:
            name = f"edge_{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}_{time.monotonic_ns() % 10**9}"
            with _logged("an episode"):
                episode.save(name, success)


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """A recording that fails is no error of the robot's."""
    try:
        yield
    except UserError as error:
        log.warning("%s was not recorded: %s", what, error)
