"""What a query gives, and what is remembered of an environment between queries."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS
from rsd_trt.runtime.speculate import Actions, Route, Tokens, steps_until_switch

Gap = tuple[tuple[float, ...], ...]  # [t, A]


class Query(msgspec.Struct, frozen=True):
    """One query's outcome.

    actions [n, A] float32 in environment units, within the controller's limits, owned by the caller; n is 0 when
    `fault` says why. clipped: how many of them were not within the limits before. ms: synchronised time of the whole
    batch.
    checked: whether the draft was run and what was left of a chunk was judged by it; then prefix is the number of its
    next steps that pass the rule, score what the rule compared with its threshold where that is one number, and
    draft_finite whether the draft could be used. full_query: whether backbone and main head were run.
    skipped: steps of the chunk before `actions`, which went by until it was there.
    token_agreement: share of equal draft and main tokens for each coarse layer, where both were computed.
    chunk [T, A] and tokens [T, D, L]: the main head's, where it was asked; not to be written to.
    draft_gap and main_gap: mode shadow only, `Chunk.gap` of the draft's guess and of the main head's new chunk.
    """

    actions: NDArray[np.float32]
    route: Route
    checked: bool = False
    full_query: bool = True
    prefix: int | None = None
    score: float | None = None
    clipped: int = 0
    draft_finite: bool = True
    token_agreement: tuple[float, ...] | None = None
    chunk: Actions | None = None
    tokens: Tokens | None = None
    draft_gap: Gap | None = None
    main_gap: Gap | None = None
    skipped: int = 0
    fault: str | None = None
    ms: float = 0.0


@dataclass
class Chunk:
    """The main head's last chunk for an environment, and how far its episode is. Without actions there is none yet."""

    actions: Actions | None = None  # [T, A]
    tokens: Tokens | None = None  # [T, D, L]; a main head may give none
    instruction: str = ""  # that it was made for
    cursor: int = 0  # steps of it that were committed: its age
    episode: tuple[int, ...] = ()  # which one the environment is at: (task, trial)
    queries: int = 0  # that were answered in it
    late: int = 0  # steps that go by until a full query is answered: it is due that much earlier
    fixed: int | None = None  # actions of every query, whatever the policy's own numbers; a check commits all or none

    def due(self, instruction: str, refresh: int | None) -> Route | None:
        """Why the next query has to be a full query, or None if there is something to check."""
        if self.actions is None:
            return "start"
        if self.instruction != instruction:
            return "instruction"
        if len(self.left) - self.late < (self.fixed or 1):
            return "exhausted"
        if self.until_switch - self.late < (self.fixed or 1):
            return "gripper"
        return "refresh" if refresh is not None and self.cursor >= refresh else None

    @property
    def left(self) -> Actions:
        """The steps [t, A] that are not committed yet."""
        assert self.actions is not None
        return self.actions[self.cursor :]

    @property
    def gripper(self) -> float:
        """The gripper's command before what is left."""
        assert self.actions is not None
        return float(self.actions[self.cursor - 1, ARM_DIMS])

    @property
    def until_switch(self) -> int:
        """How many of the steps that are left keep the gripper's command."""
        return steps_until_switch(self.left, self.gripper)

    def forget(self) -> None:
        """Ends it: the next query has nothing to check."""
        self.actions, self.tokens, self.instruction, self.cursor = None, None, "", 0

    def take_back(self, steps: int) -> None:
        """The last `steps` of those that were committed were not executed. Of a chunk of which nothing was, the
        gripper's command before it is not known: it ends."""
        self.cursor -= steps
        if self.cursor <= 0:
            self.forget()

    def gap(self, guess: Actions) -> Gap:
        """How far a guess [T, A] is from each step that is left, as |difference| for each arm dimension and, for the
        gripper, 1 where the signs differ."""
        left = self.left
        gap = np.abs(guess[: len(left)] - left)
        gap[:, ARM_DIMS] = (guess[: len(left), ARM_DIMS] > 0) != (left[:, ARM_DIMS] > 0)
        return tuple(tuple(round(float(x), 4) for x in step) for step in gap)
