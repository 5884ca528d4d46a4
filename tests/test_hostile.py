"""Every file of our own that is read, made hostile. What others wrote: test_hostile_packing.py."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
import torch
from hostile import GROWTH, attempt, memory, told, try_all
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_file, damaged_json, nodes
from safetensors.torch import save

from rsd_trt.bundle import Bundle
from rsd_trt.cli.info import describe
from rsd_trt.config import COMPONENTS, PARTS
from rsd_trt.eval.libero.episode_log import EpisodeLog
from rsd_trt.eval.read import read_run
from rsd_trt.eval.report.write import write_report
from rsd_trt.eval.results import Episode
from rsd_trt.eval.verify.inputs import hidden_states
from rsd_trt.manifest import MANIFEST, freshness, read_manifest
from rsd_trt.records import to_json
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.forward import EagerBackbone, Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.preprocess import Preprocessor

__all__ = ["told"]  # a fixture of every test here
CPU = torch.device("cpu")
EXAMPLES = 150  # of each kind of file


def use(folder: Path) -> None:
    """All that is ever done with a bundle's files."""
    bundle = Bundle.open(folder)
    Policy.load(bundle).warm_up()
    for component in COMPONENTS:
        bundle.component_fingerprint(component)
    describe(bundle, folder / "engines")


def test_bundle_configurations(bundle_copy: Path) -> None:
    file = bundle_copy / "config.json"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        use(bundle_copy)

    valid = file.read_bytes()
    read(valid)
    try_all("config.json", damaged_file(valid), read, EXAMPLES)


EXTREMES = (0, -1, 2**20, 2**62, 1e-320, 1e308, -0.5)


@pytest.mark.slow
def test_every_number_of_a_configuration_at_its_extremes(bundle_copy: Path) -> None:
    file = bundle_copy / "config.json"
    valid = json.loads(file.read_text())
    before = memory(anew=True)
    for *parents, key in nodes(valid):
        holder = valid
        for parent in parents:
            holder = holder[parent]
        value = holder[key]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            for extreme in EXTREMES if isinstance(value, float) else EXTREMES[:4]:
                holder[key] = extreme
                file.write_text(json.dumps(valid))
                attempt("config.json", lambda: use(bundle_copy))
            holder[key] = value
    assert memory() - before < GROWTH


