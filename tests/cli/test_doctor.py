"""`rsd-trt doctor`: every check where all is well and where it is not, and no check that takes another down."""

from __future__ import annotations

import importlib.metadata
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import rsd_trt
from made_without import made_without
from test_isolated import segfault

from rsd_trt import host
from rsd_trt.cli import doctor
from rsd_trt.cli.doctor import Check, Found, all_checks, examine, told
from rsd_trt.config import BACKENDS, Backend, Precision
from rsd_trt.errors import Unavailable, UserError
from rsd_trt.eval.libero.simulator import open_suite
from rsd_trt.host import Gpu
from rsd_trt.trt import Distribution, Target

ADA = Gpu("NVIDIA L4", "8.9", "580.1")
HOPPER = Gpu("NVIDIA H100", "9.0", "580.1")
Patch = pytest.MonkeyPatch


def found(look: Callable[..., Found], *arguments: object) -> Found:
    """What a check finds or raises, as its line tells it."""
    return told(Check("x", partial(look, *arguments)))


def broken(found: Found, text: str, remedy: str) -> None:
    assert found.remedy is not None
    assert text in found.text
    assert remedy in found.remedy


def test_python(monkeypatch: Patch) -> None:
    assert doctor.python().remedy is None
    with monkeypatch.context() as patch:
        patch.setattr("platform.system", lambda: "Darwin")
        broken(doctor.python(), "on Darwin", "Linux only")
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    broken(doctor.python(), "on Linux", "install Python 3.10 or later")


def test_pytorch(monkeypatch: Patch) -> None:
    assert doctor.pytorch().remedy is None

    class Wrong:
        def __matmul__(self, other: object) -> SimpleNamespace:
            return SimpleNamespace(tolist=lambda: [[2.0, 2.0], [2.0, 0.0]])

    fake = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda="12.8"), ones=lambda *_: Wrong())
    monkeypatch.setitem(sys.modules, "torch", fake)
    broken(doctor.pytorch(), "2.13.0, CUDA 12.8: a product of matrices is wrong", "install torch anew")
    monkeypatch.setitem(sys.modules, "torch", None)
    broken(doctor.pytorch(), "torch cannot be imported", "pip install")


def test_the_driver(monkeypatch: Patch) -> None:
    monkeypatch.setattr(host, "driver", lambda: "580.1")
    assert doctor.driver() == Found("580.1")
    monkeypatch.setattr(host, "driver", lambda: None)
    broken(doctor.driver(), "none", "NVIDIA's driver, or use --backend torch or ort")


def with_cuda(monkeypatch: Patch, total: float = 8.0, free: int = 10**10, error: str = "") -> None:
    """A torch with a GPU, whose sum of eight ones is `total`, or that raises."""

    def ones(count: int, device: str) -> SimpleNamespace:
        if error:
            raise RuntimeError(error)
        return SimpleNamespace(sum=lambda: total)

    cuda = SimpleNamespace(mem_get_info=lambda: (free, 2 * 10**10))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(ones=ones, cuda=cuda))
    monkeypatch.setattr(host, "gpu", lambda: ADA)


@pytest.mark.parametrize(
    ("torch", "text", "remedy"),
    [
        ({}, "NVIDIA L4, compute capability 8.9, 10.0 GB of 20.0 GB free", None),
        (
            {"error": "Found no NVIDIA driver on your system.\nMore"},
            "PyTorch cannot use one: Found no",
            "use --backend",
        ),
        ({"total": 7.0}, "a sum on the GPU gives 7, not 8", "update the driver"),
        ({"free": 1000}, "0.0 GB of 20.0 GB free; the weights of ", "nvidia-smi"),
    ],
)
def test_the_gpu(
    monkeypatch: Patch, tiny_bundle: Path, torch: dict[str, object], text: str, remedy: str | None
) -> None:
    with_cuda(monkeypatch, **torch)  # type: ignore[arg-type]
    line = doctor.cuda_gpu(tiny_bundle)
    assert text in line.text
    assert line.remedy is None if remedy is None else remedy in str(line.remedy)


def test_onnx_runtime_computes() -> None:
    line = doctor.onnx_runtime()
    assert line.remedy is None
    assert "computes on cpu" in line.text


def test_the_graph_is_the_one_that_its_name_says() -> None:
    import onnx

    model = onnx.load_from_string(doctor.NEGATE)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Neg"]
    assert [port.type.tensor_type.shape.dim[0].dim_param for port in model.graph.input] == ["B"]


