"""An export from request to manifest: builds what is not fresh, keeps what is."""

from __future__ import annotations

import datetime
import logging
import re
import shutil
import tempfile
import time
import typing
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from msgspec.structs import asdict

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, PRECISIONS, Component, Precision
from rsd_trt.errors import UserError
from rsd_trt.export.to_engine import EngineOptions, Progress, build_engine, check_options, layer_report
from rsd_trt.export.to_onnx import OPSET, export_onnx
from rsd_trt.files import locked, writing
from rsd_trt.manifest import (
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
from rsd_trt.models.classifiers import stacked
from rsd_trt.models.signature import Signature
from rsd_trt.trt import Distribution

log = logging.getLogger(__name__)

BATCHES: tuple[Batch, ...] = typing.get_args(Batch)
BUILDING = ".building."  # prefix of the folder of an artefact under way
ARTEFACT = re.compile(rf"({'|'.join(COMPONENTS)})\.({'|'.join(PRECISIONS)})\.({'|'.join(BATCHES)})\.[0-9a-f]{{8}}\.")


@dataclass(frozen=True)
class ExportRequest:
    """What to build. Without a `distribution` ONNX only."""

    engines: Path
    components: tuple[Component, ...] = COMPONENTS
    precision: Precision = "fp32"
    distribution: Distribution | None = None
    options: EngineOptions = field(default_factory=EngineOptions)
    force: bool = False
    report: bool = False


@dataclass(frozen=True)
class Outcome:
    """One artefact after an export: kept as it was, or built and why."""

    artefact: Artefact
    built: bool
    reason: str


def export_bundle(
    bundle: Bundle, request: ExportRequest, on_outcome: Callable[[Outcome], None], on_progress: Progress
) -> list[Outcome]:
    """Builds every artefact of the request that is not fresh. Each is in place, and in the manifest, when it is
    reported; an interruption loses only the one under way, and old files go when new ones have replaced them.

    Raises:
        UserError: something that cannot be built here, or a folder that cannot be written.
    """
    gpu = host.gpu()
    if request.distribution is None and (request.report or request.options != EngineOptions()):
        raise UserError("the options of engines are given, and no engine is to be built. Use: --target rtx or tensorrt")
    if request.distribution is not None:
        check_options(request.distribution, request.options, gpu)
        if request.report:
            request.distribution.check_runs_on(gpu)
    folder = folder_of(bundle, request.engines)
    outcomes = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        busy = partial(log.warning, "another export is at work in %s: waiting for it", folder)
        with locked(folder / ".lock", busy):
            work = Exporter(bundle, folder, request, gpu, on_progress)
            for component in request.components:
                for batch in BATCHES:
                    for outcome in work.component(component, batch):
                        outcomes.append(outcome)
                        on_outcome(outcome)
    return outcomes


class Exporter:
    """The state of one export under its lock."""

    def __init__(
        self, bundle: Bundle, folder: Path, request: ExportRequest, gpu: host.Gpu | None, on_progress: Progress
    ) -> None:
        self.bundle, self.folder, self.request, self.gpu = bundle, folder, request, gpu
        self.on_progress = on_progress
        self.manifest = self._manifest()
        self.timing_cache = folder / "timing.cache"
        self._sweep()

    def component(self, component: Component, batch: Batch) -> Iterator[Outcome]:
        """The ONNX graph of a component and, if asked for, its engine."""
        module = stacked(self.bundle.component(component, precision=self.request.precision))
        graph = self._ensure(component, module.signature, batch, None, lambda path: export_onnx(module, batch, path))
        yield graph
        if self.request.distribution is not None:
            file = graph.artefact.files[0]
            bound = self._engine_build(self.request.distribution, file.sha256)
            build = partial(self._engine, self.folder / file.name, module.signature, self.request.distribution)
            yield self._ensure(component, module.signature, batch, bound, build)

    def _ensure(
        self,
        component: Component,
        signature: Signature,
        batch: Batch,
        engine: EngineBuild | None,
        build: Callable[[Path], list[Path]],
    ) -> Outcome:
        """The artefact as it is if it is fresh, else built and in the manifest."""
        kind: ArtefactKind = "onnx" if engine is None else self.request.distribution.kind  # type: ignore[union-attr]
        current = self.manifest.find(component, self.request.precision, batch, kind)
        reason = self._stale(current, engine)
        if current is not None and reason is None:
            return Outcome(current, built=False, reason="fresh")
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix=BUILDING, dir=self.folder) as temporary:
            suffix = "onnx" if engine is None else f"{kind}.engine"
            name = f"{component}.{self.request.precision}.{batch}.{uuid.uuid4().hex[:8]}.{suffix}"
            files = build(Path(temporary) / name)
            artefact = Artefact(
                component=component,
                precision=self.request.precision,
                batch=batch,
                kind=kind,
                files=tuple(File.of(path) for path in files),
                weights_sha256=self.bundle.component_fingerprint(component),
                inputs=tuple(signature.describe(port) for port in signature.inputs),
                outputs=tuple(signature.describe(port) for port in signature.outputs),
                opset=OPSET,
                torch=str(torch.__version__),
                build_seconds=round(time.perf_counter() - started, 3),
                date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                engine=engine,
            )
            for path in files:
                path.rename(self.folder / path.name)
        self.manifest = self.manifest.replacing(artefact)
        write_manifest(self.folder, self.manifest)
        self._sweep()
        return Outcome(artefact, built=True, reason=reason or "")

    def _stale(self, artefact: Artefact | None, wanted: EngineBuild | None) -> str | None:
        """Why an artefact has to be built; None when it need not."""
        if artefact is None:
            return "there was none"
        if self.request.force:
            return "--force"
        ok, reason = freshness(artefact, self.folder, self.bundle)
        if not ok:
            return reason
        if artefact.opset != OPSET:
            return f"{artefact.name} has opset {artefact.opset}, wanted is {OPSET}"
        built = artefact.engine
        if built is None or wanted is None:
            return None
        if self.request.report and len(artefact.files) == 1:
            return f"{artefact.name} has no layer report"
        differences = [
            f"{key} was {getattr(built, key)!r} and is {value!r}"
            for key, value in asdict(wanted).items()
            if getattr(built, key) != value and key != "driver"
        ]
        return "; ".join(differences) or None

    def _engine_build(self, distribution: Distribution, onnx_sha256: str) -> EngineBuild:
        """What an engine of this request is bound to."""
        options, gpu = self.request.options, self.gpu
        at_hand = gpu if distribution.target == "tensorrt" else None
        capabilities = (at_hand.compute_capability,) if at_hand else options.compute_capabilities
        return EngineBuild(
            version=distribution.version,
            onnx_sha256=onnx_sha256,
            flags=options.flags,
            compute_capabilities=() if options.hardware_compatible else capabilities,
            gpu=at_hand.name if at_hand and not options.hardware_compatible else None,
            driver=at_hand.driver if at_hand else None,
        )

    def _engine(self, source: Path, signature: Signature, distribution: Distribution, path: Path) -> list[Path]:
        options, report = self.request.options, path.with_name(path.name + ".layers.json")
        engine = build_engine(source, signature, distribution, options, self.timing_cache, self.on_progress)
        path.write_bytes(engine)
        if not self.request.report:
            return [path]
        report.write_text(layer_report(engine, distribution), "utf-8")
        return [path, report]

    def _manifest(self) -> Manifest:
        try:
            return read_manifest(self.folder, self.bundle)
        except UserError:
            if not self.request.force:
                raise
            return Manifest(self.bundle.config.name)

    def _sweep(self) -> None:
        """Removes artefacts that the manifest no longer names, and what an interrupted export left."""
        named = {file.name for artefact in self.manifest.artefacts for file in artefact.files}
        for path in self.folder.iterdir():
            if path.name.startswith(BUILDING):
                shutil.rmtree(path, ignore_errors=True)
            elif ARTEFACT.match(path.name) and path.name not in named:
                path.unlink(missing_ok=True)
