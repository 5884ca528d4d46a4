"""What `rsd-trt info` shows: what a bundle is made of, as plain values for programs and as tables for people."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rsd_trt.bundle import Bundle
from rsd_trt.config import PARTS, protocol_name
from rsd_trt.eval.table import Column, Table, Value
from rsd_trt.manifest import folder_of, freshness, read_manifest
from rsd_trt.records import to_json

Json = dict[str, object]


@dataclass(frozen=True)
class File:
    """A file of weights."""

    path: str
    bytes: int
    sha256: str


def describe(bundle: Bundle, engines: Path, whole: bool = False) -> Json:
    """Parts with parameters, ports and fingerprints; dimensions; conventions. Reads every file, writes none.

    Backbone weights in another folder are compared by size, header and samples, and byte by byte if `whole`.

    Raises:
        UserError: a part that does not fit the configuration or has changed since it was packed, or no tokenizer.
    """
    config = bundle.config
    bundle.tokenizer()  # raises, if it cannot be read
    return {
        "path": str(bundle.path),
        "name": config.name,
        "trained": config.trained,
        "sha256": bundle.fingerprint,
        "parts": {part: _part(bundle, part, whole) for part in PARTS},
        "tokenizer_sha256": bundle.fingerprints.get("tokenizer.json"),
        "round_trip_mse": bundle.codec().round_trip_error() if bundle.has("codec") else None,
        "exports": _exports(bundle, engines),
        "protocol": protocol_name(config.control),
        "config": to_json(config),
    }


def _part(bundle: Bundle, part: str, whole: bool) -> Json | None:
    """None when the bundle has no such part."""
    if not bundle.has(part):
        return None
    module = bundle.outline(part, whole)
    signature = getattr(module, "signature", None)
    ports = {
        side: [signature.describe(port) for port in getattr(signature, side)] if signature else []
        for side in ("inputs", "outputs")
    }
    files = _files(bundle, part)
    lines = "".join(f"{Path(file.path).name} {file.sha256}\n" for file in files)
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "bytes": sum(file.bytes for file in files),
        "sha256": files[0].sha256 if len(files) == 1 else hashlib.sha256(lines.encode()).hexdigest(),
        "folder": str(bundle.weights_folder) if part == "backbone" and bundle.weights_folder else None,
        "files": [dataclasses.asdict(file) for file in files],
        **ports,
    }


def _files(bundle: Bundle, part: str) -> list[File]:
    """The files that hold a part's weights; for those of another folder, what was recorded when it was packed."""
    own, digest = bundle.file(part), bundle.digest(bundle.file(part).name)
    files = [File(str(own), own.stat().st_size, digest)] if digest else []
    if part == "backbone" and (weights := bundle.config.backbone_weights) and (folder := bundle.weights_folder):
        files += [File(str(folder / file.name), file.bytes, file.sha256) for file in weights.files]
    return files


def _exports(bundle: Bundle, engines: Path) -> list[Json]:
    """Every artefact of the bundle's engine folder, and whether it may still be used."""
    folder = folder_of(bundle, engines)
    found: list[Json] = []
    for artefact in read_manifest(folder, bundle).artefacts:
        fresh, reason = freshness(artefact, folder, bundle)
        size = sum(file.bytes for file in artefact.files)
        row: Json = {"artefact": artefact.name, "bytes": size, "fresh": fresh, "reason": reason}
        found.append(row)
    return found


def bundle_table(description: Json) -> Table:
    """A row for each part."""
    state = "trained" if description["trained"] else "UNTRAINED: its actions mean nothing"
    columns = Column("part"), Column("parameters"), Column("size", "MB"), Column("sha256"), Column("inputs -> outputs")
    rows: list[tuple[Value, ...]] = []
    for name, part in cast(Mapping[str, "Json | None"], description["parts"]).items():
        if part is None:
            rows.append((name, None, None, "absent", ""))
            continue
        inputs, outputs = cast(Sequence[str], part["inputs"]), cast(Sequence[str], part["outputs"])
        ports = f"{', '.join(inputs)} -> {', '.join(outputs)}" if inputs else ""
        ports = f"weights in {part['folder']}" if part["folder"] else ports
        size, parameters = cast(int, part["bytes"]) / 1e6, cast(int, part["parameters"])
        rows.append((name, parameters, size, str(part["sha256"])[:12], ports))
    return Table(f"{description['path']}  ({state})", columns, tuple(rows))


def conventions_table(description: Json) -> Table:
    """Every convention of the bundle's `dims`, `rsd` and `control` sections, a line each."""
    config = cast(Mapping[str, Json], description["config"])
    told = {f"{section}.{key}": repr(x) for section in ("dims", "rsd", "control") for key, x in config[section].items()}
    attention, head = config["backbone"]["attention"], config["head"]["kind"]
    told = {"backbone.attention": repr(attention), "head.kind": repr(head), **told}
    told = {"protocol": str(description["protocol"]), **told, "codec.scale": str(config["codec"]["scale"])}
    told["codec round-trip MSE"] = str(description["round_trip_mse"])
    return Table("", (Column("convention"), Column("value")), tuple(told.items()), headless=True)


def exports_table(description: Json) -> Table:
    """What has been exported, and whether it may still be used."""
    found = cast(Sequence[Json], description["exports"])
    rows = ((str(row["artefact"]), cast(int, row["bytes"]) / 1e6, str(row["reason"])) for row in found)
    columns = Column("artefact"), Column("size", "MB"), Column("state", "verdict")
    return Table("exports", columns, tuple(rows))
