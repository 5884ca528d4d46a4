"""A bundle as a policy: observations in, action chunks out, in the modes `baseline`, `rsd`, `shadow` and `random`."""

from __future__ import annotations

import logging
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
from rsd_trt.manifest import Batch
from rsd_trt.runtime.backends import Launcher, check_backend, open_forward
from rsd_trt.runtime.forward import Draft, Forward, Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.plan import Plan, Query, judge, plan_gap
from rsd_trt.runtime.speculate import (
    Actions,
    Coin,
    Flags,
    Route,
    Tokens,
    agreeing_prefix,
    agreeing_steps,
    agreeing_token_steps,
    commit_accepted,
    commit_full,
    gripper_holds,
    route_tested,
)

log = logging.getLogger(__name__)

DRAFT_FAULT = "the draft's logits or actions are not finite"
MAIN_FAULT = "the main head's logits or actions are not finite"


class Policy:
    """Drives `slots` environments at once, each with a plan of its own.

    Modes: `baseline` runs the whole backbone at every query and commits `n_action_steps` of the main head's
    plan. `rsd` is the loop that `rsd_trt.runtime.speculate` describes. `shadow` acts as `baseline` and records
    what `rsd` would decide about what is left of the plan of the query before (it does not follow `rsd`'s own
    older plans, nor its refresh). `random` is the loop of `rsd` with `coin` for the draft's verdict. A conditioned
    head is fed the draft's tokens in `rsd` and `random`, and zeros otherwise.
    """

    def __init__(
        self,
        config: BundleConfig,
        forward: Forward,
        mode: Mode,
        n_action_steps: int | None = None,
        slots: int = 1,
        coin: Coin | None = None,
    ) -> None:
        self.config = config
        self.mode = mode
        self.n_action_steps = config.rsd.n_action_steps if n_action_steps is None else n_action_steps
        if not 0 < self.n_action_steps <= config.dims.T:
            raise UserError(f"n_action_steps is {n_action_steps}; a chunk has 1..{config.dims.T} steps")
        if (coin is not None) != (mode == "random"):
            raise UserError(
                f"mode {mode} {'needs a' if coin is None else 'has no'} coin: it is what mode random decides by"
            )
        self._coin = coin
        self._forward = forward
        self._tolerance = np.array(config.rsd.tolerance, np.float32)
        self._plans = [Plan() for _ in range(slots)]
        self.exports: dict[str, str] = {}  # sha256 of the exports that run components, by component
        self.hidden_states: list[tuple[Tensor, Tensor]] | None = None  # set to a list: `shadow` records into it
        self._textbook = config.rsd.draft_block == config.backbone.language.blocks  # the draft reads the last block
        if mode != "baseline" and self._textbook:
            log.warning(
                "rsd.draft_block is %d, the backbone's last: an accepted query costs as much as a full one",
                config.rsd.draft_block,
            )

    @classmethod
    def load(
        cls,
        bundle: Bundle | Path | str = DEFAULT_BUNDLE,
        mode: Mode = "rsd",
        backend: str = "torch",
        device: str = "cpu",
        n_action_steps: int | None = None,
        slots: int = 1,
        rows: int = 1,
        precision: Precision = "fp32",
        engines: Path = DEFAULT_ENGINES,
        backbone: BackboneKind | None = None,
        backbone_precision: BackbonePrecision = "bundle",
        coin: Coin | None = None,
    ) -> Policy:
        """Loads every part of the bundle, or of the one in that folder, onto `device` and warms up.

        backend: what runs draft, head and decoder: torch, graph, ort or trt. n_action_steps: actions that a query
        commits at most, 1..T (default: the bundle's). slots: environments driven at once. rows: queries that may share
        a forward. precision: of draft and head. engines: the folder of exports.

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
        batch: Batch = "1" if rows == 1 else "dynamic"
        forward = open_forward(launcher, batch, backbone, backbone_precision)
        policy = cls(bundle.config, forward, mode, n_action_steps, slots, coin)
        policy.exports = launcher.opened
        policy.warm_up()
        return policy

    def warm_up(self, queries: int = 3) -> None:
        """Full queries on a black image: for one row, kernels are chosen and buffers made before the first query."""
        control = self.config.control
        side = control.camera_size
        black = Observation(
            np.zeros((len(control.cameras), side, side, 3), np.uint8), np.zeros(PROPRIO_DIM, np.float32), ""
        )
        for _ in range(queries):
            self.reset()
            self.act_batch([black], [0])
        self.reset()

    def reset(self, slot: int | None = None, episode: tuple[int, ...] | None = None) -> None:
        """Forgets the plan of one slot, or of all: to be called at the start of an episode.

        episode: its task and trial, which together with the number of the query decide mode `random`'s coins. None:
        the slot goes on counting where it was.
        """
        for i in range(len(self._plans)) if slot is None else (slot,):
            old = self._plans[i]
            same = Plan(episode=old.episode, queries=old.queries)
            self._plans[i] = same if episode is None else Plan(episode=episode)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next actions [n, A] of slot 0, in environment units.

        Raises:
            PolicyFault: a hidden state, logits or actions are not finite.
        """
        query = self.act_batch([observation], [0])[0]
        if query.fault is not None:
            raise PolicyFault(query.fault)
        return query.actions

    @torch.inference_mode()
    def act_batch(self, observations: Sequence[Observation], slots: Sequence[int]) -> list[Query]:
        """One query for each (observation, slot). A fault ends that row only."""
        started = self._now()
        plans = [self._plans[slot] for slot in slots]
        if self.mode == "baseline":
            self._forward.whole(observations)
            queries = self._full(self._forward.main(), plans, ["full"] * len(plans), None)
        else:
            self._forward.early(observations)
            queries = (self._shadow if self.mode == "shadow" else self._speculate)(plans)
        ms = (self._now() - started) * 1e3
        for plan in plans:
            plan.queries += 1
        for query, slot in zip(queries, slots, strict=True):
            if query.fault is not None:
                self.reset(slot)
        return [replace(query, ms=ms) for query in queries]

    def _speculate(self, plans: list[Plan]) -> list[Query]:
        """Accepts what the draft, or the coin, confirms and runs the rest of the backbone for the other rows."""
        forced = self._forced(plans)
        together = None not in forced
        if together:  # whatever the draft says: nothing has to wait for it
            self._forward.late(range(len(plans)))
        draft = self._forward.draft()
        finite = draft.finite.tolist()
        queries: dict[int, Query] = {}
        routes: dict[int, Route] = {}
        for row, plan in enumerate(plans):
            if not finite[row]:
                queries[row] = self._draft_fault("fault", draft, row)
            elif (reason := forced[row]) is not None:
                routes[row] = reason
            else:
                prefix = self._confirmed(plan, draft.tokens[row], draft.actions[row])
                route = route_tested(prefix, self.config.dims.T - plan.cursor, self.n_action_steps)
                if route == "rejected":
                    routes[row] = route
                else:
                    queries[row] = self._commit(plan, prefix, route)
        if routes:
            rows = list(routes)
            if not together:
                self._forward.late(rows)
            main = self._forward.main().rows(rows) if together else self._forward.main()
            full = self._full(main, [plans[row] for row in rows], list(routes.values()), draft.rows(rows))
            queries |= dict(zip(rows, full, strict=True))
        return [queries[row] for row in range(len(plans))]

    def _forced(self, plans: list[Plan]) -> list[Route | None]:
        """For each plan, why its query has to be a full query, or None if the draft may decide."""
        return [plan.forced(self.config.rsd.refresh, self.config.dims.T) for plan in plans]

    def _confirmed(self, plan: Plan, tokens: Tokens, actions: Actions) -> int:
        """The steps of a live plan that the draft, or the coin, confirms."""
        agreed = self._agreement(plan, tokens, actions)
        return agreed if self._coin is None or self._coin.accepts(plan.episode, plan.queries) else 0

    def _commit(self, plan: Plan, prefix: int, route: Route) -> Query:
        """The next actions of a plan that the draft confirms."""
        assert plan.actions is not None
        count = commit_accepted(prefix, self.n_action_steps)
        actions = plan.actions[plan.cursor : plan.cursor + count]
        plan.cursor += count
        plan.accepted_in_a_row += 1
        return Query(actions.copy(), route, prefix, full_query=self._textbook)

    def _full(self, main: Main, plans: list[Plan], routes: Sequence[Route], draft: Draft | None) -> list[Query]:
        """The main head's plan for each row; with a draft, only what both agree on is committed."""
        dims, rows = self.config.dims, len(plans)
        tokens, actions = main.tokens.copy(), main.actions.copy()
        blocks = self.config.backbone.language.blocks
        prefixes: list[int] | None = None
        shares: list[list[float]] | None = None
        if draft is not None:
            passes = self._passes(main.agreement, draft.tokens, tokens)
            passes = passes & gripper_holds(actions, before=actions[:, 0, ARM_DIMS])
            prefixes = agreeing_prefix(passes).tolist()
            shares = (draft.tokens == tokens[..., : dims.C]).mean((1, 2)).tolist()
        counts = self._counts(rows, prefixes)
        finite = main.finite.tolist()
        queries = []
        for row, plan in enumerate(plans):
            if not finite[row]:
                known = bool(main.hidden_finite[row])
                queries.append(self._fault(routes[row], MAIN_FAULT if known else self._bad_hidden(blocks), True))
                continue
            plan.actions, plan.tokens = actions[row], tokens[row]
            plan.grippers = tuple((actions[row, :, ARM_DIMS] > 0).tolist())
            plan.cursor, plan.accepted_in_a_row = counts[row], 0
            queries.append(
                Query(
                    actions[row, : counts[row]].copy(),
                    routes[row],
                    prefix=prefixes[row] if prefixes else None,
                    token_agreement=tuple(shares[row]) if shares else None,
                )
            )
        return queries

    def _counts(self, rows: int, prefixes: list[int] | None) -> list[int]:
        """Actions that full queries commit: with a draft, those that it agrees with, and at least one."""
        if prefixes is None:
            return [self.n_action_steps] * rows
        # A conditioned head copies the draft: its agreement is no reason to commit more.
        conditioned = self.config.head.kind == "conditioned"
        return [1 if conditioned else commit_full(n, self.n_action_steps) for n in prefixes]

    def _shadow(self, plans: list[Plan]) -> list[Query]:
        """Acts as the baseline, and judges by the main head's new plan what `rsd` would have decided."""
        dims, forced = self.config.dims, self._forced(plans)
        before = [Plan(plan.actions, plan.tokens, plan.grippers, plan.cursor) for plan in plans]
        self._forward.late(range(len(plans)), drafted=False)
        draft = self._forward.draft()
        queries = self._full(self._forward.main(), plans, [reason or "rejected" for reason in forced], None)
        if self.hidden_states is not None:
            early, late = self._forward.hidden()
            self.hidden_states.append((early.cpu(), late.cpu()))
        fresh = [
            (plan.tokens, plan.actions) if query.fault is None else (None, None)
            for plan, query in zip(plans, queries, strict=True)
        ]
        finite = draft.finite.tolist()
        judged = []
        for row, query in enumerate(queries):
            if not finite[row]:
                judged.append(self._draft_fault(query.route, draft, row))
                continue
            tokens, actions = fresh[row]
            if tokens is None or actions is None:
                judged.append(query)
                continue
            shares = (draft.tokens[row] == tokens[..., : dims.C]).mean((0, 1)).tolist()
            query = replace(query, token_agreement=tuple(shares))
            if forced[row] is None:
                n = self._agreement(before[row], draft.tokens[row], draft.actions[row])
                route = route_tested(n, dims.T - before[row].cursor, self.n_action_steps)
                by_main = self._agreement(before[row], tokens[..., : dims.C], actions)
                query = replace(
                    query,
                    route=route,
                    prefix=n,
                    verdict=judge(commit_accepted(n, self.n_action_steps), by_main),
                    draft_gap=plan_gap(before[row], draft.actions[row], self.n_action_steps),
                    main_gap=plan_gap(before[row], actions, self.n_action_steps),
                )
            judged.append(query)
        return judged

    def _agreement(self, plan: Plan, tokens: Tokens, actions: Actions) -> int:
        """The prefix of a live plan's remaining steps that a new chunk, tokens [T, D, C] and actions [T, A], agrees
        with."""
        assert plan.actions is not None and plan.tokens is not None
        ahead, last = plan.actions[None, plan.cursor :], plan.actions[plan.cursor - 1, ARM_DIMS, None]
        left = ahead.shape[1]
        by_actions = agreeing_steps(actions[None, :left], ahead, self._tolerance)
        passes = self._passes(by_actions, tokens[None, :left], plan.tokens[None, plan.cursor :])
        return int(agreeing_prefix(passes & gripper_holds(ahead, before=last))[0])

    def _passes(self, by_actions: Flags, draft_tokens: Tokens, plan_tokens: Tokens) -> Flags:
        """The steps [B, T] that pass under the bundle's rule; with a coin all do, and the coin decides on the query."""
        if self._coin is not None:
            return np.ones_like(by_actions)
        if self.config.rsd.rule == "actions":
            return by_actions
        coarse = plan_tokens[..., : self.config.dims.C]
        return agreeing_token_steps(draft_tokens, coarse, self.config.rsd.token_share)

    def _draft_fault(self, route: Route, draft: Draft, row: int) -> Query:
        """A row whose draft cannot be used; names the hidden state when that is where the trouble began."""
        block = self.config.rsd.draft_block
        message = DRAFT_FAULT if bool(draft.hidden_finite[row]) else self._bad_hidden(block)
        return self._fault(route, message, full_query=self._textbook)

    def _fault(self, route: Route, message: str, full_query: bool) -> Query:
        return Query(np.zeros((0, self.config.dims.A), np.float32), route, fault=message, full_query=full_query)

    @staticmethod
    def _bad_hidden(block: int) -> str:
        return f"the hidden state after block {block} is not finite"

    def _now(self) -> float:
        if self._forward.device.type == "cuda":
            torch.cuda.synchronize(self._forward.device)
        return time.perf_counter()


def check_device(device: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N`, or `auto` (CUDA if there is one) as a device that works.

    Raises:
        UserError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        if target.type not in ("cpu", "cuda"):
            raise UserError(f"device {device!r} is not supported. Use: --device cpu or cuda")
        torch.zeros(1, device=target)
        if target.type == "cuda" and target.index is not None:
            torch.cuda.set_device(target)  # graphs are captured, and engines loaded, on the current device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}. Try: --device cpu") from None
    return target
