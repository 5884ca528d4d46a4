"""The fused backbone against `Backbone`, with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import Tensor

from rsd_trt.models.backbone import PLACEHOLDER, Backbone, BackboneInputs
from rsd_trt.models.fast.backbone import FusedBackbone, FusedBlock
from rsd_trt.models.fast.products import PRODUCTS, Fp8Product, ProductName, every_product, to_fp8
from rsd_trt.presets import preset

CONFIG = preset("tiny", "tiny").backbone
N = CONFIG.language.blocks


@pytest.fixture(scope="module")
def backbone(randomise: Callable[..., None]) -> Backbone:
    module = Backbone(CONFIG)
    randomise(module)
    return module.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def fused(backbone: Backbone) -> FusedBackbone:
    return FusedBackbone(copy.deepcopy(backbone))


def make_inputs(lengths: list[int], images: int) -> BackboneInputs:
    generator = torch.Generator().manual_seed(1)
    side, batch = CONFIG.image_size, len(lengths)
    return BackboneInputs(
        pixels=torch.randn(batch, images, len(CONFIG.towers), 3, side, side, generator=generator),
        tokens=torch.randint(0, CONFIG.language.vocab, (batch, max(lengths)), generator=generator),
        lengths=torch.tensor(lengths),
        proprio=torch.randn(batch, 8, generator=generator),
    )


@pytest.mark.parametrize(("lengths", "images"), [([5], 1), ([5], 2), ([3, 9, 6], 2)])
def test_hidden_states_are_equal(backbone: Backbone, fused: FusedBackbone, lengths: list[int], images: int) -> None:
    inputs = make_inputs(lengths, images)
    stream = fused.embed(inputs.pixels, inputs.tokens, inputs.proprio)
    torch.testing.assert_close(stream, backbone.embed(inputs)[0], rtol=1e-4, atol=1e-4)
    hidden = fused(inputs.pixels, inputs.tokens, inputs.lengths, inputs.proprio)
    torch.testing.assert_close(hidden, backbone(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("lengths", "padded"), [([12], False), ([12], True), ([12, 17, 13], True)])
def test_attention_to_both_sides_is_equal(backbone: Backbone, lengths: list[int], padded: bool) -> None:
    """With action tokens: the states behind several positions of the last block."""
    both_sides = Backbone(structs.replace(CONFIG, attention="bidirectional", action_tokens=4))
    both_sides.load_state_dict(backbone.state_dict())
    fused, inputs = FusedBackbone(copy.deepcopy(both_sides)), make_inputs(lengths, 2)
    for row, length in enumerate(lengths):
        inputs.tokens[row, length - 5 : length - 1] = PLACEHOLDER
    hidden = fused(inputs.pixels, inputs.tokens, inputs.lengths, inputs.proprio, padded)
    assert hidden.shape == (len(lengths), 4, CONFIG.language.hidden)
    with torch.no_grad():
        torch.testing.assert_close(hidden, both_sides(inputs), rtol=1e-5, atol=1e-5)


def test_the_weights_are_taken_over_and_not_doubled(backbone: Backbone) -> None:
    source = copy.deepcopy(backbone)
    folded = sum(tower.width for tower in CONFIG.towers)  # the convolutions' biases, into the position embeddings
    count = sum(parameter.numel() for parameter in source.parameters()) - folded
    fused = FusedBackbone(source)
    values = [*fused.parameters(), *fused.buffers()]
    assert sum(value.numel() for value in values) == count
    assert source.llama.layers[0].self_attn.q_proj is None


def test_padding_behind_the_position_that_is_read_changes_nothing(fused: FusedBackbone) -> None:
    inputs = make_inputs([4, 9], images=1)
    stream = fused.embed(inputs.pixels, inputs.tokens, inputs.proprio)
    last = inputs.lengths - 1 + stream.shape[1] - inputs.tokens.shape[1]
    spoilt = stream.clone()
    spoilt[0, int(last[0]) + 1 :] = 1e3
    torch.testing.assert_close(fused.language(spoilt, last)[0], fused.language(stream, last)[0])


@pytest.mark.parametrize("fp8", [set(), {(1, "wo")}, {(0, "w2"), (2, "wqkv")}, every_product(N)])
def test_the_chosen_products_are_in_e4m3_and_no_other(backbone: Backbone, fp8: set[tuple[int, ProductName]]) -> None:
    fused = FusedBackbone(copy.deepcopy(backbone), fp8)
    blocks = [*fused.layers, fused.last]
    found = {(i, n) for i, block in enumerate(blocks) for n in PRODUCTS if isinstance(getattr(block, n), Fp8Product)}
    assert found == fp8
    assert not [block for block, _ in found if block == N - 1]


def plain_gate(product: Tensor, row_scale: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What `kernels.gate` computes, on any device."""
    gate, up = (product.float() * row_scale * column_scale).chunk(2, dim=-1)
    return to_fp8(F.silu(gate) * up)


def test_an_mlp_in_e4m3_is_the_same_with_its_gate_in_one_kernel(randomise: Callable[..., None]) -> None:
    wide = structs.replace(CONFIG, language=structs.replace(CONFIG.language, intermediate=96))  # a multiple of 16
    module = Backbone(wide).requires_grad_(False).to(torch.bfloat16)
    randomise(module)
    block = FusedBackbone(module, {(0, "w13"), (0, "w2")}).layers[0]
    assert isinstance(block, FusedBlock)
    x = torch.randn(7, wide.language.hidden, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = block.mlp(x)
    block.gate = plain_gate
    torch.testing.assert_close(block.mlp(x), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
