"""Queries as CUDA graphs: one from the image to the draft, one from there to the plan, one for both without a draft.

A graph is captured at the first query of its shape and replayed after, on buffers that are allocated once. A single
row is captured at its prompt's own length, which does not change within an episode; several rows are padded to a
power of two and their prompts to a multiple of `PROMPT_STEP`, so that a few graphs serve every mixture of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd_trt.config import PROPRIO_DIM, BundleConfig
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.models.fast.products import power_of_two
from rsd_trt.models.signature import Signature
from rsd_trt.runtime.forward import Draft, Main, finite_rows
from rsd_trt.runtime.graph_session import GraphSession
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.session import Launch, Session, Tensors, capture

PROMPT_STEP = 16  # tokens
Run = Callable[[Tensors], dict[str, Tensor]]


class Uploaded:
    """A tensor that the host writes, in page-locked memory, and its copy on the device."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.host = pinned(shape, dtype)
        self.written = self.host.numpy()  # the same memory: NumPy's copies wake no threads
        self.device = torch.zeros(tuple(shape), dtype=dtype, device=device)

    def upload(self) -> None:
        self.device.copy_(self.host, non_blocking=True)


class Inputs:
    """What the host writes for `rows` observations with prompts of `length` tokens."""

    def __init__(self, preprocess: Preprocessor, rows: int, length: int) -> None:
        control, device = preprocess.control, preprocess.device
        side = control.camera_size
        self._preprocess = preprocess
        self.images = Uploaded((rows, len(control.cameras), side, side, 3), torch.uint8, device)
        self.tokens = Uploaded((rows, length), torch.int64, device)
        self.lengths = Uploaded((rows,), torch.int64, device)
        self.lengths.host.fill_(1)
        self.proprio = Uploaded((rows, PROPRIO_DIM), torch.float32, device) if preprocess.backbone.proprio else None
        self._all = [x for x in (self.images, self.tokens, self.lengths, self.proprio) if x is not None]

    def write(self, observations: Sequence[Observation]) -> None:
        """Fills the host's side: the device must not be reading it."""
        for row, observation in enumerate(observations):
            self._preprocess.check(observation)
            prompt = self._preprocess.prompt_tokens(observation.instruction)
            self.images.written[row] = observation.images
            self.tokens.written[row, : len(prompt)] = prompt
            self.lengths.written[row] = len(prompt)
        if self.proprio is not None:
            values = self._preprocess.proprio(np.stack([observation.proprio for observation in observations]))
            self.proprio.written[: len(observations)] = values

    def upload(self) -> None:
        for value in self._all:
            value.upload()


class Bridge:
    """What `late` reads of `early`, on the device."""

    def __init__(self, config: BundleConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        dims = config.dims
        self.stream = torch.zeros(rows, length, config.hidden, dtype=dtype, device=device)  # after block k
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, dims.T, dims.D, dims.C, dtype=torch.int64, device=device)
        self.actions = torch.zeros(rows, dims.T, dims.A, device=device)

    def gather(self, source: Bridge, index: Tensor) -> None:
        """Takes the rows `index` of another."""
        for name in ("stream", "last", "tokens", "actions"):
            torch.index_select(getattr(source, name), 0, index, out=getattr(self, name))


class Outputs:
    """A part's hidden state on the device, and what it gives to the host, in page-locked memory."""

    def __init__(self, signature: Signature, rows: int, device: torch.device) -> None:
        self.hidden = torch.zeros(rows, signature.sizes["H"], device=device)
        self._host = {"hidden_finite": pinned((rows,), torch.bool)} | {
            port.name: pinned(signature.shape(port, rows), getattr(torch, port.dtype)) for port in signature.outputs
        }
        self._seen = {name: value.numpy() for name, value in self._host.items()}  # the same memory

    def download(self, values: Tensors) -> None:
        """Enqueues the copies to the host."""
        for name, value in {**values, "hidden_finite": finite_rows(self.hidden)}.items():
            self._host[name].copy_(value.contiguous(), non_blocking=True)

    def host(self, rows: int) -> dict[str, NDArray[Any]]:
        """The first rows of everything, once the copies are through."""
        return {name: value[:rows] for name, value in self._seen.items()}


