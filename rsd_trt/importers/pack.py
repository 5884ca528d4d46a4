"""Other people's files as a bundle: a backbone from a Hugging Face folder, and draft, head and codec from `.pt` files.

Everything is checked before anything is written, and a bundle appears whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from rsd_trt.bundle import (
    bundle_name,
    outline,
    write_config,
    write_part,
)
from rsd_trt.config import (
    OWN_FOLDER,
    PROPRIO_DIM,
    BundleConfig,
    CodecConfig,
    ControlConfig,
    Dims,
    DraftConfig,
    Gripper,
    HeadConfig,
    HiddenDraftConfig,
    Preset,
    Rotation,
    RsdConfig,
    VisionDraftConfig,
    WeightFile,
    WeightsFolder,
)
from rsd_trt.errors import UserError, shown
from rsd_trt.files import check_disk, new_folder
from rsd_trt.importers.openvla import PROPRIO, OpenVLAFolder, find_folder, read_folder
from rsd_trt.importers.original import (
    Checkpoint,
    Part,
    check_actions,
    check_finite,
    codec_config,
    draft_config,
    fit,
    head_config,
    hidden_width,
    read_checkpoint,
)
from rsd_trt.presets import attention, conventions
from rsd_trt.prompts import BOS, TOKENIZER, encode, read_tokenizer
from rsd_trt.weights import check_keys, describe_file, open_tensors

INSTRUCTION = "{instruction}"


@dataclass(frozen=True)
class PackRequest:
    """What `rsd-trt pack` is told."""

    backbone: str  # a folder, or a Hugging Face repository
    preset: Preset
    out: Path
    draft: Path | None = None
    head: Path | None = None
    codec: Path | None = None
    statistics: str | None = None  # the data set that actions and proprioception are normalised by
    codec_scale: Literal["plain", "layernorm"] | None = None  # None: what the file says
    chunk: int = Dims().T  # steps
    copy: bool = False
    # Conventions that are others than the preset's; None: as the preset has them.
    prompt: str | None = None  # "openvla", "instruction" (bare), or any text with {instruction}
    cameras: tuple[str, ...] | None = None
    rotate_images: bool | None = None
    rotation: Rotation | None = None
    gripper: Gripper | None = None


@dataclass(frozen=True)
class Packed:
    """What `pack` made."""

    bundle: str
    preset: str
    statistics: str | None
    parts: tuple[str, ...]
    backbone: str  # where its weights are
    bytes: int  # of the backbone's weights
    not_read: tuple[str, ...]  # `.pt` files in the backbone's folder, and sets of weights in others, that are left out


def pack(request: PackRequest, on_file: Callable[[Path], None] = lambda _: None) -> Packed:
    """Makes a bundle at `request.out`. `on_file` is called before each shard, all of which is read.

    Raises:
        UserError: a file that is missing, damaged or of another kind; parts that do not fit each other; statistics that
            are to be chosen; or `request.out` exists.
    """
    with new_folder(request.out) as folder:
        source = read_folder(find_folder(request.backbone))
        head = request.head
        if head is None and request.preset == "openvla-oft":
            head = source.beside("action_head")
        files: dict[Part, Path | None] = {"draft": request.draft, "head": head, "codec": request.codec}
        parts = {part: read_checkpoint(file, part) for part, file in files.items() if file}
        config = configuration(request, source, parts)
        projector = None
        found = dict(source.found)
        if config.backbone.proprio and not source.config.proprio:
            projector = read_checkpoint(source.beside("proprio_projector"), "proprio_projector")
            check_actions(f"{projector.file}, fc1.weight,", projector.size("fc1.weight", 1), PROPRIO_DIM)
            found |= {PROPRIO + key: entry for key, entry in projector.entries.items()}
        check_keys(outline(config, "backbone"), found, source.path)
        for part, checkpoint in parts.items():
            check_keys(outline(config, part), checkpoint.entries, checkpoint.file)
        _check_tokenizer(source, config)
        if request.copy:
            check_disk(request.out, sum(shard.stat().st_size for shard in source.shards))
        weights = []
        for shard in source.shards:
            on_file(shard)
            weights.append(_check_shard(shard, source))
            if request.copy:
                shutil.copyfile(shard, folder / shard.name)
        where = OWN_FOLDER if request.copy else str(source.path)
        shutil.copyfile(source.path / TOKENIZER, folder / TOKENIZER)
        for part, checkpoint in parts.items():
            write_part(folder, part, {key: value.float().clone() for key, value in checkpoint.state.items()})
        if projector:
            write_part(folder, "backbone", {PROPRIO + key: value for key, value in projector.state.items()})
        write_config(folder, replace(config, backbone_weights=WeightsFolder(where, tuple(weights))))
    used = [checkpoint for checkpoint in (projector, *parts.values()) if checkpoint]
    return Packed(
        str(request.out),
        request.preset,
        config.control.statistics,
        ("backbone", *parts),
        str(request.out) if request.copy else str(source.path),
        sum(file.bytes for file in weights),
        (
            *(file.name for file in sorted(source.path.glob("*.pt")) if file not in {x.file for x in used}),
            *(f"{checkpoint.file.name}: {key}" for checkpoint in used for key in checkpoint.unread),
        ),
    )


def configuration(request: PackRequest, source: OpenVLAFolder, parts: Mapping[Part, Checkpoint]) -> BundleConfig:
    """The packed bundle's configuration, but for the files of its backbone.

    Raises:
        UserError: parts that do not fit each other, or statistics that are missing or to be chosen.
    """
    hidden = source.config.language.hidden
    for reader in (parts[part] for part in parts if part != "codec"):
        if (width := hidden_width(reader)) != hidden:
            raise UserError(
                f"{reader.file} reads a hidden state of {width} numbers, the backbone of {source.path} gives {hidden}"
            )
    dims = fit(parts, request.chunk)
    head = head_config(parts["head"]) if "head" in parts else HeadConfig()
    if not head.gives_tokens and request.preset != "openvla-oft":
        raise UserError(
            f"{parts['head'].file} is OpenVLA-OFT's head; preset {request.preset} has a causal mask, and the head "
            "was trained without one",
            "Use: --preset openvla-oft",
        )
    draft: DraftConfig = HiddenDraftConfig() if head.gives_tokens else VisionDraftConfig()
    usual = min(RsdConfig().n_action_steps, dims.T)
    return BundleConfig(
        name=bundle_name(request.out) or request.preset,
        trained=True,
        backbone=replace(
            source.config,
            proprio=request.preset == "openvla-oft",
            attention=attention(request.preset),
            action_tokens=0 if head.gives_tokens else dims.T * dims.A,
        ),
        rsd=RsdConfig(n_action_steps=usual if head.gives_tokens else dims.T),  # OpenVLA-OFT executes whole chunks
        dims=dims,
        draft=draft_config(parts["draft"]) if "draft" in parts else draft,
        head=head,
        codec=codec_config(parts["codec"], request.codec_scale) if "codec" in parts else CodecConfig(),
        control=_control(request, source),
    )


def _control(request: PackRequest, source: OpenVLAFolder) -> ControlConfig:
    """The preset's conventions with the data set's statistics."""
    control = replace(conventions(request.preset), resize=source.resize, **_chosen(request))
    if request.preset == "rvq":
        if request.statistics is not None:
            raise UserError("preset rvq takes actions as the environment does: leave out --statistics")
        return control
    name, actions = source.quantiles(request.statistics, "action")
    proprio = source.quantiles(name, "proprio")[1] if request.preset == "openvla-oft" else None
    return replace(control, statistics=name, action_quantiles=actions, proprio_quantiles=proprio)


def _chosen(request: PackRequest) -> dict[str, object]:
    """The conventions that the request names, as `ControlConfig`'s fields.

    Raises:
        UserError: a prompt without a place for the instruction.
    """
    names = ("cameras", "rotate_images", "rotation", "gripper")
    chosen = {name: value for name in names if (value := getattr(request, name)) is not None}
    if request.prompt is None:
        return chosen
    usual = ControlConfig()
    prompt = {"openvla": usual.prompt, "instruction": INSTRUCTION}.get(request.prompt, request.prompt)
    if INSTRUCTION not in prompt:
        raise UserError(f"--prompt {shown(prompt)} lacks {INSTRUCTION}", "Use: openvla, instruction, or such a text")
    return {**chosen, "prompt": prompt, "lowercase": prompt == usual.prompt}


def _check_tokenizer(source: OpenVLAFolder, config: BundleConfig) -> None:
    """Raises UserError unless the tokenizer begins with BOS and the backbone has an embedding for every token."""
    file, vocab = source.path / TOKENIZER, config.backbone.language.vocab
    tokenizer = read_tokenizer(source.path)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab:
        raise UserError(f"{file} has the token {largest}, the backbone has embeddings of 0 to {vocab - 1} only")
    if (suffix := config.control.suffix_token) is not None and suffix >= vocab:
        raise UserError(
            f"the preset's prompt ends with token {suffix}, the backbone has embeddings of 0 to {vocab - 1}"
        )
    if encode(tokenizer, "a")[0] != tokenizer.token_to_id(BOS):
        raise UserError(f"{file} does not put {BOS} in front of the prompt, as OpenVLA's does")


def _check_shard(shard: Path, source: OpenVLAFolder) -> WeightFile:
    """What the bundle records about a shard, of which every number that is used has to be finite."""
    with open_tensors(shard) as tensors:
        for key in (key for key, entry in source.found.items() if entry.file == shard):
            check_finite(shard, key, tensors.get_tensor(key))
    return describe_file(shard)
