"""What a query has to read, write and multiply, counted from the configuration.

Matrix products and attention are counted, and nothing else: biases, norms, position tables and what is computed element
by element are below 1% of a 7B query.

    product n x i by i x o        2 n i o FLOPs      the weight i o is read, n i activations are read, n o written
    attention q over k positions  4 q k w FLOPs      2 k w keys and values and q w queries are read, q w written

for width w over all heads. Weights and activations are read and written once: what is kept on the chip between two
products would be less, what is read twice more. Causal attention is counted in full, as FLOP counters do: half of it is
1% of a 7B block. The last block is counted for the one position that is read, but for its keys and values.
"""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rsd_trt.config import ARM_DIMS, PROPRIO_DIM, BundleConfig, LanguageConfig, Precision, TowerConfig
from rsd_trt.models.fast.products import MLP, PRODUCTS, ProductName

Stage = Literal["preprocess", "vision", "blocks <= k", "blocks > k", "propose", "predict"]
Number = Literal["fp32", "fp16", "bf16", "fp8"]  # what a product's operands are stored in
STAGES: tuple[Stage, ...] = typing.get_args(Stage)
BYTES: dict[Number, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
TOKEN_BYTES = 8  # int64
RGB = 3


@dataclass(frozen=True)
class Work:
    """Bytes read and written, and FLOPs by the precision of the operands."""

    bytes: int = 0
    flops: Mapping[Number, int] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, dict(Counter(self.flops) + Counter(other.flops)))

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, {number: flops * times for number, flops in self.flops.items()})

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def product(rows: int, inputs: int, outputs: int, number: Number) -> Work:
    """rows x inputs by inputs x outputs. What E4M3 operands give is bfloat16."""
    result: Number = "bf16" if number == "fp8" else number
    operands = (inputs * outputs + rows * inputs) * BYTES[number]
    return Work(operands + rows * outputs * BYTES[result], {number: 2 * rows * inputs * outputs})


def attention(queries: int, keys: int, width: int, number: Number) -> Work:
    """`queries` positions that look at `keys`."""
    return Work(2 * (queries + keys) * width * BYTES[number], {number: 4 * queries * keys * width})


def stage_work(
    config: BundleConfig, images: int, prompt: int, backbone: Number, parts: Precision = "fp32"
) -> dict[Stage, Work]:
    """What each stage of one query has to do.

    images: of an observation; prompt: its tokens, BOS included; backbone: fp8 for the MLPs of the Llama blocks (but
    the last) in E4M3 and the rest in bfloat16; parts: the precision of draft and head.
    """
    language, k = config.backbone.language, config.rsd.draft_block
    plain: Number = "bf16" if backbone == "fp8" else backbone
    positions = prompt + images * patches(config) + config.backbone.proprio
    block = _block(language, positions, backbone, plain)
    last = _last_block(language, positions, plain)
    blocks = language.blocks
    found: dict[Stage, Work] = {
        "preprocess": _preprocess(config, images, plain),
        "vision": _vision(config, images, prompt, plain),
        "blocks <= k": block * k if k < blocks else block * (k - 1) + last,
        "propose": _draft(config, parts) + _decode(config, config.dims.C),
        "predict": _head(config, parts) + _decode(config, config.dims.L),
    }
    if k < blocks:
        found["blocks > k"] = block * (blocks - 1 - k) + last
    return {stage: found[stage] for stage in STAGES if stage in found}


