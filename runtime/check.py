"""A check with a draft that has eyes of its own: one launch, from frames in the host's memory to actions there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd_trt.models.fast.products import power_of_two
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.session import Buffers, GraphSession, Launch, Session, capture

WRITTEN = {"frames": "images", "state": "proprio"}  # ports that every check writes, and what of an observation


class VisionCheck:
    """`propose` from observations. Buffers are made, and graphs captured, at the first check of a batch size; on a GPU
    sizes are padded to powers of two.

    On the CPU the host writes into the session's own buffers. On a GPU it writes into page-locked memory, and the
    copies there and back are captured with the component where the session is a CUDA graph of our own. The rows of an
    instruction are copied only where it differs from that of the check before.
    """

    def __init__(self, session: Session, device: torch.device, rows: Callable[[str], Tensor]) -> None:
        """rows: an instruction as the draft reads it, [P, E] on the device."""
        self._session, self._device, self._rows = session, device, rows
        self._made: dict[int, _Buffers] = {}

    def __call__(self, observations: Sequence[Observation]) -> dict[str, NDArray[Any]]:
        """The outputs [B, ...] of `propose`; the next check overwrites them."""
        batch = len(observations)
        size = power_of_two(batch) if self._device.type == "cuda" else batch
        if size not in self._made:
            self._made[size] = _Buffers(self._session, size, self._device)
        made = self._made[size]
        for i, observation in enumerate(observations):
            for name, written in made.written.items():
                written[i] = getattr(observation, WRITTEN[name])
            if made.instructions[i] != observation.instruction:
                made.inputs["instruction"][i].copy_(self._rows(observation.instruction))
                made.instructions[i] = observation.instruction
        made.launch()
        return {name: value[:batch] for name, value in made.seen().items()}


class _Buffers:
    """What the host writes and reads for one batch size, and what is launched between."""

    def __init__(self, session: Session, batch: int, device: torch.device) -> None:
        if isinstance(session, GraphSession):  # is captured below, with the copies
            buffers = Buffers.allocate(session.signature, batch, device)
            launch: Launch = partial(session.compute, buffers)
        else:
            buffers, launch = session.bound(batch)
        self.inputs = buffers.inputs  # which a captured graph reads, and does not keep
        self.seen: Callable[[], Mapping[str, NDArray[Any]]]
        self.instructions: list[str | None] = [None] * batch
        ours = {name: tensor for name, tensor in buffers.inputs.items() if name in WRITTEN}
        if device.type == "cpu":
            self.written = {name: tensor.numpy() for name, tensor in ours.items()}
            self.launch = launch
            self.seen = partial(_arrays, buffers.outputs, {})
            return
        there = {name: _pinned(tensor) for name, tensor in ours.items()}
        back = {name: _pinned(tensor) for name, tensor in buffers.outputs.items()}
        self.written = {name: tensor.numpy() for name, tensor in there.items()}
        read = {name: tensor.numpy() for name, tensor in back.items()}  # the same memory

        def around() -> None:
            for name, tensor in there.items():
                buffers.inputs[name].copy_(tensor, non_blocking=True)
            launch()
            for name, tensor in back.items():
                tensor.copy_(buffers.outputs[name].contiguous(), non_blocking=True)

        def seen() -> Mapping[str, NDArray[Any]]:
            torch.cuda.current_stream(device).synchronize()
            return read

        self.seen = seen
        self.launch = capture(around, device).replay if isinstance(session, GraphSession) else around


def _arrays(tensors: Mapping[str, Tensor], known: dict[str, tuple[Tensor, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Tensors of the host as arrays, without an operation of PyTorch for those that are `known`."""
    for name, tensor in tensors.items():
        if name not in known or known[name][0] is not tensor:
            known[name] = tensor, tensor.numpy()
    return {name: array for name, (_, array) in known.items()}


def _pinned(tensor: Tensor) -> Tensor:
    """As much memory of the host, page-locked: the device copies from and to it by itself."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=True)
