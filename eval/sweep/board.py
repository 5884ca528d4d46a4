"""Which episodes of a sweep are whose, while seats execute shards of its runs.

A seat is a place at which a model is loaded, with its simulators. A group is runs that share both. A shard is some of a
group's episodes, of few tasks: a simulator has the environment of one. What seats finish streams to the runs' logs
here, which are the one source of truth: an episode counts once its line is written, and a line is written only for an
episode that its log lacks. Nothing here knows how seats come about: `rsd_trt.eval.sweep.cluster` has those of Ray.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from msgspec import structs

from rsd_trt.errors import UserError, shown
from rsd_trt.eval.libero.pool import Meter
from rsd_trt.eval.libero.request import EvalRequest
from rsd_trt.eval.libero.run import Job, own_folder, throughput_of
from rsd_trt.eval.libero.run import Run as Begun
from rsd_trt.eval.results import Episode, EpisodeKey, Settings
from rsd_trt.eval.statistics import counted
from rsd_trt.eval.sweep.plan import Run, Sweep
from rsd_trt.eval.sweep.run import Progress, groups, unfinished, with_rate
from rsd_trt.files import explained
from rsd_trt.records import differing, read_record, to_json

ATTEMPTS = 3  # at a shard, by seats that are lost or break before they finish any of it
AT_ONCE = 0.75  # of a seat's share, dealt in one shard; what is left evens out what seats differ by
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


Answer: TypeAlias = Sequence[Job] | Episode | Meter | Refused | Lost
Item: TypeAlias = tuple[int, int, int]  # an episode: the number of its run in the group, task, trial


@dataclass(eq=False)
class Place:
    """A seat, as it is seen from here."""

    node: str  # for people
    workers: int  # simulators
    group: Group | None = None  # what it has open
    shard: set[Item] | None = None  # what it has still to finish; None: it opens the group
    size: int = 0  # of the shard, at first
    tasks: set[int] = field(default_factory=set)  # of its last shard: its simulators have built their environments
    busy: bool = False


class Seats(Protocol):
    """Those that there are. They come and go."""

    def places(self) -> Sequence[Place]: ...
    def open(self, place: Place, requests: Sequence[EvalRequest], /) -> None:
        """To be answered with a `Job` for each."""
        ...

    def run(self, place: Place, keys: Sequence[Sequence[EpisodeKey]], /) -> None:
        """keys: of each request that is open. To be answered with episodes, and with a `Meter` at the end."""
        ...

    def answers(self) -> Iterable[tuple[Place, Answer]]:
        """What has come in; waits a moment for it. After a `Refused` or `Lost` the seat is not among the places."""
        ...


@dataclass(eq=False)
class Group:
    """Runs that are executed together: their logs, on this machine, and the episodes that nobody has."""

    runs: tuple[Run, ...]
    requests: tuple[EvalRequest, ...]
    command: str
    files: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    begun: tuple[Begun, ...] = ()  # none before the first seat has opened them
    numbers: dict[str, int] = field(default_factory=dict)  # of the runs, by what each node's episodes say
    left: list[Item] = field(default_factory=list)
    attempts: dict[Item, int] = field(default_factory=dict)  # that came to nothing
    parts: list[tuple[int, Meter]] = field(default_factory=list)
    started: float = 0.0
    interrupted: bool = False  # some episodes were there before, or a shard broke
    shards: int = 0  # that seats are at

    def accept(self, jobs: Sequence[Job], node: str) -> None:
        """A node's view of the runs, before its first shard there: the first one opens the logs. Its episodes name
        their runs by its own settings, which have its processor in them.

        Raises:
            UserError: the node has another bundle, exports, suite or packages than the logs' episodes are of.
        """
        self.numbers |= {job.settings.run: i for i, job in enumerate(jobs)}
        if not self.begun:
            self.begun = tuple(map(self._begin, self.requests, jobs))
            self.left, self.started = _in_shares([one.missing for one in self.begun]), time.perf_counter()
            self.interrupted = any(one.earlier for one in self.begun)
            return
        for run, one, job in zip(self.runs, self.begun, jobs, strict=True):
            logged = one.job.settings
            ours, theirs = to_json(logged), to_json(_with_machine_of(job.settings, logged))
            if differences := [
                f"{key} is {shown(b)} there and {shown(a)} here" for key, a, b in differing(ours, theirs)
            ]:
                raise UserError(f"node {node}, {run.name}: {', '.join(differences[:3])}", "Make the nodes alike")

    def take(self, most: int, tasks: set[int]) -> list[Item]:
        """A shard of so many episodes that nobody has, at most: first of those tasks."""
        chosen = sorted(self.left, key=lambda item: item[1] not in tasks)[:most]
        taken = set(chosen)
        self.left = [item for item in self.left if item not in taken]
        return chosen

    def item(self, episode: Episode) -> Item:
        """Which of the group's an episode is."""
        return (self.numbers[episode.run], *episode.key)

    def add(self, item: Item, episode: Episode) -> bool:
        """Writes the episode's line, unless its log has it already."""
        log = self.begun[item[0]].log
        if not log.lacks(*episode.key):
            return False
        log.append(episode)
        return True

    def give_back(self, items: set[Item], whole: bool, why: str) -> None:
        """What a shard did not finish is anybody's again. whole: it finished nothing.

        Raises:
            UserError: so ended `ATTEMPTS` whole shards with the same episode.
        """
        for item in sorted(items) if whole else ():
            self.attempts[item] = self.attempts.get(item, 0) + 1
            if self.attempts[item] == ATTEMPTS:
                number, task, trial = item
                raise UserError(
                    f"{self.runs[number].name}: task {task}, trial {trial} was given to {ATTEMPTS} seats in turn, and "
                    f"none finished anything; last: {why}"
                )
        self.interrupted = True
        self.left = sorted(items) + self.left

    @property
    def is_through(self) -> bool:
        return bool(self.begun) and not self.left and not self.shards

    def close(self) -> None:
        """Writes the results of runs that are through, and lets go of the logs."""
        seconds, count = time.perf_counter() - self.started, sum(len(one.missing) for one in self.begun)
        whole = self.parts and not self.interrupted
        throughput = throughput_of(count, len(self.runs), seconds, self.parts) if whole else None
        for one in self.begun:
            one.finish(self.command, throughput)
        self.files.close()

    def _begin(self, request: EvalRequest, job: Job) -> Begun:
        self.files.enter_context(own_folder(request))
        return Begun.begin(request, replace(job, settings=_as_logged(job.settings, request)))