@pytest.mark.parametrize("part", PARTS)
def test_weights(part: str, bundle_copy: Path) -> None:
    file = bundle_copy / f"{part}.safetensors"
    valid = file.read_bytes()
    length = struct.unpack("<Q", valid[:8])[0]
    header, data = valid[8 : 8 + length], valid[8 + length :]

    @st.composite
    def hostile(draw: st.DrawFn) -> bytes:
        text = draw(damaged_json(json.loads(header))).encode()
        size = draw(st.sampled_from([len(text)] * 6 + [0, 1, len(text) + 9, 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", size) + text + data[: draw(st.sampled_from([len(data)] * 6 + [0, 100]))]

    def read(content: bytes) -> None:
        file.write_bytes(content)
        getattr(Bundle.open(bundle_copy), part)()

    read(valid)
    try_all("safetensors", st.one_of(hostile(), hostile(), damaged_bytes(valid)), read, EXAMPLES // 2)


def test_tokenizers(bundle_copy: Path, observe: Callable[..., Observation]) -> None:
    file = bundle_copy / "tokenizer.json"
    valid = file.read_bytes()
    bundle = Bundle.open(bundle_copy)
    config, launcher, backbone = bundle.config, Launcher(bundle, "torch", CPU), bundle.backbone()
    propose, predict = launcher.open("propose", "1"), launcher.open("predict", "1")
    seen = observe(config.control, instruction="pick up the black bowl")

    def read(data: bytes) -> None:
        file.write_bytes(data)
        process = Preprocessor(config.control, config.backbone, Bundle.open(bundle_copy).tokenizer(), CPU)
        eager, table = EagerBackbone(backbone, process), backbone.llama.embed_tokens
        Forward(config, eager, table, propose, predict, process).warm_up(seen, queries=1)

    read(valid)
    try_all("tokenizer.json", damaged_file(valid), read, EXAMPLES)


def test_manifests(bundle_copy: Path, exported: Callable[..., Path]) -> None:
    bundle = Bundle.open(bundle_copy)
    folder = exported("fp32") / "tiny"
    own = bundle_copy.parent / "tiny"
    own.mkdir()
    valid = (folder / MANIFEST).read_bytes()
    small = json.loads(valid)
    small["artefacts"] = small["artefacts"][:2]
    for artefact in small["artefacts"]:
        for file in artefact["files"]:
            (own / file["name"]).write_bytes((folder / file["name"]).read_bytes())

    def read(data: bytes) -> None:
        (own / MANIFEST).write_bytes(data)
        for artefact in read_manifest(own, bundle).artefacts:
            freshness(artefact, own, bundle)

    read(valid)
    try_all("manifest.json", damaged_file(json.dumps(small).encode()), read, EXAMPLES)


@pytest.fixture(scope="module")
def results() -> bytes:
    return json.dumps(to_json(synthetic.run("shadow", success=0.0, tasks=(0, 1), trials=1, max_steps=30))).encode()


def test_results(results: bytes, tmp_path: Path) -> None:
    file = tmp_path / "results.json"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        read_run(file)

    read(results)
    try_all("results.json", damaged_file(results), read, 2 * EXAMPLES)


def test_reports_on_results(results: bytes, tmp_path: Path) -> None:
    """What passes as results may still hold surprises for the report."""
    file = tmp_path / "results.json"
    valid = json.loads(results)
    loose = ("settings", "command", "throughput")  # what does not follow from the episodes

    @st.composite
    def hostile(draw: st.DrawFn) -> bytes:
        text = draw(damaged_json({name: valid[name] for name in loose}, most=1))
        try:
            part = json.loads(text)
        except RecursionError:  # too deep for Python: given as it is
            return text.encode()
        return json.dumps({**valid, **part} if isinstance(part, dict) else valid).encode()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        write_report([file], tmp_path / "report", "rsd-trt report")

    read(results)
    try_all("reports", hostile(), read, 30)


def test_compressed_results(results: bytes, tmp_path: Path) -> None:
    file = tmp_path / "results.json.gz"
    inside = damaged_bytes(results).map(lambda data: gzip.compress(data, 1))

    def read(data: bytes) -> None:
        file.write_bytes(data)
        read_run(file)

    valid = gzip.compress(results)
    read(valid)
    try_all("results.json.gz", st.one_of(inside, damaged_bytes(valid)), read, EXAMPLES)


def test_episode_logs(tmp_path: Path) -> None:
    run = synthetic.run("rsd", tasks=(0,), trials=2, max_steps=30)
    log = EpisodeLog(tmp_path, "x", run.settings, fresh=True)
    for episode in run.episodes:
        log.append(episode)
    valid, name = log.path.read_bytes(), tmp_path / "x_settings.json"
    settings_file = name.read_bytes()
    line: Episode = run.episodes[0]

    def read(data: bytes) -> None:
        log.path.write_bytes(data)
        EpisodeLog(tmp_path, "x", run.settings, fresh=False)

    def read_settings(data: bytes) -> None:
        log.path.write_bytes(valid)
        name.write_bytes(data)
        EpisodeLog(tmp_path, "x", run.settings, fresh=False)

    read(valid)
    one = damaged_json(to_json(line)).map(lambda text: text.encode() + b"\n")
    try_all("episodes.jsonl", st.one_of(one, one, damaged_bytes(valid)), read, EXAMPLES)
    try_all("settings.json", damaged_file(settings_file), read_settings, EXAMPLES)


def test_recorded_hidden_states(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "hidden.safetensors"
    states = torch.randn(64, bundle.config.hidden)
    valid = save({"hidden": states})

    def read(data: bytes) -> None:
        file.write_bytes(data)
        hidden_states(bundle, 64, file, torch.device("cpu"))

    read(valid)
    length = struct.unpack("<Q", valid[:8])[0]
    header = damaged_json(json.loads(valid[8 : 8 + length])).map(str.encode)
    inside = header.map(lambda text: struct.pack("<Q", len(text)) + text + valid[8 + length :])
    try_all("hidden states", st.one_of(inside, damaged_bytes(valid)), read, EXAMPLES // 2)
