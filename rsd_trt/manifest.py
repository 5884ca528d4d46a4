"""What lies in an engine folder, what it was made from, and whether it may still be used.

`engines/<bundle>/manifest.json` is the only thing that export and runtime share. Artefacts have names that are
never used twice, so that a new manifest, renamed into place, switches from the old files to the new ones at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import replace

from rsd_trt.bundle import Bundle
from rsd_trt.config import Component, Precision
from rsd_trt.errors import UserError, shown
from rsd_trt.host import Gpu
from rsd_trt.records import Natural, Record, read_record, write_record
from rsd_trt.trt import Distribution, EngineKind
from rsd_trt.weights import sha256

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
REMEDY = "rsd-trt export --force"

Batch = Literal["1", "dynamic"]
ArtefactKind = Literal["onnx", EngineKind]


class File(Record, frozen=True):
    """A file of an artefact, beside the manifest."""

    name: str
    bytes: Natural
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        return cls(path.name, path.stat().st_size, sha256(path))


class EngineBuild(Record, frozen=True):
    """What an engine is bound to. Without `compute_capabilities` it is portable among those that RTX supports."""

    version: str  # of TensorRT or TensorRT-RTX
    onnx_sha256: str
    flags: tuple[str, ...]
    compute_capabilities: tuple[str, ...]
    gpu: str | None  # None: built ahead of time
    driver: str | None


class Artefact(Record, frozen=True):
    """An ONNX graph or an engine of one component."""

    component: Component
    precision: Precision
    batch: Batch
    kind: ArtefactKind
    files: Annotated[tuple[File, ...], Meta(min_length=1)]  # the graph or engine first, then external weights
    weights_sha256: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: Natural
    torch: str
    build_seconds: float
    date: str  # UTC, ISO 8601
    engine: EngineBuild | None = None

    @property
    def name(self) -> str:
        """For people: `propose fp32 batch 1 (onnx)`."""
        return f"{self.component} {self.precision} batch {self.batch} ({self.kind})"

    @property
    def key(self) -> tuple[Component, Precision, Batch, ArtefactKind]:
        return self.component, self.precision, self.batch, self.kind


class Manifest(Record, frozen=True):
    """All artefacts of a bundle, by key."""

    bundle: str
    artefacts: tuple[Artefact, ...] = ()
    schema_version: Literal[1] = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Raises UserError: an engine without its build, or a file outside the folder."""
        for artefact in self.artefacts:
            if (artefact.engine is None) != (artefact.kind == "onnx"):
                raise UserError(f"the engine manifest is incomplete: {artefact.name} lacks its build")
            for file in artefact.files:
                if Path(file.name).name != file.name or file.name in ("", ".", ".."):
                    raise UserError(f"the engine manifest names a file outside its folder: {shown(file.name)}")

    def find(self, component: Component, precision: Precision, batch: Batch, kind: ArtefactKind) -> Artefact | None:
        key = (component, precision, batch, kind)
        return next((artefact for artefact in self.artefacts if artefact.key == key), None)

    def replacing(self, artefact: Artefact) -> Manifest:
        """With `artefact` in place of the one that has its key."""
        others = tuple(a for a in self.artefacts if a.key != artefact.key)
        return replace(self, artefacts=tuple(sorted((*others, artefact), key=lambda a: a.key)))


def folder_of(bundle: Bundle, engines: Path) -> Path:
    """`engines/<bundle>/`."""
    return engines / bundle.config.name


