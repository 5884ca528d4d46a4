"""An export builds what is not fresh, keeps what is, and leaves what was there usable when it cannot finish."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from types import ModuleType

import pytest

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, Component, Precision
from rsd_trt.errors import UserError
from rsd_trt.export import run
from rsd_trt.export.run import ExportRequest, Outcome, export_bundle
from rsd_trt.export.to_engine import EngineOptions
from rsd_trt.host import Gpu
from rsd_trt.manifest import MANIFEST, Batch, folder_of, freshness, read_manifest, usable
from rsd_trt.models.signature import Exportable
from rsd_trt.trt import Distribution, Target

L4 = Gpu("NVIDIA L4", "8.9", "600.1")
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def export(bundle: Path, engines: Path, **request: object) -> list[Outcome]:
    return export_bundle(Bundle.open(bundle), ExportRequest(engines, **request), lambda _: None, lambda *_: None)


def distribution(target: Target = "rtx", version: str = "1.2.3") -> Distribution:
    module = ModuleType("double")
    module.__version__ = version
    return Distribution(target, module)


def built(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.artefact.name: outcome.reason for outcome in outcomes if outcome.built}


def names(components: tuple[str, ...], precision: Precision = "fp32", kinds: tuple[str, ...] = ("onnx",)) -> set[str]:
    return {f"{c} {precision} batch {b} ({k})" for c in components for b in ("1", "dynamic") for k in kinds}


def assert_whole(bundle: Path, engines: Path, count: int) -> None:
    """The manifest holds `count` artefacts, all fresh, and the folder holds nothing else."""
    opened = Bundle.open(bundle)
    folder = folder_of(opened, engines)
    artefacts = read_manifest(folder, opened).artefacts
    assert {freshness(artefact, folder, opened) for artefact in artefacts} == {(True, "fresh")}
    assert len(artefacts) == count
    named = {file.name for artefact in artefacts for file in artefact.files}
    assert {path.name for path in folder.iterdir()} - {"timing.cache"} == named | {MANIFEST, ".lock"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and engines that take no time to build, and differ when their module does."""

    def graph(module: Exportable, batch: Batch, path: Path) -> list[Path]:
        weights = sum(float(x.double().sum()) for x in module.state_dict().values())
        path.write_text(f"{type(module).__name__} {batch} {weights}")
        return [path]

    monkeypatch.setattr(run, "export_onnx", graph)
    monkeypatch.setattr(run, "build_engine", lambda source, *_: b"engine of " + source.read_bytes())
    monkeypatch.setattr(run, "layer_report", lambda *_: '{"Layers": []}')


def change_weight(bundle: Path, part: str) -> None:
    file = bundle / f"{part}.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.slow
def test_a_second_run_builds_nothing(bundle: Bundle, exported: Callable[..., Path], tmp_path: Path) -> None:
    engines = Path(shutil.copytree(exported("fp32"), tmp_path / "engines"))
    before = {path: path.stat().st_mtime_ns for path in engines.rglob("*.onnx")}
    outcomes = export(bundle.path, engines)
    assert [outcome.reason for outcome in outcomes] == ["fresh"] * 2 * len(COMPONENTS)
    assert built(outcomes) == {}
    assert {path: path.stat().st_mtime_ns for path in engines.rglob("*.onnx")} == before


def test_what_was_exported_is_in_the_manifest(bundle: Bundle, exported: Callable[..., Path]) -> None:
    folder = folder_of(bundle, exported("fp32"))
    assert_whole(bundle.path, folder.parent, 2 * len(COMPONENTS))
    for artefact in read_manifest(folder, bundle).artefacts:
        signature = bundle.component(artefact.component).signature
        assert artefact.inputs == tuple(signature.describe(port) for port in signature.inputs)
        assert artefact.outputs == tuple(signature.describe(port) for port in signature.outputs)
        assert (artefact.opset, artefact.engine) == (18, None)
        assert artefact.build_seconds > 0
        assert artefact.date.endswith("+00:00")


def test_force_builds_all_and_keeps_other_precisions(quick: None, bundle_copy: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "fp16"):
        assert built(export(bundle_copy, tmp_path, precision=precision, distribution=distribution())) == dict.fromkeys(
            names(COMPONENTS, precision, ("onnx", "rtx")), "there was none"
        )
    others = list(tmp_path.rglob("*.fp16.*"))
    assert len(others) == 4 * len(COMPONENTS)
    outcomes = export(bundle_copy, tmp_path, force=True, distribution=distribution())
    assert built(outcomes) == dict.fromkeys(names(COMPONENTS, "fp32", ("onnx", "rtx")), "--force")
    assert all(path.is_file() for path in others)
    assert_whole(bundle_copy, tmp_path, 8 * len(COMPONENTS))


