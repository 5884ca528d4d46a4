"""What a query computes, apart from what it decides: a check, and a full query."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsd_trt.config import BundleConfig, Component, VisionDraftConfig
from rsd_trt.models.backbone import Backbone
from rsd_trt.models.fast.products import power_of_two
from rsd_trt.models.vision_draft import instruction_rows
from rsd_trt.runtime.check import VisionCheck
from rsd_trt.runtime.loop import Guess, Main
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import INSTRUCTIONS, Preprocessor
from rsd_trt.runtime.session import Session
from rsd_trt.runtime.speculate import Actions, Tokens


class BackboneRun(Protocol):
    """How the backbone runs."""

    def __call__(self, observations: Sequence[Observation]) -> Tensor:
        """Observations -> float32 hidden states on the device, which the next call may overwrite: [B, H], with n action
        tokens [B, n, H], or more rows with padding behind those of the batch, so that what follows is launched for few
        sizes."""
        ...


class EagerBackbone:
    """Eager PyTorch: what every other way is checked against."""

    def __init__(self, backbone: Backbone, preprocess: Preprocessor) -> None:
        self._backbone, self._preprocess = backbone, preprocess

    def __call__(self, observations: Sequence[Observation]) -> Tensor:
        return self._backbone(self._preprocess(observations)).float()


class Forward:
    """Computes queries. What it gives belongs to it: the next query may overwrite it.

    sessions: what runs `predict` and, where there is a draft, `propose`. hidden: the states [B, H] or [B, n, H] of
    the last full query, on the device. rows(instruction): what a draft with eyes of its own reads of it, [P, E] on
    the device.
    """

    def __init__(
        self,
        config: BundleConfig,
        backbone: BackboneRun,
        embed_tokens: nn.Embedding,
        propose: Session | None,
        predict: Session,
        preprocess: Preprocessor,
        encode: Callable[[Actions], Tokens] | None = None,
    ) -> None:
        """encode: actions [B, T, A] of the environment -> tokens [B, T, D, L], for a main head that gives none."""
        self.device = preprocess.device
        self.sessions: Mapping[Component, Session] = {"predict": predict}
        if propose is not None:
            self.sessions = {"predict": predict, "propose": propose}
        self.hidden: Tensor
        self._config, self._backbone, self._preprocess = config, backbone, preprocess
        self._embed_tokens, self._encode = embed_tokens, encode
        self._kept: tuple[Sequence[Observation], Tensor] | None = None  # of the last check with a hidden draft
        self.rows = lru_cache(INSTRUCTIONS)(self._instruction_rows)
        eyes = propose is not None and isinstance(config.draft, VisionDraftConfig)
        self._vision = VisionCheck(propose, self.device, self.rows) if propose is not None and eyes else None

    @property
    def reads_state(self) -> bool:
        """Whether backbone or draft read the robot's own state."""
        return self._preprocess.reads_state

    def begin(self, observations: Sequence[Observation]) -> None:
        """Before queries of observations. What the last query kept is forgotten: its owner may have written into it.

        Raises:
            UserError: an observation is not what the bundle takes.
        """
        self._kept = None
        for observation in observations:
            self._preprocess.check(observation)

    @torch.inference_mode()
    def check(self, observations: Sequence[Observation]) -> Guess:
        """The draft's guess: one launch, after a pass of the backbone where the draft reads the hidden state."""
        if self._vision is not None:
            out = self._vision(observations)
        else:
            hidden = self._backbone(observations)
            self._kept = observations, hidden.clone()
            out = on_host(self.sessions["propose"].run({"hidden": hidden}), len(observations))
        dims = self._config.dims
        logits = out["logits"].reshape(-1, dims.T, dims.D, dims.K)
        return Guess(out["tokens"], out["actions"], logits, out["finite"])

    @torch.inference_mode()
    def full(self, observations: Sequence[Observation], condition: Tokens | None = None) -> Main:
        """The main head's chunk. The hidden states of a check just before are not computed again.

        condition [B, T, D, C]: what a conditioned head is fed; zeros for None. Other heads take none.

        Raises:
            UserError: an observation is not what the bundle takes.
        """
        batch, (kept, self._kept) = len(observations), (self._kept, None)
        hidden = self._states(observations, kept)
        self.hidden = hidden[:batch]
        inputs = {"hidden": hidden}
        if self._config.head.kind == "conditioned":
            dims = self._config.dims
            padded = np.zeros((len(hidden), dims.T, dims.D, dims.C), np.int64)
            if condition is not None:
                padded[:batch] = condition
            inputs["condition"] = torch.from_numpy(padded).to(self.device)
        out = on_host(self.sessions["predict"].run(inputs), batch)
        tokens = out.get("tokens")
        if tokens is None and self._encode is not None:
            tokens = self._encode(out["actions"])
        return Main(tokens, out["actions"], out["finite"])

    def warm_up(self, observation: Observation, batch: int = 1, queries: int = 3) -> None:
        """Makes buffers, chooses kernels and captures graphs for queries like this one, up to so many at a time."""
        sizes = {1, *(2**i for i in range(1, batch.bit_length())), batch}
        for size in sorted(sizes):
            for _ in range(queries):
                if "propose" in self.sessions:
                    self.check([observation] * size)
                self.begin([observation])
                self.full([observation] * size)

    def _states(self, observations: Sequence[Observation], kept: tuple[Sequence[Observation], Tensor] | None) -> Tensor:
        """What a `BackboneRun` gives for observations; those of the check before are `kept`."""
        places = {} if kept is None else {id(observation): place for place, observation in enumerate(kept[0])}
        index = [places.get(id(observation)) for observation in observations]
        if kept is None or None in index:
            return self._backbone(observations)
        padding = power_of_two(len(index)) - len(index) if self.device.type == "cuda" else 0
        return kept[1][index + index[:1] * padding]

    def _instruction_rows(self, instruction: str) -> Tensor:
        """What a draft with eyes of its own reads of an instruction, [P, E]."""
        assert isinstance(self._config.draft, VisionDraftConfig)
        tokens = torch.tensor(self._preprocess.prompt_tokens(instruction), device=self.device)
        return instruction_rows(self._embed_tokens(tokens), self._config.draft.instruction)


def on_host(tensors: Mapping[str, Tensor], batch: int) -> dict[str, NDArray[Any]]:
    """The first `batch` rows of tensors, as arrays: those of a device are copied into page-locked memory, all in one
    wait."""
    copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return {name: copy.numpy()[:batch] for name, copy in copies.items()}
