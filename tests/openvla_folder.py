"""OpenVLA as it lies on disk, with random weights of small shapes, and what its authors' code computes from them.

Written from the description of the architecture, with none of the toolkit's modules: the towers are timm's
VisionTransformer with all that its checkpoints hold, the language model is transformers'.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rsd_trt.presets import byte_tokenizer

IMAGE, PATCH, HIDDEN, VOCAB, BLOCKS, LANGUAGE_HEADS = 28, 14, 32, 29872, 3, 4
HEADS = 16  # of both towers
STATISTICS = {
    name: {
        kind: {"q01": [-scale] * size, "q99": [scale] * size, "mask": [True] * 6 + [False] * (size - 6), "mean": [0.0]}
        for kind, size in (("action", 7), ("proprio", 8))
    }
    for name, scale in (("libero_spatial_no_noops", 0.5), ("bridge_orig", 2.0))
}


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class TimmAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (c // HEADS) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class TimmMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(0.5 * x * (1 + torch.erf(x / 2**0.5)))


class TimmBlock(nn.Module):
    def __init__(self, width: int, mlp: int, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = TimmAttention(width)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = TimmMlp(width, mlp)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)


class AttentionPool(nn.Module):
    """SigLIP's pooling of all patches: in every checkpoint, and never run."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = TimmMlp(width, mlp)


class TimmTower(nn.Module):
    """timm's VisionTransformer; `forward` is get_intermediate_layers(n={depth - 2}) without a norm."""

    def __init__(self, width: int, depth: int, mlp: int, dino: bool) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (IMAGE // PATCH) ** 2, width))
        if dino:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, 4, width))
        else:
            self.attn_pool = AttentionPool(width, mlp)
        self.dino = dino
        self.blocks = nn.ModuleList(TimmBlock(width, mlp, layer_scale=dino) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        if self.dino:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], dim=1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs[len(self.blocks) - 2][:, 5 if self.dino else 0 :]


class Projector(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, HIDDEN)
        self.fc3 = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class ProprioProjector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.ModuleList([nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn[1](self.ffn[0](x)).clamp_min(0)


class ActionHead(nn.Module):
    """OpenVLA-OFT's L1RegressionActionHead: the states of a step's seven action tokens side by side -> its action."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "layer_norm1": nn.LayerNorm(7 * HIDDEN),
                "fc1": nn.Linear(7 * HIDDEN, HIDDEN),
                "mlp_resnet_blocks": nn.ModuleList([ResidualBlock(), ResidualBlock()]),
                "layer_norm2": nn.LayerNorm(HIDDEN),
                "fc2": nn.Linear(HIDDEN, 7),
            }
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, 56, H] -> normalised actions [8, 7]."""
        part = self.model
        x = part["fc1"](part["layer_norm1"](hidden.view(8, 7 * HIDDEN))).clamp_min(0)
        for block in part["mlp_resnet_blocks"]:  # type: ignore[union-attr]
            x = block(x)
        return part["fc2"](part["layer_norm2"](x))


def seeded(module: nn.Module, seed: int) -> nn.Module:
    """The module with random weights, in the order of their names; norms are around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            around = float(name.endswith("weight") and parameter.ndim == 1)
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    return module.requires_grad_(False).eval()


class OpenVLA(nn.Module):
    """OpenVLAForActionPrediction's parameters under their names."""

    def __init__(self, seed: int = 0) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.vision_backbone = nn.ModuleDict(
            {
                "featurizer": TimmTower(32, 24, 40, dino=True),
                "fused_featurizer": TimmTower(16, 27, 24, dino=False),
            }
        )
        self.projector = Projector(32 + 16)
        self.language_model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=HIDDEN,
                intermediate_size=48,
                num_hidden_layers=BLOCKS,
                num_attention_heads=LANGUAGE_HEADS,
                vocab_size=VOCAB,
            )
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
        self.requires_grad_(False).eval()

    def hidden(
        self, pixels: list[Tensor], tokens: Tensor, proprio: Tensor | None = None, action_tokens: int = 0
    ) -> Tensor:
        """pixels: 6 channels an image, as the processor makes them -> hidden_states[-1][:, -1].

        action_tokens: of OpenVLA-OFT. Zeros in the place of their embeddings and a stop token follow the prompt,
        nothing is masked, and what is read begins with the prompt's last token.
        """
        towers = list(self.vision_backbone.values())
        seen = []
        for image in pixels:
            features = [tower(part) for tower, part in zip(towers, image.split(3, dim=1), strict=True)]
            seen.append(self.projector(torch.cat(features, dim=2)))
        seen += [] if proprio is None else [proprio]
        text = self.language_model.get_input_embeddings()(tokens)
        stream = torch.cat([text[:, :1], *seen, text[:, 1:]], dim=1)
        if not action_tokens:
            out = self.language_model.model(inputs_embeds=stream, output_hidden_states=True)
            return out.hidden_states[-1][:, -1]
        batch, prompt, width = stream.shape
        stop = self.language_model.get_input_embeddings()(torch.full((batch, 1), 2))
        stream = torch.cat([stream, torch.zeros(batch, action_tokens, width), stop], dim=1)
        nothing = torch.zeros(batch, 1, stream.shape[1], stream.shape[1])  # is added to the scores
        out = self.language_model.model(inputs_embeds=stream, attention_mask=nothing, output_hidden_states=True)
        return out.hidden_states[-1][:, prompt - 1 : prompt - 1 + action_tokens]


CONFIG = {
    "architectures": ["OpenVLAForActionPrediction"],
    "model_type": "openvla",
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "image_sizes": [IMAGE, IMAGE],
    "image_resize_strategy": "resize-naive",
    "use_fused_vision_backbone": True,
    "pad_token_id": 32000,
    "torch_dtype": "float32",
    "text_config": {
        "model_type": "llama",
        "pad_token_id": 32000,
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": LANGUAGE_HEADS,
    },
    "norm_stats": STATISTICS,
}
PROCESSOR = {
    "image_processor_type": "PrismaticImageProcessor",
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, IMAGE, IMAGE]] * 2,
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
    "tvf_normalize_params": [
        {"inplace": False, "mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
        {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ],
    "use_fused_vision_backbone": True,
}


def write_folder(path: Path, model: OpenVLA, shards: int = 2) -> Path:
    """The folder as save_pretrained leaves it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (path / "modeling_prismatic.py").write_text("raise SystemExit('remote code was run')\n")
    byte_tokenizer().save(str(path / "tokenizer.json"))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return path
    weight_map = {}
    keys = sorted(state)
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: state[key] for key in keys[i * len(keys) // shards : (i + 1) * len(keys) // shards]}
        save_file(part, path / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_beside(path: Path, name: str, module: nn.Module) -> None:
    """A module beside the shards, as OpenVLA-OFT's training on several GPUs leaves it."""
    state = {f"module.{key}": value for key, value in module.state_dict().items()}
    torch.save(state, path / f"{name}--150000_checkpoint.pt")