@pytest.mark.parametrize(
    ("part", "components"), [("head", ("head", "predict")), ("draft", ("draft", "propose")), ("backbone", ())]
)
def test_a_changed_part_rebuilds_what_is_made_of_it(
    quick: None, bundle_copy: Path, tmp_path: Path, part: str, components: tuple[Component, ...]
) -> None:
    export(bundle_copy, tmp_path, distribution=distribution())
    change_weight(bundle_copy, part)
    reasons = built(export(bundle_copy, tmp_path, distribution=distribution()))
    assert set(reasons) == names(components, "fp32", ("onnx", "rtx"))
    assert all("was built from weights" in reason for reason in reasons.values())
    assert_whole(bundle_copy, tmp_path, 4 * len(COMPONENTS))


@pytest.mark.parametrize(
    ("change", "kinds", "reason"),
    [
        ({"options": EngineOptions(("8.9", "12.0"))}, ("rtx",), "compute_capabilities was () and is ('8.9', '12.0')"),
        ({"distribution": distribution(version="1.3.0")}, ("rtx",), "version was '1.2.3' and is '1.3.0'"),
        ({"report": True}, ("rtx",), "decoder fp32 batch 1 (rtx) has no layer report"),
        ({"OPSET": 19}, ("onnx", "rtx"), "decoder fp32 batch 1 (onnx) has opset 18, wanted is 19"),
        ({"truncate": True}, ("onnx",), "has 3 bytes, the manifest says"),
    ],
    ids=str,
)
def test_what_differs_from_the_request_is_rebuilt_with_the_reason(
    quick: None,
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    kinds: tuple[str, ...],
    reason: str,
) -> None:
    request: dict[str, object] = {"components": ("decoder",), "distribution": distribution()}
    export(bundle_copy, tmp_path, **request)
    monkeypatch.setattr(host, "gpu", lambda: L4)
    if opset := change.pop("OPSET", None):
        monkeypatch.setattr(run, "OPSET", opset)
    if change.pop("truncate", None):
        for graph in tmp_path.rglob("decoder.fp32.*.onnx"):
            graph.write_bytes(b"abc")
    outcomes = export(bundle_copy, tmp_path, **(request | change))
    assert {outcome.artefact.kind for outcome in outcomes if outcome.built} == set(kinds)
    assert reason in next(outcome.reason for outcome in outcomes if outcome.built)
    assert built(export(bundle_copy, tmp_path, **(request | change))) == {}
    assert_whole(bundle_copy, tmp_path, 4)
    if "report" in change:
        assert len(list(tmp_path.rglob("*.rtx.engine.layers.json"))) == 2