@dataclass(frozen=True)
class Part:
    """A captured part of the forward: `replay` enqueues it."""

    replay: Launch
    outputs: Outputs
    bridge: Bridge


class GraphForward:
    """The fused backbone, draft and head as CUDA graphs, with one host synchronisation for each decision.

    Sessions of the backend `graph` are captured with the backbone; others are launched after it. Images are
    preprocessed on the device, within the graph.
    """

    def __init__(
        self,
        config: BundleConfig,
        backbone: FusedBackbone,
        propose: Session,
        predict: Session,
        preprocess: Preprocessor,
    ) -> None:
        self.device = preprocess.device
        self._config = config
        self._k = config.rsd.draft_block
        self._n = config.backbone.language.blocks
        self._textbook = self._k == self._n  # nothing is left for `late` but the head
        self._backbone = backbone
        self._propose = propose
        self._predict = predict
        self._preprocess = preprocess
        self._tolerance = torch.tensor(config.rsd.tolerance, device=self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[tuple[int, int], Inputs] = {}
        self._parts: dict[tuple[str, int, int], Part] = {}
        self._early: tuple[Part, int]  # and its rows
        self._main: tuple[Part, int]

    def early(self, observations: Sequence[Observation]) -> None:
        inputs, key = self._write(observations)
        self._early = self._part("early", key, lambda: self._capture_early(inputs, *key)), len(observations)
        self._early[0].replay()

    def draft(self) -> Draft:
        part, rows = self._early
        self._wait()
        return Draft(**part.outputs.host(rows))

    def late(self, rows: Sequence[int], drafted: bool = True) -> None:
        early, count = self._early
        size, length = early.bridge.stream.shape[:2]
        if len(rows) == count:
            bridge = early.bridge
            part = self._part("late", (size, length), lambda: self._capture_late(bridge))
        else:
            size = power_of_two(len(rows))
            part = self._part("some", (size, length), lambda: self._capture_late(self._bridge(size, length)))
            index = pinned((size,), torch.int64)  # from other memory, the copy would wait for the device
            index.copy_(torch.tensor([*rows, *[rows[0]] * (size - len(rows))]))
            part.bridge.gather(early.bridge, index.to(self.device, non_blocking=True))
        if not drafted and self._config.head.kind == "conditioned":
            part.bridge.tokens.zero_()
        self._main = part, len(rows)
        part.replay()

    def whole(self, observations: Sequence[Observation]) -> None:
        inputs, key = self._write(observations)
        self._main = self._part("whole", key, lambda: self._capture_whole(inputs, *key)), len(observations)
        self._main[0].replay()

    def main(self) -> Main:
        part, rows = self._main
        self._wait()
        return Main(**part.outputs.host(rows))

    def hidden(self) -> tuple[Tensor, Tensor]:
        (early, early_rows), (main, main_rows) = self._early, self._main
        return early.outputs.hidden[:early_rows], main.outputs.hidden[:main_rows]

    def _write(self, observations: Sequence[Observation]) -> tuple[Inputs, tuple[int, int]]:
        rows = len(observations)
        length = max(len(self._preprocess.prompt_tokens(observation.instruction)) for observation in observations)
        key = (1, length) if rows == 1 else (power_of_two(rows), -(-length // PROMPT_STEP) * PROMPT_STEP)
        if key not in self._inputs:
            self._inputs[key] = Inputs(self._preprocess, *key)
        self._inputs[key].write(observations)
        return self._inputs[key], key

    def _part(self, name: str, key: tuple[int, int], make: Callable[[], Part]) -> Part:
        shape = (name, *key)
        if shape not in self._parts:
            self._parts[shape] = make()
        return self._parts[shape]

    def _capture_early(self, inputs: Inputs, rows: int, length: int) -> Part:
        bridge = self._bridge(rows, 1 if self._textbook else self._embedded(length))
        outputs = Outputs(self._propose.signature, rows, self.device)

        def compute() -> None:
            stream, last = self._embed(inputs)
            if self._textbook:
                hidden = self._backbone.finish(self._backbone.blocks(stream, 0, self._n - 1), last)
                stream = hidden[:, None]
            else:
                stream = self._backbone.blocks(stream, 0, self._k)
                hidden = self._backbone.read(stream, last)
            bridge.stream.copy_(stream)
            bridge.last.copy_(last)
            outputs.hidden.copy_(hidden)

        def propose(run: Run) -> None:
            out = run({"hidden": outputs.hidden})
            bridge.tokens.copy_(out["tokens"])
            bridge.actions.copy_(out["actions"])
            outputs.download(out)

        return Part(self._capture(compute, propose, self._propose), outputs, bridge)

    def _capture_late(self, bridge: Bridge) -> Part:
        rows = len(bridge.last)
        outputs = Outputs(self._predict.signature, rows, self.device)

        def compute() -> None:
            if self._textbook:
                hidden = bridge.stream[:, 0]
            else:
                stream = self._backbone.blocks(bridge.stream, self._k, self._n - 1)
                hidden = self._backbone.finish(stream, bridge.last)
            outputs.hidden.copy_(hidden)

        return Part(self._capture(compute, self._finish(outputs, bridge), self._predict), outputs, bridge)

    def _capture_whole(self, inputs: Inputs, rows: int, length: int) -> Part:
        bridge = self._bridge(rows, 1)
        outputs = Outputs(self._predict.signature, rows, self.device)

        def compute() -> None:
            stream, last = self._embed(inputs)
            stream = self._backbone.blocks(stream, 0, self._n - 1)
            outputs.hidden.copy_(self._backbone.finish(stream, last))

        return Part(self._capture(compute, self._finish(outputs, bridge), self._predict), outputs, bridge)

    def _finish(self, outputs: Outputs, bridge: Bridge) -> Callable[[Run], None]:
        inputs = {"hidden": outputs.hidden, "coarse_actions": bridge.actions, "tolerance": self._tolerance}
        if self._config.head.kind == "conditioned":
            inputs["condition"] = bridge.tokens

        def predict(run: Run) -> None:
            outputs.download(run(inputs))

        return predict

    def _capture(self, compute: Callable[[], None], tail: Callable[[Run], None], session: Session) -> Launch:
        """One graph of `compute` and `tail`; if the session cannot be captured, `tail` is launched after the graph."""

        def both() -> None:
            compute()
            tail(session.call)  # type: ignore[attr-defined]

        with torch.inference_mode():
            if isinstance(session, GraphSession):
                return capture(both, self.device, pool=self._pool).replay
            graph = capture(compute, self.device, pool=self._pool)

        def replay() -> None:
            graph.replay()
            tail(session.run)

        return replay

    def _embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The embedded sequence, and each row's last position."""
        inputs.upload()
        pixels = self._preprocess.pixels(inputs.images.device)
        tokens = inputs.tokens.device
        proprio = None if inputs.proprio is None else inputs.proprio.device
        stream = self._backbone.embed(pixels, tokens, proprio)
        return stream, inputs.lengths.device + (stream.shape[1] - tokens.shape[1] - 1)

    def _bridge(self, rows: int, length: int) -> Bridge:
        return Bridge(self._config, rows, length, self._preprocess.dtype, self.device)

    def _embedded(self, prompt: int) -> int:
        """The length of the embedded sequence."""
        config = self._config.backbone
        patches = (config.image_size // config.towers[0].patch) ** 2 * len(self._config.control.cameras)
        return prompt + patches + config.proprio

    def _wait(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in the host's page-locked memory, which the device copies from and to by itself."""
    return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)
