"""What a distillation is worth and what it takes.

    python -m examples.reference_policy.studies.distilling agreement --work new.distill/ --bundle A --bundle B
    python -m examples.reference_policy.studies.distilling rates --bundle bundles/7b --device cuda --out rates.json

`agreement` measures the drafts of several bundles on the same held-out episodes, those of a distillation's folder.
`rates` labels random frames, and trains the draft on a random store: frames/s and memory, at the bundle's shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from rsd_trt.bundle import Bundle
from rsd_trt.config import DEFAULT_BUNDLE, VisionDraftConfig
from rsd_trt.eval.profile.costs import release
from rsd_trt.eval.profile.inputs import InputSize, make_inputs
from rsd_trt.files import write_atomically
from rsd_trt.host import GpuMeter, hardware
from rsd_trt.models.vision_draft import VisionDraft, instruction_rows
from rsd_trt.records import read_record
from rsd_trt.runtime.backends import check_device
from rsd_trt.training.batches import Batches, hold_out
from rsd_trt.training.distill import FRAMES, HELD_OUT_SHARE, LEAST_HELD_OUT, instruction_words
from rsd_trt.training.fit import fit
from rsd_trt.training.labels import Labeller
from rsd_trt.training.loop import LoopSettings
from rsd_trt.training.measure import measure
from rsd_trt.training.sources import Frames, Listed
from rsd_trt.training.store import FACTS, Store, StoreFacts

log = logging.getLogger(__name__)

ROUNDS = 6  # of a batch, of which the first two are not timed
STORED_EPISODES, STORED_FRAMES = 8, 256  # of the random store
OFT_PROMPT = 28 + 57  # tokens: OpenVLA-OFT's placeholders for actions and the stop token behind a typical prompt


def agreement(work: Path, bundles: Sequence[Path], device: torch.device) -> dict[str, object]:
    """By bundle: agreement, blind agreement and the rest, on the held-out episodes of a distillation's folder."""
    store = Store(work / FRAMES, read_record(StoreFacts, work / FRAMES / FACTS))
    held_out = hold_out(store, HELD_OUT_SHARE, LEAST_HELD_OUT, seed=0)
    found: dict[str, object] = {}
    for path in bundles:
        bundle = Bundle.open(path)
        draft, codec, transform = bundle.draft(device), bundle.codec(device), bundle.transform(device)
        assert isinstance(draft, VisionDraft) and draft.config.side == store.facts.side, f"{path}: another draft"
        words = instruction_words(bundle, store.instructions, draft.config.instruction).to(device)
        batches = Batches(store, held_out, codec, transform, words, draft.normalised, device, seed=0)
        ahead = bundle.config.rsd.check_steps or bundle.config.rsd.n_action_steps
        found[str(path)] = asdict(measure(draft.eval(), codec, transform, batches, ahead))
    return found


def label_rates(
    bundle: Bundle, device: torch.device, kind: str, batches: Sequence[int], size: InputSize
) -> Iterator[dict[str, object]]:
    """Frames/s that the main model labels, by batch, and the memory that it takes."""
    given = make_inputs(bundle, size)
    seen = given.observations[0]
    for batch in batches:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        labeller = Labeller(given.bundle, given.bundle.config.control.camera_size, device, batch, kind)  # type: ignore[arg-type]
        frames = Frames(np.stack([seen.images] * batch), np.stack([seen.proprio] * batch), (seen.instruction,) * batch)
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            labeller(frames)
            seconds.append(time.perf_counter() - started)
        row: dict[str, object] = {"backbone": kind, "batch": batch, "images": given.images}
        row |= {"prompt_tokens": given.prompt_tokens, "frames_per_s": round(batch / float(np.median(seconds[2:])), 1)}
        row |= {"gpu_gb": round(torch.cuda.max_memory_reserved(device) / 1e9, 2) if device.type == "cuda" else None}
        row |= {"host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)}
        log.info("%s", row)
        yield row
        del labeller
        gc.collect()
        release(device, kind)  # type: ignore[arg-type]


def train_rate(bundle: Bundle, device: torch.device, batch: int, steps: int) -> dict[str, object]:
    """Frames/s of the draft's training, from a random store."""
    config, random = bundle.config, np.random.default_rng(0)
    assert isinstance(config.draft, VisionDraftConfig)
    dims, side, cameras = config.dims, config.draft.side, len(config.control.cameras)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / FRAMES, StoreFacts({}, "", config.control.cameras, side, dims.T))
        for episode in range(STORED_EPISODES):
            shape = (STORED_FRAMES, cameras, side, side, 3)
            columns = {
                "images": random.integers(0, 256, shape, dtype=np.uint8),
                "state": random.uniform(-1, 1, (STORED_FRAMES, 8)),
                "word": np.zeros(STORED_FRAMES),
                "chunk": random.uniform(-1, 1, (STORED_FRAMES, dims.T, dims.A)),
            }
            store.append(Listed(f"e{episode}", STORED_FRAMES, ""), ("x",), 0.0, columns)
        draft = VisionDraft(config.draft, dims, config.control, config.hidden).to(device)
        words = instruction_rows(torch.randn(20, config.hidden), config.draft.instruction)[None].to(device)
        held_out, codec, transform = hold_out(store, 0.1, 2, 0), bundle.codec(device), bundle.transform(device)
        rates: dict[str, object] = {"batch": batch, "parameters": sum(p.numel() for p in draft.parameters())}
        for place, resident in (("GPU", True), ("disk", False)):
            batches = Batches(store, held_out, codec, transform, words, draft.normalised, device, seed=0)
            if not resident:
                batches._images = None  # as where the frames do not fit onto the device
            limits = LoopSettings(steps=steps, log_every=3.0, save_every=1e9)
            run = Path(folder) / place
            run.mkdir()
            with GpuMeter(device) as gpu:
                fitted = fit(draft, codec, transform, batches, run, limits, batch, 1e9, 64, 1, lambda *_: None)
            rates[f"frames_per_s_from_{place}"] = fitted.samples_per_second
            rates[f"gpu_busy_from_{place}"] = gpu.mean
    log.info("%s", rates)
    return rates


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.reference_policy.studies.distilling", description=__doc__)
    parser.add_argument("step", choices=("agreement", "rates"))
    parser.add_argument("--work", type=Path, help="the folder of a distillation")
    parser.add_argument("--bundle", type=Path, action="append", help="(default: the shipped one)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backbone", default="compiled", choices=("eager", "graph", "compiled"))
    parser.add_argument(
        "--batches", default="8,16,32,64", help="frames that are labelled at once (default %(default)s)"
    )
    parser.add_argument("--train-batch", type=int, default=1024)
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, bundles = check_device(args.device), args.bundle or [DEFAULT_BUNDLE]
    found: dict[str, object] = {"hardware": hardware(str(device))}
    if args.step == "agreement":
        found["drafts"] = agreement(args.work, bundles, device)
    else:
        bundle = Bundle.open(bundles[0])
        batches = tuple(map(int, args.batches.split(",")))
        found["training"] = train_rate(bundle, device, args.train_batch, args.train_steps)
        oft = InputSize(images=2, prompt_tokens=OFT_PROMPT)
        sizes = {"one image": InputSize(images=1), "OpenVLA-OFT's lengths": oft}
        found["labels"] = {
            name: list(label_rates(bundle, device, args.backbone, batches, x)) for name, x in sizes.items()
        }
    text = json.dumps(found, indent=1)
    log.info("%s", text)
    if args.out is not None:
        write_atomically(args.out, text + "\n")


if __name__ == "__main__":
    main()
