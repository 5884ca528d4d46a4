"""Many simulators in processes of their own, and one policy that answers all of them.

Each process runs one episode at a time and waits for an answer at each query, so that there are never more
observations under way than processes. The queries that have come in by the time the policy is free share a
forward. A process that dies, breaks or falls silent is replaced and its episode tried once more.

The outcome of an episode does not depend on the number of processes as long as a query's answer does not
depend on those that share its forward. It may on a GPU, where a batch's size chooses the kernels and with them the
order of floating-point sums. On the CPU the queries are therefore answered one by one.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Protocol

import numpy as np
from msgspec import structs

from rsd_trt.config import ACTION_DIMS
from rsd_trt.errors import UserError, out_of_memory, reason
from rsd_trt.eval.libero.episode import Answer, Asking, Assignment, Broken, Finished
from rsd_trt.eval.libero.worker import CLOSING_SECONDS, Worker
from rsd_trt.eval.results import ActionStatistics, Episode, QueryRecord
from rsd_trt.recorder import Recorder
from rsd_trt.runtime.chunk import Query
from rsd_trt.runtime.observation import Observation

log = logging.getLogger(__name__)

ATTEMPTS = 2  # at an episode whose simulator breaks
HOPELESS = 10  # episodes in a row whose simulator breaks end the run


class Answering(Protocol):
    """What the pool needs of `rsd_trt.runtime.policy.Policy`."""

    def act_batch(self, observations: Sequence[Observation], environments: Sequence[int], /) -> list[Query]: ...
    def reset(self, environment: int | None = None, episode: tuple[int, ...] | None = None, /) -> None: ...


Policies = Mapping[str, Answering | None]  # by the run of an assignment


@dataclass
class Meter:
    """What the policy did during a run."""

    seconds: float = 0.0  # in which it computed
    forwards: int = 0
    queries: int = 0  # that were answered
    split: int = 0  # forwards that broke and whose queries were answered one by one
    wall: float = 0.0  # s from the first episode's start to the last one's end
    utilisation: float | None = None  # mean share of time with a kernel on the GPU, if somebody looked
    cores: float = 0.0  # that the run had, and GPUs
    gpus: float = 0.0


@dataclass
class Schedule:
    """The episodes that nobody has yet, by task. A process goes on with its task while that has any, unless another
    one has `lag` more left for each process that is at work on it."""

    left: dict[int, deque[Assignment]] = field(default_factory=dict)
    lag: float = math.inf

    @classmethod
    def of(cls, assignments: Iterable[Assignment], lag: float = math.inf) -> Schedule:
        schedule = cls(lag=lag)
        for assignment in assignments:
            schedule.left.setdefault(assignment.task, deque()).append(assignment)
        return schedule

    def take(self, task: int | None, at_work: Sequence[int]) -> Assignment | None:
        """The next episode of `task`, else of the task with the most left for each process that is `at_work` on it."""
        open_tasks = [t for t, assignments in self.left.items() if assignments]
        if not open_tasks:
            return None
        each = {t: len(self.left[t]) / (at_work.count(t) + 1) for t in open_tasks}  # with this process
        most = max(open_tasks, key=lambda t: each[t])
        if task not in open_tasks or each[most] - each[task] >= self.lag:
            task = most
        return self.left[task].popleft()


class Pool:
    """Simulators' processes that outlive a run: the environments that they have built serve the next one.

    serve(connection): what a process runs, picklable: see `rsd_trt.eval.libero.episode.serve`. timeout: seconds of
    silence after which a process is taken for hung.
    """

    def __init__(self, serve: Callable[[Connection], None], workers: int, timeout: float) -> None:
        self._serve, self._count, self._timeout = serve, workers, timeout
        self._workers: list[Worker] = []

    def run(
        self,
        policy: Answering | None,
        assignments: Sequence[Assignment],
        batch: int,
        meter: Meter,
        lag: float = math.inf,
        beside: Mapping[str, Answering] | None = None,
        recorder: Recorder | None = None,
    ) -> Generator[Episode, None, None]:
        """Runs the episodes and gives each as it finishes. A run that is given up takes the processes with it.

        policy: None if the processes never ask. batch: queries that share a forward at the most. lag: of `Schedule`,
        so that tasks are about even where the run is cut short. beside: the policies of other runs, by the `run` of
        their assignments. recorder: keeps what queries see and say, where it is wanted.

        Raises:
            UserError: the simulator cannot work on this machine, or broke in `HOPELESS` episodes in a row.
        """
        schedule, started = Schedule.of(assignments, lag), time.perf_counter()
        policies: defaultdict[str, Answering | None] = defaultdict(lambda: policy, beside or {})
        pool = self._workers
        broken = 0  # episodes in a row
        try:
            for index in range(min(self._count, len(assignments))):
                if index == len(pool):
                    pool.append(Worker(index, self._serve, self._timeout))
                pool[index].recorder = recorder
                _next_episode(pool[index], pool, schedule, policies)
            while busy := [worker for worker in pool if worker.assignment is not None]:
                asking: list[tuple[Worker, Asking]] = []
                for worker, message in _messages(busy):
                    if isinstance(message, Asking):
                        asking.append((worker, message))
                    elif (episode := _ended(worker, message, policies)) is not None:
                        yield episode
                        broken = 0 if episode.error is None else broken + 1
                        if broken == HOPELESS:
                            raise UserError(
                                f"the simulator broke in {HOPELESS} episodes in a row, last with: {episode.error}. "
                                "See why with rsd-trt -v; a slow machine needs fewer --workers or a longer --timeout"
                            )
                        _next_episode(worker, pool, schedule, policies)
                for worker, episode in _answer(policies, asking, batch, meter):
                    yield episode
                    _next_episode(worker, pool, schedule, policies)
            meter.wall += time.perf_counter() - started
        except BaseException:
            self.close(patience=0)
            raise

    def close(self, patience: float = CLOSING_SECONDS) -> None:
        """Ends the processes: by hanging up, and after so many seconds by force."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.close(patience)


