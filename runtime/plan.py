"""What a query gives, what a slot remembers between queries, and whether a decision was right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS
from rsd_trt.runtime.speculate import Actions, Route, Tokens, refresh_due

Verdict = Literal["true_accept", "false_accept", "true_reject", "false_reject"]
Gap = tuple[tuple[float, ...], ...]  # [n, A]


@dataclass(frozen=True)
class Query:
    """One query's outcome.

    actions [n, A] float32 in environment units, owned by the caller; n is 0 when `fault` says why.
    prefix: leading steps on which draft and plan agree (the live plan's if one was tested, else the new one's), or
    that the coin lets pass in its place; None without a draft. ms: synchronised time of the whole batch.
    token_agreement: share of equal draft and main tokens for each coarse layer, where both were computed. verdict,
    draft_gap and main_gap: shadow mode only; the gaps are those of `plan_gap` between the live plan and the draft,
    and the main head's new plan.
    full_query: whether the whole backbone was run.
    """

    actions: NDArray[np.float32]
    route: Route
    prefix: int | None = None
    token_agreement: tuple[float, ...] | None = None
    verdict: Verdict | None = None
    draft_gap: Gap | None = None
    main_gap: Gap | None = None
    fault: str | None = None
    full_query: bool = True
    ms: float = 0.0


@dataclass
class Plan:
    """What a slot remembers between queries. Without actions there is no live plan."""

    actions: Actions | None = None  # [T, A]
    tokens: Tokens | None = None  # [T, D, L]
    grippers: tuple[bool, ...] = ()  # closed or not, for each step
    cursor: int = 0
    accepted_in_a_row: int = 0
    episode: tuple[int, ...] = ()  # which one the slot is at: (task, trial)
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


def plan_gap(plan: Plan, chunk: Actions, most: int) -> Gap:
    """How far a new chunk [T, A] is from the plan's next steps, as |difference| for each arm dimension and, for the
    gripper, 1 where the signs differ. Of the steps that a query could commit: at most `most`, and before the plan
    switches its gripper."""
    assert plan.actions is not None
    ahead = plan.actions[plan.cursor :]
    held = [g == plan.grippers[plan.cursor - 1] for g in plan.grippers[plan.cursor :]] + [False]
    count = min(most, held.index(False))
    new, old = chunk[:count], ahead[:count]
    gap = np.abs(new - old)
    gap[:, ARM_DIMS] = (new[:, ARM_DIMS] > 0) != (old[:, ARM_DIMS] > 0)
    return tuple(tuple(round(float(x), 4) for x in step) for step in gap)


def judge(committed: int, by_main: int) -> Verdict:
    """Whether a decision was right: `committed` steps of the old plan (0: rejected) against the `by_main` leading
    steps of it that the main head's new plan confirms."""
    if committed == 0:
        return "false_reject" if by_main > 0 else "true_reject"
    return "true_accept" if by_main >= committed else "false_accept"
