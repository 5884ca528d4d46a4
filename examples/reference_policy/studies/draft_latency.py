"""What a check costs on the CPU: one launch of `Propose` with ONNX Runtime in float32, by the draft's size.

    python -m examples.reference_policy.studies.draft_latency

Weights are random: they make no difference to the time. p50 and p10 need a machine that does nothing else; `kernels` is
the sum of each operator's fastest time on one thread, which a busy machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from msgspec import structs
from numpy.typing import NDArray

from rsd_trt.config import VisionDraftConfig
from rsd_trt.export.to_onnx import export_onnx
from rsd_trt.models.classifiers import stacked
from rsd_trt.models.codec import Codec, Decoder
from rsd_trt.models.components import ActionTransform, Propose
from rsd_trt.models.vision_draft import VisionDraft
from rsd_trt.presets import preset

SIZES = {
    "192 x 4": VisionDraftConfig(),
    "192 x 3": VisionDraftConfig(blocks=3),
    "128 x 4": VisionDraftConfig(width=128, heads=2, mlp_width=512),
    "256 x 4": VisionDraftConfig(width=256, heads=4, mlp_width=1024),
    "192 x 6": VisionDraftConfig(blocks=6),
    "192 x 4, 96 pixels": VisionDraftConfig(side=96),
    "192 x 4, 160 pixels": VisionDraftConfig(side=160),
}
Feed = Mapping[str, NDArray[np.generic]]


def build(draft: VisionDraftConfig, steps: int) -> Propose:
    """The component at the reference policy's sizes, with chunks of `steps`."""
    config = preset("reference", "reference")
    dims = structs.replace(config.dims, T=steps)
    module = VisionDraft(draft, dims, config.control, config.hidden)
    decoder = Decoder(Codec(config.codec, dims), dims)
    return Propose(module, decoder, ActionTransform(config.control, dims)).eval()


def inputs(module: Propose) -> dict[str, NDArray[np.generic]]:
    """One observation."""
    random = np.random.default_rng(0)
    found: dict[str, NDArray[np.generic]] = {}
    for port in module.signature.inputs:
        shape = module.signature.shape(port, 1)
        pixels = port.dtype == "uint8"
        found[port.name] = (
            random.integers(0, 256, shape, np.uint8) if pixels else random.normal(size=shape).astype("f4")
        )
    return found


def session(file: Path, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """ONNX Runtime on `threads` threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def times(runner: onnxruntime.InferenceSession, feed: Feed, runs: int) -> list[float]:
    """Milliseconds of each run."""
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        runner.run(None, feed)
        found.append((time.perf_counter() - started) * 1e3)
    return found


def kernels(file: Path, feed: Feed, runs: int) -> float:
    """Milliseconds of the operators alone, each at its fastest, on one thread."""
    runner = session(file, 1, file.with_suffix(""))
    times(runner, feed, runs)
    best: dict[str, int] = defaultdict(lambda: 1 << 60)
    for event in json.loads(Path(runner.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            best[event["name"]] = min(best[event["name"]], event["dur"])
    return sum(best.values()) / 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.reference_policy.studies.draft_latency", description=__doc__
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=16, help="T (default %(default)s)")
    args = parser.parse_args(arguments)
    print(f"{'width x blocks':22} {'M':>5} {'p50 ms':>8} {'p10 ms':>8} {'kernels ms':>11}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, draft in SIZES.items():
            module = build(draft, args.steps)
            feed, file = inputs(module), Path(folder) / "propose.onnx"
            weights = sum(p.numel() for p in module.parameters()) / 1e6
            export_onnx(stacked(module), "1", file)
            found = times(session(file, args.threads), feed, args.runs)[args.runs // 10 :]
            p50, p10 = np.percentile(found, (50, 10))
            alone = kernels(file, feed, args.runs)
            print(f"{name:22} {weights:5.2f} {p50:8.2f} {p10:8.2f} {alone:11.2f}", flush=True)


if __name__ == "__main__":
    main()
