"""What a query has to do, and how fast this machine could do it: the roofline (Williams et al. 2009).

Counted from the configuration are matrix products and attention, and nothing else: biases, norms, position tables and
what is computed element by element are below 1% of a 7B query.

    product n x i by i x o        2 n i o FLOPs      the weight i o is read, n i activations are read, n o written
    attention q over k positions  4 q k w FLOPs      2 k w keys and values and q w queries are read, q w written

for width w over all heads. Weights and activations are read and written once: what is kept on the chip between two
products would be less, what is read twice more. Causal attention is counted in full, as FLOP counters do: half of it is
1% of a 7B block. The last block is counted for the positions that are read, but for its keys and values.

    bound = max(bytes / bandwidth, FLOPs / rate)

with bandwidth and rates measured here. A stage whose bytes take longer is bound by the memory, else by the arithmetic.
The bounds of stages that run one after the other add up.
"""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from rsd_trt.config import (
    ARM_DIMS,
    PROPRIO_DIM,
    BundleConfig,
    LanguageConfig,
    Precision,
    TowerConfig,
    torch_dtype,
)
from rsd_trt.errors import UserError
from rsd_trt.eval.profile.clock import Call, Clock
from rsd_trt.models.fast.products import MLP, PRODUCTS, ProductName

Stage = Literal["preprocess", "vision", "blocks", "predict"]
Resource = Literal["compute", "memory"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)
BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
TOKEN_BYTES = 8  # int64
RGB = 3
REPEATS = 20
CUDA_COPY, CPU_COPY = 1 << 30, 1 << 27  # bytes: far more than any cache holds
CUDA_SIDE, CPU_SIDE = 8192, 1024  # of square matrices


@dataclass(frozen=True)
class Work:
    """Bytes read and written, and FLOPs by the precision of the operands."""

    bytes: int = 0
    flops: Mapping[Precision, int] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, dict(Counter(self.flops) + Counter(other.flops)))

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, {dtype: flops * times for dtype, flops in self.flops.items()})

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def product(rows: int, inputs: int, outputs: int, dtype: Precision) -> Work:
    """rows x inputs by inputs x outputs. What E4M3 operands give is bfloat16."""
    result: Precision = "bf16" if dtype == "fp8" else dtype
    operands = (inputs * outputs + rows * inputs) * BYTES[dtype]
    return Work(operands + rows * outputs * BYTES[result], {dtype: 2 * rows * inputs * outputs})


def attention(queries: int, keys: int, width: int, dtype: Precision) -> Work:
    """`queries` positions that look at `keys`."""
    return Work(2 * (queries + keys) * width * BYTES[dtype], {dtype: 4 * queries * keys * width})


def stage_work(
    config: BundleConfig, images: int, prompt: int, backbone: Precision, parts: Precision = "fp32"
) -> dict[Stage, Work]:
    """What each stage of a full query has to do.

    images: of an observation; prompt: its tokens, BOS included; backbone: fp8 for the MLPs of the Llama blocks (but
    the last) in E4M3 and the rest in bfloat16; parts: the precision of draft and head.
    """
    language = config.backbone.language
    plain: Precision = "bf16" if backbone == "fp8" else backbone
    tokens = config.backbone.action_tokens
    prompt += tokens + 1 if tokens else 0  # placeholders and a stop token
    positions = prompt + images * patches(config) + config.backbone.proprio
    block = _block(language, positions, backbone, plain)
    last = _last_block(language, positions, max(1, tokens), plain)
    return {
        "preprocess": _preprocess(config, images, plain),
        "vision": _vision(config, images, prompt, plain),
        "blocks": block * (language.blocks - 1) + last,
        "predict": _head(config, parts) + (_decode(config, config.dims.L) if config.head.gives_tokens else Work()),
    }


