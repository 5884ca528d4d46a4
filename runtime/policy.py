"""A bundle as a policy: observations in, action chunks out, in the modes `baseline`, `rsd`, `shadow` and `random`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import (
    ACTION_DIMS,
    ARM_DIMS,
    DEFAULT_BUNDLE,
    DEFAULT_ENGINES,
    MODES,
    PROPRIO_DIM,
    RULES,
    TOLERANT_RULES,
    BackboneKind,
    BackbonePrecision,
    BundleConfig,
    Mode,
    Precision,
    RuleName,
)
from rsd_trt.errors import PolicyFault, UserError, did_you_mean
from rsd_trt.records import from_json, to_json
from rsd_trt.runtime.backends import Launcher, check_backend, check_device, open_forward
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.forward import Forward, Guess
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import fit_frames
from rsd_trt.runtime.speculate import (
    Actions,
    Check,
    RandomAcceptance,
    Route,
    Rule,
    Tokens,
    Verdict,
    agreeing_prefix,
    gripper_holds,
    route_checked,
    rule_of,
)

log = logging.getLogger(__name__)

NOTHING: Actions = np.zeros((0, ACTION_DIMS), np.float32)
NOTHING_LEFT: tuple[Route, ...] = ("start", "instruction", "exhausted")  # why a query has no old chunk beside it


class Policy:
    """Drives `environments` at once, each with a chunk of its own.

    Modes: `baseline` makes a full query every time and commits `n_action_steps` of its chunk: open loop. `rsd` is the
    loop that `rsd_trt.runtime.speculate` describes, with the bundle's rule. `shadow` acts as `baseline` and records
    what `rsd` would have decided, and how far draft and main head are from every step that was left of the chunk
    before. `random` is the loop of `rsd` with a `RandomAcceptance` for its rule. A conditioned head is fed the draft's
    tokens where a check was rejected, and zeros otherwise.

    exports: sha256 of the exported files that run components, by component.
    """

    def __init__(
        self,
        config: BundleConfig,
        forward: Forward,
        mode: Mode,
        n_action_steps: int | None = None,
        environments: int = 1,
        rule: Rule | None = None,
        batch: int = 1,
        resize: bool = False,
    ) -> None:
        if environments < 1 or batch < 1:
            raise UserError(f"environments is {environments} and batch {batch}; both are at least 1")
        self.config = config
        self.mode = mode
        self.n_action_steps = config.rsd.n_action_steps if n_action_steps is None else n_action_steps
        if type(self.n_action_steps) is not int or not 0 < self.n_action_steps <= config.dims.T:
            raise UserError(f"n_action_steps is {n_action_steps!r}; a chunk has 1..{config.dims.T} steps")
        self.check_steps = config.rsd.check_steps or self.n_action_steps
        if isinstance(rule, RandomAcceptance) != (mode == "random"):
            verb = "needs the" if mode == "random" else "has no"
            raise UserError(f"mode {mode} {verb} rule random: checks that are accepted at a rate, by chance")
        if mode != "baseline" and "propose" not in forward.sessions:
            raise UserError(f"{config.name} has no draft, and mode {mode} checks with one", "Use: --mode baseline")
        self.exports: dict[str, str] = {
            name: session.sha256 for name, session in forward.sessions.items() if session.sha256 is not None
        }
        self.hidden_states: list[Tensor] | None = None  # set to a list: `shadow` records into it
        self._rule = rule or rule_of(config.rsd)
        self._forward = forward
        self._batch = batch
        self._resize = resize
        self._limits = np.array(config.control.limits.low, np.float32), np.array(config.control.limits.high, np.float32)
        self._chunks = [Chunk() for _ in range(environments)]
        self._turn = threading.RLock()  # forwards and buffers are one thread's at a time
        if mode != "baseline" and config.late_draft is not None:
            log.warning("%s", config.late_draft)

    @classmethod
    def load(
        cls,
        bundle: Bundle | Path | str = DEFAULT_BUNDLE,
        mode: Mode = "rsd",
        backend: str = "torch",
        device: str = "auto",
        n_action_steps: int | None = None,
        environments: int = 1,
        batch: int = 1,
        precision: Precision = "fp32",
        engines: Path | str = DEFAULT_ENGINES,
        backbone: BackboneKind | None = None,
        backbone_precision: BackbonePrecision = "bundle",
        rule: Rule | RuleName | None = None,
        tolerance: float | Sequence[float] | None = None,
        threshold: float | None = None,
        resize: bool = False,
    ) -> Policy:
        """Loads every part of the bundle, or of the one in that folder, onto `device` and warms up.

        backend: what runs draft, head and decoder: torch, graph, ort or trt. device: cpu, cuda, cuda:N, or auto: CUDA
        if there is one. n_action_steps: actions that a full query
        commits, 1..T (default: the bundle's). environments: how many are driven at once. batch: queries that
        may share a forward. precision: of draft and head. engines: the folder of exports. rule: by its name (see
        `rsd_trt.config.RuleName`), by default the bundle's; mode `random` needs a `RandomAcceptance`. tolerance: of the
        rules first, actions and path, in environment units, for all arm dimensions or for each. threshold: of the rule
        likelihood. resize: frames of any size are made those that the bundle takes, as its `control.resize` says.

        backbone: by default `eager` with the backend `torch` and on the CPU, else `graph`.

        Raises:
            UserError: a part that is missing or does not fit, an unknown mode or backend, no such device, or one
                without enough memory.
        """
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is unknown{did_you_mean(mode, MODES)}")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(Path(bundle))
        named = rule if isinstance(rule, str) else None
        bundle = replace(bundle, config=with_rule(bundle.config, named, tolerance, threshold))
        target = check_device(device)
        launcher = Launcher(bundle, check_backend(backend), target, precision, Path(engines))
        forward = open_forward(launcher, "1" if batch == 1 else "dynamic", backbone, backbone_precision)
        given = None if isinstance(rule, str) else rule
        policy = cls(bundle.config, forward, mode, n_action_steps, environments, given, batch, resize)
        policy.warm_up()
        return policy

    def beside(self, config: BundleConfig, mode: Mode, rule: Rule | None = None) -> Policy:
        """A policy of another mode, or of other settings of the loop, on the same loaded parts; the two take turns."""
        other = Policy(config, self._forward, mode, None, len(self._chunks), rule, self._batch, self._resize)
        other._turn = self._turn
        return other

    def warm_up(self, instruction: str = "") -> None:
        """Queries on a black image, so that those that follow with this instruction make no buffers, choose no kernels
        and capture no graphs."""
        control = self.config.control
        side = control.camera_size
        black = np.zeros((len(control.cameras), side, side, 3), np.uint8)
        with self._turn:
            self._forward.warm_up(Observation(black, np.zeros(PROPRIO_DIM, np.float32), instruction), self._batch)

    def reset(self, env: int | None = None, episode: tuple[int, ...] | None = None) -> None:
        """Forgets the chunk of one environment, or of all: to be called at the start of an episode.

        episode: its task and trial, which together with the number of the query decide what the rule `random` draws.
        None: the environment goes on counting where it was.

        Raises:
            UserError: there is no such environment.
        """
        if env is not None:
            self._check_environments([env])
        with self._turn:
            for i in range(len(self._chunks)) if env is None else (env,):
                old = self._chunks[i]
                same = Chunk(episode=old.episode, queries=old.queries)
                self._chunks[i] = same if episode is None else Chunk(episode=episode)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next actions [n, A] of environment 0, in environment units.

        Raises:
            PolicyFault: a hidden state, or the main head's logits or actions are not finite.
        """
        return self.query(observation).actions

    def query(self, observation: Observation) -> Query:
        """What `act` gives with how it came about: route, prefix, score, ms.

        Raises:
            PolicyFault: as `act`.
        """
        query = self.act_batch([observation], [0])[0]
        if query.fault is not None:
            raise PolicyFault(query.fault)
        return query

    @torch.inference_mode()
    def act_batch(self, observations: Sequence[Observation], environments: Sequence[int]) -> list[Query]:
        """One query for each observation and the index of its environment. A fault ends that query only. Threads take
        turns.

        Raises:
            UserError: no observation, as many environments as observations are not named, one is named twice or is not
                there, or an observation is not what the bundle takes.
        """
        if not observations or len(observations) != len(environments):
            raise UserError(f"act_batch got {len(observations)} observations for {len(environments)} environments")
        self._check_environments(environments)
        if strange := [type(x).__name__ for x in observations if not hasattr(x, "instruction")]:
            raise UserError(f"act_batch got {strange[0]}, not an Observation")
        if self._resize:
            control, mean = self.config.control, self.config.backbone.towers[0].mean
            observations = [replace(x, images=fit_frames(x.images, control, mean)) for x in observations]
        with self._turn:
            started = self._now()
            chunks = [self._chunks[env] for env in environments]
            if self.mode == "baseline":
                queries = self._full(observations, chunks, [Query(NOTHING, "full")] * len(chunks))
            else:
                queries = (self._shadow if self.mode == "shadow" else self._speculate)(observations, chunks)
            ms = (self._now() - started) * 1e3
            for chunk in chunks:
                chunk.queries += 1
            for query, env in zip(queries, environments, strict=True):
                if query.fault is not None:
                    self.reset(env)
            return [replace(query, ms=ms) for query in queries]

    @property
    def reads_state(self) -> bool:
        """Whether observations need the robot's own state."""
        return self._forward.reads_state

    def _check_environments(self, environments: Sequence[int]) -> None:
        """Raises UserError unless each is there, and named once."""
        there = range(len(self._chunks))
        known = all(isinstance(env, (int, np.integer)) and env in there for env in environments)
        if not known or len(set(environments)) < len(environments):
            raise UserError(
                f"the policy got the environments {list(environments)}, each of 0..{there[-1]} at most once",
                "More at a time: Policy.load(..., environments=N)",
            )

    def _speculate(self, observations: Sequence[Observation], chunks: Sequence[Chunk]) -> list[Query]:
        """Checks the chunks that are alive, and makes full queries for the others and those that are rejected."""
        queries = [Query(NOTHING, reason or "rejected") for reason in self._due(observations, chunks)]
        guesses: dict[int, Tokens] = {}
        if live := [i for i, query in enumerate(queries) if query.route == "rejected"]:
            guess = self._forward.check([observations[i] for i in live])
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
        refresh = self.config.rsd.refresh
        return [
            chunk.due(observation.instruction, refresh) for chunk, observation in zip(chunks, observations, strict=True)
        ]

    def _checked(self, chunk: Chunk, guess: Guess, place: int) -> Query:
        """A check, decided and not yet answered. A draft that is not finite rejects."""
        if not guess.finite[place]:
            return Query(NOTHING, "rejected", checked=True, prefix=0, draft_finite=False)
        left = chunk.left
        ahead = min(self.check_steps, len(left))
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
            )
        )
        prefix = min(verdict.steps, agreeing_prefix(gripper_holds(left, before=chunk.gripper)))
        return Query(NOTHING, route_checked(prefix, ahead), checked=True, prefix=prefix, score=verdict.score)

    def _commit(self, chunk: Chunk, query: Query) -> Query:
        """A check that passed, with the chunk's next actions."""
        count = min(query.prefix or 0, self.check_steps)
        actions, clipped = self._within_limits(chunk.left[:count])
        chunk.cursor += count
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
        dims = self.config.dims
        guesses = guesses or [None] * len(chunks)
        zeros = np.zeros((dims.T, dims.D, dims.C), np.int64)
        main = self._forward.full(observations, np.stack([zeros if guess is None else guess for guess in guesses]))
        answers = []
        for i, (chunk, query, guess) in enumerate(zip(chunks, queries, guesses, strict=True)):
            if not main.finite[i]:
                answers.append(replace(query, fault=self._fault(i)))
                continue
            chunk.actions = main.actions[i].copy()
            chunk.tokens = None if main.tokens is None else main.tokens[i].copy()
            chunk.instruction, chunk.cursor = observations[i].instruction, self.n_action_steps
            actions, clipped = self._within_limits(chunk.actions[: self.n_action_steps])
            share = equal_share(guess, chunk.tokens)
            answers.append(replace(query, actions=actions, clipped=clipped, token_agreement=share))
        return answers

    def _shadow(self, observations: Sequence[Observation], chunks: Sequence[Chunk]) -> list[Query]:
        """Acts as the baseline, and records what `rsd` would have decided."""
        due = self._due(observations, chunks)
        before = [replace(chunk) for chunk in chunks]
        guess = self._forward.check(observations)
        queries = [
            Query(NOTHING, reason) if reason is not None else self._checked(chunk, guess, i)
            for i, (chunk, reason) in enumerate(zip(chunks, due, strict=True))
        ]
        queries = self._full(observations, chunks, queries)
        if self.hidden_states is not None:
            self.hidden_states.append(self._forward.hidden.cpu())
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

    def _within_limits(self, actions: Actions) -> tuple[Actions, int]:
        """A copy of actions [n, A] as the controller takes them, and how many were others."""
        within = np.clip(actions, *self._limits)
        return within, int((within != actions).any(-1).sum())

    def _fault(self, place: int) -> str:
        """Why a main head's chunk cannot be used; names the hidden state when that is where the trouble began."""
        known = bool(torch.isfinite(self._forward.hidden[place]).all())
        return f"{'the logits or actions of the main head are' if known else 'the hidden state is'} not finite"

    def _now(self) -> float:
        if self._forward.device.type == "cuda":
            torch.cuda.synchronize(self._forward.device)
        return time.perf_counter()


