"""What may be loaded: every way in which an artefact can differ from what the bundle needs is refused, and named."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnxruntime
import pytest
import torch
from made_without import made_without
from msgspec import structs

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.cli.info import describe
from rsd_trt.config import COMPONENTS, Backend, Component
from rsd_trt.errors import UserError
from rsd_trt.host import Gpu
from rsd_trt.manifest import (
    MANIFEST,
    Artefact,
    ArtefactKind,
    Batch,
    EngineBuild,
    File,
    Manifest,
    folder_of,
    freshness,
    read_manifest,
    write_manifest,
)
from rsd_trt.runtime import backends, ort_session
from rsd_trt.runtime.backends import Launcher
from rsd_trt.trt import Distribution

L4 = Gpu("NVIDIA L4", "8.9", "600.1")
VERSION = "10.9.0"


@dataclasses.dataclass
class Exports:
    """A bundle and an engine folder with two graphs and two engines of `propose`; no content is real."""

    bundle: Path
    engines: Path

    @property
    def folder(self) -> Path:
        return folder_of(Bundle.open(self.bundle), self.engines)

    def file(self, kind: ArtefactKind, batch: Batch = "1") -> Path:
        return self.folder / f"propose.fp32.{batch}.0123abcd.{'onnx' if kind == 'onnx' else kind + '.engine'}"

    def open(self, backend: Backend) -> object:
        device = torch.device("cuda" if backend == "trt" else "cpu")
        return Launcher(Bundle.open(self.bundle), backend, device, engines=self.engines).open("propose", "1")

    def edit(self, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
        """Changes the manifest's JSON."""
        file = self.folder / MANIFEST
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))


def artefact_of(
    bundle: Bundle, files: tuple[File, ...], kind: ArtefactKind, batch: Batch = "1", **changes: object
) -> Artefact:
    engine = EngineBuild(VERSION, "0" * 64, ("strongly_typed", "no_tf32"), ("8.9",), L4.name, L4.driver)
    return structs.replace(
        Artefact(
            component="propose",
            precision="fp32",
            batch=batch,
            kind=kind,
            files=files,
            weights_sha256=bundle.component_fingerprint("propose"),
            inputs=("hidden [B, H=32] float32",),
            outputs=(),
            opset=18,
            torch="2.9.0",
            build_seconds=1.5,
            date="2030-01-01T00:00:00+00:00",
            engine=None if kind == "onnx" else engine,
        ),
        **changes,
    )


