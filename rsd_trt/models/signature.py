"""What goes into a module and what comes out: one description for sessions, exports, parity checks and `info`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

BATCH = "B"
DType = Literal["float32", "int64", "bool", "uint8"]


@dataclass(frozen=True)
class Port:
    """A named tensor. `dims` are symbols of the signature's sizes; `B` alone is free."""

    name: str
    dims: tuple[str, ...]
    dtype: DType = "float32"


@dataclass(frozen=True)
class Signature:
    """The ports of an exportable module, with the sizes behind their symbols."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sizes: Mapping[str, int]

    def shape(self, port: Port, batch: int) -> tuple[int, ...]:
        """The concrete shape of `port` for a batch of `batch`."""
        return tuple(batch if dim == BATCH else self.sizes[dim] for dim in port.dims)

    def describe(self, port: Port) -> str:
        """For people: `hidden [B, H=4096] float32`."""
        dims = ", ".join(dim if dim == BATCH else f"{dim}={self.sizes[dim]}" for dim in port.dims)
        return f"{port.name} [{dims}] {port.dtype}"


class Exportable(nn.Module):
    """A module with a signature: `forward` takes its inputs and gives its outputs, in their order."""

    signature: Signature
