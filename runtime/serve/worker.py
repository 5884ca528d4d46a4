"""The thread that computes: queries that wait share a forward, and new instructions are prepared apart from them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rsd_trt.errors import UserError, reason
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.loop import Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.speculate import Tokens

log = logging.getLogger(__name__)

PREPARED = 256  # instructions that are remembered to be warm
MOST_WAITING = 1.0  # s that a new instruction waits for others' queries


class Answering(Protocol):
    """What is asked of `rsd_trt.runtime.policy.Policy`."""

    batch: int  # queries that may share a forward

    def answer(self, observations: Sequence[Observation], chunks: Sequence[Chunk], /) -> list[Query]: ...
    def full(self, observations: Sequence[Observation], condition: Tokens | None, /) -> Main: ...
    def instruction_rows(self, instruction: str, /) -> NDArray[np.float32]: ...
    def warm_up(self, instruction: str, /) -> None: ...


class Broken(UserError):
    """The policy or the server broke: a bug, which the log shows."""


Kind = Literal["loop", "full", "rows"]
Answer = Query | Main | NDArray[np.float32]


@dataclass
class Job:
    """What is asked of the policy. `loop`: a query, which brings `chunk` up to date; `full`: a full query alone, the
    whole chunk; `rows`: what the draft reads of the instruction. `abandoned`: nobody waits for it any more."""

    kind: Kind
    instruction: str
    observation: Observation | None = None
    chunk: Chunk | None = None
    condition: Tokens | None = None  # [T, D, C]
    abandoned: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    done: Callable[[Answer | UserError], None] = lambda answer: None


class Worker:
    """Runs `load()` in a thread of its own, and with the policy that it gives answers jobs until it is stopped.

    Forwards, CUDA graphs and engines are one thread's: whatever touches the policy happens here.
    """

    def __init__(self, load: Callable[[], Answering]) -> None:
        self.ready = threading.Event()
        self.error: BaseException | None = None  # why loading failed
        self.working = 0  # jobs that are not answered yet
        self._load = load
        self._incoming: SimpleQueue[Job | None] = SimpleQueue()
        self._prepared: OrderedDict[str, None] = OrderedDict()
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience: float = 5.0) -> bool:
        """Ends the thread, after the job that it is at -> whether it has ended."""
        self._incoming.put(None)
        self._thread.join(patience)
        return not self._thread.is_alive()

    async def answer(self, job: Job) -> Answer:
        """A job's answer.

        Raises:
            UserError: the policy refuses it.
            Broken: it broke.
        """
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(answer: Answer | UserError) -> None:
            if not future.done():
                future.set_result(answer)

        def done(answer: Answer | UserError) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, answer)

        job.done = done
        self.working += 1
        self._incoming.put(job)
        try:
            answer: Answer | UserError = await future
        finally:
            job.abandoned = True
            self.working -= 1
        if isinstance(answer, UserError):
            raise answer
        return answer

    def prepare(self, policy: Answering, instruction: str) -> None:
        """Warms up for an instruction, once."""
        if instruction not in self._prepared:
            policy.warm_up(instruction)
            self._prepared[instruction] = None
            if len(self._prepared) > PREPARED:
                self._prepared.popitem(last=False)

    def _run(self) -> None:
        try:
            policy = self._load()
        except BaseException as error:
            self.error = error
            return
        finally:
            self.ready.set()
        warm: deque[Job] = deque()
        cold: deque[Job] = deque()  # of instructions that are new
        prepared_at = 0.0
        while True:
            if not self._take(warm, cold):
                return
            late = bool(cold) and time.perf_counter() - cold[0].arrived > MOST_WAITING
            if warm and warm[0].arrived < prepared_at:  # it has waited for one new instruction, and not for the next
                late = False
            if cold and (late or not warm):
                job = cold.popleft()
                prepared = partial(self.prepare, policy, job.instruction)
                if self._guarded([job], prepared):  # abandoned or not: whoever asks again finds it warm
                    warm.append(job)
                prepared_at = time.perf_counter()
                continue
            if warm:
                self._answer(policy, warm)

    def _take(self, warm: deque[Job], cold: deque[Job]) -> bool:
        """Sorts what has come in, and waits if there is nothing to do -> whether to go on."""
        while not (warm or cold) or not self._incoming.empty():
            job = self._incoming.get()
            if job is None:
                return False
            (warm if job.instruction in self._prepared else cold).append(job)
        return True

    def _answer(self, policy: Answering, warm: deque[Job]) -> None:
        """The next jobs of one kind, as many as may share a forward."""
        jobs: list[Job] = []
        while warm and len(jobs) < policy.batch and (not jobs or warm[0].kind == jobs[0].kind):
            job = warm.popleft()
            if not job.abandoned:
                jobs.append(job)
        if not jobs:
            return
        now = time.perf_counter()
        for job in jobs:
            job.started = now
        if len(jobs) == 1:
            self._guarded(jobs, partial(_compute, policy, jobs))
            return
        try:
            _compute(policy, jobs)
        except Exception as error:  # the fault of one of them: all are asked alone, and those at fault are told
            log.warning("a batch of %d broke, and is answered one by one: %s", len(jobs), reason(error))
            for job in jobs:
                if job.chunk is not None:
                    job.chunk.forget()  # how far the batch got with it is not known
                self._guarded([job], partial(_compute, policy, [job]))

    def _guarded(self, jobs: Sequence[Job], run: Callable[[], None]) -> bool:
        """Whether `run` went well; the jobs are told what went wrong."""
        try:
            run()
            return True
        except UserError as refused:
            error = refused
        except Exception as broken:
            log.exception("the policy broke")
            error = Broken(f"the policy broke on this query: {type(broken).__name__}: {reason(broken)}")
        for job in jobs:
            job.done(error)
        return False


def _compute(policy: Answering, jobs: Sequence[Job]) -> None:
    """Answers jobs of one kind."""
    observations = [job.observation for job in jobs if job.observation is not None]
    if jobs[0].kind == "rows":
        for job in jobs:
            job.done(policy.instruction_rows(job.instruction))
    elif jobs[0].kind == "loop":
        chunks = [job.chunk for job in jobs if job.chunk is not None]
        for job, query in zip(jobs, policy.answer(observations, chunks), strict=True):
            job.done(query)
    else:
        given = next((job.condition for job in jobs if job.condition is not None), None)
        condition = None
        if given is not None:
            condition = np.stack([np.zeros_like(given) if job.condition is None else job.condition for job in jobs])
        main = policy.full(observations, condition)
        for i, job in enumerate(jobs):
            tokens = None if main.tokens is None else main.tokens[i : i + 1].copy()
            job.done(Main(tokens, main.actions[i : i + 1].copy(), main.finite[i : i + 1].copy()))
