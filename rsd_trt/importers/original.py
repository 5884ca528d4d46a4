"""The original RSD experiment's `.pt` files, drafts, heads and codecs, and OpenVLA-OFT's heads and projectors, with
dimensions read from their shapes."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rsd_trt.config import ACTION_DIMS, PROPRIO_DIM, CodecConfig, Dims, HeadConfig, HiddenDraftConfig
from rsd_trt.errors import UserError, named, reason, shown
from rsd_trt.files import check_whole
from rsd_trt.importers.archive import checked_archive
from rsd_trt.weights import Entry, first_few, fronts

# The keys under which a checkpoint may hold its state dict.
WRAPPINGS = ("model_state_dict", "model", "state_dict", "module")
# What training on several GPUs and torch.compile put into keys, wherever the wrapped module stands.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
COUNTER = "n_averaged"  # of the models that AveragedModel averaged, beside their average
ALONE = "Save the weights alone: torch.save(model.state_dict(), FILE)"
HEADS = "OpenVLA-OFT's L1 regression head, and the RFSQ heads of the original RSD experiment"
USES_LAYERNORM = "use_layernorm"  # of the codec, in whatever was saved with it

Part = Literal["draft", "head", "codec", "proprio_projector"]
MARKS: dict[Part, str] = {  # a key that only this part has
    "draft": r"input_projection\.weight",
    "head": r"feature_proj\.0\.weight|classification_heads\.0\.6\.weight|model\.layer_norm1\.weight",
    "codec": r"encoder\.0\.weight",
    "proprio_projector": r"fc2\.weight",
}


@dataclass(frozen=True)
class Checkpoint:
    """A state dict, the file that it is from, and the configuration that was saved with it."""

    file: Path
    part: Part
    state: Mapping[str, Tensor]
    layernorm: tuple[object, ...] = ()  # the values of `use_layernorm` that were saved with it
    unread: tuple[str, ...] = ()  # other sets of weights in the file, such as a moving average

    @property
    def entries(self) -> dict[str, Entry]:
        """The shapes, as those of a safetensors file."""
        return {
            key: Entry(self.file, tuple(value.shape), "F32" if value.is_floating_point() else "I64")
            for key, value in self.state.items()
        }

    def size(self, key: str, axis: int) -> int:
        """The length of a tensor's axis.

        Raises:
            UserError: there is no such tensor or axis.
        """
        value = self.state.get(key)
        if value is None:
            raise UserError(f"{self.file} is no {self.part}: it has no {key}")
        if axis >= value.ndim:
            raise UserError(f"{self.file}: {key} is {list(value.shape)}, which has no axis {axis}")
        return value.shape[axis]

    def count(self, pattern: str) -> int:
        """How many numbers the group of `pattern` takes among the keys: 8 for layer_heads.0 to layer_heads.7."""
        return len({match[1] for key in self.state if (match := re.match(pattern, key))})


def read_checkpoint(file: Path, part: Part) -> Checkpoint:
    """Reads a file of tensors and plain values; runs no code from it.

    Raises:
        UserError: it cannot be read, holds no state dict, is another part, or has numbers that are not finite.
    """
    if not file.exists():
        raise UserError(f"{file} is missing")
    if not file.is_file():
        raise UserError(f"{file} is no regular file")
    check_whole(file)
    size = file.stat().st_size
    try:
        with checked_archive(file) as checked:
            # Mapped: a storage is a piece of it, so that none can be larger than that, or take memory of its own.
            data = torch.load(checked, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        found = f" ({named(culprit[1])})" if culprit else ""
        raise UserError(
            f"{file} is damaged or holds more than ordinary tensors and plain values{found}, and loading that could "
            "run code",
            ALONE,
        ) from None
    except Exception as error:  # a damaged file makes torch and its unpickler raise nearly anything
        raise UserError(
            f"{file} cannot be read as a checkpoint of PyTorch 1.6 or later: {reason(error)}", ALONE
        ) from None
    top = data if isinstance(data, Mapping) else {}
    under = next((key for key in WRAPPINGS if isinstance(top.get(key), Mapping)), None)
    wrapped = {key: value for key, value in (top if under is None else top[under]).items() if key != COUNTER}
    names = _unwrapped([str(key) for key in wrapped])
    state = {name: value for name, value in zip(names, wrapped.values(), strict=True) if isinstance(value, Tensor)}
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{file} holds {named(twice)} with and without a wrapper's prefix")
    if not state or len(state) != len(wrapped):
        has = f"; it holds {first_few([named(key) for key in top])}" if top else ""
        raise UserError(f"{file} holds no state dict, neither bare nor under {' or '.join(WRAPPINGS)}{has}", ALONE)
    beside = {key: value for key, value in top.items() if key != under} if under is not None else {}
    unread = tuple(named(key) for key, value in beside.items() if _holds_tensors(value))
    if any(key.startswith("noise_predictor.") for key in state):
        raise UserError(f"{file} is OpenVLA-OFT's diffusion head, which is not supported", f"Supported are {HEADS}")
    kind = next((kind for kind, mark in MARKS.items() if any(re.fullmatch(mark, key) for key in state)), None)
    if kind != part:
        if kind:
            raise UserError(f"{file} is a {kind}, not a {part}")
        raise UserError(f"{file} is of an unknown kind, not a {part}: its keys begin with {fronts(state)}", ALONE)
    shown = sum(value.nbytes for value in state.values())
    if shown > size:  # a view that repeats its storage shows any shape, and takes its memory when it is copied
        raise UserError(f"{file} has {size} bytes, its tensors would take {shown}. Save them as clones: they overlap")
    for key, value in state.items():
        check_finite(file, key, value.float() if value.dtype == torch.float64 else value)  # as it will be saved
    layernorm = tuple(inside for key, inside in _inside(beside) if key == USES_LAYERNORM)
    return Checkpoint(file, part, state, layernorm, unread)


def _unwrapped(keys: Sequence[str]) -> list[str]:
    """The keys without what wrappers put into them, nor what all have in front of one that marks a part: the name that
    a trainer has for the model, as in `net.feature_proj.0.weight`."""
    plain = [".".join(name for name in key.split(".") if name not in WRAPPERS) for key in keys]
    marks = "|".join(MARKS.values())
    if plain and not any(re.fullmatch(marks, key) for key in plain):
        fronts = {match[1] for key in plain if (match := re.fullmatch(rf"(.+\.)(?:{marks})", key))}
        first, last = min(plain), max(plain)  # what both begin with, all between them do
        front = min((x for x in fronts if first.startswith(x) and last.startswith(x)), key=len, default="")
        plain = [key.removeprefix(front) for key in plain]
    return plain


def _inside(value: object) -> Iterator[tuple[object, object]]:
    """Key and value of all that lies in plain containers, at any depth, even in one another."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        items = enumerate(value) if isinstance(value, (list, tuple)) else ()
        for key, inside in value.items() if isinstance(value, Mapping) else items:
            yield key, inside
            waiting.append(inside)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Tensor) or any(isinstance(inside, Tensor) for _, inside in _inside(value))


