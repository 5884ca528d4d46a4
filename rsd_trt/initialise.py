"""Untrained bundles, to try the tools on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rsd_trt.bundle import Bundle, bundle_name, save
from rsd_trt.config import Size
from rsd_trt.errors import UserError
from rsd_trt.files import check_disk
from rsd_trt.presets import preset
from rsd_trt.prompts import BOS

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import nn


def initialise(path: Path, size: Size, seed: int, with_backbone: bool = True, device: str = "cpu") -> Bundle:
    """Writes an untrained bundle with seeded random weights. device: that draws them; each draws numbers of its own.

    Raises:
        UserError: `path` exists, the disk is too small, or there is no such device.
    """
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} cannot be used: torch finds no CUDA here. Try: --device cpu")

    from rsd_trt.models.backbone import Backbone
    from rsd_trt.models.codec import Codec
    from rsd_trt.models.draft import DraftModel
    from rsd_trt.models.head import build_head

    config = preset(size, name=bundle_name(path) or size)
    builders: dict[str, Callable[[], nn.Module]] = {
        "draft": lambda: DraftModel(config.draft, config.dims, config.hidden),
        "head": lambda: build_head(config.head, config.dims, config.hidden),
        "codec": lambda: Codec(config.codec, config.dims),
    }
    dtype = getattr(torch, config.backbone.dtype)
    if with_backbone:
        builders["backbone"] = lambda: _in_dtype(dtype, lambda: Backbone(config.backbone))
    with torch.device("meta"):
        needed = sum(size_in_bytes(build()) for build in builders.values())
    check_disk(path, needed)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        parts = {part: build() for part, build in builders.items()}
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
