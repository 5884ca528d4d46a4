"""Untrained bundles, by size, to try the tools on; and the conventions of policies that are packed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from rsd_trt.bundle import Bundle, build, bundle_name, save
from rsd_trt.config import (
    Attention,
    BackboneConfig,
    BundleConfig,
    ControlConfig,
    Dims,
    HeadConfig,
    HeadKind,
    LanguageConfig,
    Preset,
    RsdConfig,
    Size,
    TowerConfig,
    VisionDraftConfig,
    torch_dtype,
    with_protocol,
)
from rsd_trt.errors import UserError
from rsd_trt.files import check_disk
from rsd_trt.prompts import BOS

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import nn

# DINOv2 with a class token and four registers, normalised with ImageNet's statistics.
DINO_TOWER = partial(
    TowerConfig, prefix_tokens=5, layer_scale=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
# SigLIP: no prefix tokens, no LayerScale, pixels scaled to [-1, 1].
SIGLIP_TOWER = partial(TowerConfig, prefix_tokens=0, layer_scale=False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# OpenVLA's towers by their timm names. The last block of each is not run: its features are not read.
TIMM_TOWERS = {
    "vit_large_patch14_reg4_dinov2": partial(DINO_TOWER, blocks=23, heads=16),
    "vit_so400m_patch14_siglip_224": partial(SIGLIP_TOWER, blocks=26, heads=16),
}
LLAMA_SPACE = 29871  # the token that OpenVLA appends to every prompt, before the action


def conventions(name: Preset) -> ControlConfig:
    """How a packed policy is driven; the statistics come with its weights.

    `openvla` and `openvla-oft` follow those projects' LIBERO evaluations, `rvq` the original RSD experiment's: the
    bare instruction, images as they are rendered, actions of the environment.
    """
    if name == "rvq":
        control = ControlConfig(cameras=("agentview_image",), prompt="{instruction}", lowercase=False)
        return with_protocol(control, "original")
    control = ControlConfig(
        jpeg_quality=95,
        center_crop=0.9,
        resampling="lanczos3",
        suffix_token=LLAMA_SPACE,
        rotation="robosuite",
        gripper="openvla",
    )
    return control if name == "openvla-oft" else replace(control, cameras=control.cameras[:1])


def attention(name: Preset) -> Attention:
    """How the Llama blocks of a packed policy attend: OpenVLA-OFT's fork of transformers has no causal mask."""
    return "bidirectional" if name == "openvla-oft" else "causal"


def preset(size: Size, name: str) -> BundleConfig:
    """The configuration of an untrained bundle. `reference` is sized for two CPU cores and 50 MB."""
    if size == "openvla-7b":
        return BundleConfig(
            name=name,
            trained=False,
            backbone=BackboneConfig(
                towers=(
                    TIMM_TOWERS["vit_large_patch14_reg4_dinov2"](width=1024, mlp_width=4096, patch=14),
                    TIMM_TOWERS["vit_so400m_patch14_siglip_224"](width=1152, mlp_width=4304, patch=14),
                ),
                language=LanguageConfig(hidden=4096, intermediate=11008, blocks=32, heads=32, vocab=32064),
                image_size=224,
                dtype="bfloat16",
            ),
            draft=VisionDraftConfig(
                side=224, width=384, blocks=6, heads=6, mlp_width=1536, classifier=512, state=False
            ),
            control=conventions("openvla"),
        )
    if size == "reference":
        return BundleConfig(
            name=name,
            trained=False,
            backbone=BackboneConfig(
                towers=(
                    DINO_TOWER(width=192, blocks=5, heads=3, mlp_width=768, patch=16),
                    SIGLIP_TOWER(width=192, blocks=5, heads=3, mlp_width=768, patch=16),
                ),
                language=LanguageConfig(hidden=256, intermediate=640, blocks=12, heads=4, vocab=320),
                image_size=128,
                proprio=True,
            ),
            dims=Dims(T=16),
            rsd=RsdConfig(check_steps=2),
            head=HeadConfig(feature=512, width=256),
        )
    return BundleConfig(
        name=name,
        trained=False,
        backbone=BackboneConfig(
            towers=(
                DINO_TOWER(width=32, blocks=2, heads=2, mlp_width=64, patch=16),
                SIGLIP_TOWER(width=24, blocks=2, heads=2, mlp_width=40, patch=16),
            ),
            language=LanguageConfig(hidden=32, intermediate=88, blocks=4, heads=4, vocab=320),
            image_size=32,
            proprio=True,
        ),
        draft=VisionDraftConfig(side=32, width=16, blocks=2, heads=2, mlp_width=32, classifier=16, instruction=16),
        head=HeadConfig(feature=32, width=16, embedding=4),
    )


def with_action_head(config: BundleConfig) -> BundleConfig:
    """An untrained bundle's configuration with OpenVLA-OFT's head, and all that this head is driven by."""
    numbers, control = config.dims.T * config.dims.A, conventions("openvla-oft")
    if config.backbone.language.vocab <= LLAMA_SPACE:
        control = replace(control, suffix_token=None)
    return replace(
        config,
        backbone=replace(config.backbone, proprio=True, attention=attention("openvla-oft"), action_tokens=numbers),
        head=HeadConfig(kind="oft-l1", width=config.hidden),
        rsd=replace(config.rsd, n_action_steps=config.dims.T),
        control=control,
    )


def initialise(
    path: Path, size: Size, seed: int, with_backbone: bool = True, device: str = "cpu", head: HeadKind = "rfsq"
) -> Bundle:
    """Writes an untrained bundle with seeded random weights. device: that draws them; each draws numbers of its own.
    head: rfsq or oft-l1.

    Raises:
        UserError: `path` exists, the disk is too small, or there is no such device.
    """
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} cannot be used: torch finds no CUDA here", "Try: --device cpu")

    config = preset(size, name=bundle_name(path) or size)
    if head == "oft-l1":
        config = with_action_head(config)
    makers: dict[str, Callable[[], nn.Module]] = {p: partial(build, config, p) for p in ("draft", "head", "codec")}
    dtype = torch_dtype(config.backbone.precision)
    if with_backbone:
        makers["backbone"] = partial(_in_dtype, dtype, partial(build, config, "backbone"))
    with torch.device("meta"):
        needed = sum(size_in_bytes(make()) for make in makers.values())
    check_disk(path, needed)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        parts = {part: make() for part, make in makers.items()}
    return save(path, config, parts, byte_tokenizer())


def byte_tokenizer() -> Tokenizer:
    """BOS and one token for every byte: covers any instruction, and needs no training."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {BOS: 0} | {character: i for i, character in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def size_in_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and stored buffers."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _in_dtype(dtype: torch.dtype, build: Callable[[], nn.Module]) -> nn.Module:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)
