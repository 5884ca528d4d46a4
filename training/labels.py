"""What the main model says of frames that come without its chunks: run once, in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from msgspec import structs

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision
from rsd_trt.errors import UserError
from rsd_trt.models.vision_draft import Resize
from rsd_trt.recordings import MOST_TOKEN
from rsd_trt.runtime.backends import Launcher, default_backbone, open_forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.speculate import Actions, Tokens
from rsd_trt.training.sources import Frames, Source
from rsd_trt.training.store import Array, Store


class Labeller:
    """The main model of a bundle on frames of another size than its cameras'.

    They are rotated, cropped and resized by the bundle's conventions from the size that they have. A conditioned head
    is fed zeros.
    """

    def __init__(
        self,
        bundle: Bundle,
        size: int,
        device: torch.device,
        batch: int,
        backbone: BackboneKind | None = None,
        precision: BackbonePrecision = "bundle",
    ) -> None:
        """size: R, pixels a side.

        Raises:
            UserError: the bundle lacks a part, or the backbone cannot run like that here.
        """
        config = bundle.config
        control = structs.replace(config.control, camera_size=size)
        seen = replace(bundle, config=structs.replace(config, control=control))
        kind = backbone or default_backbone("graph", device)
        self._forward = open_forward(Launcher(seen, "torch", device), "dynamic", kind, precision, checks=False)
        self._batch = batch

    def __call__(self, frames: Frames) -> Frames:
        """The frames with the main head's chunks, NaN where they are not finite, and, where it gives any, tokens."""
        chunks: list[Actions] = []
        tokens: list[Tokens | None] = []
        for observations in self._batches(frames):
            main = self._forward.full(observations)
            chunks.append(np.where(main.finite[:, None, None], main.actions, np.nan).astype(np.float32))
            tokens.append(None if main.tokens is None else main.tokens.copy())
        given = [some for some in tokens if some is not None]
        return replace(frames, chunk=np.concatenate(chunks), tokens=np.concatenate(given) if given else None)

    def _batches(self, frames: Frames) -> Iterator[list[Observation]]:
        for first in range(0, len(frames.state), self._batch):
            part = slice(first, first + self._batch)
            parts = zip(frames.images[part], frames.state[part], frames.instructions[part], strict=True)
            yield [Observation(images, state, instruction) for images, state, instruction in parts]


def fill(
    store: Store,
    source: Source,
    labeller: Labeller | None,
    resize: Resize,
    levels: int,
    on_frames: Callable[[int, int], None],
) -> None:
    """Puts the source's episodes that the store lacks into it: with the main head's chunks, and with the frames as the
    draft's transformer sees them. on_frames: is told how many frames are done, and how many there are at the most.

    Raises:
        UserError: frames are not what the bundle takes, or cannot be labelled or written.
    """
    episodes = source.episodes
    missing = store.missing(episodes)
    total = sum(episode.frames for episode in episodes)
    done = total - sum(episodes[i].frames for i in missing)
    on_frames(done, total)
    for i in missing:
        listed = episodes[i]
        parts: dict[str, list[Array]] = {key: [np.zeros((0, *x.shape), x.dtype)] for key, x in store.columns.items()}
        words: dict[str, int] = {}
        seconds = 0.0
        for part in source.read(i):
            if labeller is not None:
                started = time.perf_counter()
                part = labeller(part)
                seconds += time.perf_counter() - started
            assert part.chunk is not None
            _check_finite(listed.name, sum(map(len, parts["state"])), part)
            parts["images"].append(_seen(resize, part))
            parts["state"].append(part.state)
            parts["chunk"].append(part.chunk)
            parts["word"].append(np.array([words.setdefault(x, len(words)) for x in part.instructions], np.int32))
            if "tokens" in parts:
                assert part.tokens is not None
                if part.tokens.min() < 0 or part.tokens.max() >= min(levels, MOST_TOKEN + 1):
                    most = f"the codec {levels} levels, of which {MOST_TOKEN + 1} can be kept"
                    raise UserError(f"{listed.name} has the token {part.tokens.max()}, and {most}")
                parts["tokens"].append(part.tokens.astype(np.uint8))
        store.append(listed, tuple(words), seconds, {key: np.concatenate(values) for key, values in parts.items()})
        done += listed.frames
        on_frames(done, total)


def _check_finite(episode: str, first: int, part: Frames) -> None:
    """Raises UserError for a state or a chunk that is not finite. first: the number in the episode of the part's first
    frame."""
    for what, values in {"the state": part.state, "the main head's chunk": part.chunk}.items():
        finite = np.isfinite(np.asarray(values)).reshape(len(part.state), -1).all(1)
        if not finite.all():
            place = first + int(np.argmin(finite))
            raise UserError(f"{episode}: {what} of frame {place} is not finite: a draft cannot learn from it")


@torch.inference_mode()
def _seen(resize: Resize, frames: Frames) -> Array:
    """The images, rotated, cropped and resized: uint8 [F, cameras, S, S, 3]."""
    images = torch.from_numpy(np.ascontiguousarray(frames.images)).to(resize.matrix.device)
    return resize(images).round().to(torch.uint8).cpu().numpy()
