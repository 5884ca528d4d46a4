"""A run's results as a few files of limited size, and back.

    python -m examples.reference_policy.parts split run/ parts/
    python -m examples.reference_policy.parts join parts/ run/

Tensors of all safetensors files are dealt out over `parts.N.safetensors`; everything else goes into `parts.tar.gz`.
"""

from __future__ import annotations

import argparse
import io
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

log = logging.getLogger(__name__)

LIMIT = 15 << 20  # bytes of tensors in a part
SEPARATOR = "::"  # between a file's name and a tensor's


def split(folder: Path, out: Path, limit: int = LIMIT) -> list[Path]:
    """Writes everything below `folder` as parts into `out`. No tensor may be larger than `limit`."""
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    parts: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    with tarfile.open(out / "parts.tar.gz", "w:gz") as archive:
        for file in files:
            name = file.relative_to(folder).as_posix()
            if file.suffix != ".safetensors":
                content = file.read_bytes()
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
                continue
            for key, tensor in load_file(file).items():
                size = tensor.numel() * tensor.element_size()
                assert size <= limit, f"{name}: {key} has {size} bytes, more than the limit of {limit}"
                if used + size > limit:
                    parts.append({})
                    used = 0
                parts[-1][f"{name}{SEPARATOR}{key}"] = tensor
                used += size
    written = [out / "parts.tar.gz"]
    for i, tensors in enumerate(parts):
        if tensors:
            written.append(out / f"parts.{i}.safetensors")
            save_file(tensors, written[-1])
    for file in written:
        log.info("%s: %.1f MiB", file, file.stat().st_size / (1 << 20))
    return written


def join(parts: Path, out: Path) -> None:
    """Writes what `split` was given into `out`."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for part in sorted(parts.glob("parts.*.safetensors")):
        for key, tensor in load_file(part).items():
            name, _, tensor_name = key.partition(SEPARATOR)
            files.setdefault(name, {})[tensor_name] = tensor
    with tarfile.open(parts / "parts.tar.gz") as archive:
        archive.extractall(out, filter="data")
    for name, tensors in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / name)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.reference_policy.parts", description=__doc__)
    parser.add_argument("step", choices=("split", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.step == "split":
        split(args.source, args.out)
    else:
        join(args.source, args.out)


if __name__ == "__main__":
    main()