def run_episodes(
    policy: Answering | None,
    serve: Callable[[Connection], None],
    assignments: Sequence[Assignment],
    workers: int,
    batch: int,
    timeout: float,
    meter: Meter,
    lag: float = math.inf,
) -> Generator[Episode, None, None]:
    """The episodes of one run, by a `Pool` of its own."""
    with closing(Pool(serve, workers, timeout)) as pool:
        yield from pool.run(policy, assignments, batch, meter, lag)


def _messages(busy: Sequence[Worker]) -> Iterator[tuple[Worker, Asking | Finished | Broken]]:
    """Waits until a process has said something, or should have."""
    patience = min(worker.deadline for worker in busy) - time.monotonic()
    spoken = wait([worker.connection for worker in busy], timeout=max(0.0, patience))
    now = time.monotonic()
    for worker in busy:
        if worker.connection in spoken:
            yield worker, worker.receive()
        elif worker.deadline <= now:
            yield worker, Broken(f"the simulator's process said nothing for {worker.timeout:g} s")


def _next_episode(worker: Worker, pool: Sequence[Worker], schedule: Schedule, policies: Policies) -> None:
    at_work = [w.assignment.task for w in pool if w is not worker and w.assignment is not None]
    assignment = schedule.take(worker.task, at_work)
    if assignment is None:
        worker.assignment = None
        return
    _begin(worker, policies, assignment)


def _begin(worker: Worker, policies: Policies, assignment: Assignment, attempt: int = 1) -> None:
    if (policy := policies[assignment.run]) is not None:
        policy.reset(worker.index, (assignment.task, assignment.trial))
    worker.begin(assignment, attempt)


