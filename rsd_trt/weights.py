"""Weights in safetensors files: what they hold, whether they are what they were, and onto a device."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rsd_trt.config import FEATURIZERS, OWN_FOLDER, BackboneConfig, WeightFile, WeightsFolder
from rsd_trt.errors import UserError, reason
from rsd_trt.errors import named as printable
from rsd_trt.files import check_whole, own

if TYPE_CHECKING:
    from typing import TypeVar

    import torch
    from safetensors import safe_open
    from torch import Tensor, nn

    ModuleT = TypeVar("ModuleT", bound=nn.Module)

log = logging.getLogger(__name__)

LISTED_KEYS = 10  # of each kind, in the error about a file that does not fit
BLOCK = 1 << 20  # bytes that are hashed at once
SAMPLES = 64  # pieces of a file that every load looks at
SAMPLE_BYTES = 4096
LENGTH_BYTES = 8  # at the start of a safetensors file: how long its header is
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, I64


def contents(files: Collection[Path]) -> dict[str, Entry]:
    """The tensors that some safetensors files hold together, by key. Reads the headers only.

    Raises:
        UserError: a file is damaged or truncated, or two hold the same key.
    """
    found: dict[str, Entry] = {}
    for file in files:
        with open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                if key in found:
                    raise UserError(f"{key} is in both {found[key].file} and {file}: one of them is of another model")
                part = tensors.get_slice(key)
                found[key] = Entry(file, tuple(part.get_shape()), part.get_dtype())
    return found


def without_unused(found: Mapping[str, Entry], config: BackboneConfig) -> dict[str, Entry]:
    """Without what a checkpoint of OpenVLA holds and rsd-trt does not compute: the words' output layer, and of the
    towers all that comes after the features: the last block, the final norm and SigLIP's attention pooling."""
    unused = [r"language_model\.lm_head\.weight", r"vision_backbone\.fused_featurizer\.attn_pool\..+"]
    for name, tower in zip(FEATURIZERS, config.towers, strict=True):
        unused.append(rf"vision_backbone\.{name}\.(blocks\.{tower.blocks}\..+|norm\.(weight|bias))")
    pattern = re.compile("|".join(unused))
    return {key: entry for key, entry in found.items() if not pattern.fullmatch(key)}


@contextlib.contextmanager
def open_tensors(file: Path, device: torch.device | str = "cpu") -> Iterator[safe_open]:
    """A safetensors file, mapped into memory; its tensors are made on `device`."""
    from safetensors import SafetensorError, safe_open

    check_whole(file)
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {reason(error)}") from None


def check_keys(module: nn.Module, found: Mapping[str, Entry], where: Path) -> None:
    """Compares the tensors of `where`, a file or a folder of files, with what the module expects.

    Raises:
        UserError: missing, unexpected and mis-shaped keys, at most ten of each, with their files.
    """
    wanted = module.state_dict()
    expected = {key: tuple(value.shape) for key, value in wanted.items()}

    def named(key: str) -> str:
        text = printable(key)
        return text if found[key].file == where else f"{text} ({found[key].file.name})"

    shapes = [
        f"{named(key)} is {list(found[key].shape)}, not {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key].shape != shape
    ]
    kinds = [
        f"{named(key)} is {found[key].dtype}"
        for key in expected
        if key in found and ("F" in found[key].dtype) != wanted[key].is_floating_point()
    ]
    problems = [
        f"{kind}: {first_few(keys)}"
        for kind, keys in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unexpected", [named(key) for key in sorted(found.keys() - expected.keys())]),
            ("of another shape", shapes),
            ("of another kind of number", kinds),
        )
        if keys
    ]
    if problems:
        raise UserError(f"{where} does not fit the configuration; {'; '.join(problems)}")


def first_few(names: list[str]) -> str:
    """`a, b, c`; of more than ten, the first ten and how many more there are."""
    more = len(names) - LISTED_KEYS
    return ", ".join(names[:LISTED_KEYS]) + (f" and {more} more" if more > 0 else "")


def fronts(keys: Iterable[str]) -> str:
    """What keys have in front of their first dot, for a message about a file that holds something else."""
    return first_few(sorted({printable(key.partition(".")[0]) for key in keys})) or "nothing"