def patches(config: BundleConfig) -> int:
    """Positions that an image takes."""
    return (config.backbone.image_size // config.backbone.towers[0].patch) ** 2


def _preprocess(config: BundleConfig, images: int, number: Number) -> Work:
    """The camera's bytes are read and each tower's pixels written; the resize is no matrix product."""
    seen = images * RGB * config.control.camera_size**2
    given = images * RGB * config.backbone.image_size**2 * len(config.backbone.towers)
    return Work(seen + given * BYTES[number])


def _vision(config: BundleConfig, images: int, prompt: int, number: Number) -> Work:
    """Both towers, the projector, and the embedding of the prompt."""
    hidden, count = config.hidden, patches(config)
    features = sum(tower.width for tower in config.backbone.towers)
    work = sum((_tower(tower, images, count, number) for tower in config.backbone.towers), Work())
    rows = images * count
    work += product(rows, features, 4 * features, number) + product(rows, 4 * features, hidden, number)
    work += product(rows, hidden, hidden, number)
    if config.backbone.proprio:
        work += product(1, PROPRIO_DIM, hidden, number) + product(1, hidden, hidden, number)
    return work + Work(prompt * (TOKEN_BYTES + 2 * hidden * BYTES[number]))


def _tower(tower: TowerConfig, images: int, count: int, number: Number) -> Work:
    width, rows = tower.width, images * (count + tower.prefix_tokens)
    look = attention(count + tower.prefix_tokens, count + tower.prefix_tokens, width, number) * images
    block = product(rows, width, 3 * width, number) + look + product(rows, width, width, number)
    block += product(rows, width, tower.mlp_width, number) + product(rows, tower.mlp_width, width, number)
    return product(images * count, RGB * tower.patch**2, width, number) + block * tower.blocks


def _block(language: LanguageConfig, positions: int, number: Number, plain: Number) -> Work:
    hidden, inner = language.hidden, language.intermediate
    of: dict[ProductName, Number] = {name: number if name in MLP else plain for name in PRODUCTS}
    work = product(positions, hidden, 3 * hidden, of["wqkv"]) + attention(positions, positions, hidden, plain)
    work += product(positions, hidden, hidden, of["wo"]) + product(positions, hidden, 2 * inner, of["w13"])
    return work + product(positions, inner, hidden, of["w2"])


def _last_block(language: LanguageConfig, positions: int, number: Number) -> Work:
    """Keys and values of all positions; the rest of the one that is read."""
    hidden, inner = language.hidden, language.intermediate
    work = product(positions, hidden, 2 * hidden, number) + product(1, hidden, hidden, number)
    work += attention(1, positions, hidden, number) + product(1, hidden, hidden, number)
    return work + product(1, hidden, 2 * inner, number) + product(1, inner, hidden, number)


def _draft(config: BundleConfig, number: Number) -> Work:
    draft, dims = config.draft, config.dims
    width, half = draft.width, draft.width // 2
    look = product(1, width, width, number) * 4  # value and output projection, of self- and of cross-attention
    mlp = product(1, width, draft.mlp_width, number) + product(1, draft.mlp_width, width, number)
    classifier = product(1, width, half, number) + product(1, half, dims.T * dims.D * dims.K, number)
    return product(1, config.hidden, width, number) + look + mlp + classifier * dims.C


def _head(config: BundleConfig, number: Number) -> Work:
    head, dims, hidden = config.head, config.dims, config.hidden
    logits = dims.T * dims.D * dims.K
    if head.kind == "classification":
        half = head.width // 2
        classifier = product(1, hidden, head.width, number) + product(1, head.width, half, number)
        return (classifier + product(1, half, logits, number)) * dims.L
    work = product(1, hidden, head.feature, number)
    if head.kind == "conditioned":
        embedded = dims.T * dims.D * dims.C * head.embedding
        work += product(1, embedded, head.feature, number) + product(1, 2 * head.feature, head.feature, number)
    classifier = product(1, head.feature, head.width, number) + product(1, head.width, logits, number)
    return work + classifier * dims.L


def _decode(config: BundleConfig, layers: int) -> Work:
    """Tokens of some layers to actions, in float32."""
    dims, width = config.dims, config.codec.width
    looked_up = Work(dims.T * dims.D * layers * (TOKEN_BYTES + BYTES["fp32"]))
    return looked_up + product(dims.T, dims.D, width, "fp32") + product(dims.T, width, ARM_DIMS + 1, "fp32")