def read_manifest(folder: Path, bundle: Bundle) -> Manifest:
    """The folder's manifest; an empty one when there is none.

    Raises:
        UserError: it cannot be read, or is of another schema.
    """
    try:
        return read_record(Manifest, folder / MANIFEST)
    except FileNotFoundError:
        return Manifest(bundle.config.name)
    except UserError as error:
        raise UserError(str(error), f"Rebuild: {REMEDY}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaces the folder's manifest in one step. The caller holds the folder's lock."""
    write_record(folder / MANIFEST, manifest)


def freshness(
    artefact: Artefact, folder: Path, bundle: Bundle, loader: Distribution | None = None, gpu: Gpu | None = None
) -> tuple[bool, str]:
    """Whether an artefact is what the bundle needs, and the reason in one line.

    `loader` is the TensorRT that would load it, `gpu` the one that would run it; None: not checked.
    """
    lacking = [part for part in bundle.parts_of(artefact.component) if not bundle.has(part)]
    if lacking:
        return False, f"the bundle has no {lacking[0]}"
    ok, reason = intact(artefact, folder, bundle.component_fingerprint(artefact.component))
    if not ok:
        return ok, reason
    engine = artefact.engine
    if engine is not None and loader is not None:
        portable = "version_compatible" in engine.flags
        if loader.target == "lean" and not portable:
            return False, f"{artefact.name} was built without --version-compatible, and the lean runtime loads no other"
        later = _numbers(loader.version) > _numbers(engine.version)
        if loader.version != engine.version and not (portable and later):
            return False, f"{artefact.name} was built by TensorRT {engine.version}, installed is {loader.version}"
    if engine is not None and gpu is not None:
        if engine.gpu is not None and engine.gpu != gpu.name:
            return False, f"{artefact.name} was built for {engine.gpu}, this is {gpu.name}"
        if engine.compute_capabilities and gpu.compute_capability not in engine.compute_capabilities:
            built = ", ".join(engine.compute_capabilities)
            return False, f"{artefact.name} was built for compute capability {built}, this is {gpu.compute_capability}"
    return True, "fresh"


def intact(artefact: Artefact, folder: Path, weights: str) -> tuple[bool, str]:
    """Whether an artefact is what was built, from the weights of that fingerprint, and the reason in one line.

    Every byte is hashed: an engine is code, and is deserialised only if this says yes.
    """
    for file in artefact.files:
        path = folder / file.name
        if path.is_symlink():
            return False, f"{path} is a symbolic link, not the file that was built"
        if not path.is_file():
            return False, f"{path} is missing"
        if (size := path.stat().st_size) != file.bytes:
            return False, f"{path} has {size} bytes, the manifest says {file.bytes}"
        if (digest := sha256(path)) != file.sha256:
            return False, f"{path} has sha256 {digest[:8]}, the manifest says {file.sha256[:8]}"
    if weights != artefact.weights_sha256:
        return (
            False,
            f"{artefact.name} was built from weights {artefact.weights_sha256[:8]}, the bundle has {weights[:8]}",
        )
    return True, "fresh"


def _numbers(version: str) -> tuple[int, ...]:
    """10.13.3.9.post1 -> (10, 13, 3, 9, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def usable(
    bundle: Bundle,
    engines: Path,
    key: tuple[Component, Precision, Batch, ArtefactKind],
    loader: Distribution | None = None,
    gpu: Gpu | None = None,
) -> tuple[Artefact, Path]:
    """A fresh artefact and its first file.

    Raises:
        UserError: there is none, or it is not fresh; with the command that makes it.
    """
    folder = folder_of(bundle, engines)
    component, precision, _, kind = key
    target = "" if kind == "onnx" else f" --target {kind}"
    target += " --version-compatible" if loader is not None and loader.target == "lean" else ""
    remedy = f"rsd-trt export {bundle.path} --precision {precision}{target} -o {engines}"
    manifest = read_manifest(folder, bundle)
    if not manifest.artefacts:
        raise UserError(f"nothing of {bundle.path} is exported in {folder}", f"Export it: {remedy}")
    artefact = manifest.find(*key)
    if artefact is None:
        raise UserError(f"{folder} has no {component} {precision} batch {key[2]} ({kind})", f"Build it: {remedy}")
    ok, reason = freshness(artefact, folder, bundle, loader, gpu)
    if not ok:
        raise UserError(reason, f"Rebuild: {remedy}")
    return artefact, folder / artefact.files[0].name
