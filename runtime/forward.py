"""What a query computes, apart from what it decides, and its plain form in eager PyTorch.

A query is one forward, in two parts. `early` runs from the image to block k, the draft and its coarse actions;
`late` goes on from there to block N, the main head and its chunk. Between them the policy decides, on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd_trt.config import BundleConfig, Component
from rsd_trt.models.backbone import Backbone, BackboneState
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.session import Session, Tensors
from rsd_trt.runtime.speculate import Actions, Flags, Tokens


@dataclass(frozen=True)
class Draft:
    """The draft's guess for a batch, on the host."""

    tokens: Tokens  # [B, T, D, C]
    actions: Actions  # [B, T, A]
    finite: Flags  # [B]: logits and actions
    hidden_finite: Flags  # [B]: the hidden state after block k

    def at(self, index: Sequence[int]) -> Draft:
        """Those of some places in the batch, in their order."""
        return self if len(index) == len(self.finite) else Draft(*(x[list(index)] for x in vars(self).values()))


@dataclass(frozen=True)
class Main:
    """The main head's chunk for a batch, on the host."""

    tokens: Tokens  # [B, T, D, L]
    actions: Actions  # [B, T, A]
    agreement: Flags  # [B, T]: the steps on which the draft's actions agree, if there was a draft
    finite: Flags  # [B]: logits and actions
    hidden_finite: Flags  # [B]: the hidden state after block N

    def at(self, index: Sequence[int]) -> Main:
        """Those of some places in the batch, in their order."""
        return self if len(index) == len(self.finite) else Main(*(x[list(index)] for x in vars(self).values()))


class Forward(Protocol):
    """Computes queries. What it gives belongs to it: the next query may overwrite it."""

    device: torch.device
    sessions: Mapping[Component, Session]  # what runs `predict` and, where there is a draft, `propose`

    def early(self, observations: Sequence[Observation]) -> None:
        """Enqueues preprocessing, vision, the blocks up to k, the draft and the decoding of its tokens."""
        ...

    def draft(self) -> Draft:
        """What `early` gave; waits for it."""
        ...

    def late(self, index: Sequence[int], drafted: bool = True) -> None:
        """Enqueues, once after `early` and for some places in its batch, the blocks after k, the head and the decoding.

        drafted: a conditioned head is fed the draft's tokens; else zeros.
        """
        ...

    def whole(self, observations: Sequence[Observation]) -> None:
        """Enqueues a full query without a draft."""
        ...

    def main(self) -> Main:
        """What `late` or `whole` gave; waits for it."""
        ...

    def hidden(self) -> tuple[Tensor, Tensor]:
        """The hidden states [B, H] after block k and after block N, of the last `early` and the last `late`."""
        ...


class EagerForward:
    """Eager PyTorch, a step at a time: what every other forward is checked against."""

    def __init__(
        self,
        config: BundleConfig,
        backbone: Backbone,
        propose: Session | None,
        predict: Session,
        preprocess: Preprocessor,
    ) -> None:
        self.device = preprocess.device
        self._config = config
        self._blocks = config.backbone.language.blocks
        self._backbone = backbone
        sessions: dict[Component, Session] = {"predict": predict}
        if propose is not None:
            sessions["propose"] = propose
        self.sessions: Mapping[Component, Session] = sessions
        self._preprocess = preprocess
        self._tolerance = torch.tensor(config.rsd.tolerance, device=self.device)
        self._early: tuple[BackboneState, Tensor, Tensors]
        self._main: tuple[Tensor, Tensors]

    def early(self, observations: Sequence[Observation]) -> None:
        state = self._backbone.run(self._preprocess(observations), until=self._config.rsd.draft_block)
        hidden = self._backbone.hidden(state).float()
        self._early = state, hidden, self.sessions["propose"].run({"hidden": hidden})

    def draft(self) -> Draft:
        _, hidden, out = self._early
        return Draft(*(on_host(x) for x in (out["tokens"], out["actions"], out["finite"], finite_states(hidden))))

    def late(self, index: Sequence[int], drafted: bool = True) -> None:
        state, _, out = self._early
        tokens, actions = out["tokens"], out["actions"]
        if len(index) < len(state.last):
            some = torch.tensor(index, device=self.device)
            state, tokens, actions = state.at(some), tokens[some], actions[some]
        inputs = self._inputs(state, actions, tokens if drafted else None)
        self._main = inputs["hidden"], self.sessions["predict"].run(inputs)

    def whole(self, observations: Sequence[Observation]) -> None:
        state = self._backbone.run(self._preprocess(observations), until=self._blocks)
        dims = self._config.dims
        inputs = self._inputs(state, torch.zeros(len(observations), dims.T, dims.A, device=self.device), None)
        self._main = inputs["hidden"], self.sessions["predict"].run(inputs)

    def main(self) -> Main:
        hidden, out = self._main
        tokens, actions, agreement, finite = (out[name] for name in ("tokens", "actions", "agreement", "finite"))
        return Main(*(on_host(x) for x in (tokens, actions, agreement, finite, finite_states(hidden))))

    def hidden(self) -> tuple[Tensor, Tensor]:
        return self._early[1], self._main[0]

    def _inputs(self, state: BackboneState, coarse_actions: Tensor, condition: Tensor | None) -> dict[str, Tensor]:
        """What `predict` reads, once the backbone has run to its end."""
        dims = self._config.dims
        hidden = self._backbone.hidden(self._backbone.resume(state, until=self._blocks)).float()
        inputs = {"hidden": hidden, "coarse_actions": coarse_actions, "tolerance": self._tolerance}
        if self._config.head.kind == "conditioned":
            shape = (len(hidden), dims.T, dims.D, dims.C)
            zeros = torch.zeros(shape, dtype=torch.int64, device=self.device)
            inputs["condition"] = zeros if condition is None else condition
        return inputs


def on_host(x: Tensor) -> NDArray[Any]:
    """The tensor as an array, copied if it is on a device."""
    array: NDArray[Any] = x.cpu().numpy()
    return array


def finite_states(hidden: Tensor) -> Tensor:
    """Which hidden states [B, H] hold neither NaN nor infinity -> [B] bool."""
    return torch.isfinite(hidden).all(1)
