"""Messages with arrays in them, as robots' clients write them: msgpack of openpi and vla-eval, JSON of json_numpy.

Whatever comes in is hostile until it was looked at: sizes, depth, types and shapes are checked before anything is made
of them, and nothing that could run is ever read (no pickle, no object arrays).
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

import msgpack
import msgspec
import numpy as np
from numpy.typing import NDArray

from rsd_trt.errors import UserError, missing_extra, shown

Array = NDArray[Any]

MAX_DEPTH = 8  # of maps and lists inside one another
MAX_ITEMS = 4096  # of all maps and lists of a message
MAX_TEXT = 4096  # characters of a string that is no array
MAX_DIMS = 6
MAX_SIDE = 4096  # pixels of a compressed image
MAX_PIXELS = 8 << 20  # of all compressed images of a message: four of 1920 x 1080
DTYPE = re.compile(r"[<>|=]?(?:[biu]1|[iuf][248]|b1|\?)")


class BadMessage(UserError):
    """What came in is not a message: one line for whoever sent it."""


def unpack(data: bytes) -> object:
    """A msgpack frame as plain values, with the maps of arrays as they are: `arrays` makes them.

    Raises:
        BadMessage: it is none.
    """
    left = MAX_ITEMS

    def counted(value: Sized) -> Sized:  # called as soon as each map and list is there
        nonlocal left
        left -= max(1, len(value))
        if left < 0:
            raise BadMessage(f"the message has more than {MAX_ITEMS} items")
        return value

    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_str_len=MAX_TEXT * 4,
            max_ext_len=0,
            list_hook=counted,
            object_hook=counted,
        )
    except BadMessage:
        raise
    except Exception as error:  # the library's share no base class, and a damaged frame is the sender's fault
        raise BadMessage(f"the frame of {len(data)} bytes is no msgpack message ({type(error).__name__})") from None


def pack(value: object, keys: type[bytes] | type[str] = bytes) -> bytes:
    """Plain values and arrays as a msgpack frame. keys: openpi's decoder looks for bytes, vla-eval's for strings."""

    def written(x: object) -> object:
        if isinstance(x, np.ndarray):
            names = ("__ndarray__", "data", "dtype", "shape")
            values = (True, np.ascontiguousarray(x).data, x.dtype.str, x.shape)  # a view: frames are copied once
            return {name.encode() if keys is bytes else name: y for name, y in zip(names, values, strict=True)}
        if isinstance(x, np.generic):
            return x.item()
        raise TypeError(f"{type(x).__name__} cannot be sent")

    return msgspec.msgpack.encode(value, enc_hook=written)


def parse(data: bytes | str) -> object:
    """JSON as plain values.

    Raises:
        BadMessage: it is none, too deep or too large.
    """
    try:
        text = data.encode() if isinstance(data, str) else data
        if sum(map(text.count, (b",", b"[", b"{"))) > MAX_ITEMS:  # before anything is made of them
            raise BadMessage(f"the body has more than {MAX_ITEMS} items")
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:  # of UTF-8, and msgspec's
        raise BadMessage(f"the body is no JSON: {shown(str(error))}") from None


def to_json(value: object) -> bytes:
    """Plain values and arrays as JSON, arrays as json_numpy writes them."""

    def written(x: object) -> object:
        if isinstance(x, np.ndarray):
            data = base64.b64encode(x.tobytes()).decode()
            return {"__numpy__": data, "dtype": x.dtype.str, "shape": list(x.shape)}
        raise TypeError(f"{type(x).__name__} cannot be sent")

    return msgspec.json.encode(value, enc_hook=written)


@dataclass
class Budget:
    """What is left for the rest of a message."""

    pixels: int = MAX_PIXELS


def arrays(value: object, depth: int = 0, budget: Budget | None = None) -> object:
    """Plain values with every map that stands for an array, a number of NumPy's or an image made into one.

    Raises:
        BadMessage: it is too deep, its images are too large, or an array is not what its map says.
    """
    budget = budget or Budget()
    if depth > MAX_DEPTH:
        raise BadMessage(f"the message has more than {MAX_DEPTH} maps and lists inside one another")
    if isinstance(value, dict):
        if b"__ndarray__" in value:
            return _array(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"))
        if "__ndarray__" in value:
            return _array(value.get("data"), value.get("dtype"), value.get("shape"))
        if "__numpy__" in value:
            return _array(_base64(value["__numpy__"]), value.get("dtype"), value.get("shape"))
        if "__image__" in value:
            return _image(value, budget)
        if b"__npgeneric__" in value:
            return _number(value.get(b"data"), value.get(b"dtype"))
        if not all(isinstance(key, str) for key in value):
            raise BadMessage("the message has a key that is no text")
        return {key: arrays(x, depth + 1, budget) for key, x in value.items()}
    if isinstance(value, list):
        return [arrays(x, depth + 1, budget) for x in value]
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise BadMessage(f"the message has a text of {len(value)} characters, {MAX_TEXT} are allowed")
    if value is None or isinstance(value, (str, bool, int, float, bytes)):
        return value
    raise BadMessage(f"the message has a value of type {type(value).__name__}")


def _array(data: object, dtype: object, shape: object) -> Array:
    """[shape], a view of `data` that cannot be written to."""
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise BadMessage(f"an array has the dtype {shown(dtype)}: bool, int, uint and float are read")
    if not isinstance(shape, (list, tuple)) or len(shape) > MAX_DIMS:
        raise BadMessage(f"an array has the shape {shown(shape)}, no list of at most {MAX_DIMS} sizes")
    if not all(type(size) is int and 0 <= size <= 1 << 31 for size in shape):
        raise BadMessage(f"an array has the shape {shown(shape)}")
    kind = np.dtype(dtype)
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * kind.itemsize:
        there = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise BadMessage(f"an array {list(shape)} of {dtype} has {there}, not {math.prod(shape) * kind.itemsize} bytes")
    try:
        return np.frombuffer(data, kind).reshape(shape)
    except ValueError:  # no bytes, for a size that NumPy cannot count
        raise BadMessage(f"an array has the shape {shown(shape)}") from None


def _base64(text: object) -> bytes:
    try:
        return base64.b64decode(text, validate=True)  # type: ignore[arg-type]
    except (ValueError, TypeError, binascii.Error):
        raise BadMessage("an array's data are no base64") from None


def _number(data: object, dtype: object) -> int | float | bool:
    """openpi's way of writing a NumPy scalar."""
    if not isinstance(data, (int, float, bool)) or not isinstance(dtype, str):
        raise BadMessage(f"a number is {shown(data)} of dtype {shown(dtype)}")
    return data


def _image(value: Mapping[Any, object], budget: Budget) -> Array:
    """vla-eval's way of writing an image: PNG or JPEG, looked at before it is decoded, or raw."""
    if value.get("format") == "raw":
        return _array(value.get("data"), value.get("dtype"), value.get("shape"))
    data, kind = value.get("data"), value.get("format")
    if kind not in ("png", "jpeg") or not isinstance(data, bytes):
        raise BadMessage(f"an image has the format {shown(kind)}, not png, jpeg or raw")
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "serve") from None
    try:
        with Image.open(io.BytesIO(data), formats=(kind.upper(),)) as image:
            if max(image.size) > MAX_SIDE or image.mode not in ("RGB", "L", "RGBA"):
                raise BadMessage(f"an image is {image.mode} {image.size}: RGB of at most {MAX_SIDE} a side is read")
            budget.pixels -= image.width * image.height
            if budget.pixels < 0:
                raise BadMessage(f"the images have more than {MAX_PIXELS} pixels together")
            return np.asarray(image)
    except BadMessage:
        raise
    except Exception as error:  # Pillow's errors on damaged files are of many kinds
        raise BadMessage(f"an image cannot be read as {kind} ({type(error).__name__})") from None
