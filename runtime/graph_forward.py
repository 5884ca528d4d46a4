"""Queries as CUDA graphs: one from the image to the draft, one from there to the chunk, one for both without a draft.

A graph is captured at the first query of its input size and replayed after, on buffers that are allocated once. A
batch of one is captured at its prompt's own length, which does not change within an episode; larger batches are padded
to a power of two and their prompts to a multiple of `PROMPT_STEP`, so that a few graphs serve every mixture of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd_trt.config import PROPRIO_DIM, BundleConfig, Component
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.models.fast.products import power_of_two
from rsd_trt.models.signature import Signature
from rsd_trt.runtime.forward import Draft, Main, finite_states
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.session import GraphSession, Session, Tensors, by_name, capture

PROMPT_STEP = 16  # tokens


class Uploaded:
    """A tensor that the host writes, in page-locked memory, and its copy on the device."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.host = pinned(shape, dtype)
        self.written = self.host.numpy()  # the same memory: NumPy's copies wake no threads
        self.device = torch.zeros(tuple(shape), dtype=dtype, device=device)

    def upload(self) -> None:
        self.device.copy_(self.host, non_blocking=True)


class Inputs:
    """What the host writes for `batch` observations with prompts of `length` tokens."""

    def __init__(self, preprocess: Preprocessor, batch: int, length: int) -> None:
        control, device = preprocess.control, preprocess.device
        side = control.camera_size
        self._preprocess = preprocess
        self.images = Uploaded((batch, len(control.cameras), side, side, 3), torch.uint8, device)
        self.tokens = Uploaded((batch, length), torch.int64, device)
        self.lengths = Uploaded((batch,), torch.int64, device)
        self.lengths.host.fill_(1)
        self.proprio = Uploaded((batch, PROPRIO_DIM), torch.float32, device) if preprocess.backbone.proprio else None
        self._all = [x for x in (self.images, self.tokens, self.lengths, self.proprio) if x is not None]

    def write(self, observations: Sequence[Observation]) -> None:
        """Fills the host's side: the device must not be reading it."""
        for i, observation in enumerate(observations):
            self._preprocess.check(observation)
            prompt = self._preprocess.prompt_tokens(observation.instruction)
            self.images.written[i] = observation.images
            self.tokens.written[i, : len(prompt)] = prompt
            self.lengths.written[i] = len(prompt)
        if self.proprio is not None:
            values = self._preprocess.proprio(np.stack([observation.proprio for observation in observations]))
            self.proprio.written[: len(observations)] = values

    def upload(self) -> None:
        for value in self._all:
            value.upload()


