"""What the draft is trained and measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.models.vision_draft import VisionDraft
from rsd_trt.training.augment import augment
from rsd_trt.training.batches import Batch, Batches, hold_out, other_episodes
from rsd_trt.training.sources import Listed
from rsd_trt.training.store import Store, StoredEpisode, StoreFacts

CPU = torch.device("cpu")
EPISODES, FRAMES = 40, 3


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "actions alone"])
def batches(request: pytest.FixtureRequest, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Batches:
    dims = bundle.config.dims
    tokens = (dims.D, dims.L) if request.param else None
    facts = StoreFacts({}, "", bundle.config.control.cameras, side=32, steps=dims.T, tokens=tokens)
    store, random, codec = Store(tmp_path_factory.mktemp("store"), facts), np.random.default_rng(0), bundle.codec()
    for i in range(EPISODES):
        chunk = random.uniform(-1, 1, (FRAMES, dims.T, dims.A)).astype(np.float32)
        columns = {
            "images": np.full((FRAMES, 2, 32, 32, 3), i, np.uint8),
            "state": random.uniform(-1, 1, (FRAMES, 8)).astype(np.float32),
            "word": np.zeros(FRAMES, np.int32),
            "chunk": chunk,
            "tokens": codec.encode(torch.from_numpy(chunk)).numpy(),
        }
        store.append(Listed(f"e{i}", FRAMES, ""), (f"task {int(i >= 10)}",), 0.0, columns)
    draft = bundle.draft()
    assert isinstance(draft, VisionDraft)
    words = torch.randn(2, draft.config.instruction, bundle.config.hidden)
    held_out = hold_out(store, 0.1, 2, seed=0)
    return Batches(store, held_out, codec, bundle.transform(), words, draft.normalised, CPU, seed=3)


def test_whole_episodes_of_every_task_are_held_out(batches: Batches) -> None:
    held = set(batches.episode[batches.held_out].tolist())
    assert len(batches.held_out) == FRAMES * len(held) == FRAMES * 4
    assert {episode >= 10 for episode in held} == {True, False}
    assert not held & set(batches.episode[batches.train].tolist())
    assert not np.array_equal(hold_out(batches.store, 0.1, 2, 1), hold_out(batches.store, 0.1, 2, 0))
    assert hold_out(batches.store, 0.0, 5, 0).sum() == FRAMES * 5


@pytest.mark.parametrize(("each", "copies", "expected"), [(15, 3, 15), (9, 1, 9), (20, 2, 20)])
def test_held_out_episodes_begin_where_no_other_does(each: int, copies: int, expected: int, tmp_path: Path) -> None:
    """Of 10 tasks, with several seeds or modes of an initial state; a tenth in all, though no task has ten."""
    store = Store(tmp_path, StoreFacts({}, "", ("a",), side=1, steps=1))
    for i in range(10 * each):
        task, trial = divmod(i, each)
        store.episodes.append(StoredEpisode(str(i), 1, (f"task {task}",), 0.0, initial_state=trial // copies))
    held, start = hold_out(store, 0.1, 2, seed=0), store.start_of
    assert held.sum() == expected
    assert not set(start[held]) & set(start[~held])
    assert len(set(start)) == 10 * each // copies
    others = other_episodes(start, store.episode_of // each, np.flatnonzero(held))
    assert (start[others] != start[held]).all()


def test_a_step_draws_the_same_whenever_it_is_made(batches: Batches) -> None:
    def drawn(first: int, count: int) -> list[Tensor]:
        coming = batches.batches(first, 8)
        return [next(coming).images for _ in range(count)]

    whole = drawn(0, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], drawn(2, 2), strict=True))
    assert not torch.equal(whole[0], whole[1])


def test_training_never_sees_what_is_held_out_and_sees_tasks_as_often(batches: Batches) -> None:
    drawn = batches.episode[np.concatenate([batches._drawn(step, 64) for step in range(20)])]
    assert not set(drawn) & set(batches.episode[batches.held_out])
    assert 0.4 < (drawn < 10).mean() < 0.6  # a quarter of the episodes are of task 0


def test_latents_are_the_main_heads(batches: Batches, bundle: Bundle) -> None:
    codec, index = bundle.codec(), batches.held_out
    chunk = batches.chunk(index)
    z = codec.encoder(chunk)
    expected = codec.rfsq.lookup(codec.encode(chunk)) if "tokens" in batches.store.columns else z
    assert torch.allclose(batches.plain(index).z, expected, atol=1e-6)


def test_blind_frames_are_of_other_episodes_of_the_task(batches: Batches) -> None:
    index = batches.held_out
    others = other_episodes(batches.start, batches.instruction, index)
    assert (batches.episode[others] != batches.episode[index]).all()
    assert set(others) <= set(index)
    task = batches.instruction
    alone = [
        frame for frame in index if (task[index] == task[frame]).sum() == FRAMES
    ]  # no other of the task is held out
    assert all(task[other] == task[frame] for frame, other in zip(index, others, strict=True) if frame not in alone)
    seen = batches.plain(index, others)
    assert torch.equal(seen.images[:, 0, 0, 0, 0], torch.from_numpy(batches.episode[others]).float())
    assert torch.equal(seen.state, batches.plain(index).state)


def test_augmented_images_are_near_the_originals() -> None:
    random = np.random.default_rng(0)
    smooth = np.cumsum(random.integers(-2, 3, (4, 2, 32, 32, 3)), axis=2) + 128
    images = torch.from_numpy(smooth.clip(0, 255).astype(np.uint8))
    changed = augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert changed.min() >= 0 and changed.max() <= 255
    assert 0 < (changed - images).abs().mean() < 60
    assert torch.equal(changed, augment(images, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("own", [True, False], ids=["the head's tokens", "the codec's"])
def test_likelihoods_are_those_of_the_rule(own: bool, bundle: Bundle) -> None:
    """A head's own tokens are the rule's, though another level of L0 is nearer to what all layers decode to."""
    from rsd_trt.runtime.speculate import log_likelihood
    from rsd_trt.training.measure import _likelihood

    dims, codec = bundle.config.dims, bundle.codec()
    z = torch.rand(3, dims.T, dims.D) * 2 - 1
    logits = torch.randn(3, dims.C, dims.T * dims.D, dims.K)
    tokens = torch.randint(dims.K, (3, dims.T, dims.D, dims.L)) if own else codec.rfsq.quantise(z)[1]
    batch = Batch(z, z, z, codec.rfsq.lookup(tokens) if own else z, tokens if own else None)
    found = _likelihood(logits, batch, codec.rfsq.table(), ahead=2)
    by_step = logits[:, 0].view(3, dims.T, dims.D, dims.K).numpy()
    expected = [log_likelihood(by_step[i, :2], tokens[i, :2, :, 0].numpy()) for i in range(3)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
