"""A robot that does not wait: while a full query is under way, its old chunk goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.loop import Loop
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.speculate import Actions


class Coming(Protocol):
    """A query of the loop, on a chunk of its own. It is done at once unless a full query is under way."""

    def done(self) -> bool: ...

    def result(self) -> tuple[Query, Chunk]:
        """The query and the chunk that it brought up to date, which are waited for.

        Raises:
            UserError: they cannot be had.
        """


@dataclass(frozen=True)
class Asked:
    """A query that a robot asked, and the actions that its old chunk gave since."""

    observation: Observation
    coming: Coming
    late: list[Actions] = field(default_factory=list)  # each [1, A]


class Ahead:
    """The chunk of one robot, and its query under way.

    Until a full query is answered, the robot gets the old chunk's actions, one a query; then it enters the new chunk at
    the step that is due. A query waits without an old chunk of the same instruction, when nothing is left of it, and
    before its gripper switches: the main head alone decides that.
    """

    def __init__(
        self,
        loop: Loop,
        begin: Callable[[Observation, Chunk], Coming],
        steps: int,
        ended: Callable[[Asked, Query | None], None] = lambda asked, query: None,
    ) -> None:
        """begin: asks `loop`. steps: a full query is due that many steps before the chunk ends, or its gripper
        switches. ended(asked, query): called for every query that was answered (None: was not, and will not be)."""
        self._loop, self._begin, self._ended = loop, begin, ended
        self._new = Chunk(late=steps)
        self._chunk = replace(self._new)
        self._asked: Asked | None = None

    def reset(self) -> None:
        """A new episode. The answer to a query under way is dropped."""
        self._drop()
        self._chunk = replace(self._new)

    def query(self, observation: Observation) -> Query:
        """The next actions.

        Raises:
            UserError: a full query is due and cannot be had. The chunk is as it was.
        """
        if self._asked is not None and self._asked.observation.instruction != observation.instruction:
            self._drop()
        if self._asked is None:
            self._asked = Asked(observation, self._begin(observation, replace(self._chunk)))
        asked = self._asked
        if self.goes_on():
            query = self._loop.go_on(self._chunk)
            asked.late.append(query.actions)
            return query
        try:
            query, chunk = asked.coming.result()
        except BaseException:
            self._drop()
            raise
        if asked.late and query.fault is None:
            query = self._loop.enter(chunk, query, len(asked.late))
        self._chunk, self._asked = chunk, None
        self._ended(asked, query)
        if query.fault is None and not len(query.actions):  # a chunk that was over before it came
            return self.query(observation)
        return query

    def goes_on(self) -> bool:
        """Whether the old chunk gives the next action."""
        chunk, asked = self._chunk, self._asked
        if asked is None or chunk.instruction != asked.observation.instruction or asked.coming.done():
            return False
        return chunk.actions is not None and chunk.until_switch > 0

    def _drop(self) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            self._ended(asked, None)
