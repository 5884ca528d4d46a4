"""The decisions of residual speculative decoding, as pure functions on arrays: they are made on the host, between two
launches, where NumPy is faster than small tensors.

The rule. A *plan* is the action chunk that the main head gave at the last full query. At each query the draft,
which reads an early hidden state of a fresh image, guesses a coarse chunk from now on. It is laid beside what
is left of the plan, step by step. The *prefix* is the number of leading steps that

1. agree: every arm dimension within its tolerance and the same gripper sign (rule `actions`), or a large
   enough share of equal coarse tokens (rule `tokens`), and
2. keep the gripper as it was at the step before: a switch is decided by the main head alone.

At least one step: the query is *accepted* and commits the plan's actions, as many as the prefix has and at
most `n_action_steps`; the rest of the backbone is not run. None: the query is *rejected*, the rest of the
backbone is run, and the main head makes a new plan, of which the prefix that the draft agrees with is
committed, and at least one action. After `refresh - 1` accepted queries in a row a full query is due: with
`refresh` 1 every query is one, and with one action a query the loop then acts exactly as the baseline.

The control. Mode `random` is the same loop, in which a coin agrees in the draft's place: with every step that is laid
beside the draft, or with none. Condition 2, the caps and the forced full queries stay; the draft is run, so that a
query costs the same, and not listened to. An accepted query therefore commits as many actions as the best draft
could make it, and so does a full query, where there is no verdict to replace. With one action a query the two loops
differ in which queries are accepted and in nothing else. With more, the coin is the bolder one: where the draft
agrees with a part of the steps, it lets all of them pass, and so makes fewer queries for the same actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS

Tokens = NDArray[np.int64]
Actions = NDArray[np.float32]
Flags = NDArray[np.bool_]

# How a query went. The first three tested a live plan; the next five had to be full queries, and say why; a fault of
# the draft ended the query before either.
Route = Literal["accepted", "partial", "rejected", "start", "exhausted", "gripper", "refresh", "full", "fault"]

COIN_STREAM = 1  # keeps the coins apart from what else is drawn from (seed, task, trial)


def agreeing_steps(a: Actions, b: Actions, tolerance: Actions) -> Flags:
    """Which steps of two chunks [B, T, A] agree -> [B, T] bool: what `rsd_trt.models.components.agreeing_steps` says on the
    device, by the same rule."""
    delta = a - b
    arm = (np.abs(delta[..., :ARM_DIMS]) <= tolerance).all(-1)
    gripper = (a[..., ARM_DIMS] > 0) == (b[..., ARM_DIMS] > 0)
    agreeing: Flags = arm & gripper & ~np.isnan(delta[..., ARM_DIMS])
    return agreeing


def agreeing_token_steps(draft: Tokens, plan: Tokens, share: float) -> Flags:
    """Steps where at least `share` of the coarse tokens [B, T, D, C] are equal -> [B, T] bool."""
    agreeing: Flags = (draft == plan).mean((2, 3)) >= share
    return agreeing


def gripper_holds(plan: Actions, before: Actions) -> Flags:
    """Steps of a plan [B, T, A] whose gripper sign is that of the step before -> [B, T] bool.

    `before` [B]: the gripper command before the plan's first step.
    """
    closed = plan[..., ARM_DIMS] > 0  # [B, T]
    holds = np.empty_like(closed)
    holds[:, :1] = closed[:, :1] == (before > 0)[:, None]
    holds[:, 1:] = closed[:, 1:] == closed[:, :-1]
    return holds


def agreeing_prefix(passes: Flags) -> NDArray[np.int64]:
    """The number of leading steps [B, T] that pass -> [B] int64."""
    prefix: NDArray[np.int64] = np.logical_and.accumulate(passes, axis=1).sum(1)
    return prefix


def commit_accepted(prefix: int, n_action_steps: int) -> int:
    """Actions that an accepted query commits."""
    return min(prefix, n_action_steps)


def commit_full(prefix: int, n_action_steps: int) -> int:
    """Actions that a full query commits: the agreeing prefix, at least one."""
    return max(1, min(prefix, n_action_steps))


def refresh_due(accepted_in_a_row: int, refresh: int) -> bool:
    """Whether the next query has to be a full query: every `refresh`-th one at the latest is."""
    return accepted_in_a_row + 1 >= refresh


def route_tested(prefix: int, left: int, n_action_steps: int) -> Route:
    """How a query went that tested a live plan with `left` steps left."""
    if prefix == 0:
        return "rejected"
    return "accepted" if prefix >= min(left, n_action_steps) else "partial"


@dataclass(frozen=True)
class Coin:
    """What decides in the draft's place in mode `random`."""

    rate: float  # how often it accepts, 0..1
    seed: int

    def accepts(self, episode: tuple[int, ...], query: int) -> bool:
        """The verdict on a query, by its number in the episode: a function of these and the coin alone, so that it
        depends neither on what else is run nor in which order. What a coin accepts, one of a higher rate does too."""
        return bool(np.random.default_rng([COIN_STREAM, self.seed, *episode, query]).random() < self.rate)


def acceptance_rate(accepted: int, partial: int, rejected: int) -> float | None:
    """The rate of the coin that accepts as often as a draft with these verdicts: in part is accepted, too. None where
    none was given."""
    tested = accepted + partial + rejected
    return (accepted + partial) / tested if tested else None


@dataclass
class Acceptance:
    """Counts of the queries that tested a live plan. Their shares add up to 1."""

    accepted: int = 0
    partial: int = 0
    rejected: int = 0

    def add(self, route: Route) -> None:
        """Counts a query; routes that tested nothing are not counted."""
        if route in ("accepted", "partial", "rejected"):
            setattr(self, route, getattr(self, route) + 1)

    def rates(self) -> dict[str, float | None]:
        """The shares under the original experiment's names; None when no plan was ever tested."""
        tested = self.accepted + self.partial + self.rejected
        return {
            "draft_acceptance_rate": self.accepted / tested if tested else None,
            "partial_acceptance_rate": self.partial / tested if tested else None,
            "full_rejection_rate": self.rejected / tested if tested else None,
        }
