"""Who is being served: each session has a chunk of its own, and remembers what it was told."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsd_trt.errors import UserError
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.arrays import BadMessage

if TYPE_CHECKING:
    from rsd_trt.recorder import EpisodeRecorder

RECENT = 20  # checks that the alarm looks at
SURPRISE = 1e-3  # how unlikely a share of rejections has to be, at the expected rate, to raise it
POSITION = 3  # leading numbers of the state: where the hand is, m


class Full(UserError):
    """There is no room for another session."""


@dataclass
class Alarm:
    """The share of the recent checks that was rejected, against the share that is expected.

    Raised when so many rejections would come by chance in one of 1 / SURPRISE windows at the most, if checks were
    independent. They come in bursts: choose the expected share above the mean, by what it raises in recorded episodes.
    """

    expected: float | None = None
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def share(self) -> float | None:
        """None before the first check."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    @property
    def raised(self) -> bool:
        if self.expected is None or not self.recent:
            return False
        n, rejected, p = len(self.recent), sum(self.recent), self.expected
        tail = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(rejected, n + 1))
        return rejected > p * n and tail < SURPRISE


@dataclass
class Session:
    """One robot's episode under way.

    hand_step: m that its hand moves in a control step at the most. A jump that the executed actions cannot explain is a
    new episode, which nobody announced. So is another instruction; its first query finds the old chunk, and says so.
    """

    fixed: int | None = None  # actions of every reply
    hand_step: float | None = None
    chunk: Chunk = field(default_factory=Chunk)
    alarm: Alarm = field(default_factory=Alarm)
    answered: int = 0  # actions of the last reply
    steps: int = 0  # that were executed in this episode
    ended: int = 0  # those of the one before
    instruction: str | None = None  # of the last query
    position: list[float] | None = None  # of the hand, at the last query
    waiting: NDArray[np.float32] | None = None  # actions that were committed and not sent, for one-at-a-time protocols
    episodes: int = 0  # that have begun
    recording: EpisodeRecorder | None = None  # of the episode, where episodes are recorded

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A new episode."""
        self.chunk = Chunk(fixed=self.fixed)
        self.instruction, self.position = None, None
        self._begin_episode()

    def _begin_episode(self) -> None:
        unsent = 0 if self.waiting is None else len(self.waiting)
        self.ended, self.steps, self.answered, self.waiting = self.steps + self.answered - unsent, 0, 0, None
        self.alarm.recent.clear()
        self.episodes += 1

    def begin(self, observation: Observation, executed: int | None) -> Chunk:
        """The chunk for a query, which `finish` keeps. executed: how many actions of the last reply were; None: all.

        Raises:
            BadMessage: more than there were.
        """
        done = self.answered if executed is None else executed
        if not 0 <= done <= self.answered:
            raise BadMessage(f"executed is {executed}, and the last reply had {self.answered} actions")
        if self.chunk.actions is not None and done < self.answered:
            self.chunk.take_back(self.answered - done)
        self.steps, self.answered = self.steps + done, 0
        hand = None if observation.proprio is None else observation.proprio[:POSITION].tolist()
        moved = 0.0 if hand is None or self.position is None else math.dist(hand, self.position)
        # One more than were executed: the state is as old as the frames.
        if self.hand_step is not None and moved > self.hand_step * (done + 1):
            self.reset()
        elif self.instruction not in (None, observation.instruction):
            self._begin_episode()
        self.instruction, self.position = observation.instruction, hand
        return replace(self.chunk)

    def finish(self, chunk: Chunk, query: Query) -> None:
        """What a query that was answered in time did to the chunk."""
        self.chunk, self.answered = chunk, len(query.actions)
        if query.checked:
            self.alarm.recent.append(query.route == "rejected")

    def late(self, count: int) -> NDArray[np.float32]:
        """The next `count` actions of the old chunk, in the place of a full query that is late."""
        actions = self.chunk.left[:count]
        self.chunk = replace(self.chunk, cursor=self.chunk.cursor + len(actions))
        self.answered = len(actions)
        return actions


class Sessions:
    """All that are open: at most `limit`. They are a connection's own, and end with it."""

    def __init__(self, limit: int, fixed: int, hand_step: float | None, expected: float | None) -> None:
        self.limit, self._fixed, self._hand_step, self._expected = limit, fixed, hand_step, expected
        self._of: dict[Hashable, OrderedDict[str, Session]] = {}

    def __len__(self) -> int:
        return sum(max(1, len(own)) for own in self._of.values())  # a connection holds a place before its first query

    def connect(self, connection: Hashable) -> None:
        """Holds a place for a connection.

        Raises:
            Full: there is none.
        """
        if len(self) >= self.limit:
            raise Full(f"{self.limit} sessions are open, and more are not served", "Start the server with --sessions")
        self._of[connection] = OrderedDict()

    def get(self, connection: Hashable, name: str) -> tuple[Session, Session | None]:
        """A connection's session of that name. A new one begins where there is room, else in the place of the one
        of the connection's that was used longest ago, which is given, too."""
        own, displaced = self._of[connection], None
        if name not in own:
            if own and len(self) >= self.limit:
                _, displaced = own.popitem(last=False)
            own[name] = Session(self._fixed, self._hand_step, alarm=Alarm(self._expected))
        own.move_to_end(name)
        return own[name], displaced

    def disconnect(self, connection: Hashable) -> list[Session]:
        """Ends a connection's sessions."""
        return list(self._of.pop(connection, {}).values())
