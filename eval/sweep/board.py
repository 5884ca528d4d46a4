"""Which episodes of a sweep are whose, while seats execute shards of its runs.

A seat is a place at which a model is loaded, with its simulators. A shard is some episodes of one run. What seats
finish streams to the runs' logs here, which are the one source of truth: an episode counts once its line is written,
and a line is written only for an episode that its log lacks. Nothing here knows how seats come about:
`rsd_trt.eval.sweep.cluster` has those of Ray.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from msgspec import structs

from rsd_trt.errors import UserError, shown
from rsd_trt.eval.libero.pool import Meter
from rsd_trt.eval.libero.request import EvalRequest
from rsd_trt.eval.libero.run import Job, own_folder, throughput_of
from rsd_trt.eval.libero.run import Run as Begun
from rsd_trt.eval.results import Episode, EpisodeKey, Settings
from rsd_trt.eval.statistics import counted
from rsd_trt.eval.sweep.plan import Run, Sweep
from rsd_trt.eval.sweep.run import Progress, unfinished, with_rate
from rsd_trt.files import explained
from rsd_trt.records import differing, read_record, to_json

ATTEMPTS = 3  # at a shard, by seats that are lost or break before they finish any of it
LEAST_ROUNDS = 2  # episodes of each simulator in a shard, at least: at its end some of them are idle
PATIENCE = 60.0  # s without a seat after which a sweep is given up
OF_A_MACHINE = ("cpu", "cores", "threads")  # of the settings' hardware: may differ from node to node


@dataclass(frozen=True)
class Refused:
    """A seat cannot do what it was asked to."""

    message: str


@dataclass(frozen=True)
class Lost:
    """A seat is gone."""

    message: str


@dataclass(eq=False)
class Place:
    """A seat, as it is seen from here."""

    node: str  # for people
    workers: int  # simulators
    record: Record | None = None  # the run that it has open
    shard: list[EpisodeKey] | None = None  # what it has still to finish; None: it opens the run
    size: int = 0  # of the shard, at first
    busy: bool = False


class Seats(Protocol):
    """Those that there are. They come and go."""

    def places(self) -> Sequence[Place]: ...
    def open(self, place: Place, request: EvalRequest, /) -> None:
        """To be answered with a `Job`."""
        ...

    def run(self, place: Place, keys: Sequence[EpisodeKey], /) -> None:
        """To be answered with episodes, and with a `Meter` at the end."""
        ...

    def answers(self) -> Iterable[tuple[Place, Job | Episode | Meter | Refused | Lost]]:
        """What has come in; waits a moment for it. After a `Refused` or `Lost` the seat is not among the places."""
        ...


@dataclass
class Record:
    """A run on this machine: its log, and the episodes that nobody has."""

    run: Run
    request: EvalRequest
    command: str
    files: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # of a run that is open
    begun: Begun | None = None
    left: deque[EpisodeKey] = field(default_factory=deque)
    attempts: dict[EpisodeKey, int] = field(default_factory=dict)  # that came to nothing
    parts: list[tuple[int, Meter]] = field(default_factory=list)
    started: float = 0.0
    interrupted: bool = False  # some episodes were there before, or a shard broke
    shards: int = 0  # that seats are at

    def accept(self, job: Job, node: str) -> None:
        """A node's view of the run, before its first shard there: the first one opens the log.

        Raises:
            UserError: the node has another bundle, exports, suite or packages than the log's episodes are of.
        """
        if self.begun is None:
            self.files.enter_context(own_folder(self.request))
            alike = replace(job, settings=_as_logged(job.settings, self.request))
            self.begun, self.started = Begun.begin(self.request, alike), time.perf_counter()
            self.left.extend(self.begun.missing)
            self.interrupted = bool(self.begun.log.episodes)
            return
        logged = self.begun.job.settings
        ours, theirs = to_json(logged), to_json(_with_machine_of(job.settings, logged))
        if differences := [f"{key} is {shown(b)} there and {shown(a)} here" for key, a, b in differing(ours, theirs)]:
            raise UserError(f"node {node}, {self.run.name}: {', '.join(differences[:3])}", "Make the nodes alike")

    def take(self, most: int) -> list[EpisodeKey]:
        """A shard of so many episodes that nobody has, at most."""
        return [self.left.popleft() for _ in range(min(most, len(self.left)))]

    def add(self, episode: Episode) -> bool:
        """Writes the episode's line, unless the log has it already."""
        assert self.begun is not None
        if not self.begun.log.lacks(*episode.key):
            return False
        self.begun.log.append(episode)
        return True

    def give_back(self, keys: Sequence[EpisodeKey], whole: bool, why: str) -> None:
        """What a shard did not finish is anybody's again. whole: it finished nothing.

        Raises:
            UserError: so ended `ATTEMPTS` whole shards with the same episode.
        """
        for key in keys if whole else ():
            self.attempts[key] = self.attempts.get(key, 0) + 1
            if self.attempts[key] == ATTEMPTS:
                raise UserError(
                    f"{self.run.name}: task {key[0]}, trial {key[1]} was given to {ATTEMPTS} seats in turn, and "
                    f"none finished anything; last: {why}"
                )
        self.interrupted = True
        self.left.extendleft(reversed(keys))

    @property
    def is_through(self) -> bool:
        return self.begun is not None and not self.left and not self.shards

    def close(self) -> None:
        """Writes the results of a run that is through, and lets go of it."""
        assert self.begun is not None
        seconds, count = time.perf_counter() - self.started, len(self.begun.log.episodes)
        whole = self.parts and not self.interrupted
        self.begun.finish(self.command, throughput_of(count, seconds, self.parts) if whole else None)
        self.files.close()
        self.begun = None


