"""What a bundle is made of, as plain values for people and programs."""

from __future__ import annotations

from pathlib import Path

from rsd_trt.bundle import PARTS, Bundle
from rsd_trt.config import protocol_name
from rsd_trt.jsonio import to_json
from rsd_trt.manifest import folder_of, freshness, read_manifest

Json = dict[str, object]


def describe(bundle: Bundle, engines: Path) -> Json:
    """Parts with parameters, ports and fingerprints; dimensions; conventions. Reads every file, writes none.

    Raises:
        UserError: a part that does not fit the configuration.
    """
    config = bundle.config
    return {
        "path": str(bundle.path),
        "name": config.name,
        "trained": config.trained,
        "sha256": bundle.fingerprint,
        "parts": {part: _part(bundle, part) for part in PARTS},
        "tokenizer_sha256": bundle.fingerprints.get("tokenizer.json"),
        "round_trip_mse": bundle.codec().round_trip_error() if bundle.file("codec").is_file() else None,
        "exports": _exports(bundle, engines),
        "protocol": protocol_name(config.control),
        "config": to_json(config),
    }


def _part(bundle: Bundle, part: str) -> Json | None:
    """None when the bundle has no such part."""
    file = bundle.file(part)
    if not file.is_file():
        return None
    module = getattr(bundle, part)()
    signature = getattr(module, "signature", None)
    ports = {
        side: [signature.describe(port) for port in getattr(signature, side)] if signature else []
        for side in ("inputs", "outputs")
    }
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "bytes": file.stat().st_size,
        "sha256": bundle.fingerprints[file.name],
        **ports,
    }


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
