"""The draft against torch.nn.TransformerDecoderLayer, with the state dict of the original class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rsd_trt.config import Dims, HiddenDraftConfig
from rsd_trt.models.draft import DraftModel

LAYER = "decoder.decoder_layer"
# RFSQDraftModelWithProjection of the original experiment.
SHAPES = {
    "input_projection.weight": (512, 4096),
    "input_projection.bias": (512,),
    "decoder.position_encoding": (1, 256, 512),
    **{
        f"{LAYER}.{attention}.{name}": shape
        for attention in ("self_attn", "multihead_attn")
        for name, shape in {
            "in_proj_weight": (1536, 512),
            "in_proj_bias": (1536,),
            "out_proj.weight": (512, 512),
            "out_proj.bias": (512,),
        }.items()
    },
    f"{LAYER}.linear1.weight": (2048, 512),
    f"{LAYER}.linear1.bias": (2048,),
    f"{LAYER}.linear2.weight": (512, 2048),
    f"{LAYER}.linear2.bias": (512,),
    **{f"{LAYER}.norm{i}.{name}": (512,) for i in (1, 2, 3) for name in ("weight", "bias")},
    "decoder.output_norm.weight": (512,),
    "decoder.output_norm.bias": (512,),
    **{
        f"classification_heads.{i}.{name}": shape
        for i in range(3)
        for name, shape in {
            "0.weight": (256, 512),
            "0.bias": (256,),
            "2.weight": (256,),
            "2.bias": (256,),
            "3.weight": (896, 256),
            "3.bias": (896,),
        }.items()
    },
}


def reference(state: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """The original forward: one decoder layer on a length-1 sequence that is its own memory."""
    layer = nn.TransformerDecoderLayer(512, 8, 2048, activation="gelu", batch_first=True, norm_first=True).eval()
    layer.load_state_dict({key.removeprefix(f"{LAYER}."): value for key, value in state.items() if LAYER in key})
    x = nn.functional.linear(hidden, state["input_projection.weight"], state["input_projection.bias"])[:, None]
    x = x + state["decoder.position_encoding"][:, :1]
    x = layer(x, x)[:, 0]
    x = nn.functional.layer_norm(x, (512,), state["decoder.output_norm.weight"], state["decoder.output_norm.bias"])
    logits = []
    for i in range(3):
        head = nn.Sequential(nn.Linear(512, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 896))
        prefix = f"classification_heads.{i}."
        head.load_state_dict({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})
        logits.append(head(x).view(-1, 128, 7))
    return torch.stack(logits, dim=1)


def test_names_and_shapes_are_the_originals() -> None:
    with torch.device("meta"):
        state = DraftModel(HiddenDraftConfig(), Dims(), 4096).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == SHAPES


@torch.no_grad()
def test_equals_the_original_forward(randomise: Callable[..., None]) -> None:
    draft = DraftModel(HiddenDraftConfig(), Dims(), 4096)
    randomise(draft)
    hidden = torch.randn(3, 4096, generator=torch.Generator().manual_seed(1))
    logits = draft(hidden)
    assert logits.shape == (3, 3, 128, 7)
    torch.testing.assert_close(logits, reference(draft.state_dict(), hidden), rtol=1e-5, atol=1e-4)
