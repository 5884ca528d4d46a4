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
    ARM_DIMS,
    DEFAULT_BUNDLE,
    DEFAULT_ENGINES,
    MODES,
    PROPRIO_DIM,
    BackboneKind,
    BackbonePrecision,
    BundleConfig,
    Mode,
    Precision,
)
from rsd_trt.errors import PolicyFault, UserError, did_you_mean
from rsd_trt.runtime.backends import Launcher, check_backend, check_device, open_forward
from rsd_trt.runtime.chunk import Chunk, Query, judge
from rsd_trt.runtime.forward import Draft, Forward, Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.speculate import (
    Actions,
    Comparison,
    RandomAcceptance,
    Route,
    Rule,
    Tokens,
    agreeing_prefix,
    commit_accepted,
    commit_full,
    gripper_holds,
    route_checked,
    rule_of,
)

log = logging.getLogger(__name__)


class Policy:
    """Drives `environments` at once, each with a chunk of its own.

    Modes: `baseline` runs the whole backbone at every query and commits `n_action_steps` of the main head's
    chunk. `rsd` is the loop that `rsd_trt.runtime.speculate` describes, with the bundle's rule. `shadow` acts as
    `baseline` and records what `rsd` would decide about what is left of the chunk of the query before (it does not
    follow `rsd`'s own older chunks, nor its refresh). `random` is the loop of `rsd` with a `RandomAcceptance` for its
    rule. A conditioned head is fed the draft's tokens in `rsd` and `random`, and zeros otherwise.

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
    ) -> None:
        self.config = config
        self.mode = mode
        self.n_action_steps = config.rsd.n_action_steps if n_action_steps is None else n_action_steps
        if not 0 < self.n_action_steps <= config.dims.T:
            raise UserError(f"n_action_steps is {n_action_steps}; a chunk has 1..{config.dims.T} steps")
        if isinstance(rule, RandomAcceptance) != (mode == "random"):
            verb = "needs the" if mode == "random" else "has no"
            raise UserError(f"mode {mode} {verb} rule random: checks that are accepted at a rate, by chance")
        if mode != "baseline" and "propose" not in forward.sessions:
            raise UserError(f"{config.name} has no draft, and mode {mode} checks with one", "Use: --mode baseline")
        self.exports: dict[str, str] = {
            name: session.sha256 for name, session in forward.sessions.items() if session.sha256 is not None
        }
        self.hidden_states: list[tuple[Tensor, Tensor]] | None = None  # set to a list: `shadow` records into it
        self._rule = rule or rule_of(config.rsd)
        self._forward = forward
        self._tolerance = np.array(config.rsd.tolerance, np.float32)
        self._chunks = [Chunk() for _ in range(environments)]
        self._turn = threading.RLock()  # forwards and buffers are one thread's at a time
        self._textbook = config.late_draft is not None
        if mode != "baseline" and self._textbook:
            log.warning("%s", config.late_draft)

    @classmethod
    def load(
        cls,
        bundle: Bundle | Path | str = DEFAULT_BUNDLE,
        mode: Mode = "rsd",
        backend: str = "torch",
        device: str = "cpu",
        n_action_steps: int | None = None,
        environments: int = 1,
        batch: int = 1,
        precision: Precision = "fp32",
        engines: Path = DEFAULT_ENGINES,
        backbone: BackboneKind | None = None,
        backbone_precision: BackbonePrecision = "bundle",
        rule: Rule | None = None,
    ) -> Policy:
        """Loads every part of the bundle, or of the one in that folder, onto `device` and warms up.

        backend: what runs draft, head and decoder: torch, graph, ort or trt. n_action_steps: actions that a query
        commits at most, 1..T (default: the bundle's). environments: how many are driven at once. batch: queries that
        may share a forward. precision: of draft and head. engines: the folder of exports. rule: mode `random` needs a
        `RandomAcceptance`; by default the bundle's.

        backbone: by default `eager` with the backend `torch` and on the CPU, else `graph`.

        Raises:
            UserError: a part that is missing or does not fit, an unknown mode or backend, no such device, or one
                without enough memory.
        """
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is unknown{did_you_mean(mode, MODES)}")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(Path(bundle))
        target = check_device(device)
        launcher = Launcher(bundle, check_backend(backend), target, precision, engines)
        forward = open_forward(launcher, "1" if batch == 1 else "dynamic", backbone, backbone_precision)
        policy = cls(bundle.config, forward, mode, n_action_steps, environments, rule)
        policy.warm_up()
        return policy

    def warm_up(self, queries: int = 3) -> None:
        """Full queries on a black image: for a batch of one, kernels are chosen and buffers made before the first
        query."""
        control = self.config.control
        side = control.camera_size
        black = Observation(
            np.zeros((len(control.cameras), side, side, 3), np.uint8), np.zeros(PROPRIO_DIM, np.float32), ""
        )
        for _ in range(queries):
            self.reset()
            self.act_batch([black], [0])
        self.reset()

    def reset(self, env: int | None = None, episode: tuple[int, ...] | None = None) -> None:
        """Forgets the chunk of one environment, or of all: to be called at the start of an episode.

        episode: its task and trial, which together with the number of the query decide what the rule `random` draws.
        None: the environment goes on counting where it was.
        """
        with self._turn:
            for i in range(len(self._chunks)) if env is None else (env,):
                old = self._chunks[i]
                same = Chunk(episode=old.episode, queries=old.queries)
                self._chunks[i] = same if episode is None else Chunk(episode=episode)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next actions [n, A] of environment 0, in environment units.

        Raises:
            PolicyFault: a hidden state, logits or actions are not finite.
        """
        query = self.act_batch([observation], [0])[0]
        if query.fault is not None:
            raise PolicyFault(query.fault)
        return query.actions

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
        if len(set(environments)) < len(environments) or not set(environments) <= set(range(len(self._chunks))):
            raise UserError(
                f"act_batch got the environments {list(environments)}, each of 0..{len(self._chunks) - 1} at most once",
                "More at a time: Policy.load(..., environments=N)",
            )
        with self._turn:
            started = self._now()
            chunks = [self._chunks[env] for env in environments]
            if self.mode == "baseline":
                self._forward.whole(observations)
                queries = self._full(self._forward.main(), chunks, ["full"] * len(chunks), None)
            else:
                self._forward.early(observations)
                queries = (self._shadow if self.mode == "shadow" else self._speculate)(chunks)
            ms = (self._now() - started) * 1e3
            for chunk in chunks:
                chunk.queries += 1
            for query, env in zip(queries, environments, strict=True):
                if query.fault is not None:
                    self.reset(env)
            return [replace(query, ms=ms) for query in queries]

    def _speculate(self, chunks: list[Chunk]) -> list[Query]:
        """Executes what the rule lets pass, and runs the rest of the backbone for the other queries."""
        forced = self._forced(chunks)
        together = None not in forced
        if together:  # whatever the draft says: nothing has to wait for it
            self._forward.late(range(len(chunks)))
        draft = self._forward.draft()
        finite = draft.finite.tolist()
        queries: dict[int, Query] = {}
        routes: dict[int, Route] = {}
        for i, chunk in enumerate(chunks):
            if not finite[i]:
                queries[i] = self._draft_fault("fault", draft, i)
            elif (reason := forced[i]) is not None:
                routes[i] = reason
            else:
                prefix = self._prefix(chunk, draft.tokens[i], draft.actions[i])
                route = route_checked(prefix, len(chunk.left), self.n_action_steps)
                if route == "rejected":
                    routes[i] = route
                else:
                    queries[i] = self._commit(chunk, prefix, route)
        if routes:
            index = list(routes)
            if not together:
                self._forward.late(index)
            main = self._forward.main().at(index) if together else self._forward.main()
            full = self._full(main, [chunks[i] for i in index], list(routes.values()), draft.at(index))
            queries |= dict(zip(index, full, strict=True))
        return [queries[i] for i in range(len(chunks))]

    def _forced(self, chunks: list[Chunk]) -> list[Route | None]:
        """For each chunk, why its query has to be a full query, or None if the draft may decide."""
        return [chunk.forced(self.config.rsd.refresh, self.config.dims.T) for chunk in chunks]

    def _prefix(self, chunk: Chunk, tokens: Tokens, actions: Actions) -> int:
        """The leading steps of what is left of a chunk that a guess lets pass: tokens [T, D, C] and actions [T, A]."""
        passes = self._rule(chunk.beside(tokens, actions, self._tolerance))
        return int(agreeing_prefix(passes & gripper_holds(chunk.left, before=chunk.gripper)))

    def _commit(self, chunk: Chunk, prefix: int, route: Route) -> Query:
        """The next actions of a chunk that the rule lets pass."""
        count = commit_accepted(prefix, self.n_action_steps)
        actions = chunk.left[:count].copy()
        chunk.cursor += count
        chunk.accepted_in_a_row += 1
        return Query(actions, route, prefix, full_query=self._textbook)

    def _full(self, main: Main, chunks: list[Chunk], routes: Sequence[Route], draft: Draft | None) -> list[Query]:
        """The main head's new chunk for each query; with a draft, only what both agree on is committed."""
        tokens, actions = main.tokens.copy(), main.actions.copy()
        coarse = tokens[..., : self.config.dims.C]
        held = gripper_holds(actions, before=actions[:, 0, ARM_DIMS])
        finite = main.finite.tolist()
        queries = []
        for i, chunk in enumerate(chunks):
            if not finite[i]:
                known, block = bool(main.hidden_finite[i]), self.config.backbone.language.blocks
                queries.append(self._fault(routes[i], "main head", known, block, full_query=True))
                continue
            prefix = share = None
            if draft is not None:
                passes = self._rule(Comparison(main.agreement[i], draft.tokens[i], coarse[i], query=None))
                prefix = int(agreeing_prefix(passes & held[i]))
                share = equal_share(draft.tokens[i], coarse[i])
            count = self._count(prefix)
            chunk.actions, chunk.tokens = actions[i], tokens[i]
            chunk.grippers = tuple((actions[i, :, ARM_DIMS] > 0).tolist())
            chunk.cursor, chunk.accepted_in_a_row = count, 0
            queries.append(Query(actions[i, :count].copy(), routes[i], prefix, share))
        return queries

    def _count(self, prefix: int | None) -> int:
        """Actions that a full query commits: with a draft, those that it agrees with, and at least one."""
        if prefix is None:
            return self.n_action_steps
        # A conditioned head copies the draft: its agreement is no reason to commit more.
        return 1 if self.config.head.kind == "conditioned" else commit_full(prefix, self.n_action_steps)

    def _shadow(self, chunks: list[Chunk]) -> list[Query]:
        """Acts as the baseline, and judges by the main head's new chunk what `rsd` would have decided."""
        forced = self._forced(chunks)
        before = [replace(chunk) for chunk in chunks]
        self._forward.late(range(len(chunks)), drafted=False)
        draft = self._forward.draft()
        queries = self._full(self._forward.main(), chunks, [reason or "rejected" for reason in forced], None)
        if self.hidden_states is not None:
            early, late = self._forward.hidden()
            self.hidden_states.append((early.cpu(), late.cpu()))
        for i, query in enumerate(queries):
            if not draft.finite[i]:
                queries[i] = self._draft_fault(query.route, draft, i)
            elif query.fault is None:
                guess = draft.tokens[i], draft.actions[i]
                queries[i] = self._judged(query, chunks[i], None if forced[i] else before[i], *guess)
        return queries

    def _judged(self, query: Query, new: Chunk, old: Chunk | None, tokens: Tokens, actions: Actions) -> Query:
        """A query with what the draft's guess comes to beside its new chunk and, if one was to be checked, the old."""
        assert new.tokens is not None and new.actions is not None
        coarse = new.tokens[..., : tokens.shape[-1]]
        query = replace(query, token_agreement=equal_share(tokens, coarse))
        if old is None:
            return query
        prefix = self._prefix(old, tokens, actions)
        by_main = self._prefix(old, coarse, new.actions)
        return replace(
            query,
            route=route_checked(prefix, len(old.left), self.n_action_steps),
            prefix=prefix,
            judgement=judge(commit_accepted(prefix, self.n_action_steps), by_main),
            draft_gap=old.gap(actions, self.n_action_steps),
            main_gap=old.gap(new.actions, self.n_action_steps),
        )

    def _draft_fault(self, route: Route, draft: Draft, i: int) -> Query:
        """A query whose draft cannot be used."""
        known, block = bool(draft.hidden_finite[i]), self.config.rsd.draft_block
        return self._fault(route, "draft", known, block, full_query=self._textbook)

    def _fault(self, route: Route, part: str, hidden_finite: bool, block: int, full_query: bool) -> Query:
        """A query without actions; names the hidden state when that is where the trouble began."""
        what = f"the {part}'s logits or actions are" if hidden_finite else f"the hidden state after block {block} is"
        nothing = np.zeros((0, self.config.dims.A), np.float32)
        return Query(nothing, route, fault=f"{what} not finite", full_query=full_query)

    def _now(self) -> float:
        if self._forward.device.type == "cuda":
            torch.cuda.synchronize(self._forward.device)
        return time.perf_counter()


def equal_share(draft: Tokens, main: Tokens) -> tuple[float, ...]:
    """The share of equal tokens [T, D, C] for each coarse layer -> C numbers."""
    return tuple((draft == main).mean((0, 1)).tolist())
