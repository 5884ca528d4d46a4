"""OpenGL without a screen: which renderer there is, whether its context is alive, and what to install if not."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import sys
import traceback
from collections.abc import Iterator

from rsd_trt.errors import UserError, reason

GL_LIBRARIES = {"egl": ("libEGL.so.1",), "osmesa": ("libOSMesa.so.8", "libOSMesa.so")}


def choose_gl() -> str:
    """Sets MUJOCO_GL to a headless renderer whose library is here: the one that it names, or where it names none
    that is headless, the first of ours.

    Raises:
        UserError: none is, or the one that MUJOCO_GL names is not.
    """
    device = os.environ.get("MUJOCO_EGL_DEVICE_ID", "0")
    if not (device.isascii() and device.isdigit()):
        raise UserError(f"MUJOCO_EGL_DEVICE_ID is {device!r}, not the number of a device", "Unset it, or set it to 0")
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    wanted = wanted if wanted in GL_LIBRARIES else ""
    for name in (wanted,) if wanted else GL_LIBRARIES:
        for library in GL_LIBRARIES[name]:
            with contextlib.suppress(OSError):
                ctypes.CDLL(library)
                os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = name  # MuJoCo refuses two that differ
                return name
    raise UserError(
        f"no headless OpenGL for {wanted or 'EGL or OSMesa'}",
        f"Install it: apt-get install {'libosmesa6' if wanted == 'osmesa' else 'libegl1'}",
    )


def gpu_number(device: str) -> int | None:
    """Which of the machine's GPUs a device `cuda` or `cuda:N` is, by CUDA_VISIBLE_DEVICES; None: of another device, or
    where that does not give numbers."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    place, visible = int(index or 0), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return place
    named = dict(enumerate(visible.split(","))).get(place, "").strip()
    return int(named) if named.isascii() and named.isdigit() else None


def render_on(gpu: int) -> None:
    """Has this process render on that GPU, unless MUJOCO_EGL_DEVICE_ID names one. By itself every process takes the
    first, and many that share one wait for each other."""
    if gpu < _egl_devices():
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(gpu))


def _egl_devices() -> int:
    """How many EGL has, in CUDA's order."""
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libEGL.so.1")
        library.eglGetProcAddress.restype = ctypes.c_void_p
        if found := library.eglGetProcAddress(b"eglQueryDevicesEXT"):
            query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(found)
            query(0, None, ctypes.byref(count))
    return count.value


@contextlib.contextmanager
def robosuite_alone() -> Iterator[None]:
    """For robosuite's import and its contexts. It takes CUDA_VISIBLE_DEVICES for the number of an EGL device, and opens
    a log file below the temporary folder, which may be another user's. In the block it finds neither."""
    visible, handler = os.environ.pop("CUDA_VISIBLE_DEVICES", None), logging.FileHandler
    logging.FileHandler = lambda *_: logging.NullHandler()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        logging.FileHandler = handler  # type: ignore[misc]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


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
        if "MUJOCO_EGL_DEVICE_ID" in str(error):
            device = os.environ.get("MUJOCO_EGL_DEVICE_ID")
            raise UserError(
                f"MUJOCO_EGL_DEVICE_ID is {device!r}: {reason(error)}", "Unset it, or set it to 0"
            ) from None
        raise UserError(
            f"{name} gives no OpenGL context ({str(error).splitlines()[0]})",
            "Install a driver: apt-get install libegl-mesa0, or libosmesa6 with MUJOCO_GL=osmesa",
        ) from None
