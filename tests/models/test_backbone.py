"""The backbone against transformers' Llama, causal and to both sides, and its promise: padding changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from msgspec import structs
from torch import Tensor

from rsd_trt.config import PROPRIO_DIM
from rsd_trt.models.backbone import PLACEHOLDER, Backbone, BackboneInputs
from rsd_trt.presets import preset

TINY = preset("tiny", "tiny").backbone
N = TINY.language.blocks
ACTION_TOKENS = 6
PATCHES = (TINY.image_size // TINY.towers[0].patch) ** 2


# Some of the keys of OpenVLA's checkpoint.
OPENVLA = {
    "language_model.model.embed_tokens.weight": (32064, 4096),
    "language_model.model.layers.31.self_attn.q_proj.weight": (4096, 4096),
    "language_model.model.layers.31.self_attn.o_proj.weight": (4096, 4096),
    "language_model.model.layers.31.mlp.gate_proj.weight": (11008, 4096),
    "language_model.model.layers.31.mlp.down_proj.weight": (4096, 11008),
    "language_model.model.layers.31.input_layernorm.weight": (4096,),
    "language_model.model.layers.31.post_attention_layernorm.weight": (4096,),
    "language_model.model.norm.weight": (4096,),
    "projector.fc1.weight": (8704, 2176),
    "projector.fc2.weight": (4096, 8704),
    "projector.fc3.bias": (4096,),
    "vision_backbone.featurizer.cls_token": (1, 1, 1024),
    "vision_backbone.featurizer.reg_token": (1, 4, 1024),
    "vision_backbone.featurizer.pos_embed": (1, 256, 1024),
    "vision_backbone.featurizer.patch_embed.proj.weight": (1024, 3, 14, 14),
    "vision_backbone.featurizer.blocks.22.attn.qkv.weight": (3072, 1024),
    "vision_backbone.featurizer.blocks.22.ls2.scale_factor": (1024,),
    "vision_backbone.fused_featurizer.pos_embed": (1, 256, 1152),
    "vision_backbone.fused_featurizer.blocks.25.mlp.fc1.weight": (4304, 1152),
}


def make_inputs(lengths: list[int], images: int = 2, proprio: bool = True, seed: int = 0) -> BackboneInputs:
    generator = torch.Generator().manual_seed(seed)
    batch, size = len(lengths), TINY.image_size
    return BackboneInputs(
        pixels=torch.randn(batch, images, len(TINY.towers), 3, size, size, generator=generator),
        tokens=torch.randint(1, TINY.language.vocab, (batch, max(lengths)), generator=generator),
        lengths=torch.tensor(lengths),
        proprio=torch.randn(batch, PROPRIO_DIM, generator=generator) if proprio else None,
    )


def one_row(inputs: BackboneInputs, row: int) -> BackboneInputs:
    """The row alone, without its padding."""
    assert inputs.proprio is not None
    pick, length = slice(row, row + 1), int(inputs.lengths[row])
    return BackboneInputs(inputs.pixels[pick], inputs.tokens[pick, :length], inputs.lengths[pick], inputs.proprio[pick])


@pytest.fixture(scope="module")
def backbone(randomise: Callable[..., None]) -> Backbone:
    module = Backbone(TINY)
    randomise(module)
    return module.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def both_sides(backbone: Backbone) -> Backbone:
    """The same weights with attention to both sides and action tokens."""
    module = Backbone(structs.replace(TINY, attention="bidirectional", action_tokens=ACTION_TOKENS))
    module.load_state_dict(backbone.state_dict())
    return module.requires_grad_(False).eval()


def with_action_tokens(inputs: BackboneInputs) -> BackboneInputs:
    """The same rows with placeholders and a stop token (2) behind each prompt."""
    tokens = torch.zeros(len(inputs.tokens), inputs.tokens.shape[1] + ACTION_TOKENS + 1, dtype=torch.int64)
    for row, length in enumerate(inputs.lengths.tolist()):
        behind = torch.tensor([*[PLACEHOLDER] * ACTION_TOKENS, 2])
        tokens[row, : length + len(behind)] = torch.cat([inputs.tokens[row, :length], behind])
    return dataclasses.replace(inputs, tokens=tokens, lengths=inputs.lengths + ACTION_TOKENS + 1)


def llama_oracle(backbone: Backbone, stream: Tensor, mask: Tensor | None = None) -> Tensor:
    """transformers' last hidden states for an embedded sequence, with this backbone's weights copied by key. mask: is
    added to the attention scores in place of the causal one."""
    from transformers import LlamaConfig, LlamaModel

    language = backbone.config.language
    oracle = LlamaModel(
        LlamaConfig(
            hidden_size=language.hidden,
            intermediate_size=language.intermediate,
            num_hidden_layers=language.blocks,
            num_attention_heads=language.heads,
            vocab_size=language.vocab,
            rms_norm_eps=language.rms_eps,
        )
    ).eval()
    oracle.load_state_dict(backbone.llama.state_dict())
    with torch.no_grad():
        return oracle(inputs_embeds=stream, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize(("images", "tokens"), [(1, 3), (2, 20)])
def test_every_position_equals_transformers(backbone: Backbone, images: int, tokens: int) -> None:
    inputs = make_inputs([tokens, tokens], images)
    stream, last = backbone.embed(inputs)
    assert stream.shape == (2, 1 + images * PATCHES + 1 + tokens - 1, TINY.language.hidden)
    assert last.tolist() == [stream.shape[1] - 1] * 2
    expected = llama_oracle(backbone, stream)
    for position in range(stream.shape[1]):
        found = backbone.language(stream, torch.full((2,), position))
        torch.testing.assert_close(found, expected[:, position], rtol=0, atol=1e-5)
    assert torch.equal(backbone(inputs), backbone.language(stream, last))


def test_the_sequence_is_bos_then_patches_then_proprio_then_prompt(backbone: Backbone) -> None:
    inputs = make_inputs([4])
    assert inputs.proprio is not None
    both = backbone.embed(inputs)[0][0]
    words = backbone.llama.embed_tokens(inputs.tokens)[0]
    assert torch.equal(both[0], words[0])
    assert torch.equal(both[-3:], words[1:])
    torch.testing.assert_close(both[-4], backbone.proprio_projector(inputs.proprio)[0])
    for i in range(2):
        alone = dataclasses.replace(inputs, pixels=inputs.pixels[:, i : i + 1])
        patches = slice(1 + i * PATCHES, 1 + (i + 1) * PATCHES)
        single = backbone.embed(alone)[0][0, 1 : 1 + PATCHES]
        torch.testing.assert_close(both[patches], single, rtol=1e-5, atol=1e-5)


def test_each_tower_reads_its_own_pixels(backbone: Backbone) -> None:
    inputs = make_inputs([2], images=1)
    pixels = inputs.pixels[0]  # [1, towers, 3, S, S]
    features = [tower(pixels[:, i]) for i, tower in enumerate(backbone.vision_backbone.values())]
    expected = backbone.projector(torch.cat(features, dim=-1))[0]
    torch.testing.assert_close(backbone.embed(inputs)[0][0, 1 : 1 + PATCHES], expected)


def test_padding_changes_nothing(backbone: Backbone) -> None:
    inputs = make_inputs([3, 9, 6])
    together = backbone(inputs)
    for row in range(3):
        torch.testing.assert_close(together[row], backbone(one_row(inputs, row))[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("images", [1, 2])
def test_attention_to_both_sides_equals_transformers(both_sides: Backbone, images: int) -> None:
    """The states that are read begin with the prompt's last one; the placeholders' embeddings are zero."""
    inputs = with_action_tokens(make_inputs([5, 5], images))
    stream, read = both_sides.embed(inputs)
    assert read.tolist() == [list(range(images * PATCHES + 5, images * PATCHES + 5 + ACTION_TOKENS))] * 2
    assert not stream[:, read[0, 1:]].any() and stream[:, read[0, 0]].any() and stream[:, -1].any()
    length = stream.shape[1]
    expected = llama_oracle(both_sides, stream, torch.zeros(2, 1, length, length))
    torch.testing.assert_close(both_sides(inputs), expected[:, read[0]], rtol=0, atol=1e-5)
    causal = llama_oracle(both_sides, stream)
    assert (causal[:, read[0]] - expected[:, read[0]]).abs().max() > 1e-2


def test_padding_is_kept_out_of_attention_to_both_sides(both_sides: Backbone) -> None:
    inputs = with_action_tokens(make_inputs([3, 9, 6]))
    together = both_sides(inputs)
    assert together.shape == (3, ACTION_TOKENS, TINY.language.hidden)
    for row in range(3):
        torch.testing.assert_close(together[row], both_sides(one_row(inputs, row))[0], rtol=0, atol=2e-6)


def test_without_a_proprioception_token(backbone: Backbone) -> None:
    blind = Backbone(structs.replace(TINY, proprio=False))
    assert not [name for name in blind.state_dict() if "proprio" in name]
    assert blind.embed(make_inputs([4], proprio=False))[0].shape[1] == 1 + 2 * PATCHES + 3
    with pytest.raises(ValueError, match="no proprio"):
        backbone.embed(make_inputs([4], proprio=False))


def test_names_and_shapes_are_openvlas() -> None:
    with torch.device("meta"):
        state = Backbone(preset("openvla-7b", "name").backbone).state_dict()
    assert OPENVLA.items() <= {key: tuple(value.shape) for key, value in state.items()}.items()