def _ended(worker: Worker, message: Finished | Broken, policies: Policies) -> Episode | None:
    """The worker's episode, or None if it is tried again."""
    assignment = worker.assignment
    assert assignment is not None
    if isinstance(message, Finished):
        worker.save(message)
        actions = ActionStatistics.of(message.actions) if len(message.actions) else None
        episode = worker.episode(message.success, actions, len(message.actions), None)
        seconds, event = round(message.seconds, 4), message.event
        if event is None:
            return structs.replace(episode, seconds=seconds)
        return structs.replace(
            episode, seconds=seconds, perturbed_by=event.kind, perturbed_at=event.step, displacement=event.displacement
        )
    if message.refused:
        raise UserError(message.message)
    again = worker.attempt < ATTEMPTS
    log.warning("task %d, trial %d: %s%s", assignment.task, assignment.trial, message.message, "; again" * again)
    failed = worker.episode(False, None, worker.queries[-1].step if worker.queries else 0, message.message)
    worker.restart()
    if not again:
        return failed
    _begin(worker, policies, assignment, worker.attempt + 1)
    return None


def _answer(
    policies: Policies, asking: Sequence[tuple[Worker, Asking]], batch: int, meter: Meter
) -> Iterator[tuple[Worker, Episode]]:
    """Sends each process its actions; gives the episodes that end because the policy has none.

    What breaks a query is the fault of that query alone: a batch that breaks is answered one by one. That is warned of
    once a run, and a query that breaks each time; -v shows the traceback of either.
    """
    by_run: defaultdict[str, list[tuple[Worker, Asking]]] = defaultdict(list)
    for one in asking:
        by_run[_run(one[0])].append(one)
    groups = deque(mine[i : i + batch] for mine in by_run.values() for i in range(0, len(mine), batch))
    while groups:
        group = groups.popleft()
        policy = policies[_run(group[0][0])]
        assert policy is not None, "a process asks, and nobody answers"
        environments = [worker.index for worker, _ in group]
        fault, full = None, None
        started = time.perf_counter()
        try:
            queries = policy.act_batch([message.observation for _, message in group], environments)
        except UserError:
            raise
        except Exception as error:
            fault, full = f"{type(error).__name__}: {reason(error)}", out_of_memory(error)
            log.debug("the policy broke", exc_info=True)
        meter.seconds += time.perf_counter() - started
        meter.forwards += 1
        if fault is not None:  # the error is gone by here, and with it the tensors that its traceback held
            told = full or f"the policy broke: {fault}. See where with rsd-trt -v"
            if len(group) > 1:
                level = logging.DEBUG if meter.split else logging.WARNING
                log.log(level, "%s. Batches that fail are answered one by one", told)
                meter.split += 1
                for environment in environments:
                    policy.reset(environment)  # how far the forward got with the chunks is not known: all make new ones
                groups.extendleft([one] for one in reversed(group))
                continue
            if full is not None:  # no other query would fit either
                raise full
            log.warning("%s", told)
            queries = [Query(np.zeros((0, 0), np.float32), "fault", fault=fault)]
        meter.queries += len(group)
        for (worker, message), query in zip(group, map(_checked, queries), strict=True):
            worker.queries.append(QueryRecord.of(query, message.step, len(group)))
            if query.fault is None:
                worker.record(message, query)
                worker.send(Answer(query.actions, query.route))
            else:
                worker.send(None)
                yield worker, worker.episode(False, None, message.step, query.fault)


def _run(worker: Worker) -> str:
    """Which run the worker's episode is of."""
    assert worker.assignment is not None
    return worker.assignment.run


def _checked(query: Query) -> Query:
    """The query, with a fault if its actions cannot be executed."""
    actions = query.actions
    if query.fault is not None:
        return query
    if actions.ndim != 2 or not len(actions) or actions.shape[1] != ACTION_DIMS:
        shape = f"{list(actions.shape)}, not [n, {ACTION_DIMS}]"
        return structs.replace(query, fault=f"the policy gave actions of shape {shape}")
    if not np.isfinite(actions).all():
        return structs.replace(query, fault="the policy gave actions that are not finite")
    return query
