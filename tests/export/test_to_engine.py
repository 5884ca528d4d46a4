"""Engines, really built with TensorRT-RTX on the CPU. Nothing here can run one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tensorrt_rtx as trt

from rsd_trt.bundle import Bundle
from rsd_trt.config import COMPONENTS, MAX_BATCH, Component, Precision
from rsd_trt.errors import UserError
from rsd_trt.export.run import ExportRequest, Outcome, export_bundle
from rsd_trt.export.to_engine import EngineOptions, build_engine, check_options, layer_report
from rsd_trt.host import Gpu
from rsd_trt.manifest import Batch, folder_of, freshness, read_manifest
from rsd_trt.trt import RTX_CAPABILITIES, Distribution, Target, find_distribution

MAGIC = b"vtrt"  # the first bytes of a TensorRT-RTX engine
PARTS = ("draft", "head", "decoder")  # of which `propose` and `predict` are made
GPU = Gpu("NVIDIA L4", "8.9", "600.1")

Steps = list[tuple[str, int, int]]


def watched(before_build: Callable[[Any, Any, Any], object]) -> ModuleType:
    """TensorRT-RTX with a builder that first calls `before_build(network, config, profile)`."""

    class Builder(trt.Builder):
        def __init__(self, logger: object) -> None:
            super().__init__(logger)
            self.profile = None

        def create_optimization_profile(self) -> object:
            self.profile = super().create_optimization_profile()
            return self.profile

        def build_serialized_network(self, network: object, config: object) -> object:
            before_build(network, config, self.profile)
            return super().build_serialized_network(network, config)

    module = ModuleType("double")
    vars(module).update(vars(trt) | {"Builder": Builder})
    return module


@pytest.fixture(scope="module")
def rtx(
    bundle: Bundle, exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Outcome], Steps]:
    """An engines folder with every component's engines in fp32, and what was reported while they were built."""
    folder = Path(shutil.copytree(exported("fp32"), tmp_path_factory.mktemp("rtx") / "engines"))
    outcomes: list[Outcome] = []
    steps: Steps = []
    request = ExportRequest(folder, distribution=find_distribution("rtx"))
    export_bundle(bundle, request, outcomes.append, lambda *step: steps.append(step))
    return folder, outcomes, steps


def graph(bundle: Bundle, engines: Path, component: Component, precision: Precision, batch: Batch) -> Path:
    folder = folder_of(bundle, engines)
    artefact = read_manifest(folder, bundle).find(component, precision, batch, "onnx")
    assert artefact is not None
    return folder / artefact.files[0].name


def build(
    bundle: Bundle, file: Path, component: Component, options: EngineOptions | None = None, module: ModuleType = trt
) -> bytes:
    signature = bundle.component(component).signature
    cache = file.parent / "timing.cache"
    return build_engine(
        file, signature, Distribution("rtx", module), options or EngineOptions(), cache, lambda *_: None
    )


@pytest.mark.parametrize("batch", ["1", "dynamic"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_has_an_engine(
    bundle: Bundle, rtx: tuple[Path, list[Outcome], Steps], component: Component, batch: Batch
) -> None:
    folder = folder_of(bundle, rtx[0])
    manifest = read_manifest(folder, bundle)
    source, engine = (manifest.find(component, "fp32", batch, kind) for kind in ("onnx", "rtx"))
    assert source is not None
    assert engine is not None
    assert engine.engine is not None
    assert (folder / engine.files[0].name).read_bytes().startswith(MAGIC)
    assert engine.engine.version == trt.__version__
    assert engine.engine.onnx_sha256 == source.files[0].sha256
    assert engine.engine.flags == ("strongly_typed", "no_tf32")
    assert (engine.engine.gpu, engine.engine.driver, engine.engine.compute_capabilities) == (None, None, ())
    assert (engine.inputs, engine.outputs, engine.opset) == (source.inputs, source.outputs, source.opset)
    assert freshness(engine, folder, bundle, find_distribution("rtx"), GPU) == (True, "fresh")


def test_graphs_are_kept_and_engines_reported_with_their_progress(rtx: tuple[Path, list[Outcome], Steps]) -> None:
    _, outcomes, steps = rtx
    assert len(outcomes) == 4 * len(COMPONENTS)
    assert {outcome.artefact.kind: outcome.built for outcome in outcomes} == {"onnx": False, "rtx": True}
    assert all(phase and 1 <= done <= total for phase, done, total in steps)
    assert sum(done == 1 for _, done, _ in steps) == 2 * len(COMPONENTS)  # every build counts from one


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "component", ["propose", "predict", *(pytest.param(part, marks=pytest.mark.slow) for part in PARTS)]
)
def test_half_precision_builds(
    bundle: Bundle, exported: Callable[..., Path], component: Component, precision: Precision
) -> None:
    file = graph(bundle, exported(precision, component), component, precision, "dynamic")
    assert build(bundle, file, component).startswith(MAGIC)


@pytest.mark.parametrize(
    ("component", "batch", "capabilities", "profiles", "names"),
    [
        ("decoder", "1", (), 0, []),
        ("decoder", "dynamic", ("8.9", "12.0"), 1, ["SM89", "SM120"]),
        ("predict", "dynamic", (), 1, []),
        ("decoder", "1", RTX_CAPABILITIES, 0, ["SM80", "SM86", "SM89", "SM120", "SM121"]),
    ],
)
def test_what_the_builder_is_asked_for(
    bundle: Bundle,
    exported: Callable[..., Path],
    component: Component,
    batch: Batch,
    capabilities: tuple[str, ...],
    profiles: int,
    names: list[str],
) -> None:
    asked: dict[str, object] = {}

    def note(network: Any, config: Any, profile: Any) -> None:
        asked["strongly typed"] = network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        asked["flags"] = [name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)]
        count = config.num_compute_capabilities
        asked["capabilities"] = [config.get_compute_capability(i).name for i in range(count)]
        asked["profiles"] = config.num_optimization_profiles
        inputs = [network.get_input(i).name for i in range(network.num_inputs)]
        asked["shapes"] = {name: [tuple(x) for x in shapes] for name in inputs if (shapes := profile.get_shape(name))}

    file = graph(bundle, exported("fp32"), component, "fp32", batch)
    assert build(bundle, file, component, EngineOptions(capabilities), watched(note)).startswith(MAGIC)
    signature = bundle.component(component).signature
    assert asked == {
        "strongly typed": True,
        "flags": [],  # TF32 is on unless cleared
        "capabilities": names,
        "profiles": profiles,
        "shapes": {
            port.name: [signature.shape(port, n) for n in (1, 1, MAX_BATCH)]
            for port in signature.inputs
            if profiles and "B" in port.dims
        },
    }