def patches(config: BundleConfig) -> int:
    """Positions that an image takes."""
    return (config.backbone.image_size // config.backbone.towers[0].patch) ** 2


def _preprocess(config: BundleConfig, images: int, dtype: Precision) -> Work:
    """The camera's bytes are read and each tower's pixels written; the resize is not counted."""
    seen = images * RGB * config.control.camera_size**2
    given = images * RGB * config.backbone.image_size**2 * len(config.backbone.towers)
    return Work(seen + given * BYTES[dtype])


def _vision(config: BundleConfig, images: int, prompt: int, dtype: Precision) -> Work:
    """Both towers, the projector, and the embedding of the prompt."""
    hidden, count = config.hidden, patches(config)
    features = sum(tower.width for tower in config.backbone.towers)
    work = sum((_tower(tower, images, count, dtype) for tower in config.backbone.towers), Work())
    rows = images * count
    work += product(rows, features, 4 * features, dtype) + product(rows, 4 * features, hidden, dtype)
    work += product(rows, hidden, hidden, dtype)
    if config.backbone.proprio:
        work += product(1, PROPRIO_DIM, hidden, dtype) + product(1, hidden, hidden, dtype)
    return work + Work(prompt * (TOKEN_BYTES + 2 * hidden * BYTES[dtype]))


def _tower(tower: TowerConfig, images: int, count: int, dtype: Precision) -> Work:
    width, rows = tower.width, images * (count + tower.prefix_tokens)
    look = attention(count + tower.prefix_tokens, count + tower.prefix_tokens, width, dtype) * images
    block = product(rows, width, 3 * width, dtype) + look + product(rows, width, width, dtype)
    block += product(rows, width, tower.mlp_width, dtype) + product(rows, tower.mlp_width, width, dtype)
    return product(images * count, RGB * tower.patch**2, width, dtype) + block * tower.blocks


def _block(language: LanguageConfig, positions: int, dtype: Precision, plain: Precision) -> Work:
    hidden, inner = language.hidden, language.intermediate
    of: dict[ProductName, Precision] = {name: dtype if name in MLP else plain for name in PRODUCTS}
    work = product(positions, hidden, 3 * hidden, of["wqkv"]) + attention(positions, positions, hidden, plain)
    work += product(positions, hidden, hidden, of["wo"]) + product(positions, hidden, 2 * inner, of["w13"])
    return work + product(positions, inner, hidden, of["w2"])


def _last_block(language: LanguageConfig, positions: int, read: int, dtype: Precision) -> Work:
    """Keys and values of all positions; the rest of those that are read."""
    hidden, inner = language.hidden, language.intermediate
    work = product(positions, hidden, 2 * hidden, dtype) + product(read, hidden, hidden, dtype)
    work += attention(read, positions, hidden, dtype) + product(read, hidden, hidden, dtype)
    return work + product(read, hidden, 2 * inner, dtype) + product(read, inner, hidden, dtype)


def _head(config: BundleConfig, dtype: Precision) -> Work:
    head, dims, hidden = config.head, config.dims, config.hidden
    if head.kind == "oft-l1":
        work = product(dims.T, dims.A * hidden, head.width, dtype) + product(dims.T, head.width, dims.A, dtype)
        return work + product(dims.T, head.width, head.width, dtype) * head.blocks
    logits = dims.T * dims.D * dims.K
    if head.kind == "classification":
        half = head.width // 2
        classifier = product(1, hidden, head.width, dtype) + product(1, head.width, half, dtype)
        return (classifier + product(1, half, logits, dtype)) * dims.L
    work = product(1, hidden, head.feature, dtype)
    if head.kind == "conditioned":
        embedded = dims.T * dims.D * dims.C * head.embedding
        work += product(1, embedded, head.feature, dtype) + product(1, 2 * head.feature, head.feature, dtype)
    classifier = product(1, head.feature, head.width, dtype) + product(1, head.width, logits, dtype)
    return work + classifier * dims.L


def _decode(config: BundleConfig, layers: int) -> Work:
    """Tokens of some layers to actions, in float32."""
    dims, width = config.dims, config.codec.width
    looked_up = Work(dims.T * dims.D * layers * (TOKEN_BYTES + BYTES["fp32"]))
    return looked_up + product(dims.T, dims.D, width, "fp32") + product(dims.T, width, ARM_DIMS + 1, "fp32")


@dataclass(frozen=True)
class Bound:
    """The least time that some work takes, and what it is bound by."""

    ms: float
    by: Resource


@dataclass(frozen=True)
class Machine:
    """What a device was seen to do: the fastest of `REPEATS` large copies and matrix products."""

    bytes_per_s: float  # read and written by a copy from device to device
    flops_per_s: dict[str, float]  # of a square matrix product on random data, by the operands' type
    matrix_side: int
    copied_bytes: int

    def bound(self, parts: Sequence[Work]) -> Bound:
        """The least time that stages which run one after the other take here, and what most of it is bound by."""
        total = computing = 0.0
        for work in parts:
            memory = work.bytes / self.bytes_per_s * 1e3
            compute = sum(flops / self.flops_per_s[dtype] for dtype, flops in work.flops.items()) * 1e3
            total += max(memory, compute)
            computing += compute if compute > memory else 0.0
        return Bound(total, "compute" if computing > total / 2 else "memory")


def measure_machine(device: torch.device, dtypes: Iterable[Precision]) -> Machine:
    """Copies and multiplies, for a second or so.

    Raises:
        UserError: the device has too little memory free.
    """
    clock = Clock(device)
    size, side = (CUDA_COPY, CUDA_SIDE) if clock.cuda else (CPU_COPY, CPU_SIDE)
    try:
        with torch.inference_mode():
            copied = 2 * size / _fastest(clock, _copy(size, device))
            rates = {str(dtype): 2 * side**3 / _fastest(clock, _matmul(dtype, side, device)) for dtype in dtypes}
    except torch.OutOfMemoryError as error:
        raise UserError(f"{device} has too little memory free to be measured: {str(error).splitlines()[0]}") from None
    return Machine(copied, rates, side, size)


def _fastest(clock: Clock, call: Call) -> float:
    """Seconds of the fastest call; the first two are not counted."""
    times = [clock.issued(call) if (ms := clock.queued(call)) is None else ms for _ in range(2 + REPEATS)]
    return min(times[2:]) / 1e3


def _copy(size: int, device: torch.device) -> Call:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _matmul(dtype: Precision, side: int, device: torch.device) -> Call:
    """A product of random square matrices: on zeros a GPU draws less power, and is faster."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    if dtype == "fp8":
        x, y = (z.to(torch.float8_e4m3fn) for z in (a, b))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    a, b = (z.to(torch_dtype(dtype)) for z in (a, b))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)
