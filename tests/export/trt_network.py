"""What a TensorRT engine is told to compute: the network that its parser makes of an ONNX file, run in torch.

No engine runs on a processor, but the parser does. Each layer's meaning is the one that TensorRT's documentation of its
operators gives, and each tensor must come out with the dtype and shape that TensorRT infers for it.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx as trt
import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {
    trt.float32: torch.float32,
    trt.float16: torch.float16,
    trt.bfloat16: torch.bfloat16,
    trt.int64: torch.int64,
    trt.int32: torch.int32,
    trt.uint8: torch.uint8,
    trt.bool: torch.bool,
}
BINARY = trt.ElementWiseOperation
UNARY = trt.UnaryOperation
REDUCE = trt.ReduceOperation
ACTIVATION = trt.ActivationType

ELEMENTWISE: dict[object, Callable[[Tensor, Tensor], Tensor]] = {
    BINARY.SUM: torch.add,
    BINARY.SUB: torch.sub,
    BINARY.PROD: torch.mul,
    BINARY.POW: torch.pow,
    BINARY.MAX: torch.maximum,
    BINARY.MIN: torch.minimum,
    BINARY.AND: torch.logical_and,
    BINARY.OR: torch.logical_or,
    BINARY.EQUAL: torch.eq,
    BINARY.GREATER: torch.gt,
    BINARY.LESS: torch.lt,
    # Of integers it goes towards zero, as in C.
    BINARY.DIV: lambda x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc"),
}
ONE: dict[object, Callable[[Tensor], Tensor]] = {
    UNARY.NOT: torch.logical_not,
    UNARY.ABS: torch.abs,
    UNARY.NEG: torch.neg,
    UNARY.EXP: torch.exp,
    UNARY.SQRT: torch.sqrt,
    UNARY.RECIP: torch.reciprocal,
    UNARY.ERF: torch.erf,
    UNARY.SIGN: torch.sign,
    UNARY.ISINF: torch.isinf,
    UNARY.ISNAN: torch.isnan,
}
REDUCTIONS: dict[object, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    REDUCE.SUM: lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    REDUCE.AVG: lambda x, axes, keep: x.mean(axes, keep),
    REDUCE.MAX: lambda x, axes, keep: x.amax(axes, keep),
    REDUCE.MIN: lambda x, axes, keep: x.amin(axes, keep),
}
ACTIVATIONS: dict[object, Callable[[Tensor, float, float], Tensor]] = {
    ACTIVATION.RELU: lambda x, *_: x.relu(),
    ACTIVATION.CLIP: lambda x, low, high: x.double().clamp(low, high).to(x.dtype),  # either may be beyond float16
    ACTIVATION.TANH: lambda x, *_: x.tanh(),
    ACTIVATION.SIGMOID: lambda x, *_: x.sigmoid(),
    ACTIVATION.SOFTPLUS: lambda x, scale, beta: scale * F.softplus(x, beta),
    ACTIVATION.GELU_ERF: lambda x, *_: F.gelu(x),
}
# The class that a layer has to be seen as, to read what it was given: the network hands out the base class only.
CLASSES = {
    "ACTIVATION": trt.IActivationLayer,
    "CAST": trt.ICastLayer,
    "CONCATENATION": trt.IConcatenationLayer,
    "CONSTANT": trt.IConstantLayer,
    "ELEMENTWISE": trt.IElementWiseLayer,
    "GATHER": trt.IGatherLayer,
    "MATRIX_MULTIPLY": trt.IMatrixMultiplyLayer,
    "NORMALIZATION": trt.INormalizationLayer,
    "REDUCE": trt.IReduceLayer,
    "SHAPE": trt.IShapeLayer,
    "SHUFFLE": trt.IShuffleLayer,
    "SLICE": trt.ISliceLayer,
    "SOFTMAX": trt.ISoftMaxLayer,
    "SQUEEZE": trt.ISqueezeLayer,
    "TOPK": trt.ITopKLayer,
    "UNARY": trt.IUnaryLayer,
    "UNSQUEEZE": trt.IUnsqueezeLayer,
}


@dataclass(frozen=True)
class Port:
    """A tensor's name, and the dtype and shape that TensorRT infers."""

    name: str
    inferred: tuple[torch.dtype, tuple[int, ...]]

    @classmethod
    def of(cls, tensor: Any) -> Port:
        return cls(tensor.name, (DTYPES[tensor.dtype], tuple(tensor.shape)))

    def check(self, value: Tensor) -> Tensor:
        found = value.dtype, tuple(value.shape)
        assert found == self.inferred, f"{self.name} is {found}; TensorRT infers {self.inferred}"
        return value