class Board:
    """Which episodes are whose. It knows nothing of how they are executed."""

    def __init__(self, sweep: Sweep, waiting: Sequence[tuple[Run, ...]], progress: Progress, command: str) -> None:
        self._sweep, self._progress, self._command = sweep, progress, command
        self._waiting = deque(waiting)  # groups that no seat has been asked to open
        self.open: list[Group] = []
        self._unopened = 0  # seats in a row that were lost while they opened a group

    @property
    def is_through(self) -> bool:
        return not self._waiting and not self.open

    def choose(self, current: Group | None) -> Group | None:
        """The group that a seat takes its next shard from: the one that it has open, else one that no seat has, else
        the one with most episodes left."""
        if current is not None and current.left:
            return current
        there = {run.name for group in self.open for run in group.runs}
        there |= {run.name for runs in self._waiting for run in runs}
        for runs in self._waiting:
            if not any(run.matched in there for run in runs):
                self._waiting.remove(runs)
                group = Group(runs, tuple(with_rate(run, self._sweep) for run in runs), self._command)
                self.open.append(group)
                return group
        behind = [group for group in self.open if group.left or not group.begun]
        return max(behind, key=lambda group: len(group.left), default=None)

    def shard(self, group: Group, place: Place, seats: int, under_way: int) -> list[Item]:
        """The next episodes of the group for one of so many seats: the most part of a seat's share of all that is not
        finished, so that few shards are dealt and the seats end together all the same. A shard costs: its simulators
        wait for its longest episode, and may build other tasks' environments. A rest that is too short for a shard goes
        along.

        under_way: episodes that seats are at.
        """
        left = sum(len(other.left) for other in self.open)
        not_begun = len(self._waiting) + sum(not other.begun for other in self.open)
        left += not_begun * len(group.left)  # those are about as long
        share = max(place.workers, int(AT_ONCE * (left + under_way) / seats))
        whole = len(group.left) - share < place.workers
        return group.take(len(group.left) if whole else share, place.tasks)

    def accept(self, group: Group, jobs: Sequence[Job], node: str) -> None:
        self._unopened = 0
        group.accept(jobs, node)

    def add(self, group: Group, item: Item, episode: Episode) -> None:
        if group.add(item, episode):
            self._progress.add(group.runs[item[0]].name, episode)

    def settle(self, group: Group) -> None:
        """Closes the group if it is through."""
        if group.is_through and group in self.open:
            group.close()
            self.open.remove(group)

    def abandon(self, group: Group, why: str) -> None:
        """A seat was lost while it opened the group.

        Raises:
            UserError: that happened `ATTEMPTS` times in a row.
        """
        self._unopened += 1
        if self._unopened == ATTEMPTS:
            name = group.runs[0].name
            raise UserError(f"{name} cannot be opened: {ATTEMPTS} seats in turn were lost; last: {why}")

    def stop(self) -> None:
        """Lets go of the files."""
        for group in self.open:
            group.files.close()


