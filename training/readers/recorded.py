"""Recordings of the policy itself: the main head's chunks are in them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from msgspec import structs

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError, shown
from rsd_trt.recordings import SERVER, Array, Facts, Recordings
from rsd_trt.training.sources import Frames, Listed, in_parts, stamp

log = logging.getLogger(__name__)


class RecordedSource:
    """The queries that asked the main head. The others have no label, and are left out."""

    labelled = True

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        """Raises UserError: they are neither of this bundle nor of somebody else's server, or damaged."""
        self.recordings = Recordings(folder)
        facts, theirs = Facts.of(bundle), self.recordings.facts.fingerprint
        if theirs.startswith(SERVER):
            facts = structs.replace(facts, fingerprint=theirs)
            log.warning("the draft will follow %s, not the head of %s: use it there", theirs, bundle.path)
        self.recordings.check(facts)
        if not self.recordings.episodes:
            raise UserError(f"{folder} has no whole episode yet")
        dims = bundle.config.dims
        shapes = {episode.shapes["tokens"][2:] for episode in self.recordings.episodes if "tokens" in episode.shapes}
        if shapes - {(dims.D, dims.L)}:
            raise UserError(f"{folder} has tokens [T, {dims.D}, {dims.L}] of {shown(sorted(shapes))}: another codec's")
        unknown = {x.name: bool(np.isnan(x.read("state")["state"]).any()) for x in self.recordings.episodes}
        if len(set(unknown.values())) > 1:
            some = next(name for name, lacking in unknown.items() if lacking)
            raise UserError(f"{folder}: some of the states of {some} are not known, those of other episodes are")
        self.has_state = not any(unknown.values())
        if bundle.config.backbone.proprio and not self.has_state:
            raise UserError(f"{folder} has no states of the robot, and {bundle.config.name} reads them")
        self.tokens = all("tokens" in episode.shapes for episode in self.recordings.episodes)

    @property
    def facts(self) -> dict[str, str]:
        return {"recordings": str(self.recordings.folder.resolve())}

    @property
    def size(self) -> int:
        return self.recordings.facts.size

    @property
    def episodes(self) -> Sequence[Listed]:
        return [Listed(x.name, len(x), stamp(x.path), x.facts.initial_state) for x in self.recordings.episodes]

    def read(self, index: int) -> Iterator[Frames]:
        episode = self.recordings.episodes[index]
        arrays = episode.read()
        state = arrays["state"] if self.has_state else np.zeros_like(arrays["state"])
        known: Array = np.asarray(np.isfinite(arrays["chunk"]).all((1, 2)))
        for part in in_parts(len(episode)):
            chosen = np.flatnonzero(known[part]) + part.start
            if len(chosen):
                yield Frames(
                    episode.frames(part.start, part.stop)[chosen - part.start],
                    state[chosen],
                    tuple(episode.facts.instructions[i] for i in arrays["instruction"][chosen]),
                    arrays["chunk"][chosen],
                    arrays["tokens"][chosen].astype(np.int64) if self.tokens else None,
                )