class Board:
    """Which episodes are whose. It knows nothing of how they are executed."""

    def __init__(self, sweep: Sweep, waiting: Sequence[Run], progress: Progress, command: str) -> None:
        self._sweep, self._progress, self._command = sweep, progress, command
        self._waiting = deque(waiting)  # not begun
        self.open: dict[str, Record] = {}
        self._unopened = 0  # seats in a row that were lost while they opened a run

    @property
    def is_through(self) -> bool:
        return not self._waiting and not self.open

    def choose(self, current: Record | None) -> Record | None:
        """The run that a seat takes its next shard from: the one that it has open, else one that nobody has begun, else
        the one with most episodes left."""
        if current is not None and current.left:
            return current
        for run in self._waiting:
            if run.matched is None or self._is_through(run.matched):
                self._waiting.remove(run)
                record = Record(run, with_rate(run, self._sweep), self._command)
                self.open[run.name] = record
                return record
        behind = [record for record in self.open.values() if record.left]
        return max(behind, key=lambda record: len(record.left), default=None)

    def shard(self, record: Record, seats: int, workers: int, under_way: int) -> list[EpisodeKey]:
        """The next episodes of the run for one of so many seats: a seat's share of all that is not finished, so that
        the seats end together. A shard costs: simulators build other tasks' environments, and wait for its longest
        episode. So there are few, and a rest that is too short for one goes along.

        under_way: episodes that seats are at.
        """
        left = sum(len(other.left) for other in self.open.values())
        not_begun = len(self._waiting) + sum(other.begun is None for other in self.open.values())
        left += not_begun * len(record.left)  # those are about as long
        least = LEAST_ROUNDS * workers
        share = max(least, (left + under_way) // seats)
        return record.take(share if len(record.left) - share >= least else len(record.left))

    def accept(self, record: Record, job: Job, node: str) -> None:
        self._unopened = 0
        record.accept(job, node)

    def add(self, record: Record, episode: Episode) -> None:
        if record.add(episode):
            self._progress.add(record.run.name, episode)

    def settle(self, record: Record) -> None:
        """Closes the run if it is through."""
        if record.is_through:
            record.close()
            del self.open[record.run.name]

    def abandon(self, record: Record, why: str) -> None:
        """A seat was lost while it opened the run: it has not begun, unless others have.

        Raises:
            UserError: that happened `ATTEMPTS` times in a row.
        """
        self._unopened += 1
        if self._unopened == ATTEMPTS:
            raise UserError(f"{record.run.name} cannot be opened: {ATTEMPTS} seats in turn were lost; last: {why}")
        if record.begun is None:
            del self.open[record.run.name]
            self._waiting.appendleft(record.run)

    def stop(self) -> None:
        """Lets go of the files."""
        for record in self.open.values():
            record.files.close()

    def _is_through(self, name: str) -> bool:
        return name not in self.open and all(run.name != name for run in self._waiting)


def conduct(sweep: Sweep, seats: Seats, progress: Progress, command: str) -> None:
    """Executes what the sweep lacks.

    Raises:
        UserError: a seat cannot open a run, or differs from the others; an episode fails again and again; there is no
            seat; or the user stopped the sweep: what had finished is kept, and the same sweep goes on from there.
    """
    sweep.declare()
    board = Board(sweep, unfinished(sweep, progress), progress, command)
    seen = time.monotonic()
    try:
        while not board.is_through:
            places = seats.places()
            for place in places:
                if not place.busy:
                    _employ(place, board, seats, places)
            if any(place.busy for place in places):
                seen = time.monotonic()
            elif time.monotonic() - seen > PATIENCE:
                raise UserError(f"there has been no node to work on for {PATIENCE:g} s", "The same command goes on")
            for place, answer in seats.answers():
                _note(place, answer, board, progress)
    except KeyboardInterrupt:
        raise UserError(
            f"stopped. What had finished is in {sweep.out}", "The same command goes on from there"
        ) from None
    finally:
        board.stop()


def _employ(place: Place, board: Board, seats: Seats, places: Sequence[Place]) -> None:
    """Gives an idle seat a run to open, or a shard of the one that it has open."""
    record = board.choose(place.record)
    if record is None:
        return
    place.busy = True
    if record is not place.record:
        place.record, place.shard = record, None
        seats.open(place, record.request)
        return
    under_way = sum(len(other.shard or ()) for other in places)
    place.shard = board.shard(record, len(places), place.workers, under_way)
    place.size = len(place.shard)
    record.shards += 1
    seats.run(place, place.shard)


def _note(place: Place, answer: Job | Episode | Meter | Refused | Lost, board: Board, progress: Progress) -> None:
    """What a seat said."""
    record = place.record
    assert record is not None
    if isinstance(answer, Episode):
        assert place.shard is not None
        with explained(record.request.out):
            board.add(record, answer)
        place.shard.remove(answer.key)
        return
    place.busy = False
    if isinstance(answer, Job):
        with explained(record.request.out):
            board.accept(record, answer, place.node)
    elif isinstance(answer, Meter):
        record.parts.append((place.workers, answer))
        record.shards -= 1
    elif place.shard is None:  # while it opened the run
        if isinstance(answer, Refused):
            raise UserError(f"node {place.node}: {answer.message}")
        progress.lost(f"node {place.node}: {answer.message}")
        board.abandon(record, answer.message)
    else:
        progress.lost(f"node {place.node}: {answer.message}; {counted(len(place.shard), 'episode')} go to others")
        record.shards -= 1
        record.give_back(place.shard, len(place.shard) == place.size, answer.message)
    with explained(record.request.out):
        board.settle(record)


def _with_machine_of(settings: Settings, other: Settings) -> Settings:
    """The settings as if processor and cores were those of the other ones."""
    machine = {key: other.hardware[key] for key in OF_A_MACHINE if key in other.hardware}
    return structs.replace(settings, hardware={**settings.hardware, **machine})


def _as_logged(settings: Settings, request: EvalRequest) -> Settings:
    """The settings of a run that may go on from what another node began."""
    with contextlib.suppress(FileNotFoundError, UserError):
        stored = read_record(Settings, request.out / f"{request.name}_settings.json")
        return _with_machine_of(settings, stored)
    return settings