def test_both_flavours_side_by_side(
    quick: None, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "gpu", lambda: L4)
    export(bundle_copy, tmp_path, components=("decoder",), distribution=distribution("rtx"))
    outcomes = export(bundle_copy, tmp_path, components=("decoder",), distribution=distribution("tensorrt", "10.9.0"))
    assert set(built(outcomes)) == names(("decoder",), "fp32", ("tensorrt",))
    (engine,) = {outcome.artefact.engine for outcome in outcomes if outcome.built and outcome.artefact.batch == "1"}
    assert engine is not None
    assert (engine.version, engine.gpu, engine.driver) == ("10.9.0", L4.name, L4.driver)
    assert engine.compute_capabilities == ("8.9",)
    assert_whole(bundle_copy, tmp_path, 6)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"report": True, "distribution": distribution()},
            "TensorRT engines need an NVIDIA GPU, and none is usable here",
        ),
        ({"distribution": distribution("tensorrt")}, "TensorRT builds an engine on the GPU that will run it"),
        ({"report": True}, "no engine is to be built. Use: --target rtx or tensorrt"),
        ({"options": EngineOptions(("8.9",))}, "no engine is to be built. Use: --target rtx or tensorrt"),
    ],
)
def test_what_cannot_be_built_here_is_refused_at_once(
    bundle_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request_: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr(host, "gpu", lambda: None)
    with pytest.raises(UserError) as error:
        export(bundle_copy, tmp_path / "engines", **request_)
    assert message in str(error.value)
    assert not (tmp_path / "engines").exists()


def test_an_export_into_the_bundles_own_folder_leaves_the_bundle_whole(
    quick: None, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    before = {path: path.read_bytes() for path in bundle.iterdir()}
    export(bundle, tmp_path, components=("draft", "head"))
    export(bundle, tmp_path, components=("draft", "head"), force=True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("failure", [RuntimeError("a bug"), KeyboardInterrupt(), UserError("no"), NO_SPACE], ids=repr)
@pytest.mark.parametrize("where", ["export_onnx", "build_engine", "write_manifest", "File.of"])
def test_a_failure_leaves_the_old_artefacts_usable(
    quick: None, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failure: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        for path in arguments:
            if isinstance(path, Path) and path.parent.name.startswith(run.BUILDING):
                path.write_bytes(b"half")
        raise failure

    request: dict[str, object] = {"components": ("draft", "decoder"), "distribution": distribution()}
    export(bundle_copy, tmp_path, **request)
    bundle = Bundle.open(bundle_copy)
    before = read_manifest(folder_of(bundle, tmp_path), bundle)
    with monkeypatch.context() as patch:
        patch.setattr(f"rsd_trt.export.run.{where}", fail)
        with pytest.raises(BaseException) as error:
            export(bundle_copy, tmp_path, force=True, **request)
    if failure is NO_SPACE:
        assert isinstance(error.value, UserError)
        assert str(error.value) == f"{folder_of(bundle, tmp_path)} cannot be written: No space left on device"
    else:
        assert error.value is failure
    for artefact in before.artefacts:
        usable(bundle, tmp_path, artefact.key)
    assert not list(folder_of(bundle, tmp_path).glob(f"{run.BUILDING}*"))
    assert built(export(bundle_copy, tmp_path, **request)) == {}
    assert_whole(bundle_copy, tmp_path, 8)


def test_an_unreadable_manifest_is_rebuilt_only_by_force(quick: None, bundle_copy: Path, tmp_path: Path) -> None:
    export(bundle_copy, tmp_path, components=("decoder",))
    manifest = folder_of(Bundle.open(bundle_copy), tmp_path) / MANIFEST
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read: .*\. Rebuild: rsd-trt export --force$"):
        export(bundle_copy, tmp_path, components=("decoder",))
    export(bundle_copy, tmp_path, components=("decoder",), force=True)
    assert_whole(bundle_copy, tmp_path, 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk(options) mounts, or mounts again, a file system in memory."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no permission to mount: {done.stderr.strip()}")
        return path

    yield mount
    subprocess.run(["umount", str(path)], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("options", "reason"), [("remount,size=256k", "No space left on device"), ("remount,ro", "Read-only file system")]
)
def test_a_real_disk_that_takes_nothing_leaves_the_old_engine_usable(
    quick: None,
    small_disk: Callable[[str], Path],
    bundle_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    reason: str,
) -> None:
    monkeypatch.setattr(run, "build_engine", lambda *_: os.urandom(100_000))
    engines = small_disk("size=1m")
    export(bundle_copy, engines, components=("decoder",), distribution=distribution())
    small_disk(options)
    with pytest.raises(UserError) as error:
        export(bundle_copy, engines, components=("decoder",), distribution=distribution(), force=True)
    assert str(error.value) == f"{engines / 'tiny'} cannot be written: {reason}"
    for batch in ("1", "dynamic"):
        usable(Bundle.open(bundle_copy), engines, ("decoder", "fp32", batch, "rtx"))
    small_disk("remount,rw,size=1m")
    export(bundle_copy, engines, components=("decoder",), distribution=distribution())
    assert_whole(bundle_copy, engines, 4)


def test_a_folder_that_cannot_be_made_is_told(quick: None, bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        export(bundle_copy, tmp_path / "file")


def hang(bundle: Path, engines: Path, ready: Event) -> None:
    """In a process of its own: an export that never ends."""

    def graph(_module: Exportable, _batch: Batch, path: Path) -> list[Path]:
        path.write_bytes(b"half")
        ready.set()
        time.sleep(600)
        return [path]

    run.export_onnx = graph
    export(bundle, engines, components=("decoder",), force=True)


def compete(bundle: Path, engines: Path) -> int:
    """In a process of its own: a real export; how many artefacts it built."""
    return len(built(export(bundle, engines, components=("decoder",))))


def test_a_killed_export_leaves_the_old_artefacts_usable(quick: None, bundle_copy: Path, tmp_path: Path) -> None:
    export(bundle_copy, tmp_path, components=("decoder",))
    folder = folder_of(Bundle.open(bundle_copy), tmp_path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hang, args=(bundle_copy, tmp_path, ready))
    process.start()
    assert ready.wait(60)
    process.kill()
    process.join()
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(folder.iterdir())) == len(before) + 1, "the export was killed too early to leave anything"
    assert built(export(bundle_copy, tmp_path, components=("decoder",))) == {}
    assert_whole(bundle_copy, tmp_path, 2)


@pytest.mark.slow
def test_two_exports_at_once_do_not_disturb_each_other(bundle_copy: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        jobs = [pool.apply_async(compete, (bundle_copy, tmp_path)) for _ in range(2)]
        counts = [job.get(120) for job in jobs]
    assert sorted(counts) == [0, 2], "what one had built, the other built again"
    assert_whole(bundle_copy, tmp_path, 2)
