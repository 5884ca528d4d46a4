"""What a server does, whatever the protocol: sessions, deadlines, alarms, recordings."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd_trt.errors import PolicyFault, UserError
from rsd_trt.runtime.chunk import Query
from rsd_trt.runtime.loop import NOTHING, Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.arrays import BadMessage
from rsd_trt.runtime.serve.interface import Interface
from rsd_trt.runtime.serve.metrics import Metrics
from rsd_trt.runtime.serve.sessions import Full, Session, Sessions
from rsd_trt.runtime.serve.worker import Answer, Answering, Broken, Job, Worker
from rsd_trt.runtime.speculate import Tokens, within_limits

if TYPE_CHECKING:
    from rsd_trt.recorder import Recorder

log = logging.getLogger(__name__)

MOST_RECORDED = 2000  # queries of an episode in memory, 20 kB each with two cameras


class NotReady(UserError):
    """The policy is being loaded, or the server is stopping."""


class Late(UserError):
    """A full query took too long, and there is nothing left to execute in its place."""


KINDS = {BadMessage: "message", Full: "full", Late: "late", PolicyFault: "fault", Broken: "broken", NotReady: "ready"}


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server behaves. None: without."""

    host: str = "127.0.0.1"
    port: int = 8000
    sessions: int = 16
    deadline_ms: float | None = None
    idle_s: float = 600.0  # of silence, after which a connection is closed
    api_key: str | None = None
    max_message: int = 16 << 20  # bytes
    expected_rejections: float | None = None  # share of checks, as calibration saw it: for the alarm
    instructions: tuple[str, ...] = ()  # that are warmed up before the server is ready
    record: Path | None = None


@dataclass(frozen=True)
class Reply:
    """A query's answer. late: what was left of the chunk, in the place of a full query that was not there in time."""

    query: Query
    queue_ms: float
    policy_ms: float
    total_ms: float
    late: bool
    rejected_share: float | None
    alarm: bool

    def report(self) -> dict[str, object]:
        """What a robot's log shows beside the actions."""
        return {
            "outcome": self.query.route,
            "prefix": self.query.prefix,
            "score": self.query.score,
            "clipped": self.query.clipped,
            "late": self.late,
            "alarm": self.alarm,
            "rejected_share": self.rejected_share,
        }


