"""The decisions of residual speculative decoding, as pure functions on arrays: they are made on the host, between two
launches, where NumPy is faster than small tensors, and Python's own numbers than NumPy on a few dozen of them.

The loop. A *chunk* holds the actions that the main head gave at the last full query, which committed the first
`n_action_steps` of them. While a chunk is alive a query is a *check*: the draft guesses, from fresh frames, the chunk
from now on; a *rule* lays the guess beside what is left of the old chunk and says how many of its next steps may be
executed, up to `check_steps`. That many: *accepted*. Fewer: *partial*. None: *rejected*, and a full query follows, as
it does where there is nothing to check: at the *start*, under another *instruction*, with a chunk that is *exhausted*,
before its *gripper* switches (the main head alone decides that), and when a *refresh* is due. No rule lets a gripper
switch pass.

The rules. A step agrees when every arm dimension lies within its tolerance and the gripper has the same sign.
    first       the first step agrees: all may be executed
    actions     the leading steps that agree
    path        the summed motion over the next steps stays within the tolerance, and their grippers agree: all
    tokens      the leading steps of which a large enough share of the coarse tokens is equal
    likelihood  the chunk's own L0 tokens of the next steps are likely enough under the draft's logits: all, or one
                where they are not as likely as it takes to be sure
    random      the control: at each check all may be executed, or none, by chance; the draft is run and not listened to
Tolerances and the thresholds of likelihoods may depend on the chunk's age.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS, RsdConfig

Tokens = NDArray[np.int64]
Actions = NDArray[np.float32]
Logits = NDArray[np.float32]
Flags = NDArray[np.bool_]

# How a query went. The first three were checks; the others had to be full queries, and say why; `full` is each of mode
# baseline. `late`: no query, but the old chunk's next action while a full query is under way. A fault of the policy
# ended the query before it had a route.
Route = Literal[
    "accepted",
    "partial",
    "rejected",
    "start",
    "instruction",
    "exhausted",
    "gripper",
    "refresh",
    "full",
    "late",
    "fault",
]

FEW = 256  # logits, up to which a loop is faster than NumPy on a processor that has just done something else
STREAM = 1  # keeps what the rule `random` draws apart from what else is drawn from (seed, task, trial)
TINY_TOLERANCE = 1e-9  # what a deviation is divided by where nothing may deviate


class Check(Struct, frozen=True):
    """The draft's guess beside what is left of a chunk."""

    left: Actions  # [t, A], t >= 1
    left_tokens: Tokens | None  # [t, D, L]; None of a main head without tokens, where the rule does not read them
    guess: Actions  # [T, A], from now on
    guess_tokens: Tokens  # [T, D, C]
    logits: Logits  # [T, D, K], of L0
    ahead: int  # steps that an accepted check commits, or all that is left
    age: int  # of the chunk, in executed steps
    query: tuple[int, ...]  # task, trial and the query's number in the episode
    fewest: int = 1  # steps that a check commits at the least, if any


class Verdict(NamedTuple):
    """What a rule says of a check: how many steps pass, and what it compared with its threshold, if one number."""

    steps: int
    score: float | None = None


class Rule(Protocol):
    """What stands between a guess and the actions of a chunk."""

    def __call__(self, check: Check) -> Verdict: ...


@dataclass(frozen=True)
class Tolerance:
    """How far actions may differ."""

    arm: tuple[float, ...]  # environment units, [6]
    by_age: tuple[float, ...] = ()

    def at(self, age: int) -> Actions:
        """[6], for a chunk of that age."""
        return np.array(self.arm, np.float32) * np.float32(factor(self.by_age, age))


@dataclass(frozen=True)
class FirstStep:
    """The rule `first`. Its score is the largest difference of the first step, in tolerances."""

    tolerance: Tolerance

    def __call__(self, check: Check) -> Verdict:
        tolerance = self.tolerance.at(check.age)
        agrees = bool(agreeing_steps(check.guess[:1], check.left[:1], tolerance)[0])
        score = _in_tolerances(check.guess[:1] - check.left[:1], tolerance)
        return Verdict(len(check.left) * agrees, score)


@dataclass(frozen=True)
class ActionsAgree:
    """The rule `actions`."""

    tolerance: Tolerance

    def __call__(self, check: Check) -> Verdict:
        now = check.guess[: len(check.left)]
        return Verdict(agreeing_prefix(agreeing_steps(now, check.left, self.tolerance.at(check.age))))


@dataclass(frozen=True)
class PathAgrees:
    """The rule `path`. Its score is the largest difference of the summed motion, in tolerances."""

    tolerance: Tolerance

    def __call__(self, check: Check) -> Verdict:
        tolerance = self.tolerance.at(check.age)
        guess, left = check.guess[: check.ahead], check.left[: check.ahead]
        drift = np.cumsum(guess - left, axis=0)[:, :ARM_DIMS]
        same = ((guess[:, ARM_DIMS] > 0) == (left[:, ARM_DIMS] > 0)).all()
        passes = bool(same and (np.abs(drift) <= tolerance).all())
        return Verdict(len(check.left) * passes, _in_tolerances(drift, tolerance))


@dataclass(frozen=True)
class TokensAgree:
    """The rule `tokens`."""

    share: float  # of a step's coarse tokens that must be equal, 0..1

    def __call__(self, check: Check) -> Verdict:
        assert check.left_tokens is not None  # the configuration was checked
        steps, _, layers = check.guess_tokens[: len(check.left)].shape
        agreeing = agreeing_token_steps(check.guess_tokens[:steps], check.left_tokens[..., :layers], self.share)
        return Verdict(agreeing_prefix(agreeing))


