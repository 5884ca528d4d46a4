"""OpenVLA and OpenVLA-OFT as Hugging Face folders: their files as a configuration, without their code.

Read are config.json, the safetensors shards with their index, preprocessor_config.json, tokenizer.json, and the action
statistics from dataset_statistics.json or config.json. Everything that rsd-trt does not compute is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from rsd_trt.config import BackboneConfig, ControlConfig, LanguageConfig, Quantiles, TowerConfig
from rsd_trt.errors import UserError, did_you_mean, missing_extra
from rsd_trt.jsonio import from_json
from rsd_trt.presets import TIMM_TOWERS
from rsd_trt.weights import Entry, contents, listed

MODEL_TYPE = "openvla"
FEATURIZERS = ("featurizer", "fused_featurizer")
EMBEDDING = "language_model.model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STATISTICS = "dataset_statistics.json"
PROPRIO = "proprio_projector."
FILES = ("*.json", "*.safetensors", "proprio_projector--*.pt")  # what a hub repository is asked for
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class RopeParameters:
    """What transformers 5 writes instead of `rope_theta` and `rope_scaling`."""

    rope_type: str = "default"
    rope_theta: float | None = None


@dataclass(frozen=True)
class TextConfig:
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


@dataclass(frozen=True)
class ModelConfig:
    """config.json."""

    timm_model_ids: tuple[str, ...]
    timm_override_act_layers: tuple[str | None, ...]
    image_sizes: tuple[int, ...]
    use_fused_vision_backbone: bool
    text_config: TextConfig = TextConfig()
    torch_dtype: str | None = None
    dtype: str | None = None  # the same, as transformers 5 writes it


@dataclass(frozen=True)
class Normalisation:
    """Of one tower's pixels, by RGB channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class ProcessorConfig:
    """preprocessor_config.json. The processor normalises by `tvf_normalize_params`, which it has saved rounded to
    bfloat16, and by `means` and `stds` where there are none."""

    image_resize_strategy: str
    input_sizes: tuple[tuple[int, ...], ...]
    interpolations: tuple[str, ...]
    means: tuple[tuple[float, float, float], ...]
    stds: tuple[tuple[float, float, float], ...]
    tvf_normalize_params: tuple[Normalisation, ...] = ()


@dataclass(frozen=True)
class OpenVLAFolder:
    """What a folder says. Nothing of its weights is read but the headers."""

    path: Path
    shards: tuple[Path, ...]
    found: Mapping[str, Entry] = field(repr=False)  # the tensors that the backbone is made of
    config: BackboneConfig  # with `proprio` as the shards have it
    resize: Literal["resize-naive", "letterbox"]
    statistics: Mapping[str, object] = field(repr=False)  # by data set

    def proprio_projector(self) -> Path:
        """The file beside the shards that OpenVLA-OFT keeps the projector of proprioception in.

        Raises:
            UserError: there is none, or more than one.
        """
        files = sorted(self.path.glob("proprio_projector--*.pt"))
        if len(files) != 1:
            have = f"has {listed([file.name for file in files])}: keep one" if files else "has none"
            raise UserError(f"preset openvla-oft needs proprio_projector--*_checkpoint.pt, {self.path} {have}")
        return files[0]

    def quantiles(self, name: str | None, kind: Literal["action", "proprio"]) -> tuple[str, Quantiles]:
        """The data set's name and its 1% and 99% quantiles. `name` may be None where there is but one data set.

        Raises:
            UserError: no such data set, several to choose from, or no quantiles.
        """
        names = sorted(self.statistics)
        if name is None:
            if len(names) != 1:
                choice = f"statistics of {len(names)} data sets: {', '.join(names)}. Choose one" if names else "none"
                raise UserError(f"{self.path} has {choice}: --statistics NAME")
            name = names[0]
        if name not in self.statistics:
            raise UserError(f"{self.path} has no statistics of {name!r}{did_you_mean(name, names)}")
        values = _object(_object(self.statistics[name]).get(kind))
        if "q01" not in values or "q99" not in values:
            raise UserError(f"{self.path} has no {kind} quantiles (q01 and q99) for {name!r}")
        q01 = values["q01"]
        mask = values.get("mask", [True] * len(q01) if isinstance(q01, list) else [])
        where = f"{self.path}, statistics of {name!r}, {kind}"
        return name, from_json(Quantiles, {"q01": q01, "q99": values["q99"], "mask": mask}, where)


def find_folder(name: str) -> Path:
    """A folder, or the local copy of a Hugging Face repository, which is fetched if it is not in the cache.

    Raises:
        UserError: neither a folder nor a repository that is in the cache or can be reached.
    """
    if Path(name).is_dir():
        return Path(name).absolute()
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{name} is no folder")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise missing_extra("huggingface_hub", "hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the library's errors have no common base, and differ between its versions
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is no folder, is not whole in the Hugging Face cache, and cannot be fetched: {reason} "
            f"Fetch it where there is a network (hf download {name}), and give its folder"
        ) from None


def read_folder(path: Path) -> OpenVLAFolder:
    """Reads a folder's JSON files and its shards' headers.

    Raises:
        UserError: another architecture, a missing or damaged file, or anything that rsd-trt does not compute.
    """
    file = path / "config.json"
    data = _read_object(file)
    if not file.is_file():
        raise UserError(f"{file} is missing: {path} is no Hugging Face folder of OpenVLA")
    if data.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{file} is of model_type {data.get('model_type')!r}, architectures {data.get('architectures')}: "
            f"only {MODEL_TYPE!r} (OpenVLA, OpenVLA-OFT) can be packed"
        )
    model = _read(ModelConfig, data, str(file))
    processor_file = path / "preprocessor_config.json"
    processor = _read(ProcessorConfig, _read_object(processor_file), str(processor_file))
    shards, found = _shards(path)
    config = BackboneConfig(
        towers=_towers(file, model, processor, found),
        language=_language(file, model.text_config, found),
        image_size=_image_size(file, model, processor),
        proprio=any(key.startswith(PROPRIO) for key in found),
        dtype=_dtype(file, model),
    )
    # OpenVLA's own code lets the file beside the weights replace what the configuration holds.
    statistics = _read_object(path / STATISTICS) or _object(data.get("norm_stats"))
    return OpenVLAFolder(
        path,
        shards,
        without_unused(found, config),
        config,
        _resize(processor_file, processor),
        statistics,
    )