def conduct(sweep: Sweep, seats: Seats, progress: Progress, command: str) -> None:
    """Executes what the sweep lacks.

    Raises:
        UserError: a seat cannot open a run, or differs from the others; an episode fails again and again; there is no
            seat; or the user stopped the sweep: what had finished is kept, and the same sweep goes on from there.
    """
    sweep.declare()
    board = Board(sweep, groups(unfinished(sweep, progress)), progress, command)
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
    """Gives an idle seat a group to open, or a shard of the one that it has open."""
    group = board.choose(place.group)
    if group is None:
        return
    place.busy = True
    if group is not place.group:
        place.group, place.shard = group, None
        seats.open(place, group.requests)
        return
    items = board.shard(group, place, len(places), sum(len(other.shard or ()) for other in places))
    place.shard, place.size, place.tasks = set(items), len(items), {task for _, task, _ in items}
    group.shards += 1
    keys: list[list[EpisodeKey]] = [[] for _ in group.runs]
    for number, task, trial in items:
        keys[number].append((task, trial))
    seats.run(place, keys)


def _note(place: Place, answer: Answer, board: Board, progress: Progress) -> None:
    """What a seat said."""
    group = place.group
    assert group is not None
    folder = group.requests[0].out
    if isinstance(answer, Episode):
        assert place.shard is not None
        item = group.item(answer)
        with explained(folder):
            board.add(group, item, answer)
        place.shard.remove(item)
        return
    place.busy = False
    if isinstance(answer, Meter):
        group.parts.append((place.workers, answer))
        group.shards -= 1
    elif not isinstance(answer, (Refused, Lost)):
        with explained(folder):
            board.accept(group, answer, place.node)
    elif place.shard is None:  # while it opened the group
        if isinstance(answer, Refused):
            raise UserError(f"node {place.node}: {answer.message}")
        progress.lost(f"node {place.node}: {answer.message}")
        board.abandon(group, answer.message)
    else:
        progress.lost(f"node {place.node}: {answer.message}; {counted(len(place.shard), 'episode')} go to others")
        group.shards -= 1
        group.give_back(place.shard, len(place.shard) == place.size, answer.message)
    with explained(folder):
        board.settle(group)


def _in_shares(missing: Sequence[Sequence[EpisodeKey]]) -> list[Item]:
    """The episodes that each run lacks, by task, in the order in which they are dealt: first so much of every task as
    is dealt at once, so that a seat that comes again finds more of its tasks."""
    tasks: dict[int, list[tuple[int, Item]]] = {}
    for number, keys in enumerate(missing):
        for place, (task, trial) in enumerate(keys):
            tasks.setdefault(task, []).append((place, (number, task, trial)))
    first: list[Item] = []
    later: list[Item] = []
    for _, mine in sorted(tasks.items()):
        items = [item for _, item in sorted(mine)]
        cut = math.ceil(AT_ONCE * len(items))
        first += items[:cut]
        later += items[cut:]
    return first + later


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
