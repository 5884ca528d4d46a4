"""Which matrix products may be computed in E4M3? What some of them in it, and no other, do to states and answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rsd_trt.bundle import Bundle
from rsd_trt.eval.verify.backbone import Answers, flips, heads, joined, steps_apart
from rsd_trt.eval.verify.components import DYNAMIC_ROWS
from rsd_trt.eval.verify.oracle import last_positions
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.models.fast.products import PRODUCTS, Fp8Product, Product, ProductName, every_product, fp8_products
from rsd_trt.runtime.backends import check_fp8
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor

Choice = Collection[tuple[int, ProductName]]


@dataclass(frozen=True)
class Sensitivity:
    """What a choice of products in E4M3 does to hidden states, tokens and actions, beside the same backbone in
    bfloat16."""

    what: str
    products: int
    cosine: float  # after block N, the worst input
    mean_cosine: float
    early_cosine: float  # after block k, the worst input
    draft_flips: float  # share of different tokens in the draft's worst layer
    flips: float  # the same of the main head's
    action_mean_abs: float  # of the plans, in environment units
    steps_apart: float  # share of the plans' steps that differ by more than the bundle's tolerance
    rows: int


@torch.inference_mode()
def sensitivity(bundle: Bundle, device: torch.device, observations: Sequence[Observation]) -> Iterator[Sensitivity]:
    """All products; the MLPs', as `fp8` computes them; each kind alone, and all but it; all but the first blocks; each
    block alone (counted from 0).

    Raises:
        UserError: the device or the backbone's widths allow no E4M3.
    """
    check_fp8(bundle, "graph", device)
    config = bundle.config.backbone
    process = Preprocessor(bundle.config.control, config, bundle.tokenizer(), device)
    fused = FusedBackbone(bundle.backbone(device)).to(torch.bfloat16)
    embedded = []
    for start in range(0, len(observations), DYNAMIC_ROWS):
        inputs = process(observations[start : start + DYNAMIC_ROWS])
        stream = fused.embed(inputs.pixels.bfloat16(), inputs.tokens, inputs.proprio)
        embedded.append((stream, last_positions(inputs, stream)))
    k, blocks = bundle.config.rsd.draft_block, config.language.blocks
    read = heads(bundle, device)
    expected = answers(read, fused, embedded, k)
    for what, choice in choices(blocks).items():
        plain = {pair: getattr(fused.layers[pair[0]], pair[1]) for pair in choice}
        try:
            for (block, name), module in plain.items():
                assert isinstance(module, Product)
                setattr(fused.layers[block], name, Fp8Product(module.weight))
            found = answers(read, fused, embedded, k)
        finally:
            for (block, name), module in plain.items():
                setattr(fused.layers[block], name, module)
        early, final = (
            cosine_similarity(x.double(), y.double(), dim=-1)
            for x, y in ((found.early, expected.early), (found.final, expected.final))
        )
        yield Sensitivity(
            what=what,
            products=len(choice),
            cosine=float(final.min()),
            mean_cosine=float(final.mean()),
            early_cosine=float(early.min()),
            draft_flips=max(flips(found.draft_tokens, expected.draft_tokens)),
            flips=max(flips(found.tokens, expected.tokens)),
            action_mean_abs=float((found.actions - expected.actions).abs().mean()),
            steps_apart=steps_apart(found, expected, bundle.config),
            rows=len(final),
        )


def choices(blocks: int) -> dict[str, Choice]:
    """The choices of products that are measured, by name."""
    every = every_product(blocks)
    only = {f"only {name}": {pair for pair in every if pair[1] == name} for name in PRODUCTS}
    but = {f"all but {name}": {pair for pair in every if pair[1] != name} for name in PRODUCTS}
    single = {f"block {i}": {pair for pair in every if pair[0] == i} for i in range(blocks - 1)}
    first = {f"all but blocks < {n}": {pair for pair in every if pair[0] >= n} for n in range(1, min(4, blocks - 1))}
    return {"all": every, "the MLPs": fp8_products(blocks), **only, **but, **first, **single}


def answers(
    read: Callable[[Tensor, Tensor], Answers],
    fused: FusedBackbone,
    embedded: Sequence[tuple[Tensor, Tensor]],
    k: int,
) -> Answers:
    """The hidden states after block k and after block N, and what the heads make of them."""
    last_block = fused.config.language.blocks - 1
    parts = []
    for stream, last in embedded:
        middle = fused.blocks(stream, 0, min(k, last_block))
        final = fused.finish(fused.blocks(middle, k, last_block), last)
        parts.append(read(fused.read(middle, last) if k <= last_block else final, final))
    return joined(parts)
