"""The loop: observations and chunks in, queries out. It is handed what computes a check and what computes a full query,
and needs no torch: a policy and the client at a robot's side run the same lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from msgspec.structs import replace

from rsd_trt.config import ACTION_DIMS, Dims, Limits, Mode, RsdConfig
from rsd_trt.errors import UserError
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.speculate import (
    Actions,
    Check,
    Flags,
    Logits,
    RandomAcceptance,
    Route,
    Rule,
    Tokens,
    Verdict,
    route_checked,
    rule_of,
    within_limits,
)

NOTHING: Actions = np.zeros((0, ACTION_DIMS), np.float32)
NOTHING_LEFT: tuple[Route, ...] = ("start", "instruction", "exhausted")  # why a query has no old chunk beside it


@dataclass(frozen=True)
class Guess:
    """The draft's guess for a batch, on the host."""

    tokens: Tokens  # [B, T, D, C]
    actions: Actions  # [B, T, A]
    logits: Logits  # [B, T, D, K], of L0
    finite: Flags  # [B]: logits and actions


@dataclass(frozen=True)
class Main:
    """The main head's chunk for a batch, on the host. tokens: None of a head that gives none, where the rule of the
    bundle does not read them."""

    tokens: Tokens | None  # [B, T, D, L]
    actions: Actions  # [B, T, A]
    finite: Flags  # [B]: logits and actions


class CheckQuery(Protocol):
    """Computes a check."""

    def __call__(self, observations: Sequence[Observation], /) -> Guess: ...


class FullQuery(Protocol):
    """Computes a full query. condition [B, T, D, C]: what a conditioned head is fed."""

    def __call__(self, observations: Sequence[Observation], condition: Tokens | None, /) -> Main: ...


