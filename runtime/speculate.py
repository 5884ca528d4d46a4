"""The decisions of residual speculative decoding, as pure functions on arrays: they are made on the host, between two
launches, where NumPy is faster than small tensors.

The rule. A *chunk* holds the actions that the main head gave at the last full query. At each query the draft,
which reads an early hidden state of a fresh image, guesses a coarse chunk from now on. It is laid beside what
is left of the chunk, step by step. The *prefix* is the number of leading steps that

1. pass the rule: every arm dimension within its tolerance and the same gripper sign (rule `actions`), or a large
   enough share of equal coarse tokens (rule `tokens`), and
2. keep the gripper as it was at the step before: a switch is decided by the main head alone.

At least one step: the query is *accepted* and commits the chunk's actions, as many as the prefix has and at
most `n_action_steps`; the rest of the backbone is not run. None: the query is *rejected*, the rest of the
backbone is run, and the main head makes a new chunk, of which the prefix that the draft agrees with is
committed, and at least one action. After `refresh - 1` accepted queries in a row a full query is due: with
`refresh` 1 every query is one, and with one action a query the loop then acts exactly as the baseline.

The random-acceptance control. Mode `random` is the same loop with the rule `random`: at a check every step passes, or
none does, by chance. Condition 2, the caps and the forced full queries stay; the draft is run, so that a query costs
the same, and not listened to. An accepted query therefore commits as many actions as the best draft could make it, and
so does a full query, where there is no decision to replace. With one action a query the two loops differ in which
queries are accepted and in nothing else. With more, the control is the bolder one: where the draft agrees with a part
of the steps, it lets all of them pass, and so makes fewer queries for the same actions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS, RsdConfig

Tokens = NDArray[np.int64]
Actions = NDArray[np.float32]
Flags = NDArray[np.bool_]

# How a query went. The first three checked what was left of a chunk; the next five had to be full queries, and say why;
# a fault of the draft ended the query before either.
Route = Literal["accepted", "partial", "rejected", "start", "exhausted", "gripper", "refresh", "full", "fault"]

STREAM = 1  # keeps what the rule `random` draws apart from what else is drawn from (seed, task, trial)


@dataclass(frozen=True)
class Comparison:
    """The draft's guess beside the next t steps of a chunk. query: task, trial and the query's number in the episode
    where what is left of a chunk is checked, None where the chunk is new."""

    agreeing: Flags  # [t]: `agreeing_steps` of the actions
    guess: Tokens  # [t, D, C]
    tokens: Tokens  # [t, D, C], the chunk's
    query: tuple[int, ...] | None


class Rule(Protocol):
    """Condition 1: what stands between a guess and the actions of a chunk."""

    def __call__(self, comparison: Comparison) -> Flags:
        """Which steps pass -> [t] bool."""
        ...


@dataclass(frozen=True)
class ActionsAgree:
    """The rule `actions`."""

    def __call__(self, comparison: Comparison) -> Flags:
        return comparison.agreeing


@dataclass(frozen=True)
class TokensAgree:
    """The rule `tokens`."""

    share: float  # of a step's coarse tokens that must be equal, 0..1

    def __call__(self, comparison: Comparison) -> Flags:
        return agreeing_token_steps(comparison.guess, comparison.tokens, self.share)


@dataclass(frozen=True)
class RandomAcceptance:
    """The rule `random`."""

    rate: float  # how often a check is accepted, 0..1
    seed: int

    def __call__(self, comparison: Comparison) -> Flags:
        passes = comparison.query is None or self.accepts(comparison.query)
        return np.full_like(comparison.agreeing, passes)

    def accepts(self, query: tuple[int, ...]) -> bool:
        """The decision on a query: a function of its place, the rate and the seed alone, so that it depends neither on
        what else is run nor in which order. What one rate accepts, a higher one does too."""
        return bool(np.random.default_rng([STREAM, self.seed, *query]).random() < self.rate)


def rule_of(rsd: RsdConfig) -> Rule:
    """The rule that a bundle names."""
    return ActionsAgree() if rsd.rule == "actions" else TokensAgree(rsd.token_share)


def agreeing_steps(a: Actions, b: Actions, tolerance: Actions) -> Flags:
    """Which steps of two chunks [..., T, A] agree -> [..., T] bool.

    The host's form of what `Predict` computes on the device: `rsd_trt.models.components.agreeing_steps`.
    """
    delta = a - b
    arm = (np.abs(delta[..., :ARM_DIMS]) <= tolerance).all(-1)
    gripper = (a[..., ARM_DIMS] > 0) == (b[..., ARM_DIMS] > 0)
    agreeing: Flags = arm & gripper & ~np.isnan(delta[..., ARM_DIMS])
    return agreeing


def agreeing_token_steps(draft: Tokens, chunk: Tokens, share: float) -> Flags:
    """Steps where at least `share` of the coarse tokens [..., T, D, C] are equal -> [..., T] bool."""
    agreeing: Flags = (draft == chunk).mean((-2, -1)) >= share
    return agreeing


def gripper_holds(chunk: Actions, before: Actions) -> Flags:
    """Steps of a chunk [..., T, A] whose gripper sign is that of the step before -> [..., T] bool.

    `before` [...]: the gripper command before the first of them.
    """
    closed = chunk[..., ARM_DIMS] > 0  # [..., T]
    holds = np.empty_like(closed)
    holds[..., :1] = closed[..., :1] == (before > 0)[..., None]
    holds[..., 1:] = closed[..., 1:] == closed[..., :-1]
    return holds


def agreeing_prefix(passes: Flags) -> NDArray[np.int64]:
    """The number of leading steps [..., T] that pass -> [...] int64."""
    prefix: NDArray[np.int64] = np.logical_and.accumulate(passes, axis=-1).sum(-1)
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


def route_checked(prefix: int, left: int, n_action_steps: int) -> Route:
    """How a query went that checked a chunk with `left` steps left."""
    if prefix == 0:
        return "rejected"
    return "accepted" if prefix >= min(left, n_action_steps) else "partial"


@dataclass(frozen=True)
class Checks:
    """How many queries checked what was left of a chunk, by how they went. Their shares add up to 1."""

    accepted: int = 0
    partial: int = 0
    rejected: int = 0

    @classmethod
    def of(cls, routes: Iterable[Route]) -> Checks:
        """Counts queries; those that checked nothing are left out."""
        counts = Counter(routes)
        return cls(counts["accepted"], counts["partial"], counts["rejected"])

    @property
    def acceptance_rate(self) -> float | None:
        """The rate of the random-acceptance control that accepts as often: in part is accepted, too. None without a
        check."""
        return self._share(self.accepted + self.partial)

    def rates(self) -> dict[str, float | None]:
        """The shares under the original experiment's names; None without a check."""
        return {
            "draft_acceptance_rate": self._share(self.accepted),
            "partial_acceptance_rate": self._share(self.partial),
            "full_rejection_rate": self._share(self.rejected),
        }

    def _share(self, count: int) -> float | None:
        total = self.accepted + self.partial + self.rejected
        return count / total if total else None
