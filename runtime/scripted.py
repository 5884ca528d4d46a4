"""A policy that is told its decisions: what a query costs, without a draft that is right as often as a recorded one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rsd_trt.config import BundleConfig
from rsd_trt.errors import PolicyFault
from rsd_trt.runtime.chunk import Chunk, Query
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.speculate import Actions, Route, Tokens

CHECKED: tuple[Route, ...] = ("accepted", "partial", "rejected")


@dataclass(frozen=True)
class Decision:
    """How a query is to go, and how many actions it commits."""

    route: Route
    committed: int


class ScriptedPolicy(Policy):
    """One environment in mode `baseline` or `rsd`. All that `Policy` computes is computed, on the device and on the
    host; what follows from it is replaced by the decision that is given.

    Non-obvious: decisions must be such as a policy makes, in their order: an episode begins with a full query, and no
    more actions of a chunk are accepted than it has steps left.
    """

    def __init__(
        self, config: BundleConfig, forward: Forward, mode: Literal["baseline", "rsd"], n_action_steps: int
    ) -> None:
        super().__init__(config, forward, mode, n_action_steps)
        self._decision = Decision("start", 1)

    def follow(self, decision: Decision, observation: Observation) -> Query:
        """Answers a query by `decision`. Whether it is accepted in full or in part depends on the bundle's chunks too,
        and is the same work.

        Raises:
            PolicyFault: the bundle's hidden state, logits or actions are not finite.
            ValueError: no policy decides so here.
        """
        self._decision = decision
        query = self.act_batch([observation], [0])[0]
        if query.fault is not None:
            raise PolicyFault(query.fault)
        in_full = {"partial": "accepted"}
        made, told = in_full.get(query.route, query.route), in_full.get(decision.route, decision.route)
        if (made, len(query.actions)) != (told, decision.committed):
            raise ValueError(f"{decision} cannot be followed: {query.route}, {len(query.actions)} came of it")
        return query

    def _forced(self, chunks: list[Chunk]) -> list[Route | None]:
        super()._forced(chunks)
        route = self._decision.route
        return [None if route in CHECKED else route]

    def _prefix(self, chunk: Chunk, tokens: Tokens, actions: Actions) -> int:
        super()._prefix(chunk, tokens, actions)
        return 0 if self._decision.route == "rejected" else self._decision.committed

    def _count(self, prefix: int | None) -> int:
        super()._count(prefix)
        return self._decision.committed
