"""The built wheel in an empty environment: what is shipped is all that it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import rsd_trt

ROOT = Path(__file__).parents[1]
SHIPPED = (
    "rsd_trt/py.typed",
    "rsd_trt/eval/results.schema.json",
    "rsd_trt/eval/report/templates/report.html.jinja",
    "rsd_trt/eval/report/templates/report.md.jinja",
    "rsd_trt/eval/report/templates/report.css",
    "rsd_trt/export/to_onnx.py",
    "rsd_trt/runtime/policy.py",
    "rsd_trt/training/readers/recorded.py",
    *(f"rsd_trt/bundles/reference/{part}.safetensors" for part in ("backbone", "draft", "head", "codec")),
    "rsd_trt/bundles/reference/config.json",
    "rsd_trt/bundles/reference/tokenizer.json",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree: setuptools leaves its build folder beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if names.returncode:
        pytest.skip("the tree is no git checkout, so that what belongs to it is not known")
    for name in filter(None, names.stdout.split("\0")):
        if name.startswith(("tests/", "docs/")) or not os.path.lexists(ROOT / name):
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("rsd_trt-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a new environment with the wheel, and with the dependencies that the tests run with."""
    environment = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    # Behind the environment's own packages; a .pth file in there, such as that of an editable install, is not read.
    library = next(environment.glob("lib/python3*/site-packages"))
    (library / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "--force-reinstall", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return environment / "bin"


def run(installed: Path, folder: Path, script: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(installed / script), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_all_that_is_read_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(SHIPPED) <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"rsd_trt", f"rsd_trt-{rsd_trt.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "python", "-c", "import rsd_trt; print(rsd_trt.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert run(installed, tmp_path, "rsd-trt", "--version") == f"rsd-trt, version {rsd_trt.__version__}\n"


@pytest.mark.slow
def test_the_installed_package_works(installed: Path, tmp_path: Path) -> None:
    assert "reference" in run(installed, tmp_path, "rsd-trt", "info")  # the bundle that is shipped
    run(installed, tmp_path, "rsd-trt", "init", "bundle", "--size", "tiny")
    run(installed, tmp_path, "rsd-trt", "export", "bundle", "--target", "onnx", "--component", "decoder")
    example = (
        "import numpy as np, rsd_trt\n"
        "policy = rsd_trt.Policy.load('bundle')\n"
        "control = policy.config.control\n"
        "side, cameras = control.camera_size, len(control.cameras)\n"
        "images = np.zeros((cameras, side, side, 3), np.uint8)\n"
        "print(policy.act(rsd_trt.Observation(images, np.zeros(8, np.float32), 'x')).shape[1])\n"
    )
    assert run(installed, tmp_path, "python", "-c", example) == "7\n"


@pytest.mark.libero
@pytest.mark.slow
def test_the_installed_package_runs_what_the_demo_runs(installed: Path, tmp_path: Path) -> None:
    shown = ("--tasks", "0", "--trials", "1", "--max-steps", "12", "--perturb", "late:7", "--video", "--out", "demo")
    run(installed, tmp_path, "rsd-trt", "eval", "--mode", "baseline,rsd", *shown)
    run(installed, tmp_path, "rsd-trt", "report", "demo")
    assert len(list((tmp_path / "demo" / "videos" / "beside").glob("*.mp4"))) == 1
    assert (tmp_path / "report" / "report.html").stat().st_size


def test_the_installed_package_reports(installed: Path, tmp_path: Path) -> None:
    recorded = ROOT / "docs" / "results" / "reference"
    files = [str(recorded / f"{name}.json.gz") for name in ("late_baseline_6", "late_rsd_first")]
    run(installed, tmp_path, "rsd-trt", "report", *files, "-o", "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "frontier.png",
        "performance_comparison.json",
        "report.html",
        "report.md",
    }
