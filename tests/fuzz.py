"""Feeds hostile files to the readers that are written in Python, guided by the lines that they reach.

    python tests/fuzz.py                            all readers, so many inputs each
    python tests/fuzz.py manifest --runs 1000000    one

Needs atheris (`pip install atheris`), which is no dependency of the project. Inputs are drawn by the strategies of
tests/mutations.py; what a reader may do with them: tests/hostile.py. An input that breaks a reader is kept in the
current folder: make it a test. Exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "eval")]
SECONDS = 20  # of an input
MEGABYTES = 2048  # of a process, PyTorch's libraries among them
Reader = Callable[[bytes], object]


def bundle_config(folder: Path) -> tuple[bytes, Reader]:
    from rsd_trt.bundle import Bundle
    from rsd_trt.presets import preset
    from rsd_trt.records import to_json

    file = folder / "config.json"
    return json.dumps(to_json(preset("tiny", "x"))).encode(), lambda data: (file.write_bytes(data), Bundle.open(folder))


def manifest(folder: Path) -> tuple[bytes, Reader]:
    from rsd_trt.manifest import Manifest
    from rsd_trt.records import from_json, parse

    file = {"name": "x.engine", "bytes": 1, "sha256": "0"}
    build = {"version": "10", "onnx_sha256": "0", "flags": ["a"], "compute_capabilities": ["8.9"]}
    artefact = {
        **{"component": "draft", "precision": "fp32", "batch": "1", "kind": "rtx", "files": [file], "opset": 18},
        **{"weights_sha256": "0", "inputs": ["x"], "outputs": ["y"], "torch": "2", "build_seconds": 1.0, "date": "d"},
        "engine": {**build, "gpu": None, "driver": None},
    }
    valid = json.dumps({"bundle": "x", "artefacts": [artefact], "schema_version": 1}).encode()
    return valid, lambda data: from_json(Manifest, parse(data, "manifest.json"), "manifest.json")


def results(folder: Path) -> tuple[bytes, Reader]:
    import synthetic

    from rsd_trt.eval.read import read_run
    from rsd_trt.records import to_json

    valid = to_json(synthetic.run("shadow", tasks=(0,), trials=1, max_steps=20))
    file = folder / "results.json"
    return json.dumps(valid).encode(), lambda data: (file.write_bytes(data), read_run(file))


def hugging_face(folder: Path) -> tuple[bytes, Reader]:
    """config.json and preprocessor_config.json, in one."""
    from openvla_folder import CONFIG, HIDDEN, PATCH, PROCESSOR, VOCAB

    from rsd_trt.importers.openvla_config import EMBEDDING, FEATURIZERS, backbone_config
    from rsd_trt.records import parse
    from rsd_trt.weights import Entry

    file = folder / "config.json"
    found = {EMBEDDING: Entry(file, (VOCAB, HIDDEN), "F32")}
    for name in FEATURIZERS:
        found[f"vision_backbone.{name}.patch_embed.proj.weight"] = Entry(file, (32, 3, PATCH, PATCH), "F32")
        found[f"vision_backbone.{name}.blocks.0.mlp.fc1.weight"] = Entry(file, (40, 32), "F32")

    def read(data: bytes) -> None:
        both = parse(data, "config.json")
        model, processor = (both.get(name) if isinstance(both, dict) else both for name in ("model", "processor"))
        backbone_config(file, model, file, processor, found)

    return json.dumps({"model": CONFIG, "processor": PROCESSOR}).encode(), read


def tokenizer(folder: Path) -> tuple[bytes, Reader]:
    """How far its steps may blow text up: the library itself is not written in Python."""
    from rsd_trt.presets import byte_tokenizer
    from rsd_trt.prompts import growth
    from rsd_trt.records import parse

    return byte_tokenizer().to_str().encode(), lambda data: growth(parse(data, "tokenizer.json"))


def checkpoint(folder: Path) -> tuple[bytes, Reader]:
    import torch

    from rsd_trt.importers.original import read_checkpoint

    file, valid = folder / "x.pt", io.BytesIO()
    torch.save({"model": {"encoder.0.weight": torch.ones(2, 3), "x": torch.ones(4)}, "config": {"a": [1, 2.0]}}, valid)
    return valid.getvalue(), lambda data: (file.write_bytes(data), read_checkpoint(file, "codec"))


READERS = {f.__name__: f for f in (bundle_config, manifest, results, hugging_face, tokenizer, checkpoint)}


def fuzz(name: str, runs: int, scratch: str) -> None:
    """Ends its process: that is how libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["rsd_trt"], enable_loader_override=False):
        folder = Path(scratch)
        valid, read = READERS[name](folder)
    import hostile
    from hypothesis import HealthCheck, given, settings
    from mutations import damaged_bytes, damaged_file

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged_bytes(valid) if name == "checkpoint" else damaged_file(valid))
    def each(data: bytes) -> None:
        try:
            hostile.attempt(name, lambda: read(data))
        except BaseException:
            kept = Path(f"{name}-{hashlib.sha256(data).hexdigest()[:8]}")
            kept.write_bytes(data)
            print(f"kept as {kept}", file=sys.stderr)
            raise

    read(valid)
    limits = [f"-runs={runs}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/"], each.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", choices=[*READERS, []], help="; ".join(READERS))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs of each reader [100000]")
    options = parser.parse_args()
    failed = 0
    for name in options.readers or READERS:
        with tempfile.TemporaryDirectory() as scratch:
            started, log = time.monotonic(), Path(scratch) / "log"
            arguments = (log, name, options.runs, scratch)
            process = multiprocessing.get_context("spawn").Process(target=_logged, args=arguments)
            process.start()
            process.join()
            text = log.read_text("utf-8", "replace")
            inputs, reached = (max(re.findall(p, text), key=int, default="0") for p in (r"#(\d+)\s", r"cov: (\d+)"))
            seconds, outcome = time.monotonic() - started, "broken" if process.exitcode else "held"
            print(f"{name}: {outcome}; {inputs} inputs in {seconds:.0f} s, {reached} places reached", flush=True)
            if process.exitcode:
                failed = 1
                print(text[-4000:], file=sys.stderr)
    return failed


def _logged(log: Path, name: str, runs: int, scratch: str) -> None:
    """The child: libFuzzer and Python write to the log."""
    import os

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    fuzz(name, runs, scratch)


if __name__ == "__main__":
    sys.exit(main())
