"""A simulator's process as the pool sees it: it is given episodes, listened to, and replaced when it breaks."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

import numpy as np

from rsd_trt.errors import UserError
from rsd_trt.eval.libero.episode import Asking, Assignment, Broken, Finished
from rsd_trt.eval.results import ActionStatistics, Episode, QueryRecord
from rsd_trt.recorder import EpisodeRecorder, Recorder
from rsd_trt.runtime.chunk import Query

log = logging.getLogger(__name__)

CLOSING_SECONDS = 10.0  # that a process gets to end by itself


def recorded_name(run: str, task: int, trial: int) -> str:
    """What the recording of an episode is named."""
    return f"{run}_task{task}_trial{trial}"


class Worker:
    """A simulator's process, and the episode that it is at."""

    def __init__(self, index: int, serve: Callable[[Connection], None], timeout: float) -> None:
        self.index = index  # of its environment
        self.assignment: Assignment | None = None
        self.task: int | None = None  # whose environment the process has
        self.attempt = 1
        self.started = 0.0
        self.queries: list[QueryRecord] = []
        self.deadline = np.inf  # monotonic time at which it is taken for hung; infinite while it waits for us
        self.recorder: Recorder | None = None  # of what queries see and say
        self._recorded: EpisodeRecorder | None = None
        self._serve = serve
        self.timeout = timeout
        self._start()

    def begin(self, assignment: Assignment, attempt: int = 1) -> None:
        """Hands the process an episode."""
        self.assignment, self.attempt, self.task = assignment, attempt, assignment.task
        self.started = time.monotonic()
        self.queries = []
        self._recorded = None if self.recorder is None else self.recorder.episode(assignment.task, assignment.state)
        self.send(assignment)

    def send(self, message: object) -> None:
        """A process that is gone shows when it is next listened to."""
        self.deadline = time.monotonic() + self.timeout
        try:
            self.connection.send(message)
        except OSError:
            log.debug("simulator process %d hung up", self.index)

    def receive(self) -> Asking | Finished | Broken:
        """The process's next message, which is there."""
        self.deadline = np.inf
        watchdog = threading.Timer(self.timeout, self._process.kill)  # it may freeze in the middle of a message
        try:
            watchdog.start()
            message: Asking | Finished | Broken = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(CLOSING_SECONDS)
            return Broken(f"the simulator's process ended (exit code {self._process.exitcode})")
        finally:
            watchdog.cancel()
        return message

    def record(self, message: Asking, query: Query) -> None:
        """Keeps what a query saw and said, where the run is recorded."""
        if self._recorded is not None:
            seen = message.observation
            self._recorded.add(
                message.step, seen.images, seen.proprio, seen.instruction, query.actions, query.chunk, query.tokens
            )

    def save(self, finished: Finished) -> None:
        """Writes the episode's recording, where the run is recorded."""
        if self._recorded is not None and self.assignment is not None:
            name = recorded_name(self.assignment.run, self.assignment.task, self.assignment.trial)
            self._recorded.save(name, finished.success, len(finished.actions))

    def episode(self, success: bool, actions: ActionStatistics | None, steps: int, error: str | None) -> Episode:
        assert self.assignment is not None
        task, trial, run = self.assignment.task, self.assignment.trial, self.assignment.run
        seconds = round(time.monotonic() - self.started, 4)
        return Episode(task, trial, success, steps, seconds, tuple(self.queries), actions, error, run)

    def restart(self) -> None:
        self.close(patience=0)
        self.task = None
        self._start()

    def close(self, patience: float) -> None:
        """Ends the process: by hanging up, and after `patience` seconds by force."""
        self.connection.close()
        if patience:
            self._process.join(patience)
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share CUDA's and GL's state
        resource_tracker.ensure_running()  # starting it would undo the mask below
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for the parent alone
        try:
            self.connection, theirs = context.Pipe()
            self._process = context.Process(target=self._serve, args=(theirs,), daemon=True)
            self._process.start()
        except OSError as error:
            raise UserError(
                f"no simulator process {self.index + 1} can be started: {error.strerror}. Use fewer --workers"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
