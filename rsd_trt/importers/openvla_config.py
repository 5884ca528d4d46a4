"""OpenVLA's config.json and preprocessor_config.json as the configuration of a backbone.

Widths come from the tensors, the rest from the files and, for the towers, from the names of timm's models. What rsd-trt
does not compute is refused by name.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from rsd_trt.config import FEATURIZERS, BackboneConfig, LanguageConfig, Resize, TowerConfig
from rsd_trt.errors import UserError, named, shown
from rsd_trt.presets import TIMM_TOWERS
from rsd_trt.records import checked, from_json
from rsd_trt.weights import Entry, first_few, fronts

RESAVE = "Save the model anew, as safetensors and without what wraps it: model.save_pretrained(FOLDER)"
EMBEDDING = "language_model.model.embed_tokens.weight"
RESIZES: tuple[Resize, ...] = typing.get_args(Resize)


class RopeParameters(msgspec.Struct, frozen=True):
    """What transformers 5 writes instead of `rope_theta` and `rope_scaling`."""

    rope_type: str = "default"
    rope_theta: float | None = None


class TextConfig(msgspec.Struct, frozen=True):
    """`text_config`: what it leaves out has transformers' LlamaConfig's default."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: object = None
    rope_parameters: RopeParameters | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False


class ModelConfig(msgspec.Struct, frozen=True):
    """config.json."""

    timm_model_ids: tuple[str, ...]
    timm_override_act_layers: tuple[str | None, ...]
    image_sizes: tuple[int, ...]
    use_fused_vision_backbone: bool
    text_config: TextConfig = TextConfig()
    torch_dtype: str | None = None
    dtype: str | None = None  # the same, as transformers 5 writes it


class Normalisation(msgspec.Struct, frozen=True):
    """Of one tower's pixels, by RGB channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ProcessorConfig(msgspec.Struct, frozen=True):
    """preprocessor_config.json. The processor normalises by `tvf_normalize_params`, which it has saved rounded to
    bfloat16, and by `means` and `stds` where there are none."""

    image_resize_strategy: str
    input_sizes: tuple[tuple[int, ...], ...]
    interpolations: tuple[str, ...]
    means: tuple[tuple[float, float, float], ...]
    stds: tuple[tuple[float, float, float], ...]
    tvf_normalize_params: tuple[Normalisation, ...] = ()


def backbone_config(
    file: Path, data: object, processor_file: Path, processor_data: object, found: Mapping[str, Entry]
) -> tuple[BackboneConfig, Resize]:
    """The backbone of the tensors `found`, and how its images are brought to size.

    Raises:
        UserError: anything that rsd-trt does not compute, with the file that says so.
    """
    model = from_json(ModelConfig, data, str(file))
    processor = from_json(ProcessorConfig, processor_data, str(processor_file))
    config = BackboneConfig(
        towers=_towers(file, model, processor, found),
        language=_language(file, model.text_config, found),
        image_size=_image_size(file, model, processor),
        proprio=any(key.startswith("proprio_projector.") for key in found),
        dtype=_dtype(file, model),
    )
    return checked(config, f"{file}, as a backbone"), _resize(processor_file, processor)


def _towers(
    file: Path, model: ModelConfig, processor: ProcessorConfig, found: Mapping[str, Entry]
) -> tuple[TowerConfig, ...]:
    """Widths come from the tensors, the rest from the names of timm's models."""
    names = [name.partition(".")[0] for name in model.timm_model_ids]
    if names != list(TIMM_TOWERS) or not model.use_fused_vision_backbone:
        raise UserError(
            f"{file}: the vision towers are {first_few([named(name) for name in names])}, "
            f"not {first_few(list(TIMM_TOWERS))}"
        )
    if any(model.timm_override_act_layers):
        raise UserError(
            f"{file}: timm_override_act_layers {shown(list(model.timm_override_act_layers))} are not supported"
        )
    pixels = processor.tvf_normalize_params or tuple(map(Normalisation, processor.means, processor.stds))
    if len(pixels) != len(names):
        raise UserError(
            f"{file.parent}: preprocessor_config.json normalises for {len(pixels)} towers, not {len(names)}"
        )
    towers = []
    for name, featurizer, normalise in zip(names, FEATURIZERS, pixels, strict=True):
        prefix = f"vision_backbone.{featurizer}"
        patches = _shape(file.parent, found, f"{prefix}.patch_embed.proj.weight", 4)
        mlp = _shape(file.parent, found, f"{prefix}.blocks.0.mlp.fc1.weight", 2)
        towers.append(
            TIMM_TOWERS[name](
                width=patches[0], mlp_width=mlp[0], patch=patches[-1], mean=normalise.mean, std=normalise.std
            )
        )
    return tuple(towers)


