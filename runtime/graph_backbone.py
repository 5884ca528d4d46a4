"""The fused backbone as CUDA graphs, from images in the host's memory to hidden states.

A graph is captured at the first query of its input size and replayed after, on buffers that are allocated once. A
batch of one is captured at its prompt's own length, which does not change within an episode; larger batches are padded
to a power of two and their prompts to a multiple of `PROMPT_STEP`, so that a few graphs serve every mixture of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsd_trt.config import PROPRIO_DIM
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.models.fast.products import power_of_two
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.runtime.session import capture

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
        self.lengths.host.fill_(
            preprocess.backbone.action_tokens + 2
        )  # the least that rows without an observation need
        self.proprio = Uploaded((batch, PROPRIO_DIM), torch.float32, device) if preprocess.backbone.proprio else None
        self._all = [x for x in (self.images, self.tokens, self.lengths, self.proprio) if x is not None]

    def write(self, observations: Sequence[Observation]) -> None:
        """Fills the host's side: the device must not be reading it."""
        for i, observation in enumerate(observations):
            self._preprocess.check(observation)
            prompt = self._preprocess.tokens(observation.instruction)
            self.images.written[i] = self._preprocess.frames(observation.images)
            self.tokens.written[i, : len(prompt)] = prompt
            self.lengths.written[i] = len(prompt)
        if self.proprio is not None:
            self.proprio.written[: len(observations)] = self._preprocess.states(observations)

    def upload(self) -> None:
        for value in self._all:
            value.upload()


class GraphBackbone:
    """A `rsd_trt.runtime.forward.BackboneRun`. Images are preprocessed on the device, within the graph.

    The caller waits for what a call gives before the next one, which writes to the same memory.
    """

    def __init__(self, backbone: FusedBackbone, preprocess: Preprocessor) -> None:
        self._backbone, self._preprocess = backbone, preprocess
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, int], tuple[Inputs, torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, observations: Sequence[Observation]) -> Tensor:
        batch = len(observations)
        length = max(len(self._preprocess.tokens(observation.instruction)) for observation in observations)
        size = (1, length) if batch == 1 else (power_of_two(batch), -(-length // PROMPT_STEP) * PROMPT_STEP)
        if size not in self._captured:
            self._captured[size] = self._capture(*size)
        inputs, graph, hidden = self._captured[size]
        inputs.write(observations)
        graph.replay()
        return hidden

    def _capture(self, batch: int, length: int) -> tuple[Inputs, torch.cuda.CUDAGraph, Tensor]:
        device = self._preprocess.device
        inputs = Inputs(self._preprocess, batch, length)
        hidden = torch.zeros(batch, *self._backbone.config.hidden_shape, device=device)

        def launch() -> None:
            inputs.upload()
            pixels = self._preprocess.seen(inputs.images.device)
            proprio = None if inputs.proprio is None else inputs.proprio.device
            tokens, lengths = inputs.tokens.device, inputs.lengths.device
            hidden.copy_(self._backbone(pixels, tokens, lengths, proprio, padded=batch > 1))

        with torch.inference_mode():
            return inputs, capture(launch, device, pool=self._pool), hidden


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in the host's page-locked memory, which the device copies from and to by itself."""
    return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)