class Network:
    """A parsed, strongly typed network for inputs of one batch size."""

    def __init__(self, onnx: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """shapes: of the inputs, from which TensorRT infers those of all tensors."""
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser = trt.OnnxParser(self.network, self.logger)  # owns the weights
        parsed = self.parser.parse_from_file(str(onnx))
        assert parsed, [self.parser.get_error(i).desc() for i in range(self.parser.num_errors)]
        assert self.network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        for i in range(self.network.num_inputs):
            port = self.network.get_input(i)
            port.shape = shapes[port.name]
        self.layers = [_layer(self.network, i) for i in range(self.network.num_layers)]
        self.inputs = [Port.of(self.network.get_input(i)) for i in range(self.network.num_inputs)]
        self.outputs = [self.network.get_output(i).name for i in range(self.network.num_outputs)]
        self.steps = list(self._in_order())
        self.fixed: dict[str, Tensor] = {}  # what no input's value changes, kept from the first run

    @property
    def kinds(self) -> Counter[str]:
        """How many layers there are of each kind."""
        return Counter(kind for kind, _ in self.layers)

    def _in_order(self) -> Iterator[tuple[str, Any, list[str | None], list[Port], bool]]:
        """Each layer behind those that it reads (the parser adds some casts behind their readers): its kind, the layer,
        what it reads, what it makes, and whether that is the same for all inputs."""
        known = {port.name: False for port in self.inputs}
        waiting = self.layers
        while waiting:
            later = []
            for kind, layer in waiting:
                ports = [layer.get_input(i) for i in range(layer.num_inputs)]
                read = [None if port is None else port.name for port in ports]
                if not all(name is None or name in known for name in read):
                    later.append((kind, layer))
                    continue
                made = [Port.of(layer.get_output(i)) for i in range(layer.num_outputs)]
                fixed = kind == "SHAPE" or all(known[name] for name in read if name is not None)
                known |= {port.name: fixed for port in made}
                yield kind, layer, read, made, fixed
            assert len(later) < len(waiting), "a layer reads what no layer makes"
            waiting = later

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by port name -> outputs by port name.

        Raises:
            AssertionError: a tensor has not the dtype or shape that TensorRT infers.
        """
        values = self.fixed | {port.name: port.check(inputs[port.name]) for port in self.inputs}
        for kind, layer, read, made, fixed in self.steps:
            if made[0].name in self.fixed:
                continue
            found = compute(kind, layer, [None if name is None else values[name] for name in read])
            values |= {port.name: port.check(value) for port, value in zip(made, found, strict=True)}
            if fixed:
                self.fixed |= {port.name: values[port.name] for port in made}
        return {name: values[name] for name in self.outputs}


def _layer(network: Any, index: int) -> tuple[str, Any]:
    """A layer's kind, and the layer seen as what it is. (An activation's `type` is another thing than a layer's.)"""
    layer = network.get_layer(index)
    kind = layer.type.name
    layer.__class__ = CLASSES[kind]
    return kind, layer


def _constant(weights: Any) -> Tensor:
    """A copy of a constant's values [size]. Those in bfloat16, which the bindings do not hand out (NumPy has no such
    type), are read where `nvinfer1::Weights` (type, address, count) lies: behind the head of pybind11's object."""
    if isinstance(weights, np.ndarray):
        return torch.from_numpy(weights.copy())
    fields = ctypes.c_void_p.from_address(id(weights) + 2 * ctypes.sizeof(ctypes.c_void_p)).value
    assert fields is not None
    address, count = (ctypes.c_int64.from_address(fields + offset).value for offset in (8, 16))
    assert count == weights.size
    return torch.frombuffer(bytearray(ctypes.string_at(address, weights.nbytes)), dtype=torch.bfloat16)


def compute(kind: str, layer: Any, given: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """A layer's inputs -> its outputs."""
    if kind == "CONSTANT":
        return (_constant(layer.weights).to(DTYPES[layer.get_output(0).dtype]).reshape(tuple(layer.shape)),)
    x, rest = given[0], given[1:]
    assert x is not None
    if kind == "SHAPE":
        return (torch.tensor(x.shape, dtype=torch.int64),)
    if kind == "CAST":
        return (x.to(DTYPES[layer.to_type]),)
    if kind == "UNARY":
        return (ONE[layer.op](x),)
    if kind == "ACTIVATION":
        return (ACTIVATIONS[layer.type](x, layer.alpha, layer.beta),)
    if kind == "SOFTMAX":
        (axis,) = _axes(layer.axes)
        return (x.softmax(axis),)
    if kind == "REDUCE":
        return (REDUCTIONS[layer.op](x, _axes(layer.axes), layer.keep_dims),)
    if kind == "CONCATENATION":
        return (torch.cat([value for value in given if value is not None], layer.axis),)
    if kind == "ELEMENTWISE":
        (y,) = rest
        assert y is not None
        assert x.dtype == y.dtype, "a strongly typed network mixes no types"
        return (ELEMENTWISE[layer.op](x, y),)
    if kind == "MATRIX_MULTIPLY":
        (y,) = rest
        assert y is not None
        return (_matrix(x, layer.op0) @ _matrix(y, layer.op1),)
    if kind == "NORMALIZATION":
        return (_normalise(layer, x, *rest),)
    if kind == "SHUFFLE":
        return (_shuffle(layer, x, *rest),)
    if kind == "SLICE":
        return (_slice(layer, x, rest),)
    if kind == "GATHER":
        return (_gather(layer, x, *rest),)
    if kind == "TOPK":
        (axis,) = _axes(layer.axes)
        assert layer.op == trt.TopKOperation.MAX
        values, indices = x.topk(layer.k, axis)
        return values, indices.to(torch.int32)
    assert kind in ("SQUEEZE", "UNSQUEEZE"), f"no meaning is given for {kind}"
    (axes,) = rest
    assert axes is not None
    rank = x.ndim + (len(axes) if kind == "UNSQUEEZE" else 0)
    for axis in sorted((axis % rank for axis in axes.tolist()), reverse=kind == "SQUEEZE"):
        assert kind == "UNSQUEEZE" or x.shape[axis] == 1
        x = x.unsqueeze(axis) if kind == "UNSQUEEZE" else x.squeeze(axis)
    return (x,)


def _axes(mask: int) -> tuple[int, ...]:
    """The axes of a bit mask."""
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


def _matrix(x: Tensor, operation: object) -> Tensor:
    assert operation in (trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE)
    return x if operation == trt.MatrixOperation.NONE else x.mT


def _normalise(layer: Any, x: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, computed in float32."""
    assert layer.num_groups == 1
    assert scale is not None
    assert bias is not None
    axes, wide = _axes(layer.axes), x.float()
    mean = wide.mean(axes, keepdim=True)
    variance = (wide - mean).square().mean(axes, keepdim=True)
    return ((wide - mean) * (variance + layer.epsilon).rsqrt() * scale.float() + bias.float()).to(x.dtype)


def _shuffle(layer: Any, x: Tensor, wanted: Tensor | None = None) -> Tensor:
    """A transpose, a reshape, a transpose. In a reshape 0 may stand for the dimension as it was."""
    x = x.permute(tuple(layer.first_transpose)[: x.ndim])
    dims = x.shape if layer.reshape_dims is None else tuple(layer.reshape_dims)
    dims = dims if wanted is None else tuple(wanted.tolist())
    if layer.zero_is_placeholder:
        dims = tuple(x.shape[i] if dim == 0 else dim for i, dim in enumerate(dims))
    x = x.reshape(dims)
    return x.permute(tuple(layer.second_transpose)[: x.ndim])


def _slice(layer: Any, x: Tensor, rest: Sequence[Tensor | None]) -> Tensor:
    """Start, size and stride along some axes, or all of them: constants, or inputs 1 to 3 and 5."""
    assert layer.mode == trt.SampleMode.STRICT_BOUNDS
    given = [None if value is None else tuple(value.tolist()) for value in rest] + [None] * (5 - len(rest))
    fixed = (layer.start, layer.shape, layer.stride)
    start, size, stride = (value or tuple(given_not) for value, given_not in zip(given[:3], fixed, strict=True))
    axes = given[4] or layer.axes or range(x.ndim)
    for axis, first, count, step in zip(axes, start, size, stride, strict=True):
        x = x.index_select(axis, first + step * torch.arange(count))
    return x


def _gather(layer: Any, x: Tensor, indices: Tensor | None) -> Tensor:
    """Along one axis, or (ND) of elements whose coordinates stand in the last axis of the indices."""
    assert layer.num_elementwise_dims == 0
    assert indices is not None
    indices = indices.long()
    if layer.mode == trt.GatherMode.ND:
        return x[indices.unbind(-1)]
    assert layer.mode == trt.GatherMode.DEFAULT
    dims = (*x.shape[: layer.axis], *indices.shape, *x.shape[layer.axis + 1 :])
    return x.index_select(layer.axis, indices.reshape(-1)).reshape(dims)
