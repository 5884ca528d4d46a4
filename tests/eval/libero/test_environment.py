"""What the environment may hold: it renders all the same, or one line names the variable."""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

import pytest

from rsd_trt.errors import UserError
from rsd_trt.eval.libero import simulator
from rsd_trt.eval.libero.rendering import choose_gl
from rsd_trt.eval.libero.simulator import open_suite


@pytest.mark.parametrize("held", ["glfw", "disable", "elg", ""])
def test_a_renderer_of_ours_is_taken_where_none_is_named(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", held)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    assert choose_gl() in ("egl", "osmesa")
    assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == choose_gl()


@pytest.mark.libero
def test_nobody_is_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    open_suite("libero_spatial")
    assert os.environ.pop("HOME") == "/"


@pytest.mark.libero
@pytest.mark.parametrize(("cache", "told"), [(None, "HOME is '/nowhere'"), ("/none", "NUMBA_CACHE_DIR is '/none'")])
def test_numba_has_no_folder(cache: str | None, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("cannot cache function 'mat2quat': no locator available for file 'x.py'")

    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    if cache is not None:
        monkeypatch.setenv("NUMBA_CACHE_DIR", cache)
    monkeypatch.setattr(simulator, "robosuite_alone", refuse)
    with pytest.raises(UserError, match=f"numba cannot write what it compiles: {told}.*NUMBA_CACHE_DIR="):
        open_suite("libero_spatial")


def test_another_package_hides_libero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libero").mkdir()
    (tmp_path / "libero" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "libero"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"hides LIBERO \(PYTHONPATH is "):
        open_suite("libero_spatial")