class Loop:
    """What `rsd_trt.runtime.speculate` describes, in the modes of `rsd_trt.runtime.policy.Policy`."""

    def __init__(
        self,
        dims: Dims,
        rsd: RsdConfig,
        limits: Limits,
        mode: Mode,
        check: CheckQuery,
        full: FullQuery,
        rule: Rule | None = None,
        fault: Callable[[int], str] = lambda place: "the main head's actions are not finite",
    ) -> None:
        """rule: by default the one that `rsd` names. fault(place): why a row of the last full query cannot be used.

        Raises:
            UserError: more steps than a chunk has, or a rule that does not go with the mode.
        """
        self.dims, self.rsd, self.mode = dims, rsd, mode
        self.n_action_steps = rsd.n_action_steps
        if type(self.n_action_steps) is not int or not 0 < self.n_action_steps <= dims.T:
            raise UserError(f"n_action_steps is {self.n_action_steps!r}; a chunk has 1..{dims.T} steps")
        self.check_steps = rsd.check_steps or self.n_action_steps
        if isinstance(rule, RandomAcceptance) != (mode == "random"):
            verb = "needs the" if mode == "random" else "has no"
            raise UserError(f"mode {mode} {verb} rule random: checks that are accepted at a rate, by chance")
        self._check, self._ask_main, self._fault = check, full, fault
        self._rule = rule or rule_of(rsd)
        self._limits = np.array(limits.low, np.float32), np.array(limits.high, np.float32)

    def query(self, observations: Sequence[Observation], chunks: Sequence[Chunk]) -> list[Query]:
        """One query for each observation and the chunk of whoever made it, which is brought up to date. A fault ends
        that query only, and its chunk."""
        if self.mode == "shadow":
            return self._shadow(observations, chunks)
        due: Sequence[Route | None] = ["full"] * len(chunks)
        if self.mode != "baseline":
            due = self._due(observations, chunks)
        queries = [Query(NOTHING, reason or "rejected") for reason in due]
        guesses: dict[int, Tokens] = {}
        if live := [i for i, query in enumerate(queries) if query.route == "rejected"]:
            guess = self._check([observations[i] for i in live])
            for place, i in enumerate(live):
                queries[i] = self._checked(chunks[i], guess, place)
                if queries[i].route != "rejected":
                    queries[i] = self._commit(chunks[i], queries[i])
                elif queries[i].draft_finite:
                    guesses[i] = guess.tokens[place]
        if full := [i for i, query in enumerate(queries) if not len(query.actions)]:
            answers = self._full(
                [observations[i] for i in full],
                [chunks[i] for i in full],
                [queries[i] for i in full],
                [guesses.get(i) for i in full],
            )
            for i, answer in zip(full, answers, strict=True):
                queries[i] = answer
        return queries

    def _due(self, observations: Sequence[Observation], chunks: Sequence[Chunk]) -> list[Route | None]:
        """For each query, why it has to be a full one, or None if there is something to check."""
        refresh = self.rsd.refresh
        return [
            chunk.due(observation.instruction, refresh) for chunk, observation in zip(chunks, observations, strict=True)
        ]

    def _checked(self, chunk: Chunk, guess: Guess, place: int) -> Query:
        """A check, decided and not yet answered. A draft that is not finite rejects."""
        if not guess.finite[place]:
            return Query(NOTHING, "rejected", checked=True, prefix=0, draft_finite=False)
        left = chunk.left
        ahead = min(chunk.fixed or self.check_steps, len(left) - chunk.late)
        verdict: Verdict = self._rule(
            Check(
                left=left,
                left_tokens=None if chunk.tokens is None else chunk.tokens[chunk.cursor :],
                guess=guess.actions[place],
                guess_tokens=guess.tokens[place],
                logits=guess.logits[place],
                ahead=ahead,
                age=chunk.cursor,
                query=(*chunk.episode, chunk.queries),
                fewest=chunk.fixed or 1,
            )
        )
        prefix = min(verdict.steps, chunk.until_switch - chunk.late)
        if prefix < (chunk.fixed or 0):
            prefix = 0
        return Query(NOTHING, route_checked(prefix, ahead), checked=True, prefix=prefix, score=verdict.score)

    def _commit(self, chunk: Chunk, query: Query) -> Query:
        """A check that passed, with the chunk's next actions."""
        count = min(query.prefix or 0, chunk.fixed or self.check_steps)
        actions, clipped = within_limits(chunk.left[:count], *self._limits)
        chunk.cursor += count
        chunk.queries += 1
        return replace(query, actions=actions, clipped=clipped, full_query=False)

    def _full(
        self,
        observations: Sequence[Observation],
        chunks: Sequence[Chunk],
        queries: Sequence[Query],
        guesses: Sequence[Tokens | None] = (),
    ) -> list[Query]:
        """The queries with the first actions of the main head's new chunks. guesses: the draft's tokens where a check
        was rejected, which a conditioned head is fed."""
        dims = self.dims
        guesses = guesses or [None] * len(chunks)
        zeros = np.zeros((dims.T, dims.D, dims.C), np.int64)
        main = self._ask_main(observations, np.stack([zeros if guess is None else guess for guess in guesses]))
        answers = []
        for i, (chunk, query, guess) in enumerate(zip(chunks, queries, guesses, strict=True)):
            chunk.queries += 1
            if not main.finite[i]:
                chunk.forget()
                answers.append(replace(query, fault=self._fault(i)))
                continue
            chunk.actions = main.actions[i].copy()
            chunk.tokens = None if main.tokens is None else main.tokens[i].copy()
            chunk.instruction = observations[i].instruction
            share = equal_share(guess, chunk.tokens)
            said = replace(query, chunk=chunk.actions, tokens=chunk.tokens, token_agreement=share)
            answers.append(self.enter(chunk, said))
        return answers

    def enter(self, chunk: Chunk, query: Query, skipped: int = 0) -> Query:
        """The full query that made the chunk, with the actions that it commits. skipped: how many of them went by
        before it was there; where none is left, it has no actions."""
        assert chunk.actions is not None
        actions, clipped = within_limits(
            chunk.actions[skipped : max(chunk.fixed or self.n_action_steps, skipped + 1)], *self._limits
        )
        chunk.cursor = min(skipped + len(actions), len(chunk.actions))
        return replace(query, actions=actions, clipped=clipped, skipped=skipped)

    def go_on(self, chunk: Chunk) -> Query:
        """The chunk's next action, while a full query is under way."""
        actions, clipped = within_limits(chunk.left[:1], *self._limits)
        chunk.cursor += 1
        return Query(actions, "late", full_query=False, clipped=clipped)

    def _shadow(self, observations: Sequence[Observation], chunks: Sequence[Chunk]) -> list[Query]:
        """Acts as the baseline, and records what `rsd` would have decided."""
        due = self._due(observations, chunks)
        before = [copy(chunk) for chunk in chunks]
        guess = self._check(observations)
        queries = [
            Query(NOTHING, reason) if reason is not None else self._checked(chunk, guess, i)
            for i, (chunk, reason) in enumerate(zip(chunks, due, strict=True))
        ]
        queries = self._full(observations, chunks, queries)
        return [
            self._recorded(query, chunks[i], None if due[i] in NOTHING_LEFT else before[i], guess, i)
            for i, query in enumerate(queries)
        ]

    def _recorded(self, query: Query, new: Chunk, old: Chunk | None, guess: Guess, place: int) -> Query:
        """A query of mode shadow with what draft and main head say beside each other, and beside the old chunk."""
        if query.fault is not None or not guess.finite[place]:
            return query
        assert new.actions is not None
        tokens, actions = guess.tokens[place], guess.actions[place]
        query = replace(query, token_agreement=equal_share(tokens, new.tokens))
        return query if old is None else replace(query, draft_gap=old.gap(actions), main_gap=old.gap(new.actions))


def equal_share(draft: Tokens | None, main: Tokens | None) -> tuple[float, ...] | None:
    """The share of equal tokens of draft [T, D, C] and main head [T, D, L] for each coarse layer -> C numbers; None
    where one of them gave no tokens."""
    if draft is None or main is None:
        return None
    return tuple((draft == main[..., : draft.shape[-1]]).mean((0, 1)).tolist())