def check_finite(file: Path, key: str, value: Tensor) -> None:
    """Raises UserError if a tensor holds NaN or infinity."""
    if value.is_floating_point() and not (finite := torch.isfinite(value)).all():
        bad = value.numel() - int(finite.sum())
        raise UserError(f"{file}: {named(key)} has {bad} of {value.numel()} numbers that are NaN or infinite")


def draft_config(draft: Checkpoint) -> HiddenDraftConfig:
    """RFSQDraftModelWithProjection's sizes."""
    return HiddenDraftConfig(
        width=draft.size("input_projection.weight", 0),
        mlp_width=draft.size("decoder.decoder_layer.linear1.weight", 0),
        positions=draft.size("decoder.position_encoding", 1),
    )


def head_config(head: Checkpoint) -> HeadConfig:
    """Which of the heads it is (RFSQHead, ConditionedRFSQHead, RFSQClassificationHead, OpenVLA-OFT's
    L1RegressionActionHead), and its sizes.

    Raises:
        UserError: actions of other robots.
    """
    if "model.layer_norm1.weight" in head.state:
        check_actions(f"{head.file}, model.fc2.weight,", head.size("model.fc2.weight", 0), ACTION_DIMS)
        blocks = head.count(r"model\.mlp_resnet_blocks\.(\d+)\.")
        return HeadConfig(kind="oft-l1", width=head.size("model.fc1.weight", 0), blocks=blocks)
    if "classification_heads.0.0.weight" in head.state:
        return HeadConfig(kind="classification", width=head.size("classification_heads.0.0.weight", 0))
    feature = head.size("feature_proj.0.weight", 0)
    width = head.size("layer_heads.0.0.weight", 0)
    if "token_embedding.weight" not in head.state:
        return HeadConfig(kind="rfsq", feature=feature, width=width)
    embedding = head.size("token_embedding.weight", 1)
    return HeadConfig(kind="conditioned", feature=feature, width=width, embedding=embedding)


def check_actions(where: str, found: int, wanted: int) -> None:
    """Raises UserError for another robot's number of action or state dimensions."""
    if found != wanted:
        robot = " (ALOHA's two arms)" if found == 2 * ACTION_DIMS else ""
        raise UserError(
            f"{where} has {found} dimensions{robot}; {wanted} are supported: {ACTION_DIMS} of an action, six of one "
            f"arm's end effector and a gripper, and {PROPRIO_DIM} of a state"
        )