@pytest.mark.parametrize(
    ("target", "options", "gpu", "message"),
    [
        ("rtx", EngineOptions(("8.9", "12.0")), None, None),
        (
            "lean",
            EngineOptions(),
            GPU,
            "TensorRT's lean runtime builds no engines. Use: --target tensorrt --version-compatible",
        ),
        ("tensorrt", EngineOptions(version_compatible=True, hardware_compatible=True), GPU, None),
        (
            "rtx",
            EngineOptions(("8.9", "9.0")),
            None,
            "TensorRT-RTX does not build for compute capability 9.0 (known: 8.0, 8.6, 8.9, 12.0, 12.1)",
        ),
        (
            "tensorrt",
            EngineOptions(),
            None,
            "TensorRT builds an engine on the GPU that will run it, and none is usable here. "
            "Build ahead of time: --target rtx",
        ),
        (
            "tensorrt",
            EngineOptions(("8.9",)),
            GPU,
            "--compute-capability is for --target rtx: TensorRT builds for the GPU at hand",
        ),
        (
            "rtx",
            EngineOptions(version_compatible=True),
            GPU,
            "--version-compatible and --hardware-compatible are for --target tensorrt",
        ),
        (
            "rtx",
            EngineOptions(hardware_compatible=True),
            None,
            "--version-compatible and --hardware-compatible are for --target tensorrt",
        ),
    ],
)
def test_what_a_distribution_cannot_build(
    target: Target, options: EngineOptions, gpu: Gpu | None, message: str | None
) -> None:
    distribution = Distribution(target, ModuleType("double"))
    if message is None:
        check_options(distribution, options, gpu)
        return
    with pytest.raises(UserError) as error:
        check_options(distribution, options, gpu)
    assert str(error.value) == message


def test_turing_is_left_out_since_it_cannot_run_the_codec(bundle: Bundle, exported: Callable[..., Path]) -> None:
    def for_turing(_network: Any, config: Any, _profile: Any) -> None:
        config.num_compute_capabilities = 1
        assert config.set_compute_capability(trt.ComputeCapability.SM75, 0)

    file = graph(bundle, exported("fp32"), "decoder", "fp32", "1")
    with pytest.raises(UserError, match="FP32 GEMM is not supported"):
        build(bundle, file, "decoder", module=watched(for_turing))


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x08\x0a truncated", None], ids=str)
def test_what_is_no_onnx_is_refused(bundle: Bundle, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "graph.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        build(bundle, file, "decoder")
    assert str(error.value).startswith(f"rtx cannot parse {file}: ")
    assert "\n" not in str(error.value)


def test_a_failed_build_says_what_the_builder_logged(bundle: Bundle, exported: Callable[..., Path]) -> None:
    # RTX has no runtime that it could put into an engine.
    module = watched(lambda _network, config, _profile: config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE))
    file = graph(bundle, exported("fp32"), "decoder", "fp32", "1")
    with pytest.raises(UserError, match="Unable to load library") as error:
        build(bundle, file, "decoder", module=module)
    assert str(error.value).startswith(f"rtx {trt.__version__} cannot build {file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*unsupported in TensorRT-RTX:DeprecationWarning")
@pytest.mark.parametrize("before", [None, b"", b"of another GPU"], ids=str)
def test_tensorrt_keeps_a_timing_cache(
    bundle: Bundle, exported: Callable[..., Path], tmp_path: Path, before: bytes | None
) -> None:
    cache = tmp_path / "timing.cache"
    if before is not None:
        cache.write_bytes(before)
    file = graph(bundle, exported("fp32"), "decoder", "fp32", "1")
    signature, options = bundle.component("decoder").signature, EngineOptions(hardware_compatible=True)
    # RTX stands in for TensorRT: it has the same names.
    assert build_engine(file, signature, Distribution("tensorrt", trt), options, cache, lambda *_: None)
    assert cache.is_file()
    assert cache.read_bytes() != before


def test_a_report_needs_an_engine_that_loads() -> None:
    with pytest.raises(UserError, match=r"the engine cannot be loaded for a report: .*Assertion bufferSize") as error:
        layer_report(b"nonsense", Distribution("rtx", trt))
    assert "\n" not in str(error.value)