@dataclass(frozen=True)
class Likelihood:
    """The rule `likelihood`. Its score is the mean log-probability of the chunk's L0 tokens of the steps ahead."""

    threshold: float
    by_age: tuple[float, ...] = ()
    sure: float | None = None  # a score from which all may be executed; below it, as few as may be

    def __call__(self, check: Check) -> Verdict:
        assert check.left_tokens is not None
        score = log_likelihood(check.logits[: check.ahead], check.left_tokens[: check.ahead, :, 0])
        scale = factor(self.by_age, check.age)
        steps = len(check.left) if self.sure is None or score >= self.sure * scale else check.fewest
        return Verdict(steps * (score >= self.threshold * scale), score)


@dataclass(frozen=True)
class RandomAcceptance:
    """The rule `random`."""

    rate: float  # how often a check is accepted, 0..1
    seed: int

    def __call__(self, check: Check) -> Verdict:
        return Verdict(len(check.left) * self.accepts(check.query))

    def accepts(self, query: tuple[int, ...]) -> bool:
        """The decision on a query: a function of its place, the rate and the seed alone, so that it depends neither on
        what else is run nor in which order. What one rate accepts, a higher one does too."""
        return bool(np.random.default_rng([STREAM, self.seed, *query]).random() < self.rate)


def rule_of(rsd: RsdConfig) -> Rule:
    """The rule that a bundle names."""
    tolerance = Tolerance(rsd.tolerance, rsd.by_age)
    if rsd.rule == "tokens":
        return TokensAgree(rsd.token_share)
    if rsd.rule == "likelihood":
        assert rsd.threshold is not None  # the configuration was checked
        return Likelihood(rsd.threshold, rsd.by_age, rsd.sure)
    if rsd.rule == "first":
        return FirstStep(tolerance)
    return PathAgrees(tolerance) if rsd.rule == "path" else ActionsAgree(tolerance)


def factor(by_age: tuple[float, ...], age: int) -> float:
    """What a tolerance or threshold is multiplied by for a chunk of that age."""
    return by_age[min(age, len(by_age) - 1)] if by_age else 1.0


def agreeing_steps(a: Actions, b: Actions, tolerance: Actions) -> Flags:
    """Which steps of two chunks [..., T, A] agree -> [..., T] bool. NaN agrees with nothing."""
    delta = a - b
    arm = (np.abs(delta[..., :ARM_DIMS]) <= tolerance).all(-1)
    gripper = (a[..., ARM_DIMS] > 0) == (b[..., ARM_DIMS] > 0)
    agreeing: Flags = arm & gripper & ~np.isnan(delta[..., ARM_DIMS])
    return agreeing


def agreeing_token_steps(draft: Tokens, chunk: Tokens, share: float) -> Flags:
    """Steps where at least `share` of the coarse tokens [..., T, D, C] are equal -> [..., T] bool."""
    agreeing: Flags = (draft == chunk).mean((-2, -1)) >= share
    return agreeing


def log_likelihood(logits: Logits, tokens: Tokens) -> float:
    """The mean log-probability of tokens [t, D] under logits [t, D, K]."""
    assert logits.shape[:2] == tokens.shape
    if logits.size > FEW:
        rest = logits - logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(rest, tokens[..., None], -1)[..., 0]
        return float((chosen - np.log(np.exp(rest).sum(-1))).mean())
    total = 0.0
    for row, token in zip(logits.reshape(tokens.size, -1).tolist(), tokens.reshape(-1).tolist(), strict=True):
        most = max(row)
        total += row[token] - most - math.log(sum([math.exp(logit - most) for logit in row]))
    return total / tokens.size


def steps_until_switch(chunk: Actions, before: float) -> int:
    """The number of leading steps of a chunk [T, A] whose gripper command has the sign of the one `before` them."""
    closed = [command > 0 for command in chunk[:, ARM_DIMS].tolist()]
    switched = not before > 0
    return closed.index(switched) if switched in closed else len(closed)


def within_limits(actions: Actions, low: Actions, high: Actions) -> tuple[Actions, int]:
    """A copy of actions [n, A] as the controller takes them, its limits being [A] each, and how many were others."""
    bounds = list(zip(low.tolist(), high.tolist(), strict=True))
    outside = [
        any(not least <= x <= most for x, (least, most) in zip(row, bounds, strict=True)) for row in actions.tolist()
    ]
    return np.clip(actions, low, high) if any(outside) else actions.copy(), sum(outside)


def agreeing_prefix(passes: Flags) -> int:
    """The number of leading steps [T] that pass."""
    return int(np.logical_and.accumulate(passes).sum())


def route_checked(steps: int, ahead: int) -> Route:
    """How a check went that may commit `steps` of the `ahead` that an accepted one commits."""
    if steps == 0:
        return "rejected"
    return "accepted" if steps >= ahead else "partial"


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
    def tested(self) -> int:
        """How many there were."""
        return self.accepted + self.partial + self.rejected

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
        return count / self.tested if self.tested else None


def _in_tolerances(difference: Actions, tolerance: Actions) -> float:
    """The largest of differences [t, >= 6] of arm dimensions, as a multiple of the tolerance [6]."""
    return float((np.abs(difference[:, :ARM_DIMS]) / np.maximum(tolerance, TINY_TOLERANCE)).max())