def codec_config(codec: Checkpoint, scale: Literal["plain", "layernorm"] | None) -> CodecConfig:
    """ActionRFSQAE's width, and its scale: what `use_layernorm` says, wherever it was saved beside the weights.

    Raises:
        UserError: neither the file nor `scale` says which, or they differ.
    """
    found: Literal["plain", "layernorm"] | None = scale
    for saved in codec.layernorm:
        if not isinstance(saved, (bool, int)) or saved not in (0, 1):
            raise UserError(f"{codec.file} was saved with use_layernorm {shown(saved)}: true or false is read")
        told: Literal["plain", "layernorm"] = "layernorm" if saved else "plain"
        if found not in (None, told):
            other = f"--codec-scale {scale} does not fit" if scale else "and with the opposite elsewhere in it"
            raise UserError(f"{codec.file} was saved with use_layernorm {bool(saved)}: {other}")
        found = told
    if found is None:
        raise UserError(
            f"{codec.file} does not say whether it normalises residuals (use_layernorm). "
            f"Say it: --codec-scale layernorm or --codec-scale plain"
        )
    return CodecConfig(width=codec.size("encoder.0.weight", 0), scale=found)


def hidden_width(checkpoint: Checkpoint) -> int:
    """How many numbers of a hidden state a draft or a head reads."""
    if "model.layer_norm1.weight" in checkpoint.state:  # a step's hidden states, side by side
        return checkpoint.size("model.layer_norm1.weight", 0) // ACTION_DIMS
    first = ("input_projection.weight", "feature_proj.0.weight", "classification_heads.0.0.weight")
    return checkpoint.size(next((key for key in first if key in checkpoint.state), first[0]), 1)


def fit(parts: Mapping[Part, Checkpoint], steps: int) -> Dims:
    """The dimensions that draft, head and codec share. What no file says is as usual; no file says the number of steps.

    Raises:
        UserError: two files that do not fit each other, or a chunk of another length.
    """
    usual = Dims()
    draft, head, codec = parts.get("draft"), parts.get("head"), parts.get("codec")
    if head and "model.layer_norm1.weight" in head.state:
        head = None  # of actions: it fits any codec, and any number of steps
    conditioned = head if head and "token_embedding.weight" in head.state else None
    latent = codec.size("encoder.2.weight", 0) if codec else usual.D
    layers = _same(
        "RFSQ layers",
        [(codec, lambda c: c.count(r"rfsq\.layers\.(\d+)\.")), (head, lambda h: h.count(r"\w+_heads\.(\d+)\."))],
        usual.L,
    )
    levels = _same(
        "levels",
        [
            (codec, lambda c: c.size("rfsq.layers.0.boundaries", 0)),
            (conditioned, lambda h: h.size("token_embedding.weight", 0)),
        ],
        usual.K,
    )
    for classifier in (draft, head):
        if classifier and (logits := _logits(classifier)) != steps * latent * levels:
            others, rest = divmod(logits, max(1, latent * levels))
            told = "" if rest else f"For chunks of {others} steps: --chunk {others}"
            told = told if codec else "Give the codec, too (--codec): it holds latent dimensions and levels"
            raise UserError(
                f"{classifier.file} gives {logits} logits a layer; {steps} steps of {latent} latent dimensions with "
                f"{levels} levels are {steps * latent * levels}",
                told or None,
            )
    drafted = draft.count(r"classification_heads\.(\d+)\.") if draft else None
    read = _condition(conditioned, steps * latent) if conditioned else None
    if draft and conditioned and drafted != read:
        raise UserError(f"{conditioned.file} is conditioned on {read} layers, {draft.file} gives {drafted}")
    coarse = drafted or read or min(usual.C, layers)
    actions = codec.size("encoder.0.weight", 1) if codec else usual.A
    return Dims(T=steps, A=actions, D=latent, L=layers, C=coarse, K=levels)


def _logits(checkpoint: Checkpoint) -> int:
    """What the last matrix of the first classifier gives."""
    weights = (key for key in checkpoint.state if re.fullmatch(r"\w+_heads\.0\.\d\.weight", key))
    return checkpoint.size(max(weights, default="classification_heads.0.3.weight"), 0)


def _condition(head: Checkpoint, tokens: int) -> int:
    """How many layers of `tokens` tokens a conditioned head reads."""
    inputs, width = head.size("token_proj.0.weight", 1), tokens * head.size("token_embedding.weight", 1)
    if width == 0 or inputs % width:
        raise UserError(f"{head.file}: token_proj reads {inputs} numbers, which are no multiple of a layer's {width}")
    return inputs // width


def _same(what: str, sources: list[tuple[Checkpoint | None, Callable[[Checkpoint], int]]], usual: int) -> int:
    """The number that all files have; `usual` if there is no file."""
    found = [(source.file, read(source)) for source, read in sources if source]
    for file, number in found[1:]:
        if number != found[0][1]:
            raise UserError(f"{found[0][0]} has {found[0][1]} {what}, {file} has {number}: they do not fit together")
    return found[0][1] if found else usual