def _language(file: Path, text: TextConfig, found: Mapping[str, Entry]) -> LanguageConfig:
    rope = text.rope_parameters or RopeParameters()
    heads = max(1, text.num_attention_heads)
    computed: dict[str, tuple[object, object]] = {  # what is there, and what is computed here
        "model_type": (text.model_type, "llama"),
        "hidden_act": (text.hidden_act, "silu"),
        "num_key_value_heads": (text.num_key_value_heads or heads, heads),
        "head_dim": (text.head_dim or text.hidden_size // heads, text.hidden_size // heads),
        "rope_scaling": (text.rope_scaling, None),
        "rope_type": (rope.rope_type, "default"),
        "attention_bias": (text.attention_bias, False),
        "mlp_bias": (text.mlp_bias, False),
    }
    if wrong := [f"{key} is {shown(there)}, not {here!r}" for key, (there, here) in computed.items() if there != here]:
        raise UserError(f"{file}: the language model is not supported: {'; '.join(wrong)}")
    rows = _shape(file.parent, found, EMBEDDING, 2)[0]
    if rows != text.vocab_size:
        raise UserError(
            f"{file}: text_config.vocab_size is {text.vocab_size}, the weights have {rows} embeddings "
            f"({found[EMBEDDING].file.name})"
        )
    return LanguageConfig(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        blocks=text.num_hidden_layers,
        heads=text.num_attention_heads,
        vocab=text.vocab_size,
        rms_eps=text.rms_norm_eps,
        rope_theta=text.rope_theta if rope.rope_theta is None else rope.rope_theta,
    )


def _image_size(file: Path, model: ModelConfig, processor: ProcessorConfig) -> int:
    sizes = set(model.image_sizes) | {size for shape in processor.input_sizes for size in shape[1:]}
    if len(sizes) != 1:
        raise UserError(
            f"{file.parent}: the towers read images of {shown(sorted(sizes))} pixels; one size is supported"
        )
    return sizes.pop()


def _resize(file: Path, processor: ProcessorConfig) -> Resize:
    if set(processor.interpolations) != {"bicubic"}:
        raise UserError(f"{file}: interpolations {shown(list(processor.interpolations))} are not supported, bicubic is")
    for strategy in RESIZES:
        if processor.image_resize_strategy == strategy:
            return strategy
    raise UserError(f"{file}: image_resize_strategy {shown(processor.image_resize_strategy)} is not supported")


def _dtype(file: Path, model: ModelConfig) -> Literal["float32", "bfloat16"]:
    name = model.torch_dtype or model.dtype or "bfloat16"
    if name == "float32":
        return "float32"
    if name == "bfloat16":
        return "bfloat16"
    raise UserError(
        f"{file}: torch_dtype {shown(name)} is not supported; bfloat16 and float32 are",
        "Save the model in bfloat16, as which OpenVLA's evaluations load it: model.bfloat16().save_pretrained(FOLDER)",
    )


def _shape(path: Path, found: Mapping[str, Entry], key: str, axes: int) -> tuple[int, ...]:
    if key not in found:
        raise UserError(
            f"{path} has no {key}: its weights are not OpenVLA's, their keys begin with {fronts(found)}", RESAVE
        )
    if len(shape := found[key].shape) != axes:
        raise UserError(f"{found[key].file}: {key} is {list(shape)}, which does not have {axes} axes")
    return shape
