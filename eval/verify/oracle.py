"""What a backbone computes, in other people's code: PIL's pixels, timm's towers and transformers' Llama on its weights.

It is what preprocessing and `rsd_trt.models.backbone` are checked against, and what people run who deploy nothing:
`rsd-trt profile-query` times towers and Llama as that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rsd_trt.config import BackboneConfig, ControlConfig, LanguageConfig, TowerConfig
from rsd_trt.errors import Unavailable
from rsd_trt.models.backbone import Backbone, BackboneInputs
from rsd_trt.models.vision import NORM_EPS
from rsd_trt.runtime.pixels import through_jpeg

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import LlamaModel

INSTALL = "pip install timm transformers"
LEVELS = 255  # of an 8-bit channel


class Oracle:
    """The backbone once more, independently assembled.

    It shares the given backbone's weights, on whose device and in whose dtype it computes: building it costs no memory.

    Raises:
        Unavailable: timm or transformers is not installed.
    """

    def __init__(self, backbone: Backbone) -> None:
        config = self.config = backbone.config
        self.towers = [
            build_tower(tower, config.image_size, module.state_dict())
            for tower, module in zip(config.towers, backbone.vision_backbone.values(), strict=True)
        ]
        self.llama = build_llama(config.language, backbone.llama.state_dict())
        self._projector = linears(backbone.projector)
        self._proprio = linears(backbone.proprio_projector) if backbone.proprio_projector is not None else None

    def vision(self, pixels: Tensor) -> Tensor:
        """pixels [B, images, towers, 3, S, S] -> both towers' features [B, images * patches, width]."""
        features = []
        for i, tower in enumerate(self.towers):
            features.append(tower_features(tower, pixels[:, :, i].flatten(0, 1)))  # [B * images, patches, width]
        joined = torch.cat(features, dim=-1)
        return joined.view(len(pixels), -1, joined.shape[-1])

    def embed(self, inputs: BackboneInputs) -> Tensor:
        """The embedded sequence [B, S, H]: BOS, patches, proprioception, the rest of the prompt."""
        words = self.llama.get_input_embeddings()(inputs.tokens.clamp_min(0))  # [B, P, H]
        words = words * (inputs.tokens >= 0)[..., None]  # placeholders of action tokens have no embedding
        parts = [words[:, :1], mlp(self._projector, self.vision(inputs.pixels)), words[:, 1:]]
        if self._proprio is not None:
            assert inputs.proprio is not None
            parts.insert(2, mlp(self._proprio, inputs.proprio.to(words.dtype))[:, None])
        return torch.cat(parts, dim=1)

    def states(self, stream: Tensor) -> tuple[Tensor, ...]:
        """The embedded sequence [B, S, H] -> the stream before block 1 and after every block, the last one normed."""
        mask = self._mask(stream, None)
        found = self.llama(
            inputs_embeds=stream, attention_mask=mask, use_cache=False, output_hidden_states=True
        ).hidden_states
        assert found is not None
        return tuple(found)

    def hidden(self, inputs: BackboneInputs) -> Tensor:
        """After the last block and the final norm: [B, H] at the prompt's last position; with n action tokens [B, n, H]
        there and at all of them but the last."""
        stream = self.embed(inputs)
        last = last_positions(inputs, stream)
        mask = self._mask(stream, last)
        final = self.llama(inputs_embeds=stream, attention_mask=mask, use_cache=False).last_hidden_state
        assert final is not None
        count = self.config.action_tokens
        if not count:
            return final[torch.arange(len(stream), device=stream.device), last]
        return torch.stack([row[end - count - 1 : end - 1] for row, end in zip(final, last.tolist(), strict=True)])

    def _mask(self, stream: Tensor, last: Tensor | None) -> Tensor | None:
        """What is added to the attention's scores [B, 1, S, S] in place of a causal mask; last [B]: where rows end."""
        if self.config.attention == "causal":
            return None
        batch, length, _ = stream.shape
        mask = torch.zeros(batch, 1, length, length, dtype=stream.dtype, device=stream.device)
        for row, end in enumerate(() if last is None else last.tolist()):
            mask[row, :, :, end + 1 :] = torch.finfo(stream.dtype).min
        return mask


def last_positions(inputs: BackboneInputs, stream: Tensor) -> Tensor:
    """[B], where each row's prompt ends in the embedded sequence."""
    return inputs.lengths - 1 + stream.shape[1] - inputs.tokens.shape[1]


def tower_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """pixels [B, 3, S, S] -> features [B, patches, width]: timm's last block, without final norm and prefix tokens."""
    features: Tensor = tower.get_intermediate_layers(pixels, n=1)[0]  # type: ignore[operator]
    return features


