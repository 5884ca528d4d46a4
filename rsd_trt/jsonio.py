"""Frozen dataclasses to JSON values and back, strictly: an unknown key or another type is refused by name.

The same type hints give the JSON Schema; the text in an `Annotated` hint becomes its description.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from rsd_trt.errors import UserError, did_you_mean

ConfigT = TypeVar("ConfigT")
MAX_INT = 2**63 - 1
MAX_DEPTH = 32  # of a value without a type
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlist, _SHOWN.maxdict = 3, 200, 200, 12, 12


def parse(text: str | bytes, where: str) -> object:
    """JSON text as plain values.

    Raises:
        UserError: `where` cannot be read: it is no JSON, no Unicode, too deep, or has a number of too many digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{where} cannot be read: {error}") from None


def shown(value: object) -> str:
    """A value that came from a file, for a message: short, on one line, whatever it is."""
    return _SHOWN.repr(value)


def named(key: object) -> str:
    """A key that came from a file, for a message: as it is, if that is short and can be printed."""
    text = str(key)
    return text if text.isprintable() and len(text) <= 80 else shown(text)


def to_json(config: object) -> dict[str, object]:
    """The dataclass as plain JSON values (tuples become lists)."""
    data: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload]
    return data


def from_json(cls: type[ConfigT], data: object, where: str) -> ConfigT:
    """Builds `cls` from JSON values.

    Raises:
        UserError: an unknown key (with a did-you-mean), a missing key, or a value of another type; `where`
            names the file, and the message the key's path in it. So is a text that is not Unicode (a lone
            surrogate), or a number that is not finite or beyond 64 bits.
    """
    return typing.cast(ConfigT, _build(cls, data, where, ""))


def known(kind: object, value: object) -> object:
    """`value` without the keys that dataclasses of `kind` do not have."""
    arguments = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        return {name: known(hint, value[name]) for name, hint in _type_hints(kind).items() if name in value}
    if arguments and isinstance(value, list):
        return [known(arguments[0], entry) for entry in value]
    return known(arguments[0], value) if arguments and isinstance(value, Mapping) else value


def json_schema(cls: type) -> dict[str, object]:
    """The JSON Schema (2020-12) of what `to_json` gives for `cls` and `from_json` takes."""
    definitions: dict[str, object] = {}
    root = _schema(cls, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _build(kind: object, value: object, where: str, path: str) -> object:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, value, where, path)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value, where, path)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        raise UserError(f"{where}: {path} is {shown(value)}{did_you_mean(str(value)[:80], map(str, arguments))}")
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise UserError(f"{where}: {path} has {len(value)} entries, not {len(arguments)}")
        return tuple(_build(arguments[0], entry, where, f"{path}[{i}]") for i, entry in enumerate(value))
    if origin is dict and isinstance(value, dict):
        keys = [_text(str(key), where, path) for key in value]
        return {key: _build(arguments[1], value[key], where, f"{path}.{named(key)}") for key in keys}
    if kind is object:
        _check_value(value, where, path, MAX_DEPTH)
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # infinity, NaN, or a whole number that is too large
            raise UserError(f"{where}: {path} is {shown(value)}, not a finite number")
        return float(value)
    if kind is int and type(value) is int and abs(value) > MAX_INT:
        raise UserError(f"{where}: {path} is too large a whole number")
    if kind is str and isinstance(value, str):
        return _text(value, where, path)
    if kind in (int, bool) and type(value) is kind:
        return value
    raise UserError(f"{where}: {path or 'the top level'} is {shown(value)}, not {_describe(kind)}")


def _text(value: str, where: str, path: str) -> str:
    """`value`, if it can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {path} is {value[:80]!a}, not Unicode text") from None
    return value


def _check_value(value: object, where: str, path: str, depth: int) -> None:
    """Raises UserError unless a value of any type can be written as JSON again."""
    if depth == 0:
        raise UserError(f"{where}: {path.split('.')[0]} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_value(entry, where, f"{path}.{named(_text(str(key), where, path))}", depth - 1)
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            _check_value(entry, where, f"{path}[{i}]", depth - 1)
    elif isinstance(value, float):
        _build(float, value, where, path)
    elif isinstance(value, (int, str)) and not isinstance(value, bool):
        _build(type(value), value, where, path)


def _build_dataclass(cls: type, value: object, where: str, path: str) -> object:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {path or 'the top level'} is {shown(value)}, not an object")
    hints = _type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in fields:
            raise UserError(f"{where}: unknown key {prefix}{named(key)}{did_you_mean(str(key)[:80], fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise UserError(f"{where}: the key {prefix}{name} is missing")
    built = {key: _build(hints[key], entry, where, f"{prefix}{key}") for key, entry in value.items()}
    try:
        return cls(**built)
    except UserError as error:  # from __post_init__, which does not know the file
        raise UserError(f"{where}: {error}") from None


@functools.cache
def _type_hints(cls: type) -> dict[str, object]:
    """Resolved once a class: a results file holds ten thousands of records."""
    return typing.get_type_hints(cls)


def _describe(kind: object) -> str:
    origin = typing.get_origin(kind)
    names: dict[object, str] = {tuple: "a list", dict: "an object", int: "a whole number", float: "a number"}
    names |= {str: "a string", bool: "true or false"}
    return names.get(origin or kind, str(kind))


def _schema(kind: object, definitions: dict[str, object]) -> dict[str, object]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return {**_schema(arguments[0], definitions), "description": arguments[1]}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # taken, should the class refer to itself
            definitions[kind.__name__] = _object_schema(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        fixed = arguments[-1] is not Ellipsis
        length = {"minItems": len(arguments), "maxItems": len(arguments)} if fixed else {}
        return {"type": "array", "items": _schema(arguments[0], definitions), **length}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if kind is object:
        return {}
    names: dict[object, str] = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}
    return {"type": names[kind]}


def _object_schema(cls: type, definitions: dict[str, object]) -> dict[str, object]:
    hints = typing.get_type_hints(cls, include_extras=True)
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return {
        "type": "object",
        "description": " ".join((cls.__doc__ or "").split()),
        "properties": {f.name: _schema(hints[f.name], definitions) for f in dataclasses.fields(cls)},
        "required": required,
        "additionalProperties": False,
    }