def test_onnx_runtime_that_does_not(monkeypatch: Patch) -> None:
    import onnxruntime
    import torch

    with monkeypatch.context() as patch:  # a GPU, and no provider for it
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "Stream", lambda _: None)
        broken(found(doctor.onnx_runtime), "has no CUDAExecutionProvider", "pip install 'rsd-trt[cuda]'")
    with monkeypatch.context() as patch:
        wrong = {"y": SimpleNamespace(tolist=lambda: [1.0])}
        patch.setattr("rsd_trt.runtime.ort_session.OrtSession.run", lambda *_: wrong)
        broken(found(doctor.onnx_runtime), "-(1) is [1.0] on cpu", "onnxruntime anew")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider"])
    broken(found(doctor.onnx_runtime), "has no CPUExecutionProvider", "pip install 'rsd-trt[cpu]'")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    broken(found(doctor.onnx_runtime), "onnxruntime is not installed", "pip install 'rsd-trt[cpu]'")


class Bindings:
    """A TensorRT whose builder raises `error`, if there is one."""

    __version__ = "10.9"

    def __init__(self, error: str = "") -> None:
        def builder(_: object) -> SimpleNamespace:
            if error:
                raise RuntimeError(error)
            return SimpleNamespace(create_builder_config=lambda: object())

        class Logger:
            ERROR = 1

            def __init__(self, _: int) -> None: ...

        self.Builder, self.Logger = builder, Logger


@pytest.mark.parametrize(
    ("target", "gpu", "error", "text", "remedy"),
    [
        ("tensorrt", ADA, "", "10.9 can build here, can run here", None),
        ("tensorrt", None, "", "cannot build here (it builds on the GPU that runs", "--backend ort"),
        ("rtx", None, "", "can build here, cannot run here (TensorRT engines need an NVIDIA GPU", "--backend ort"),
        ("rtx", HOPPER, "", "NVIDIA H100 has 9.0", "--backend ort"),
        ("lean", HOPPER, "", "10.9 loads engines of the full TensorRT that are version-compatible, can run here", None),
        ("lean", None, "", "version-compatible, cannot run here (TensorRT engines need an NVIDIA GPU", "--backend ort"),
        ("tensorrt", ADA, "libnvinfer 11 is loaded", "cannot build here (RuntimeError: libnvinfer 11", "pip install"),
    ],
)
def test_tensorrt(
    monkeypatch: Patch, target: Target, gpu: Gpu | None, error: str, text: str, remedy: str | None
) -> None:
    monkeypatch.setattr(doctor, "find_distribution", lambda name: Distribution(name, Bindings(error)))  # type: ignore[arg-type]
    monkeypatch.setattr(host, "gpu", lambda: gpu)
    line = doctor.tensorrt(target)
    assert text in line.text
    assert line.remedy is None if remedy is None else remedy in str(line.remedy)