@pytest.fixture
def exports(bundle_copy: Path, tmp_path: Path) -> Exports:
    found = Exports(bundle_copy, tmp_path / "engines")
    found.folder.mkdir(parents=True)
    bundle, manifest = Bundle.open(bundle_copy), Manifest("tiny")
    for kind in ("onnx", "tensorrt"):
        for batch in ("1", "dynamic"):
            file = found.file(kind, batch)
            file.write_bytes(f"{kind} {batch:>7}".encode())
            manifest = manifest.replacing(artefact_of(bundle, (File.of(file),), kind, batch))
    write_manifest(found.folder, manifest)
    return found


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What ONNX Runtime or a double of TensorRT was given to deserialise, on a machine with an L4."""
    seen: list[object] = []

    def session(graph: bytes, *_: object, **__: object) -> SimpleNamespace:
        seen.append(graph)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    def deserialise(content: bytes) -> SimpleNamespace:
        seen.append(content)
        ports = ["frames", "state", "instruction", "tokens", "actions", "logits", "finite"]
        return SimpleNamespace(num_io_tensors=len(ports), get_tensor_name=ports.__getitem__)

    module = ModuleType("double")
    module.__version__ = VERSION
    module.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})
    module.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=deserialise)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(ort_session, "locations", lambda graph: set())  # these are no graphs
    monkeypatch.setattr(backends, "runnable_distribution", lambda gpu: Distribution("tensorrt", module))
    monkeypatch.setattr(host, "gpu", lambda _: L4)
    return seen


def flip_last_byte(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def exchange(exports: Exports, kind: ArtefactKind) -> None:
    one, other, aside = exports.file(kind, "1"), exports.file(kind, "dynamic"), exports.folder / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def link(exports: Exports, kind: ArtefactKind) -> None:
    file = exports.file(kind)
    file.symlink_to(file.rename(exports.engines / "elsewhere"))


DAMAGE: dict[str, tuple[Callable[[Exports, ArtefactKind], object], str]] = {
    "a changed weight": (
        lambda exports, _: flip_last_byte(exports.bundle / "draft.safetensors"),
        r"propose fp32 batch 1 \({kind}\) was built from weights [0-9a-f]{{8}}, the bundle has [0-9a-f]{{8}}",
    ),
    "exchanged files": (exchange, r"{file} has sha256 [0-9a-f]{{8}}, the manifest says [0-9a-f]{{8}}"),
    "a flipped bit": (
        lambda exports, kind: flip_last_byte(exports.file(kind)),
        r"{file} has sha256 [0-9a-f]{{8}}, the manifest says [0-9a-f]{{8}}",
    ),
    "a truncated file": (
        lambda exports, kind: exports.file(kind).write_bytes(b"on"),
        r"{file} has 2 bytes, the manifest says {size}",
    ),
    "a missing file": (lambda exports, kind: exports.file(kind).unlink(), "{file} is missing"),
    "a folder in its place": (
        lambda exports, kind: (exports.file(kind).unlink(), exports.file(kind).mkdir()),
        "{file} is missing",
    ),
    "a link in its place": (link, "{file} is a symbolic link, not the file that was built"),
}


@pytest.mark.parametrize("backend", ["ort", "trt"])
def test_what_is_fresh_is_loaded(exports: Exports, loaded: list[object], backend: Backend) -> None:
    exports.open(backend)
    assert loaded == [f"{'onnx' if backend == 'ort' else 'tensorrt'}       1".encode()]
    assert {row["reason"] for row in describe(Bundle.open(exports.bundle), exports.engines)["exports"]} == {"fresh"}


@pytest.mark.parametrize("backend", ["ort", "trt"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_fresh_is_refused_before_it_is_loaded(
    exports: Exports, loaded: list[object], backend: Backend, damage: str
) -> None:
    kind: ArtefactKind = "onnx" if backend == "ort" else "tensorrt"
    file = exports.file(kind)
    size = file.stat().st_size
    change, message = DAMAGE[damage]
    change(exports, kind)
    with pytest.raises(UserError) as error:
        exports.open(backend)
    target = "" if kind == "onnx" else " --target tensorrt"
    remedy = rf"\. Rebuild: rsd-trt export {exports.bundle} --precision fp32{target} -o {exports.engines}"
    assert re.fullmatch(message.format(kind=kind, file=file, size=size) + remedy, str(error.value))
    assert loaded == []


@pytest.mark.parametrize(
    ("version", "gpu", "flags", "message"),
    [
        (VERSION, L4, (), None),
        (
            "10.10.0",
            L4,
            (),
            "propose fp32 batch 1 (tensorrt) was built by TensorRT 10.9.0, installed is 10.10.0",
        ),
        ("10.10.0", L4, ("version_compatible",), None),
        (
            "10.8.0",  # earlier than what built it
            L4,
            ("version_compatible",),
            "propose fp32 batch 1 (tensorrt) was built by TensorRT 10.9.0, installed is 10.8.0",
        ),
        (
            VERSION,
            Gpu("NVIDIA L40S", "8.9", "600.1"),
            (),
            "propose fp32 batch 1 (tensorrt) was built for NVIDIA L4, this is NVIDIA L40S",
        ),
        (
            VERSION,
            Gpu("NVIDIA L4", "12.0", "600.1"),
            (),
            "propose fp32 batch 1 (tensorrt) was built for compute capability 8.9, this is 12.0",
        ),
        (VERSION, Gpu("NVIDIA L4", "8.9", "another driver"), (), None),
    ],
)
def test_an_engine_is_bound_to_its_tensorrt_and_its_gpu(
    exports: Exports,
    loaded: list[object],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    gpu: Gpu,
    flags: tuple[str, ...],
    message: str | None,
) -> None:
    monkeypatch.setattr(Distribution, "version", version)
    monkeypatch.setattr(host, "gpu", lambda _: gpu)
    exports.edit(lambda data: [a["engine"].update(flags=list(flags)) for a in data["artefacts"] if a["engine"]])
    if message is None:
        exports.open("trt")
        assert len(loaded) == 1
        return
    with pytest.raises(UserError) as error:
        exports.open("trt")
    remedy = f"Rebuild: rsd-trt export {exports.bundle} --precision fp32 --target tensorrt -o {exports.engines}"
    assert str(error.value) == f"{message}. {remedy}"
    assert loaded == []


@pytest.mark.parametrize(
    ("gpu", "capabilities", "name", "fresh"),
    [
        (Gpu("anything", "12.0", ""), (), None, True),  # portable
        (Gpu("anything", "12.0", ""), ("8.9", "12.0"), None, True),
        (Gpu("anything", "8.6", ""), ("8.9", "12.0"), None, False),
        (None, ("8.9",), "NVIDIA L4", True),  # not checked
    ],
)
def test_an_engine_built_ahead_of_time_runs_on_its_capabilities(
    exports: Exports, gpu: Gpu | None, capabilities: tuple[str, ...], name: str | None, fresh: bool
) -> None:
    bundle = Bundle.open(exports.bundle)
    built = EngineBuild(VERSION, "0" * 64, (), capabilities, name, None)
    artefact = artefact_of(bundle, (File.of(exports.file("tensorrt")),), "rtx", engine=built)
    module = ModuleType("double")
    module.__version__ = VERSION
    assert freshness(artefact, exports.folder, bundle, Distribution("rtx", module), gpu)[0] == fresh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema_version=2), "schema_version 2, this version reads 1: update rsd-trt"),
        *(
            (
                lambda data, name=name: data["artefacts"][0]["files"][0].update(name=name),
                f"the engine manifest names a file outside its folder: {name!r}",
            )
            for name in ("../x", "/etc/passwd", "a/b", "", ".", "..", "x/")
        ),
        (
            lambda data: data["artefacts"][0].update(files=[]),
            "artefacts[0].files is [], which must be of length >= 1",
        ),
        (
            lambda data: data["artefacts"][1].update(engine=None),
            "the engine manifest is incomplete: propose fp32 batch 1 (tensorrt) lacks its build",
        ),
        (lambda data: data.update(artefact=[]), "unknown key artefact; did you mean 'artefacts'?"),
        (lambda data: data["artefacts"][1].pop("opset"), "the key artefacts[1].opset is missing"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(
    exports: Exports,
    loaded: list[object],
    change: Callable[[dict], object],
    message: str,  # type: ignore[type-arg]
) -> None:
    exports.edit(change)
    for backend in ("ort", "trt"):
        with pytest.raises(UserError) as error:
            exports.open(backend)
        assert re.sub(": | has ", "|", str(error.value), count=1) == (
            f"{exports.folder / MANIFEST}|{message}. Rebuild: rsd-trt export --force"
        )
    assert loaded == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"null", b'{"bundle": 1}', b"[" * 100_000], ids=lambda x: str(x[:9])
)
def test_garbage_is_no_manifest(exports: Exports, content: bytes) -> None:
    file = exports.folder / MANIFEST
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        exports.open("ort")
    message = str(error.value)
    assert message.startswith(str(file))
    assert message.endswith(". Rebuild: rsd-trt export --force")
    assert "\n" not in message


def test_nothing_built_yet_is_told_with_the_command(exports: Exports) -> None:
    shutil.rmtree(exports.folder)
    with pytest.raises(UserError) as error:
        exports.open("ort")
    command = f"rsd-trt export {exports.bundle} --precision fp32 -o {exports.engines}"
    assert str(error.value) == f"nothing of {exports.bundle} is exported in {exports.folder}. Export it: {command}"
    assert describe(Bundle.open(exports.bundle), exports.engines)["exports"] == []


def test_info_says_why_an_artefact_is_not_fresh(exports: Exports) -> None:
    exports.file("onnx").unlink()
    rows = describe(Bundle.open(exports.bundle), exports.engines)["exports"]
    assert [(row["fresh"], row["reason"]) for row in rows if not row["fresh"]] == [
        (False, f"{exports.file('onnx')} is missing")
    ]
    assert len(rows) == 4
    without = Bundle.open(made_without(exports.bundle, "codec"))
    rows = describe(without, exports.engines)["exports"]
    assert {(row["fresh"], row["reason"]) for row in rows} == {(False, "the bundle has no codec")}


QUANTILES = {"q01": [0] * 7, "q99": [1] * 7, "mask": [True] * 7}


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ("draft.safetensors", {"draft", "propose"}),
        ("head.safetensors", {"head", "predict"}),
        ("codec.safetensors", {"decoder", "propose", "predict"}),
        ("backbone.safetensors", set()),
        ("tokenizer.json", set()),
        ({"rsd": {"tolerance": [0.2] * 6}}, set()),
        ({"rsd": {"check_steps": 2}}, set()),
        ({"control": {"limits": {"high": [2] * 7}}}, set()),
        ({"control": {"rotate_images": False}}, {"draft", "propose"}),
        ({"control": {"center_crop": 0.9}}, {"draft", "propose"}),
        ({"control": {"max_steps": {"libero_goal": 9}}}, set()),
        ({"control": {"gripper": "openvla"}}, {"propose", "predict"}),
        ({"control": {"action_quantiles": QUANTILES}}, {"propose", "predict"}),
    ],
    ids=lambda value: ",".join(sorted(value)) if isinstance(value, set) else str(value)[:40],
)
def test_what_makes_which_component_stale(
    bundle_copy: Path, change: str | dict[str, dict[str, object]], stale: set[Component]
) -> None:
    before = {component: Bundle.open(bundle_copy).component_fingerprint(component) for component in COMPONENTS}
    if isinstance(change, str):
        flip_last_byte(bundle_copy / change)
    else:
        config = json.loads((bundle_copy / "config.json").read_text())
        for section, values in change.items():
            config[section].update(values)
        (bundle_copy / "config.json").write_text(json.dumps(config))
    after = {component: Bundle.open(bundle_copy).component_fingerprint(component) for component in COMPONENTS}
    assert {component for component in COMPONENTS if after[component] != before[component]} == stale


def test_a_manifest_is_read_as_it_was_written(exports: Exports) -> None:
    bundle = Bundle.open(exports.bundle)
    manifest = read_manifest(exports.folder, bundle)
    artefact = artefact_of(bundle, (File("a", 1, "f"), File("b", 2, "e")), "tensorrt", date="later")
    changed = manifest.replacing(artefact)
    write_manifest(exports.folder, changed)
    assert read_manifest(exports.folder, bundle) == changed
    assert changed.find("propose", "fp32", "1", "tensorrt") == artefact
    assert len(changed.artefacts) == len(manifest.artefacts) == 4
    assert changed.find("propose", "fp16", "1", "tensorrt") is None


def test_an_interrupted_write_leaves_the_old_manifest(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted((path.name, path.read_bytes()) for path in exports.folder.iterdir())
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(exports.folder, Manifest("tiny"))
    assert sorted((path.name, path.read_bytes()) for path in exports.folder.iterdir()) == before