def build_tower(config: TowerConfig, image_size: int, state: Mapping[str, Tensor]) -> nn.Module:
    """timm's VisionTransformer on the weights of a `VisionTower`. timm calls a LayerScale's factor `gamma`.

    Raises:
        Unavailable: timm is not installed.
    """
    tower = timm_tower(config, image_size)
    tower.norm = nn.Identity()  # unused: OpenVLA reads the stream as a block leaves it
    tower.load_state_dict({key.replace("scale_factor", "gamma"): value for key, value in state.items()}, assign=True)
    return tower.requires_grad_(False).eval()


def timm_tower(config: TowerConfig, image_size: int) -> nn.Module:
    """timm's VisionTransformer of these dimensions, without memory for its weights.

    Raises:
        Unavailable: timm is not installed.
    """
    from functools import partial

    try:
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed. Install it: {INSTALL}") from None
    with torch.device("meta"):
        tower: nn.Module = VisionTransformer(
            img_size=image_size,
            patch_size=config.patch,
            embed_dim=config.width,
            depth=config.blocks,
            num_heads=config.heads,
            mlp_ratio=(config.mlp_width + 0.5) / config.width,  # timm multiplies and rounds down
            init_values=1.0 if config.layer_scale else None,
            class_token=config.prefix_tokens > 0,
            reg_tokens=max(config.prefix_tokens - 1, 0),
            no_embed_class=True,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
            act_layer=partial(nn.GELU, approximate="tanh" if config.gelu == "tanh" else "none"),
            global_pool="",
            num_classes=0,
        )
    return tower


def build_llama(config: LanguageConfig, state: Mapping[str, Tensor]) -> LlamaModel:
    """transformers' LlamaModel on the weights of a `Llama`, with PyTorch's attention.

    Raises:
        Unavailable: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaModel
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed. Install it: {INSTALL}") from None
    settings = LlamaConfig.from_dict(
        {
            "hidden_size": config.hidden,
            "intermediate_size": config.intermediate,
            "num_hidden_layers": config.blocks,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads,
            "vocab_size": config.vocab,
            "rms_norm_eps": config.rms_eps,
            "rope_theta": config.rope_theta,
            "attn_implementation": "sdpa",
        }
    )
    with torch.device("meta"):
        llama = LlamaModel(settings)
    llama.load_state_dict(state, assign=True)
    llama.rotary_emb = type(llama.rotary_emb)(config=settings).to(state["norm.weight"].device)  # is no weight
    llama.train(False)
    return llama.requires_grad_(False)


def linears(module: nn.Module) -> list[nn.Linear]:
    """A projector's layers, in order."""
    return [layer for layer in module.children() if isinstance(layer, nn.Linear)]


def mlp(layers: list[nn.Linear], x: Tensor) -> Tensor:
    """Linear layers with an exact GELU between each two."""
    for i, layer in enumerate(layers):
        x = F.linear(F.gelu(x) if i else x, layer.weight, layer.bias)
    return x


def pil_pixels(image: NDArray[np.uint8], control: ControlConfig, backbone: BackboneConfig) -> Tensor:
    """One camera's image [S, S, 3] uint8 -> pixels [towers, 3, size, size], as OpenVLA's processors make them."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture = picture.rotate(180) if control.rotate_images else picture
    if control.jpeg_quality is not None:
        picture = Image.fromarray(through_jpeg(np.asarray(picture), control.jpeg_quality))
    size = backbone.image_size
    if control.resampling == "lanczos3":
        values = tensorflow_resample(np.asarray(picture), size, control.center_crop)
    else:
        keep = round(picture.width * control.center_crop**0.5)
        left = (picture.width - keep) // 2
        picture = picture.crop((left, left, left + keep, left + keep)).resize((size, size), Image.Resampling.BICUBIC)
        values = np.array(picture)
    x = torch.from_numpy(values).permute(2, 0, 1).float() / LEVELS  # [3, size, size]
    mean, std = (torch.tensor([getattr(t, name) for t in backbone.towers]) for name in ("mean", "std"))
    return (x - mean[:, :, None, None]) / std[:, :, None, None]


def tensorflow_resample(image: NDArray[np.uint8], size: int, area: float) -> NDArray[np.uint8]:
    """[S, S, 3] -> [size, size, 3]: OpenVLA's `resize_image_for_policy` and `center_crop_image` without TensorFlow, by
    PIL's Lanczos in floating point and NumPy's linear interpolation."""
    from PIL import Image

    channels = [Image.fromarray(image[..., i].astype(np.float32)) for i in range(image.shape[-1])]
    resized = [np.asarray(c.resize((size, size), Image.Resampling.LANCZOS)) for c in channels]
    x = np.clip(np.round(np.stack(resized, -1)), 0, LEVELS).astype(np.float64)  # [size, size, 3]
    margin = (1 - area**0.5) / 2
    at, grid = np.linspace(margin, 1 - margin, size) * (size - 1), np.arange(size)
    for axis in (0, 1):
        x = np.apply_along_axis(lambda line: np.interp(at, grid, line), axis, x)
    return np.floor(x / LEVELS * (LEVELS + 0.5)).astype(np.uint8)