def install(folder: Path, name: str, version: str, files: dict[str, str] | None = None) -> None:
    """A package's metadata, and its files, where importlib.metadata finds them."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for file, text in (files or {}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
        lines.append(f"{file},,{len(text)}")
    (metadata / "RECORD").write_text("\n".join([*lines, f"{metadata.name}/RECORD,,"]))


def test_bindings_and_libraries_of_two_versions(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "find_distribution", lambda name: Distribution(name, Bindings()))  # type: ignore[arg-type]
    install(tmp_path, "tensorrt_cu13_bindings", "10.9")
    install(tmp_path, "tensorrt_cu13_libs", "11.0")
    install(tmp_path, "tensorrt_lean_cu13", "12.0")
    monkeypatch.syspath_prepend(tmp_path)
    line = doctor.tensorrt("tensorrt")
    broken(line, "tensorrt-cu13-bindings 10.9, tensorrt-cu13-libs 11.0", "all of one version")
    assert "rtx" not in line.text
    assert "lean" not in line.text


def test_a_tensorrt_that_is_not_installed_or_lacks_its_library(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    broken(found(doctor.tensorrt, "tensorrt"), "tensorrt cannot be imported", "pip install 'rsd-trt[trt]'")

    def absent(name: str) -> object:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", absent)
    broken(found(doctor.tensorrt, "tensorrt"), "libnvinfer.so.10", "pip install 'rsd-trt[trt]'")


def test_engines_run(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "runnable_distribution", lambda gpu: Distribution("rtx", Bindings()))  # type: ignore[arg-type]
    assert doctor.engines_run() == Found("rtx 10.9")

    def none(gpu: Gpu | None) -> Distribution:
        raise Unavailable("TensorRT-RTX runs on 8.9; NVIDIA H100 has 9.0", "Use: --backend ort")

    monkeypatch.setattr(doctor, "runnable_distribution", none)
    broken(found(doctor.engines_run), "NVIDIA H100 has 9.0", "--backend ort")


def test_no_opengl_library(monkeypatch: Patch) -> None:
    monkeypatch.setattr("rsd_trt.eval.libero.rendering.GL_LIBRARIES", {"egl": ("libNoEGL.so",)})
    monkeypatch.setenv("MUJOCO_GL", "egl")
    broken(found(doctor.rendering), "no headless OpenGL for egl", "apt-get install libegl1")


@pytest.mark.libero
def test_a_frame_is_rendered() -> None:
    line = doctor.rendering()
    assert line.remedy is None, line
    import mujoco  # only after the check: it reads MUJOCO_GL when it is imported

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "SCENE", "<mujoco/>")
        broken(doctor.rendering(), "the frame is empty", "MUJOCO_GL")
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object) -> None:
            raise RuntimeError("eglInitialize failed")

        patch.setattr(mujoco, "Renderer", refuse)
        broken(doctor.rendering(), "gives no OpenGL context (RuntimeError: eglInitialize failed)", "apt-get install")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mujoco", None)
        broken(doctor.rendering(), "mujoco", "rsd-trt[libero]")


@pytest.mark.slow
@pytest.mark.libero
def test_libero_is_complete(monkeypatch: Patch, tmp_path: Path) -> None:
    line = doctor.libero()
    assert (line.remedy, line.text.endswith("614 tasks, assets complete")) == (None, True)
    install(tmp_path, "libero_assets_9", "1", {"assets/bowl.xml": "whole", "assets/plate.xml": "whole"})
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.libero().remedy is None
    (tmp_path / "assets/bowl.xml").write_text("half")
    (tmp_path / "assets/plate.xml").unlink()
    broken(
        doctor.libero(), f"2 files are missing or damaged, such as: {tmp_path / 'assets/bowl.xml'}", "libero-assets-9"
    )


@pytest.mark.libero
def test_libero_without_a_tasks_description(monkeypatch: Patch, tmp_path: Path) -> None:
    lost = tmp_path / "lost.bddl"
    kind = type(open_suite("libero_goal"))
    monkeypatch.setattr(kind, "get_task_bddl_file_path", lambda self, i: str(lost))
    broken(
        doctor.libero(),
        f"such as: LIBERO does not find its files ({lost}: No such file or directory)",
        "pip install --force-reinstall --no-deps libero",
    )


def test_libero_that_is_not_installed(monkeypatch: Patch) -> None:
    monkeypatch.setattr("rsd_trt.eval.libero.simulator.choose_gl", lambda: "egl")
    monkeypatch.setitem(sys.modules, "libero.libero.envs", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "libero"]:
        monkeypatch.setitem(sys.modules, name, None)
    broken(found(doctor.libero), "LIBERO is not installed", "pip install 'rsd-trt[libero]'")


def test_the_extras(monkeypatch: Patch) -> None:
    wanted = ["click>=8", "click>=8; extra == 'cpu'", "pytest>=8; extra == 'trt'", "not_there<2; extra == 'trt'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    assert doctor.extras() == Found("complete: cpu; not: trt (lacks not_there)")


def test_the_disk(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 10**9))
    assert doctor.disk(tmp_path / "not" / "yet") == Found(f"3.0 GB free at {tmp_path}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    broken(doctor.disk(tmp_path), "1.0 GB free", "make 2.0 GB free")


def test_the_bundle(bundle_copy: Path, tmp_path: Path) -> None:
    def line() -> Found:
        (check,) = (check for check in all_checks("torch", bundle_copy, tmp_path) if check.what == "bundle")
        return told(check)

    assert line() == Found(f"{bundle_copy}: tiny, UNTRAINED, all parts load")
    made_without(bundle_copy, "backbone")
    assert line() == Found(f"{bundle_copy}: tiny, UNTRAINED, no backbone")
    draft = bundle_copy / "draft.safetensors"
    draft.write_bytes(draft.read_bytes()[:-9])
    broken(line(), f"{draft} cannot be read as safetensors", "take another copy of the bundle")
    draft.unlink()
    broken(line(), f"{draft} is missing: the bundle was made with it", "Put it back")
    (bundle_copy / "config.json").unlink()
    broken(line(), f"{bundle_copy} is no bundle: it has no config.json", "A bundle is a folder")


def test_exports(bundle_copy: Path, exported: Callable[[Precision], Path], tmp_path: Path) -> None:
    none, some = tmp_path / "engines", exported("fp32")
    broken(doctor.exports("torch", bundle_copy, none), f"none in {none / 'tiny'}", "rsd-trt export")
    broken(doctor.exports("ort", bundle_copy, none), "has no propose fp32 batch 1 for --backend ort", "rsd-trt export")
    broken(doctor.exports("trt", bundle_copy, some), "has no propose fp32 batch 1 for --backend trt", "rsd-trt export")
    for backend in ("torch", "ort"):
        line = doctor.exports(backend, bundle_copy, some)  # type: ignore[arg-type]
        assert (line.remedy, line.text.endswith("all fresh")) == (None, True)
    draft = bundle_copy / "draft.safetensors"
    draft.write_bytes(draft.read_bytes()[:-1] + b"\1")
    broken(doctor.exports("ort", bundle_copy, some), "4 of 10 cannot be used, such as: draft fp32", "rsd-trt export")
    (none / "tiny").mkdir(parents=True)
    (none / "tiny" / "manifest.json").write_text("[]")
    broken(found(doctor.exports, "ort", bundle_copy, none), "manifest.json", "rsd-trt export --force")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_isolated_can_be_sent(backend: Backend, tiny_bundle: Path, tmp_path: Path) -> None:
    for check in all_checks(backend, tiny_bundle, tmp_path):
        pickle.dumps(check)
        assert doctor._alone(check).startswith("python -c ")


def well() -> Found:
    return Found("well")


def sick() -> Found:
    return Found("sick\nand sore", "rest")


def refused() -> Found:
    raise UserError("3 apples: none left. None at all", "Buy: apples")


def bug() -> Found:
    raise KeyError("x")


CHECKS = (
    Check("well", well, ("ort",), isolated=False),
    Check("needed", sick, ("ort",), isolated=False),
    Check("noted", sick, isolated=False),
    Check("bug", bug, ("ort",), isolated=False),
    Check("refused apart", partial(refused), ("ort",)),
    Check("bug apart", partial(bug), ("ort",)),
    Check("crash", segfault),  # type: ignore[arg-type]
)


def test_no_check_takes_another_down() -> None:
    lines = examine(CHECKS, "ort", seconds=60)
    assert [(line.what, line.state, line.found) for line in lines] == [
        ("well", "ok", "well"),
        ("needed", "broken", "sick and sore"),
        ("noted", "note", "sick and sore"),
        ("bug", "broken", "KeyError: 'x'"),
        ("refused apart", "broken", "3 apples: none left. None at all"),
        ("bug apart", "broken", "KeyError: 'x'"),
        ("crash", "note", "its process ended: killed by SIGSEGV"),
    ]
    assert (
        lines[-1].remedy == 'see what it prints: python -c "from rsd_trt.cli import doctor; print(doctor.segfault())"'
    )
    assert lines[4].remedy == "Buy: apples"
    assert {line.state for line in examine(CHECKS[:4], "torch")} == {"ok", "note"}


def test_the_command(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "all_checks", lambda *_: CHECKS[:4])
    done = rsd_trt("doctor", "--backend", "ort")
    assert done.exit_code == 1
    assert done.stderr == "error: backend ort cannot work here: needed, bug\n"
    assert all(word in done.stdout for word in ("broken", "note", "rest", "KeyError"))
    done = rsd_trt("doctor", "--backend", "ort", "--json")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["broken"]) == (1, ["needed", "bug"])
    assert report["checks"][1] == {
        "what": "needed",
        "state": "broken",
        "found": "sick and sore",
        "remedy": "rest",
        "needed": True,
    }
    done = rsd_trt("doctor")
    assert (done.exit_code, done.stderr) == (0, "")
    wrong = rsd_trt("doctor", "--backend", "tr")
    assert wrong.exit_code == 2
    assert "'tr' is unknown; did you mean 'trt'?" in wrong.stderr