def without_unused(found: Mapping[str, Entry], config: BackboneConfig) -> dict[str, Entry]:
    """Without what a checkpoint of OpenVLA holds and rsd-trt does not compute: the words' output layer, and of the
    towers all that comes after the features: the last block, the final norm and SigLIP's attention pooling."""
    unused = [r"language_model\.lm_head\.weight", r"vision_backbone\.fused_featurizer\.attn_pool\..+"]
    for name, tower in zip(FEATURIZERS, config.towers, strict=True):
        unused.append(rf"vision_backbone\.{name}\.(blocks\.{tower.blocks}\..+|norm\.(weight|bias))")
    pattern = re.compile("|".join(unused))
    return {key: entry for key, entry in found.items() if not pattern.fullmatch(key)}


def _towers(
    file: Path, model: ModelConfig, processor: ProcessorConfig, found: Mapping[str, Entry]
) -> tuple[TowerConfig, ...]:
    """Widths come from the tensors, the rest from the names of timm's models."""
    names = [name.partition(".")[0] for name in model.timm_model_ids]
    if names != list(TIMM_TOWERS) or not model.use_fused_vision_backbone:
        raise UserError(f"{file}: the vision towers are {listed(names)}, not {listed(list(TIMM_TOWERS))}")
    if any(model.timm_override_act_layers):
        raise UserError(f"{file}: timm_override_act_layers {list(model.timm_override_act_layers)} are not supported")
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
    if wrong := [f"{key} is {there!r}, not {here!r}" for key, (there, here) in computed.items() if there != here]:
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
        raise UserError(f"{file.parent}: the towers read images of {sorted(sizes)} pixels; one size is supported")
    return sizes.pop()


def _resize(file: Path, processor: ProcessorConfig) -> Literal["resize-naive", "letterbox"]:
    if set(processor.interpolations) != {"bicubic"}:
        raise UserError(f"{file}: interpolations {list(processor.interpolations)} are not supported, bicubic is")
    for strategy in typing.get_args(typing.get_type_hints(ControlConfig)["resize"]):
        if processor.image_resize_strategy == strategy:
            return strategy
    raise UserError(f"{file}: image_resize_strategy {processor.image_resize_strategy!r} is not supported")


def _dtype(file: Path, model: ModelConfig) -> Literal["float32", "bfloat16"]:
    name = model.torch_dtype or model.dtype or "bfloat16"
    if name == "float32":
        return "float32"
    if name == "bfloat16":
        return "bfloat16"
    raise UserError(f"{file}: torch_dtype {name!r} is not supported; bfloat16 and float32 are")


def _shards(path: Path) -> tuple[tuple[Path, ...], dict[str, Entry]]:
    """The files that hold the weights, and what is in them: what the index says, and nothing else."""
    single, index = path / SINGLE, path / INDEX
    if single.is_file() == index.is_file():
        have = "both" if single.is_file() else "neither"
        raise UserError(f"{path} has {have} {SINGLE} {'and' if single.is_file() else 'nor'} {INDEX}: one is needed")
    if single.is_file():
        return (single,), contents([single])
    weight_map = _object(_read_object(index).get("weight_map"))
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{index} names a file outside its folder: {name!r}")
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing: {path} is incomplete")
    shards = tuple(path / name for name in names)
    found = contents(shards)
    wrong = sorted(
        key
        for key in weight_map.keys() | found.keys()
        if key not in found or weight_map.get(key) != found[key].file.name
    )
    if wrong:
        raise UserError(f"{index} and the shards disagree about {listed(wrong)}")
    return shards, found


def _shape(path: Path, found: Mapping[str, Entry], key: str, axes: int) -> tuple[int, ...]:
    if key not in found:
        raise UserError(f"{path} has no {key}: its weights are not OpenVLA's")
    if len(shape := found[key].shape) != axes:
        raise UserError(f"{found[key].file}: {key} is {list(shape)}, which does not have {axes} axes")
    return shape


def _read_object(file: Path) -> dict[str, object]:
    """A JSON file's top level; empty when there is no file."""
    try:
        return _object(json.loads(file.read_text("utf-8")), str(file))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _object(value: object, where: str = "") -> dict[str, object]:
    """`value` if it is a JSON object; empty for anything else, unless `where` says whose top level it is."""
    if isinstance(value, dict):
        return value
    if where:
        raise UserError(f"{where}: the top level is no object")
    return {}


def _read(cls: type[ConfigT], data: Mapping[str, object], where: str) -> ConfigT:
    """`cls` from JSON values that have other keys too."""
    return from_json(cls, _known(cls, data), where)


def _known(kind: object, value: object) -> object:
    """`value` without the keys that dataclasses of `kind` do not have."""
    arguments = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return {name: _known(hint, value[name]) for name, hint in typing.get_type_hints(kind).items() if name in value}
    if arguments and isinstance(value, list):
        return [_known(arguments[0], entry) for entry in value]
    return _known(arguments[0], value) if arguments and isinstance(value, Mapping) else value