def with_rule(
    config: BundleConfig, rule: str | None, tolerance: float | Sequence[float] | None, threshold: float | None
) -> BundleConfig:
    """The configuration with another rule, tolerance or threshold; None leaves the bundle's.

    Raises:
        UserError: an unknown rule, a value out of bounds, or one that the rule does not read.
    """
    if rule is not None and rule not in RULES:
        raise UserError(f"rule {rule!r} is unknown{did_you_mean(rule, RULES)}")
    if tolerance is not None and (rule or config.rsd.rule) not in TOLERANT_RULES:
        raise UserError(f"tolerance is of the rules {', '.join(TOLERANT_RULES)}: the rule is {rule or config.rsd.rule}")
    if threshold is not None and (rule or config.rsd.rule) != "likelihood":
        raise UserError(f"threshold is of the rule likelihood: the rule is {rule or config.rsd.rule}")
    given: dict[str, object] = {"rule": rule, "threshold": threshold}
    if tolerance is not None:
        each = (tolerance,) * ARM_DIMS if isinstance(tolerance, (int, float)) else tolerance
        given["tolerance"] = each
    told = {name: value for name, value in given.items() if value is not None}
    return (
        from_json(BundleConfig, to_json(config) | {"rsd": to_json(config.rsd) | told}, "Policy.load")
        if told
        else config
    )


def equal_share(draft: Tokens | None, main: Tokens | None) -> tuple[float, ...] | None:
    """The share of equal tokens of draft [T, D, C] and main head [T, D, L] for each coarse layer -> C numbers; None
    where one of them gave no tokens."""
    if draft is None or main is None:
        return None
    return tuple((draft == main[..., : draft.shape[-1]]).mean((0, 1)).tolist())
