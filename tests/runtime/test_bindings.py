"""The bindings of every TensorRT that is supported have the names, enums and signatures that the project uses.

Wheels of bindings are small, and import without TensorRT's libraries: a stub of their nine functions stands in. What
cannot be had here (no index, no wheel for this Python, no compiler) is skipped with the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import bindings
import pytest

SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("nvinfer", "nvinfer_lean", "nvinfer_plugin", "nvonnxparser")
SECONDS = 120.0


def attempt(command: Sequence[object], needed: str) -> None:
    """Runs a command; skips the test with what it says if it cannot do it here."""
    try:
        subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        pytest.skip(f"{needed} cannot be had here: {told[-1]}")


def ask(module: str, target: str, *paths: Path, libraries: Path | None = None) -> dict[str, object]:
    """What bindings.py finds."""
    path = os.pathsep.join([*map(str, paths), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": str(libraries or "")}
    command = [sys.executable, bindings.__file__, module, target]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    print(f"\n| {module} | {found['version']} | {found['names']} | {found['calls']} | {len(found['problems'])} |")  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stub of each library, of every major version."""
    folder = tmp_path_factory.mktemp("stubs")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for major in (10, 11):
        for library in LIBRARIES:
            attempt(["gcc", "-shared", "-fPIC", "-o", folder / f"lib{library}.so.{major}", source], "a C compiler")
    return folder


@pytest.mark.parametrize(
    ("package", "version", "target"),
    [
        ("tensorrt-cu12-bindings", "10.4.0", "tensorrt"),
        ("tensorrt-cu13-bindings", "10.16.1.11", "tensorrt"),
        ("tensorrt-cu13-bindings", "11.4.0.106", "tensorrt"),
        ("tensorrt-lean-cu13-bindings", "11.4.0.106", "lean"),
    ],
)
def test_the_bindings_have_what_is_used(package: str, version: str, target: str, stubs: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--retries", 0]
    attempt([*pip, "-d", tmp_path, f"{package}=={version}"], f"{package} {version}")
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    module = {"tensorrt": "tensorrt_bindings", "lean": "tensorrt_lean_bindings"}[target]
    found = ask(module, target, tmp_path, libraries=stubs)
    assert (found["version"], found["problems"]) == (version, [])
    assert (found["names"], found["calls"]) >= ((45, 25) if target == "tensorrt" else (10, 5)), found


def test_the_installed_rtx_has_what_is_used() -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    found = ask("tensorrt_rtx", "rtx")
    assert found["problems"] == []
    assert (found["names"], found["calls"]) >= (45, 25), found


def test_what_is_missing_is_found() -> None:
    """Bindings that lack a name, or have it with another signature."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    code = (
        "import bindings, tensorrt_rtx as trt\n"
        "del trt.BuilderFlag\n"
        "trt.ICudaEngine.get_tensor_name = lambda self, index: 'get_tensor_name(self: x, name: str) -> str'\n"
        "for line in bindings.Bindings('tensorrt_rtx', 'rtx').problems(): print(line)\n"
    )
    path = os.pathsep.join([str(Path(bindings.__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "there is no trt.BuilderFlag\n" in told.stdout
    assert "self.engine.get_tensor_name(i) fits none of []" in told.stdout
    assert "ICudaEngine.get_tensor_name requires [], not ['index']" in told.stdout