def fill(
    module: ModuleT, found: Mapping[str, Entry], where: Path, dtype: torch.dtype, device: torch.device | str
) -> ModuleT:
    """Gives a module that was built on the meta device its weights, for inference, and logs how long that took.

    Files are mapped into memory, and each tensor goes straight to `device` in `dtype` before the next one is read: the
    host holds no second copy. On the CPU, weights that are in `dtype` already stay in the mapped file, which must not
    change then.

    Raises:
        UserError: keys that do not fit, a damaged file, or a device with too little memory.
    """
    import torch

    check_keys(module, found, where)
    target, started = torch.device(device), time.perf_counter()
    needed = sum(value.numel() for value in module.state_dict().values()) * dtype.itemsize
    if (free := free_memory(target)) is not None and free < needed:
        raise _too_large(where, needed, target, free)
    state: dict[str, Tensor] = {}
    try:
        for file, entries in itertools.groupby(sorted(found, key=lambda key: found[key].file), lambda k: found[k].file):
            with open_tensors(file, target) as tensors:
                for key in entries:
                    value = tensors.get_tensor(key)
                    state[key] = value.to(dtype) if value.is_floating_point() else value
    except torch.OutOfMemoryError:
        raise _too_large(where, needed, target, free_memory(target) or 0) from None
    module.load_state_dict(state, assign=True)
    on_meta = [n for n, t in itertools.chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
    if on_meta:
        raise RuntimeError(f"{type(module).__name__} has tensors that no file holds: {on_meta}")
    if target.type == "cuda":
        torch.cuda.synchronize(target)
    seconds = time.perf_counter() - started
    rate = needed / 1e9 / seconds
    log.info("%s: %.2f GB onto %s in %.2f s (%.1f GB/s)", where, needed / 1e9, target, seconds, rate)
    return module.requires_grad_(False).eval()


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a GPU, those that PyTorch holds in reserve included. None: a CPU."""
    import torch

    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _too_large(where: Path, needed: int, device: torch.device, free: int) -> UserError:
    return UserError(
        f"{where} needs {needed / 1e9:.2f} GB on {device}, {free / 1e9:.2f} GB are free. "
        f"End what else uses the GPU, or take --device cpu"
    )


def sha256(file: Path) -> str:
    """The file's sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sample_sha256(file: Path) -> str:
    """sha256 of a safetensors file's size, its header, and `SAMPLES` pieces spread evenly over its tensors.

    Takes milliseconds where hashing gigabytes takes many seconds. Another checkpoint of the same shapes differs in it,
    since training changes nearly every number; a few numbers that were changed on purpose may not show.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        head = stream.read(LENGTH_BYTES)
        header = stream.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
        digest.update(head + header)
        start = len(head) + len(header)
        for i in range(SAMPLES):
            stream.seek(start + (size - start) * i // SAMPLES)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def describe_file(file: Path) -> WeightFile:
    """What a bundle records about a file of weights. Reads all of it."""
    return WeightFile(file.name, file.stat().st_size, sample_sha256(file), sha256(file))


def check_folder(weights: WeightsFolder, folder: Path, whole: bool = False) -> tuple[Path, ...]:
    """The files of a packed folder, if they are what they were.

    Names, sizes, headers and samples are compared; with `whole`, every byte. Links are followed, since the Hugging Face
    cache consists of them, but not in the bundle itself.

    Raises:
        UserError: a file is missing or has changed.
    """
    remedy = "Restore it, or pack the bundle again: rsd-trt pack"
    for record in weights.files:
        file = folder / record.name
        if weights.folder == OWN_FOLDER:
            own(file)
        if not file.is_file():
            raise UserError(f"{file} is missing: the bundle refers to it", remedy)
        if (size := file.stat().st_size) != record.bytes:
            raise UserError(f"{file} has {size} bytes, the bundle was packed with {record.bytes}", remedy)
        checks: list[tuple[str, Callable[[Path], str], str]] = [("samples", sample_sha256, record.sample_sha256)]
        checks += [("content", sha256, record.sha256)] if whole else []
        for what, digest, expected in checks:
            if (actual := digest(file)) != expected:
                raise UserError(
                    f"{file} has changed: sha256 of its {what} is {actual[:8]}, the bundle was packed with "
                    f"{expected[:8]}",
                    remedy,
                )
    return tuple(folder / record.name for record in weights.files)