class Bridge:
    """What `late` reads of `early`, on the device."""

    def __init__(self, config: BundleConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        dims = config.dims
        self.stream = torch.zeros(batch, length, config.hidden, dtype=dtype, device=device)  # after block k
        self.last = torch.zeros(batch, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch, dims.T, dims.D, dims.C, dtype=torch.int64, device=device)
        self.actions = torch.zeros(batch, dims.T, dims.A, device=device)

    def gather(self, source: Bridge, index: Tensor) -> None:
        """Takes some places in another's batch."""
        for name in ("stream", "last", "tokens", "actions"):
            torch.index_select(getattr(source, name), 0, index, out=getattr(self, name))


class Outputs:
    """A part's hidden state on the device, and what it gives to the host, in page-locked memory."""

    def __init__(self, signature: Signature, batch: int, device: torch.device, bridge: Bridge | None) -> None:
        """bridge: where the draft's tokens and actions go, too."""
        self._bridge = bridge
        self.hidden = torch.zeros(batch, signature.sizes["H"], device=device)
        self._host = {"hidden_finite": pinned((batch,), torch.bool)} | {
            port.name: pinned(signature.shape(port, batch), getattr(torch, port.dtype)) for port in signature.outputs
        }
        self._seen = {name: value.numpy() for name, value in self._host.items()}  # the same memory

    def take(self, values: Tensors) -> None:
        """Enqueues the copies of what a component gave."""
        if self._bridge is not None:
            self._bridge.tokens.copy_(values["tokens"])
            self._bridge.actions.copy_(values["actions"])
        for name, value in {**values, "hidden_finite": finite_states(self.hidden)}.items():
            self._host[name].copy_(value.contiguous(), non_blocking=True)

    def host(self, batch: int) -> dict[str, NDArray[Any]]:
        """The first `batch` of everything, once the copies are through."""
        return {name: value[:batch] for name, value in self._seen.items()}


@dataclass(frozen=True)
class Part:
    """A captured part of the forward, with all that its graph reads and writes.

    session: what is launched after the graph, on `inputs`; None if it is captured, too.
    """

    graph: torch.cuda.CUDAGraph
    session: Session | None
    inputs: Tensors
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
        propose: Session | None,
        predict: Session,
        preprocess: Preprocessor,
    ) -> None:
        self.device = preprocess.device
        self._config = config
        self._k = config.rsd.draft_block
        self._n = config.backbone.language.blocks
        self._textbook = self._k == self._n  # nothing is left for `late` but the head
        self._backbone = backbone
        sessions: dict[Component, Session] = {"predict": predict}
        if propose is not None:
            sessions["propose"] = propose
        self.sessions: Mapping[Component, Session] = sessions
        self._preprocess = preprocess
        self._tolerance = torch.tensor(config.rsd.tolerance, device=self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[tuple[int, int], Inputs] = {}
        self._parts: dict[tuple[str, int, int], Part] = {}
        self._early: tuple[Part, int]  # and the batch's own size
        self._main: tuple[Part, int]

    def early(self, observations: Sequence[Observation]) -> None:
        inputs, size = self._write(observations)
        part = self._part("early", size, lambda: self._capture_early(inputs, *size))
        self._early = part, len(observations)
        part.graph.replay()
        if part.session is not None:
            part.outputs.take(part.session.run(part.inputs))

    def draft(self) -> Draft:
        part, batch = self._early
        self._wait()
        return Draft(**part.outputs.host(batch))

    def late(self, index: Sequence[int], drafted: bool = True) -> None:
        early, count = self._early
        batch, length = early.bridge.stream.shape[:2]
        if len(index) == count:
            bridge = early.bridge
            part = self._part("late", (batch, length), lambda: self._capture_late(bridge))
        else:
            batch = power_of_two(len(index))
            part = self._part("some", (batch, length), lambda: self._capture_late(self._bridge(batch, length)))
            places = pinned((batch,), torch.int64)  # from other memory, the copy would wait for the device
            places.copy_(torch.tensor([*index, *[index[0]] * (batch - len(index))]))
            part.bridge.gather(early.bridge, places.to(self.device, non_blocking=True))
        if not drafted and self._config.head.kind == "conditioned":
            part.bridge.tokens.zero_()
        self._main = part, len(index)
        part.graph.replay()
        if part.session is not None:
            part.outputs.take(part.session.run(part.inputs))

    def whole(self, observations: Sequence[Observation]) -> None:
        inputs, size = self._write(observations)
        part = self._part("whole", size, lambda: self._capture_whole(inputs, *size))
        self._main = part, len(observations)
        part.graph.replay()
        if part.session is not None:
            part.outputs.take(part.session.run(part.inputs))

    def main(self) -> Main:
        part, batch = self._main
        self._wait()
        return Main(**part.outputs.host(batch))

    def hidden(self) -> tuple[Tensor, Tensor]:
        (early, early_batch), (main, main_batch) = self._early, self._main
        return early.outputs.hidden[:early_batch], main.outputs.hidden[:main_batch]

    def _write(self, observations: Sequence[Observation]) -> tuple[Inputs, tuple[int, int]]:
        """The inputs, written, and their size: batch and prompt length, padded."""
        batch = len(observations)
        length = max(len(self._preprocess.prompt_tokens(observation.instruction)) for observation in observations)
        size = (1, length) if batch == 1 else (power_of_two(batch), -(-length // PROMPT_STEP) * PROMPT_STEP)
        if size not in self._inputs:
            self._inputs[size] = Inputs(self._preprocess, *size)
        self._inputs[size].write(observations)
        return self._inputs[size], size

    def _part(self, name: str, size: tuple[int, int], make: Callable[[], Part]) -> Part:
        key = (name, *size)
        if key not in self._parts:
            self._parts[key] = make()
        return self._parts[key]

    def _capture_early(self, inputs: Inputs, batch: int, length: int) -> Part:
        bridge = self._bridge(batch, 1 if self._textbook else self._embedded(length))

        def compute(outputs: Outputs) -> None:
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

        return self._capture("propose", bridge, compute)

    def _capture_late(self, bridge: Bridge) -> Part:
        def compute(outputs: Outputs) -> None:
            if self._textbook:
                hidden = bridge.stream[:, 0]
            else:
                stream = self._backbone.blocks(bridge.stream, self._k, self._n - 1)
                hidden = self._backbone.finish(stream, bridge.last)
            outputs.hidden.copy_(hidden)

        return self._capture("predict", bridge, compute)

    def _capture_whole(self, inputs: Inputs, batch: int, length: int) -> Part:
        def compute(outputs: Outputs) -> None:
            stream, last = self._embed(inputs)
            stream = self._backbone.blocks(stream, 0, self._n - 1)
            outputs.hidden.copy_(self._backbone.finish(stream, last))

        return self._capture("predict", self._bridge(batch, 1), compute)

    def _capture(self, component: Component, bridge: Bridge, compute: Callable[[Outputs], None]) -> Part:
        """A graph of `compute` and of the component, if its session can be captured."""
        session = self.sessions[component]
        drafted = bridge if component == "propose" else None
        outputs = Outputs(session.signature, len(bridge.last), self.device, drafted)
        inputs = {"hidden": outputs.hidden}
        if component == "predict":
            inputs |= {"coarse_actions": bridge.actions, "tolerance": self._tolerance}
            if self._config.head.kind == "conditioned":
                inputs["condition"] = bridge.tokens

        def launch() -> None:
            compute(outputs)
            if isinstance(session, GraphSession):
                outputs.take(by_name(session.module, inputs))

        with torch.inference_mode():
            graph = capture(launch, self.device, pool=self._pool)
        return Part(graph, None if isinstance(session, GraphSession) else session, inputs, outputs, bridge)

    def _embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The embedded sequence, and each one's last position."""
        inputs.upload()
        pixels = self._preprocess.pixels(inputs.images.device)
        tokens = inputs.tokens.device
        proprio = None if inputs.proprio is None else inputs.proprio.device
        stream = self._backbone.embed(pixels, tokens, proprio)
        return stream, inputs.lengths.device + (stream.shape[1] - tokens.shape[1] - 1)

    def _bridge(self, batch: int, length: int) -> Bridge:
        return Bridge(self._config, batch, length, self._preprocess.dtype, self.device)

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
