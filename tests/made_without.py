"""A bundle that some parts were never put into."""

from __future__ import annotations

import json
from pathlib import Path


def made_without(folder: Path, *parts: str) -> Path:
    """The bundle in `folder`, as if it had been made without those parts."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["parts"] = [part for part in config["parts"] if part not in parts]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for part in parts:
        (folder / f"{part}.safetensors").unlink()
    return folder
