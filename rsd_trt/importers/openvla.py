"""OpenVLA and OpenVLA-OFT as Hugging Face folders: their files as a configuration, without their code.

Read are config.json, the safetensors shards with their index, preprocessor_config.json, tokenizer.json, and the action
statistics from dataset_statistics.json or config.json. Everything that rsd-trt does not compute is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rsd_trt.config import ACTION_DIMS, PROPRIO_DIM, BackboneConfig, Quantiles, Resize
from rsd_trt.errors import UserError, did_you_mean, missing_extra, named, reason, shown
from rsd_trt.files import check_whole, read_bounded
from rsd_trt.importers.openvla_config import RESAVE, backbone_config
from rsd_trt.importers.original import HEADS, check_actions
from rsd_trt.records import from_json, parse
from rsd_trt.weights import Entry, contents, first_few, without_unused

MODEL_TYPE = "openvla"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STATISTICS = "dataset_statistics.json"
STATISTICS_REMEDY = f"Put {STATISTICS} of the training run beside the weights"
PROCESSOR, NESTED = "preprocessor_config.json", "processor_config.json"  # as transformers 4 and 5 write it
MERGE = "Merge them (OpenVLA-OFT: vla-scripts/merge_lora_weights_and_save.py), and pack the merged folder"
MOST_NAMES = 100  # of data sets, in a message
PROPRIO = "proprio_projector."
ADAPTERS = "lora_adapter"  # the folder in which OpenVLA-OFT's training leaves them, beside merged weights
UNSUPPORTED = {  # files beside the shards: what they say, and what can be done
    "vision_backbone--*.pt": (
        "was fine-tuned with FiLM: its vision tower lies apart",
        "Take one without FiLM",
    ),
    "noise_predictor--*.pt": ("has a diffusion head", f"Supported are {HEADS}"),
    "noisy_action_projector--*.pt": ("has a diffusion head", f"Supported are {HEADS}"),
    "adapter_config.json": ("holds LoRA adapters that are not merged into the weights", MERGE),
}
REMEDY = {  # where a file beside the shards is missing
    "action_head": "Give another head: --head. Without a head OpenVLA-OFT gives action tokens, which are not decoded",
}
SIZES = {"action": ACTION_DIMS, "proprio": PROPRIO_DIM}
FILES = (
    "*.json",
    "*.safetensors",
    "proprio_projector--*.pt",
    "action_head--*.pt",
    *UNSUPPORTED,
)  # what a hub repository is asked for
ADAPTER_KEY = re.compile(r"\.lora_|\.base_layer\.|^base_model\.")  # what peft puts into keys
SHARD = re.compile(r"model[\w.-]*\.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class OpenVLAFolder:
    """What a folder says. Nothing of its weights is read but the headers."""

    path: Path
    shards: tuple[Path, ...]
    found: Mapping[str, Entry] = field(repr=False)  # the tensors that the backbone is made of
    config: BackboneConfig  # with `proprio` as the shards have it
    resize: Resize
    statistics: Mapping[str, object] = field(repr=False)  # by data set

    def beside(self, name: Literal["proprio_projector", "action_head"]) -> Path:
        """The file beside the shards that OpenVLA-OFT keeps a module in.

        Raises:
            UserError: there is none, or more than one.
        """
        files = sorted(self.path.glob(f"{name}--*.pt"))
        needed = f"preset openvla-oft needs {name}--*_checkpoint.pt, {self.path} has"
        if not files:
            raise UserError(f"{needed} none", REMEDY.get(name))
        if len(files) > 1:
            raise UserError(f"{needed} {first_few([file.name for file in files])}: keep one")
        return files[0]

    def quantiles(self, name: str | None, kind: Literal["action", "proprio"]) -> tuple[str, Quantiles]:
        """The data set's name and its 1% and 99% quantiles. `name` may be None where there is but one data set.

        Raises:
            UserError: no such data set, several to choose from, or no quantiles.
        """
        names = sorted(self.statistics)
        if name is None:
            if len(names) != 1:
                if not names:
                    raise UserError(
                        f"{self.path} has no statistics to normalise by: no {STATISTICS}, no norm_stats in config.json",
                        STATISTICS_REMEDY,
                    )
                choice = f"statistics of {len(names)} data sets: {first_few([named(x) for x in names])}. Choose one"
                raise UserError(f"{self.path} has {choice}: --statistics NAME")
            name = names[0]
        if name not in self.statistics:
            raise UserError(
                f"{self.path} has no statistics of {shown(name)}{did_you_mean(name, map(named, names[:MOST_NAMES]))}"
            )
        values = _object(_object(self.statistics[name]).get(kind))
        if "q01" not in values or "q99" not in values:
            raise UserError(f"{self.path} has no {kind} quantiles (q01, q99) for {shown(name)}", STATISTICS_REMEDY)
        q01 = values["q01"]
        if isinstance(q01, list) and len(q01) == 2 * ACTION_DIMS:
            check_actions(f"{self.path}, statistics of {shown(name)}, {kind}", len(q01), SIZES[kind])
        mask = values.get("mask", [True] * len(q01) if isinstance(q01, list) else [])
        where = f"{self.path}, statistics of {shown(name)}, {kind}"
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
        raise UserError(
            f"{name} is no folder, is not whole in the Hugging Face cache, and cannot be fetched: {reason(error)} "
            f"Fetch it where there is a network (hf download {name}), and give its folder"
        ) from None


def read_folder(path: Path) -> OpenVLAFolder:
    """Reads a folder's JSON files and its shards' headers.

    Raises:
        UserError: another architecture, a missing or damaged file, or anything that rsd-trt does not compute.
    """
    for pattern, (told, remedy) in UNSUPPORTED.items():
        if beside := sorted(path.glob(pattern)):
            raise UserError(f"{path} {told} ({beside[0].name}), which rsd-trt does not compute", remedy)
    file = path / "config.json"
    data = _read_object(file)
    if not file.is_file():
        raise UserError(f"{file} is missing: {path} is no Hugging Face folder of OpenVLA")
    if data.get("model_type") != MODEL_TYPE:
        kind, architectures = shown(data.get("model_type")), shown(data.get("architectures"))
        raise UserError(
            f"{file} is of model_type {kind}, architectures {architectures}: only {MODEL_TYPE!r} (OpenVLA, "
            "OpenVLA-OFT) can be packed"
        )
    shards, found = _shards(path)
    if adapters := [key for key in found if ADAPTER_KEY.search(key)]:
        raise UserError(f"{path}: the weights hold LoRA adapters beside the layers ({named(adapters[0])})", MERGE)
    processor, nested = path / PROCESSOR, path / NESTED
    processor_data = _read_object(processor)
    if not processor.is_file() and (inner := _object(_read_object(nested).get("image_processor"))):
        processor, processor_data = nested, inner
    config, resize = backbone_config(file, data, processor, processor_data, found)
    # OpenVLA's own code lets the file beside the weights replace what the configuration holds.
    statistics = _read_object(path / STATISTICS) or _object(data.get("norm_stats"))
    return OpenVLAFolder(path, shards, without_unused(found, config), config, resize, statistics)


def _shards(path: Path) -> tuple[tuple[Path, ...], dict[str, Entry]]:
    """The files that hold the weights, and what is in them: what the index says, and nothing else."""
    single, index = path / SINGLE, path / INDEX
    if single.is_file() == index.is_file():
        have = "both" if single.is_file() else "neither"
        if (path / ADAPTERS).is_dir() and not single.is_file():
            raise UserError(f"{path} has LoRA adapters ({ADAPTERS}) and no merged weights", MERGE)
        raise UserError(
            f"{path} has {have} {SINGLE} {'and' if single.is_file() else 'nor'} {INDEX}: one is needed", RESAVE
        )
    if single.is_file():
        return (single,), contents([single])
    weight_map = _object(_read_object(index).get("weight_map"))
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not SHARD.fullmatch(name):
            raise UserError(f"{index} names {shown(name)}, which is no model*.safetensors of its folder")
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
        raise UserError(f"{index} and the shards disagree about {first_few([named(key) for key in wrong])}")
    return shards, found


def _read_object(file: Path) -> dict[str, object]:
    """A JSON file's top level; empty when there is no file."""
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is no regular file. Put the file itself in its place")
        check_whole(file)
        return _object(parse(read_bounded(file), str(file)), str(file))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from None


def _object(value: object, where: str = "") -> dict[str, object]:
    """`value` if it is a JSON object; empty for anything else, unless `where` says whose top level it is."""
    if isinstance(value, dict):
        return value
    if where:
        raise UserError(f"{where}: the top level is no object")
    return {}
