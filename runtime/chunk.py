"""What a query gives, what is remembered of an environment between queries, and whether a decision was right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS
from rsd_trt.runtime.speculate import Actions, Comparison, Route, Tokens, agreeing_steps, refresh_due

Judgement = Literal["true_accept", "false_accept", "true_reject", "false_reject"]
Gap = tuple[tuple[float, ...], ...]  # [n, A]


@dataclass(frozen=True)
class Query:
    """One query's outcome.

    actions [n, A] float32 in environment units, owned by the caller; n is 0 when `fault` says why.
    prefix: leading steps that pass the rule and hold the gripper (of what is left of the chunk if that was checked,
    else of the new one); None without a draft. ms: synchronised time of the whole batch. token_agreement: share of
    equal draft and main tokens for each coarse layer, where both were computed. judgement, draft_gap and main_gap:
    shadow mode only; the gaps are those of `Chunk.gap` to the draft's guess, and to the main head's new chunk.
    full_query: whether the whole backbone was run.
    """

    actions: NDArray[np.float32]
    route: Route
    prefix: int | None = None
    token_agreement: tuple[float, ...] | None = None
    judgement: Judgement | None = None
    draft_gap: Gap | None = None
    main_gap: Gap | None = None
    fault: str | None = None
    full_query: bool = True
    ms: float = 0.0


@dataclass
class Chunk:
    """The main head's last chunk for an environment, and how far its episode is. Without actions there is none yet."""

    actions: Actions | None = None  # [T, A]
    tokens: Tokens | None = None  # [T, D, L]
    grippers: tuple[bool, ...] = ()  # closed or not, for each step
    cursor: int = 0
    accepted_in_a_row: int = 0
    episode: tuple[int, ...] = ()  # which one the environment is at: (task, trial)
    queries: int = 0  # that were answered in it

    def forced(self, refresh: int, steps: int) -> Route | None:
        """Why the next query has to be a full query, or None if the draft may decide."""
        if self.actions is None:
            return "start"
        if self.cursor >= steps:
            return "exhausted"
        if self.grippers[self.cursor] != self.grippers[self.cursor - 1]:
            return "gripper"
        return "refresh" if refresh_due(self.accepted_in_a_row, refresh) else None

    @property
    def left(self) -> Actions:
        """The steps [t, A] that are not executed yet."""
        assert self.actions is not None
        return self.actions[self.cursor :]

    @property
    def gripper(self) -> Actions:
        """The gripper's command before what is left, []."""
        assert self.actions is not None
        return self.actions[self.cursor - 1, ARM_DIMS]

    def beside(self, tokens: Tokens, actions: Actions, tolerance: Actions) -> Comparison:
        """What is left, compared with the first steps of a guess: tokens [T, D, C], actions [T, A]."""
        assert self.tokens is not None
        left = self.left
        return Comparison(
            agreeing=agreeing_steps(actions[: len(left)], left, tolerance),
            guess=tokens[: len(left)],
            tokens=self.tokens[self.cursor :, :, : tokens.shape[-1]],
            query=(*self.episode, self.queries),
        )

    def gap(self, guess: Actions, most: int) -> Gap:
        """How far a guess [T, A] is from what is left, as |difference| for each arm dimension and, for the gripper, 1
        where the signs differ. Of the steps that a query could commit: at most `most`, and before the chunk switches
        its gripper."""
        held = [g == self.grippers[self.cursor - 1] for g in self.grippers[self.cursor :]] + [False]
        count = min(most, held.index(False))
        new, old = guess[:count], self.left[:count]
        gap = np.abs(new - old)
        gap[:, ARM_DIMS] = (new[:, ARM_DIMS] > 0) != (old[:, ARM_DIMS] > 0)
        return tuple(tuple(round(float(x), 4) for x in step) for step in gap)


def judge(committed: int, by_main: int) -> Judgement:
    """Whether a decision was right: `committed` steps of the old chunk (0: rejected) against the `by_main` leading
    steps of it that the main head's new chunk confirms."""
    if committed == 0:
        return "false_reject" if by_main > 0 else "true_reject"
    return "true_accept" if by_main >= committed else "false_accept"
