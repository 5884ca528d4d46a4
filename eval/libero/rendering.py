"""OpenGL without a screen: which renderer there is, whether its context is alive, and what to install if not."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Iterator

from rsd_trt.errors import UserError

GL_LIBRARIES = {"egl": ("libEGL.so.1",), "osmesa": ("libOSMesa.so.8", "libOSMesa.so")}


def choose_gl() -> str:
    """Sets MUJOCO_GL, if the user has not, to a headless renderer whose library is here.

    Raises:
        UserError: none is, or the one that MUJOCO_GL names is not.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted and wanted not in GL_LIBRARIES:
        return wanted
    for name in (wanted,) if wanted else GL_LIBRARIES:
        for library in GL_LIBRARIES[name]:
            with contextlib.suppress(OSError):
                ctypes.CDLL(library)
                os.environ["MUJOCO_GL"] = name
                return name
    raise UserError(
        f"no headless OpenGL for {wanted or 'EGL or OSMesa'}",
        f"Install it: apt-get install {'libosmesa6' if wanted == 'osmesa' else 'libegl1'}",
    )


def check_gl() -> None:
    """Raises RuntimeError if there is no OpenGL context: an image read then is whatever lay in the memory."""
    from OpenGL.GL import GL_VERSION, glGetString

    if glGetString(GL_VERSION) is None:
        raise RuntimeError("the OpenGL context is lost")


@contextlib.contextmanager
def explaining_gl() -> Iterator[None]:
    """Turns the many ways in which a GL context fails to come up into one line.

    Raises:
        UserError: none came up in the block.
    """
    try:
        yield
    except (ImportError, RuntimeError, AttributeError) as error:
        name = os.environ.get("MUJOCO_GL", "").upper()
        if "EGL" not in str(error).upper() and "OSMESA" not in str(error).upper():
            raise
        hook = sys.unraisablehook
        try:
            sys.unraisablehook = lambda _: None  # destructors of what is half made complain
            traceback.clear_frames(error.__traceback__)
            gc.collect()
        finally:
            sys.unraisablehook = hook
        raise UserError(
            f"{name} gives no OpenGL context ({str(error).splitlines()[0]})",
            "Install a driver: apt-get install libegl-mesa0, or libosmesa6 with MUJOCO_GL=osmesa",
        ) from None
