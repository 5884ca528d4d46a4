"""The configurations of untrained bundles, by size, and the conventions of policies that are packed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rsd_trt.config import (
    BackboneConfig,
    BundleConfig,
    ControlConfig,
    DraftConfig,
    HeadConfig,
    LanguageConfig,
    Preset,
    RsdConfig,
    Size,
    TowerConfig,
    with_protocol,
)

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
    control = ControlConfig(center_crop=0.9, suffix_token=LLAMA_SPACE, gripper="openvla")
    return control if name == "openvla-oft" else replace(control, cameras=control.cameras[:1])


def preset(size: Size, name: str) -> BundleConfig:
    """The configuration of an untrained bundle. `reference` is sized for two CPU cores and 40 MB."""
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
            rsd=RsdConfig(draft_block=8),
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
            rsd=RsdConfig(draft_block=3),
            draft=DraftConfig(width=256, mlp_width=1024, positions=1),
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
        rsd=RsdConfig(draft_block=1),
        draft=DraftConfig(width=16, mlp_width=32, positions=1),
        head=HeadConfig(feature=32, width=16, embedding=4),
    )