@dataclass
class Service:
    """Answers for everybody who is connected."""

    interface: Interface
    load: Callable[[], Answering]
    options: ServeOptions = ServeOptions()
    recorder: Recorder | None = None
    stopping: bool = False

    def __post_init__(self) -> None:
        options, interface = self.options, self.interface
        self.sessions = Sessions(
            options.sessions, interface.n, interface.control.hand_step, options.expected_rejections
        )
        self.posts = asyncio.Semaphore(options.sessions)  # requests without a session
        self.worker = Worker(self._prepared)
        self.metrics = Metrics(lambda: len(self.sessions), lambda: self.worker.working)
        self._low = np.array(interface.control.limits.low, np.float32)
        self._high = np.array(interface.control.limits.high, np.float32)
        self._saved = 0

    def _prepared(self) -> Answering:
        policy = self.load()
        for instruction in self.options.instructions:
            self.worker.prepare(policy, instruction)
        return policy

    @property
    def ready(self) -> bool:
        """Whether queries are answered."""
        return self.worker.ready.is_set() and self.worker.error is None and not self.stopping

    def check_ready(self) -> None:
        """Raises NotReady."""
        if not self.ready:
            raise NotReady("the server is stopping" if self.stopping else "the policy is being loaded: /readyz tells")

    async def act(self, session: Session, observation: Observation, executed: int | None = None) -> Reply:
        """A session's next actions.

        Raises:
            UserError: of the kinds in `KINDS`.
        """
        self.check_ready()
        started = time.perf_counter()
        before = session.episodes
        chunk = session.begin(observation, executed)
        if session.episodes > before:  # the hand jumped, or the instruction is another
            await self._save(session, session.ended)
        elif session.recording is not None and len(session.recording) >= MOST_RECORDED:
            await self._save(session, session.steps)
        due = self.interface.mode == "baseline" or chunk.due(observation.instruction, self.interface.rsd.refresh)
        job = Job("loop", observation.instruction, observation, chunk)
        late = False
        try:
            answer = await self._in_time(job)
        except asyncio.TimeoutError:
            self.metrics.late()
            query, late = self._left(session, observation, bool(due)), True
        else:
            assert isinstance(answer, Query)
            query = answer
            session.finish(chunk, query)
        now = time.perf_counter()
        if query.fault is not None:
            raise PolicyFault(query.fault)
        queue, policy = (job.started or now) - started, now - (job.started or now)
        alarm = session.alarm.raised
        self.metrics.answered(query, queue, policy, now - started, alarm)
        if self.recorder is not None:
            self._record(self.recorder, session, observation, query)
        return Reply(query, queue * 1e3, query.ms, (now - started) * 1e3, late, session.alarm.share, alarm)

    async def full(self, observation: Observation, condition: Tokens | None = None) -> Main:
        """A full query alone, for a loop that runs elsewhere or for nobody's: the whole chunk, as it comes.

        Raises:
            UserError: of the kinds in `KINDS`.
        """
        self.check_ready()
        started = time.perf_counter()
        job = Job("full", observation.instruction, observation, condition=condition)
        try:
            main = await self._in_time(job)
        except asyncio.TimeoutError:
            self.metrics.late()
            raise Late(f"the full query took longer than {self.options.deadline_ms:g} ms") from None
        assert isinstance(main, Main)
        if not main.finite[0]:
            raise PolicyFault("the main head's chunk is not finite")
        now = time.perf_counter()
        queue, policy = job.started - started, now - job.started
        self.metrics.answered(Query(NOTHING, "full"), queue, policy, now - started, False)
        return main

    async def first_actions(self, observation: Observation) -> NDArray[np.float32]:
        """The first n actions of a new chunk, within the limits: open loop for clients without a session."""
        main = await self.full(observation)
        within, clipped = within_limits(main.actions[0, : self.interface.n], self._low, self._high)
        self.metrics.clipped(clipped)
        return within

    async def rows(self, instruction: str) -> NDArray[np.float32]:
        """What the draft reads of an instruction, for a client that runs it."""
        self.check_ready()
        rows = await self.worker.answer(Job("rows", instruction))
        assert isinstance(rows, np.ndarray)
        return rows

    async def session(self, connection: Hashable, name: str = "") -> Session:
        """A connection's session of that name; the one in whose place it begins has ended."""
        session, displaced = self.sessions.get(connection, name)
        if displaced is not None:
            await self.reset(displaced)
        return session

    async def reset(self, session: Session) -> None:
        """A session's new episode."""
        session.reset()
        await self._save(session, session.ended)

    async def disconnect(self, connection: Hashable) -> None:
        for session in self.sessions.disconnect(connection):
            await self.reset(session)

    def failed(self, error: UserError) -> str:
        """Counts an error -> what is told to whoever asked."""
        self.metrics.error(next((kind for cls, kind in KINDS.items() if isinstance(error, cls)), "refused"))
        return str(error)

    async def _in_time(self, job: Job) -> Answer:
        deadline = self.options.deadline_ms
        answer = self.worker.answer(job)
        return await (answer if deadline is None else asyncio.wait_for(answer, deadline / 1e3))

    def _left(self, session: Session, observation: Observation, due: bool) -> Query:
        """What is left of the chunk, where a full query that was due without a check is late.

        Raises:
            Late: a check was to be made first, nothing is left, or the gripper would switch, which the main head alone
                decides. A check may have been rejected: what it stood before is not to be executed.
        """
        chunk, n = session.chunk, self.interface.n
        why = None
        if not due:
            why = "a check had to be made before anything is executed"
        elif chunk.actions is None or chunk.instruction != observation.instruction or len(chunk.left) < n:
            why = "nothing is left of the chunk"
        elif chunk.until_switch < n:
            why = "the gripper would switch"
        if why is not None:
            raise Late(f"the answer took longer than {self.options.deadline_ms:g} ms, and {why}")
        actions = session.late(n)
        within, clipped = within_limits(actions, self._low, self._high)
        return Query(within, "late", full_query=False, clipped=clipped)

    def _record(self, recorder: Recorder, session: Session, observation: Observation, query: Query) -> None:
        if session.recording is None:
            session.recording = recorder.episode()
        seen = observation.images, observation.proprio, observation.instruction
        session.recording.add(session.steps, *seen, query.actions, query.chunk, query.tokens)

    async def _save(self, session: Session, steps: int) -> None:
        """Writes the session's episode, if one is recorded. steps: that were executed."""
        episode, session.recording = session.recording, None
        if episode is None:
            return
        self._saved += 1
        name = f"served_{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}_{self._saved}"
        try:
            await asyncio.get_running_loop().run_in_executor(None, episode.save, name, None, steps)
        except UserError as error:
            log.warning("an episode was not recorded: %s", error)
