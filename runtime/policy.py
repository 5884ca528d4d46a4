"""A bundle as a policy: observations in, action chunks out, in the modes `baseline`, `rsd` and `shadow`."""

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
    BundleConfig,
    Mode,
    Precision,
)
from rsd_trt.errors import PolicyFault, UserError, did_you_mean
from rsd_trt.manifest import Batch
from rsd_trt.models.backbone import Backbone, BackboneState
from rsd_trt.models.fused import agreeing_steps
from rsd_trt.runtime.backends import Launcher, check_backend
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.plan import Draft, Plan, Query, judge, plan_gap
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.session import Session
from rsd_trt.runtime.speculate import (
    Route,
    agreeing_prefix,
    agreeing_token_steps,
    commit_accepted,
    commit_full,
    gripper_holds,
    remaining,
    route_tested,
)

log = logging.getLogger(__name__)

DRAFT_FAULT = "the draft's logits or actions are not finite"


class Policy:
    """Drives `slots` environments at once, each with a plan of its own.

    Modes: `baseline` runs the whole backbone at every query and commits `n_action_steps` of the main head's
    plan. `rsd` is the loop that `rsd_trt.runtime.speculate` describes. `shadow` acts as `baseline` and records
    what `rsd` would decide about what is left of the plan of the query before (it does not follow `rsd`'s own
    older plans, nor its refresh). A conditioned head is fed the draft's tokens in `rsd` and zeros otherwise.
    """

    def __init__(
        self,
        config: BundleConfig,
        backbone: Backbone,
        accept: Session,
        chain: Session,
        preprocess: Preprocessor,
        mode: Mode,
        n_action_steps: int | None = None,
        slots: int = 1,
    ) -> None:
        self.config = config
        self.mode = mode
        self.n_action_steps = config.rsd.n_action_steps if n_action_steps is None else n_action_steps
        if not 0 < self.n_action_steps <= config.dims.T:
            raise UserError(f"n_action_steps is {n_action_steps}; a chunk has 1..{config.dims.T} steps")
        self._backbone = backbone
        self._accept = accept
        self._chain = chain
        self._preprocess = preprocess
        self._device = preprocess.device
        self._tolerance = torch.tensor(config.rsd.tolerance, device=self._device)
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
    ) -> Policy:
        """Loads every part of the bundle, or of the one in that folder, onto `device` and warms up.

        backend: what runs draft, head and decoder: torch, graph, ort or trt. n_action_steps: actions that a query
        commits at most, 1..T (default: the bundle's). slots: environments driven at once. rows: queries that may share
        a forward. precision: of draft and head. engines: the folder of exports.

        Raises:
            UserError: a part that is missing or does not fit, an unknown mode or backend, or no such device.
        """
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is unknown{did_you_mean(mode, MODES)}")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(Path(bundle))
        target = check_device(device)
        launcher = Launcher(bundle, check_backend(backend), target, precision, engines)
        batch: Batch = "1" if rows == 1 else "dynamic"
        policy = cls(
            bundle.config,
            bundle.backbone(target),
            launcher.open("accept", batch),
            launcher.open("chain", batch),
            Preprocessor(bundle.config.control, bundle.config.backbone, bundle.tokenizer(), target),
            mode,
            n_action_steps,
            slots,
        )
        policy.exports = launcher.opened
        policy.warm_up()
        return policy

    def warm_up(self, queries: int = 3) -> None:
        """Full passes on a black image: for one row, kernels are chosen and buffers made before the first query."""
        control = self.config.control
        side = control.camera_size
        black = Observation(
            np.zeros((len(control.cameras), side, side, 3), np.uint8), np.zeros(PROPRIO_DIM, np.float32), ""
        )
        for _ in range(queries):
            self.reset()
            self.act_batch([black], [0])
        self.reset()

    def reset(self, slot: int | None = None) -> None:
        """Forgets the plan of one slot, or of all: to be called at the start of an episode."""
        for i in range(len(self._plans)) if slot is None else (slot,):
            self._plans[i] = Plan()

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
        inputs = self._preprocess(observations)
        plans = [self._plans[slot] for slot in slots]
        blocks = self.config.backbone.language.blocks
        if self.mode == "baseline":
            state = self._backbone.run(inputs, until=blocks)
            queries = self._full(state, plans, ["full"] * len(plans), None)
        else:
            prefix = self._backbone.run(inputs, until=self.config.rsd.draft_block)
            hidden = self._backbone.hidden(prefix).float()
            draft = Draft(**self._accept.run({"hidden": hidden}))
            queries = (self._shadow if self.mode == "shadow" else self._speculate)(prefix, draft, plans)
        ms = (self._now() - started) * 1e3
        for query, slot in zip(queries, slots, strict=True):
            if query.fault is not None:
                self.reset(slot)
        return [replace(query, ms=ms) for query in queries]

    def _speculate(self, prefix: BackboneState, draft: Draft, plans: list[Plan]) -> list[Query]:
        """Accepts what the draft confirms and runs the rest of the backbone for the other rows."""
        rsd = self.config.rsd
        forced = [plan.forced(rsd.refresh, self.config.dims.T) for plan in plans]
        agreed = self._agreement_with_plans(draft.tokens, draft.actions, plans)
        finite = draft.finite.tolist()
        queries: dict[int, Query] = {}
        routes: dict[int, Route] = {}
        for row, plan in enumerate(plans):
            if not finite[row]:
                queries[row] = self._fault("fault", DRAFT_FAULT, prefix, row)
            elif (reason := forced[row]) is not None:
                routes[row] = reason
            else:
                left = self.config.dims.T - plan.cursor
                route = route_tested(agreed[row], left, self.n_action_steps)
                if route == "rejected":
                    routes[row] = route
                else:
                    queries[row] = self._commit(plan, agreed[row], route)
        if routes:
            rows = list(routes)
            index = torch.tensor(rows, device=self._device)
            some = Draft(draft.tokens[index], draft.actions[index], draft.finite[index])
            state = prefix if len(rows) == len(plans) else prefix.rows(index)
            state = self._backbone.resume(state, until=self.config.backbone.language.blocks)
            full = self._full(state, [plans[row] for row in rows], list(routes.values()), some)
            queries |= dict(zip(rows, full, strict=True))
        return [queries[row] for row in range(len(plans))]

    def _commit(self, plan: Plan, prefix: int, route: Route) -> Query:
        """The next actions of a plan that the draft confirms."""
        assert plan.actions is not None
        count = commit_accepted(prefix, self.n_action_steps)
        actions = plan.actions[plan.cursor : plan.cursor + count]
        plan.cursor += count
        plan.accepted_in_a_row += 1
        return Query(actions.cpu().numpy().copy(), route, prefix, full_pass=self._textbook)

    def _full(
        self, state: BackboneState, plans: list[Plan], routes: Sequence[Route], draft: Draft | None
    ) -> list[Query]:
        """The main head's plan for each row; with a draft, only what both agree on is committed."""
        dims, rows = self.config.dims, len(plans)
        hidden = self._backbone.hidden(state).float()
        conditioned = self.config.head.kind == "conditioned"
        inputs = {
            "hidden": hidden,
            "coarse_actions": torch.zeros(rows, dims.T, dims.A, device=self._device)
            if draft is None
            else draft.actions,
            "tolerance": self._tolerance,
        }
        if conditioned:
            zeros = torch.zeros(rows, dims.T, dims.D, dims.C, dtype=torch.int64, device=self._device)
            inputs["condition"] = zeros if draft is None else draft.tokens
        out = self._chain.run(inputs)
        tokens, actions = out["tokens"].clone(), out["actions"].clone()
        counts = [self.n_action_steps] * rows
        prefixes: list[int] | None = None
        shares: list[list[float]] | None = None
        if draft is not None:
            passes = self._passes(out["agreement"], draft.tokens, tokens)
            passes = passes & gripper_holds(actions, before=actions[:, 0, ARM_DIMS])
            prefixes = agreeing_prefix(passes, torch.full((rows,), dims.T, device=self._device)).tolist()
            # A conditioned head copies the draft: its agreement is no reason to commit more.
            counts = [1 if conditioned else commit_full(n, self.n_action_steps) for n in prefixes]
            shares = (draft.tokens == tokens[..., : dims.C]).float().mean((1, 2)).tolist()
        finite, numbers = out["finite"].tolist(), actions.cpu().numpy()
        queries = []
        for row, plan in enumerate(plans):
            if not finite[row]:
                message = "the main head's logits or actions are not finite"
                queries.append(self._fault(routes[row], message, state, row))
                continue
            plan.actions, plan.tokens = actions[row], tokens[row]
            plan.grippers = tuple(bool(closed) for closed in numbers[row, :, ARM_DIMS] > 0)
            plan.cursor, plan.accepted_in_a_row = counts[row], 0
            queries.append(
                Query(
                    numbers[row, : counts[row]].copy(),
                    routes[row],
                    prefix=prefixes[row] if prefixes else None,
                    token_agreement=tuple(shares[row]) if shares else None,
                )
            )
        return queries

    def _shadow(self, prefix: BackboneState, draft: Draft, plans: list[Plan]) -> list[Query]:
        """Acts as the baseline, and judges by the main head's new plan what `rsd` would have decided."""
        rsd, dims = self.config.rsd, self.config.dims
        forced = [plan.forced(rsd.refresh, dims.T) for plan in plans]
        before = [Plan(plan.actions, plan.tokens, plan.grippers, plan.cursor) for plan in plans]
        by_draft = self._agreement_with_plans(draft.tokens, draft.actions, before)
        state = self._backbone.resume(prefix, until=self.config.backbone.language.blocks)
        if self.hidden_states is not None:
            self.hidden_states.append((self._backbone.hidden(prefix).cpu(), self._backbone.hidden(state).cpu()))
        queries = self._full(state, plans, [reason or "rejected" for reason in forced], None)
        fresh = [
            (plan.tokens, plan.actions) if query.fault is None else (None, None)
            for plan, query in zip(plans, queries, strict=True)
        ]
        finite = draft.finite.tolist()
        judged = []
        for row, query in enumerate(queries):
            if not finite[row]:
                judged.append(self._fault(query.route, DRAFT_FAULT, prefix, row))
                continue
            tokens, actions = fresh[row]
            if tokens is None or actions is None:
                judged.append(query)
                continue
            shares = (draft.tokens[row] == tokens[..., : dims.C]).float().mean((0, 1)).tolist()
            query = replace(query, token_agreement=tuple(shares))
            if forced[row] is None:
                n = by_draft[row]
                route = route_tested(n, dims.T - before[row].cursor, self.n_action_steps)
                by_main = self._agreement_with_plans(tokens[None, ..., : dims.C], actions[None], [before[row]])[0]
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

    def _agreement_with_plans(self, tokens: Tensor, actions: Tensor, plans: list[Plan]) -> list[int]:
        """The prefix of each live plan's remaining steps that a new chunk agrees with; 0 without a plan."""
        live = [plan for plan in plans if plan.actions is not None and plan.tokens is not None]
        if not live:
            return [0] * len(plans)
        rows = [row for row, plan in enumerate(plans) if plan.actions is not None]
        index = torch.tensor(rows, device=self._device)
        cursor = torch.tensor([plan.cursor for plan in live], device=self._device)
        plan_actions = torch.stack([plan.actions for plan in live if plan.actions is not None])  # [b, T, A]
        plan_tokens = torch.stack([plan.tokens for plan in live if plan.tokens is not None])  # [b, T, D, L]
        ahead, length = remaining(plan_actions, cursor)
        ahead_tokens, _ = remaining(plan_tokens, cursor)
        passes = self._passes(agreeing_steps(actions[index], ahead, self._tolerance), tokens[index], ahead_tokens)
        last = plan_actions[torch.arange(len(live), device=self._device), cursor - 1, ARM_DIMS]
        prefix = agreeing_prefix(passes & gripper_holds(ahead, before=last), length).tolist()
        found = dict(zip(rows, prefix, strict=True))
        return [found.get(row, 0) for row in range(len(plans))]

    def _passes(self, by_actions: Tensor, draft_tokens: Tensor, plan_tokens: Tensor) -> Tensor:
        """The steps [B, T] that pass under the bundle's rule."""
        if self.config.rsd.rule == "actions":
            return by_actions
        coarse = plan_tokens[..., : self.config.dims.C]
        return agreeing_token_steps(draft_tokens, coarse, self.config.rsd.token_share)

    def _fault(self, route: Route, message: str, state: BackboneState, row: int) -> Query:
        """A row that ends here; names the hidden state when that is where the trouble began."""
        hidden = self._backbone.hidden(state)[row]
        if not bool(torch.isfinite(hidden).all()):
            message = f"the hidden state after block {state.block} is not finite"
        full_pass = state.block == self.config.backbone.language.blocks
        return Query(np.zeros((0, self.config.dims.A), np.float32), route, fault=message, full_pass=full_pass)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
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
