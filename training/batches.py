"""Batches for the draft: drawn from a store, on the training device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsd_trt.config import ARM_DIMS
from rsd_trt.models.codec import Codec
from rsd_trt.models.components import ActionTransform
from rsd_trt.training.augment import augment, augment_state
from rsd_trt.training.sources import in_parts
from rsd_trt.training.store import Store

SWITCH_WEIGHT = 2.0  # how much oftener frames before a gripper switch are drawn
RESIDENT_SHARE = 0.4  # of the device's free memory that the images may take; else they come from the disk
AHEAD = 4  # batches that are read ahead
READERS = 4  # threads
STEP_SEEDS = 1_000_003  # between the seeds of two trainings


@dataclass(frozen=True)
class Batch:
    """What the draft reads, and what it should say, for B frames."""

    images: Tensor  # [B, cameras, S, S, 3] in 0..255
    state: Tensor  # [B, 8], normalised
    words: Tensor  # [B, P, E]
    z: Tensor  # [B, T, D], what the main head's chunk is in the codec's latents
    tokens: Tensor | None = None  # [B, T, D, L], its own, where the head gives any


class Batches:
    """Frames of a store, by index.

    What a step draws, and how it is changed, depends on the seed and on the step alone: a resumed training sees what an
    uninterrupted one does. Images stay on the device where there is room; else threads read them ahead.

    train, held_out: the frames' indices. z is what the tokens decode to, or where the head gives none the codec's
    encoding of the chunk.
    """

    def __init__(
        self,
        store: Store,
        held_out: NDArray[np.bool_],
        codec: Codec,
        transform: ActionTransform,
        words: Tensor,
        normalise: Callable[[Tensor], Tensor],
        device: torch.device,
        seed: int,
        teacher: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """held_out [F]: whose episodes are. words [instructions, P, E]. normalise: the state, as the draft reads it.
        teacher: makes z of augmented images, their states and instructions; None: z is that of the frame as it was."""
        self.store, self.device, self.seed, self.words = store, device, seed, words
        self._codec, self._transform, self._normalised = codec, transform, normalise
        self._teacher = teacher
        self.held_out, self.train = np.flatnonzero(held_out), np.flatnonzero(~held_out)
        self.episode, self.start, self.instruction = store.episode_of, store.start_of, store.instruction_of
        maps = store.maps
        gripper = maps["chunk"][:, :, ARM_DIMS][self.train]
        self._weights = torch.from_numpy(draw_weights(self.instruction[self.train], gripper))
        room = torch.cuda.mem_get_info(device)[0] * RESIDENT_SHARE if device.type == "cuda" else 0
        self.resident = maps["images"].nbytes < room
        self._images: Tensor | None = None
        if self.resident:
            self._images = torch.empty(maps["images"].shape, dtype=torch.uint8, device=device)
            for part in in_parts(len(store)):  # the host may not have the room
                self._images[part] = torch.from_numpy(np.array(maps["images"][part]))

    def batches(self, first: int, count: int) -> Iterator[Batch]:
        """Batches of `count` augmented frames for the steps from `first` on, without end."""
        with ThreadPoolExecutor(READERS) as pool:
            coming: deque[Future[dict[str, Tensor]]] = deque()
            step = first
            while True:
                while len(coming) < AHEAD:
                    coming.append(pool.submit(lambda at: self._read(self._drawn(at, count)), step + len(coming)))
                yield self._augmented(step, self._there(coming.popleft().result()))
                step += 1

    def plain(self, index: NDArray[np.int64], images_of: NDArray[np.int64] | None = None) -> Batch:
        """The frames `index` [B] as they are; images_of: with the images of these ones instead."""
        batch = self._there(self._read(index))
        if images_of is not None:
            batch["images"] = self._there(self._read(images_of))["images"]
        return self._made(batch, batch["images"].float(), self._normalised(batch["state"]))

    def chunk(self, index: NDArray[np.int64]) -> Tensor:
        """The main head's chunks [B, T, A] of the frames `index`, in environment units."""
        return torch.from_numpy(self.store.maps["chunk"][index]).to(self.device)

    def _drawn(self, step: int, count: int) -> NDArray[np.int64]:
        generator = torch.Generator().manual_seed(self.seed * STEP_SEEDS + step)
        drawn = torch.multinomial(self._weights, count, replacement=True, generator=generator)
        return self.train[drawn.numpy()]

    def _read(self, index: NDArray[np.int64]) -> dict[str, Tensor]:
        """The frames' columns on the host, page-locked where they go to a GPU."""
        found = {"index": torch.from_numpy(index), "word": torch.from_numpy(self.instruction[index])}
        for key, values in self.store.maps.items():
            if key == "word" or (key == "images" and self._images is not None):
                continue
            found[key] = torch.from_numpy(np.take(values, index, axis=0))
        if self.device.type == "cuda":
            found = {key: value.pin_memory() for key, value in found.items()}
        return found

    def _there(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same on the device."""
        found = {key: value.to(self.device, non_blocking=True) for key, value in columns.items()}
        if self._images is not None:
            found["images"] = self._images[found["index"]]
        return found

    def _augmented(self, step: int, columns: dict[str, Tensor]) -> Batch:
        generator = torch.Generator(self.device).manual_seed(self.seed * STEP_SEEDS + step)
        images = augment(columns["images"], generator)
        state = augment_state(self._normalised(columns["state"]), generator)
        if self._teacher is None:
            return self._made(columns, images, state)
        return Batch(images, state, self.words[columns["word"]], self._teacher(images, state, columns["word"]))

    @torch.no_grad()
    def _made(self, columns: dict[str, Tensor], images: Tensor, state: Tensor) -> Batch:
        tokens = columns["tokens"].long() if "tokens" in columns else None
        if tokens is not None:
            z = self._codec.rfsq.lookup(tokens)
        else:
            z = self._codec.encoder(self._transform.inverse(columns["chunk"]))
        return Batch(images, state, self.words[columns["word"]], z, tokens)


def draw_weights(task: NDArray[np.int64], gripper: NDArray[np.float32]) -> NDArray[np.float64]:
    """How often each of F frames is drawn: every task as often, and oftener where the gripper is about to switch. task
    [F]; gripper [F, T], its commands in the frames' chunks."""
    closed = gripper > 0
    switches = (closed != closed[:, :1]).any(1)
    return np.where(switches, SWITCH_WEIGHT, 1.0) / np.bincount(task)[task]


def hold_out(store: Store, share: float, least: int, seed: int) -> NDArray[np.bool_]:
    """Which frames [F] are of held-out episodes: of all that began in a share of the initial states, or in `least` of
    them, by chance. Each task gives its share, rounded down; any task what is left. An episode whose initial state is
    not known has one of its own."""
    start_of = store.start_of
    by_task: dict[str, list[int]] = {}
    starts = np.random.default_rng(seed).permutation(np.unique(start_of)).tolist()
    for start in starts:
        by_task.setdefault(store.episodes[start].instructions[0], []).append(start)
    chosen = [start for group in by_task.values() for start in group[: int(len(group) * share)]]
    rest = [start for start in starts if start not in set(chosen)]
    chosen += rest[: max(0, max(least, int(len(starts) * share)) - len(chosen))]
    return np.isin(start_of, chosen)


def other_episodes(
    begun: NDArray[np.int64], task: NDArray[np.int64], index: NDArray[np.int64], seed: int = 0
) -> NDArray[np.int64]:
    """For each of the frames `index` [F] one among them whose episode began otherwise, of the same task where there is
    one.

    begun: what their episodes began in, and task: of all frames.
    """
    random = np.random.default_rng(seed)
    pools: dict[int, NDArray[np.int64]] = {
        int(t): random.permutation(index[task[index] == t]) for t in np.unique(task[index])
    }
    everything = random.permutation(index)
    chosen = np.empty_like(index)
    for i, frame in enumerate(index):
        for pool in (pools[int(task[frame])], everything):
            start = int(random.integers(len(pool)))
            strange = np.flatnonzero(begun[pool] != begun[frame])
            if len(strange):
                chosen[i] = pool[strange[start % len(strange)]]
                break
        else:
            chosen[i] = frame
    return chosen
