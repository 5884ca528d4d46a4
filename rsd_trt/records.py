"""What is kept on disk as JSON: records with the bounds of every field beside it, read strictly and written whole.

A subclass of `Record` is a frozen msgspec Struct. msgspec checks types and bounds as it reads; here its errors become
one line that names the file, the key's path, the value, and for a slip of the keyboard what was meant.
"""

from __future__ import annotations

import json
import re
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, inspect

from rsd_trt.errors import UserError, did_you_mean, named, reason, shown
from rsd_trt.files import own, read_bounded, write_atomically

RecordT = TypeVar("RecordT")
MAX_INT = 2**63 - 1
Natural = Annotated[int, Meta(ge=0, le=MAX_INT)]
Positive = Annotated[int, Meta(ge=1, le=MAX_INT)]
VERSIONS = ("format_version", "schema_version")  # the field of a record that says which version reads it

WORDS = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}
WORDS |= {"array": "a list", "object": "an object"}
TYPES = {int: "int", float: "float", str: "str", bool: "bool", list: "array", dict: "object", type(None): "null"}


def told(description: str) -> Meta:
    """What a field is, for the JSON Schema."""
    return Meta(description=description)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything that is kept as JSON. `__post_init__` raises UserError where fields do not fit each other."""


def parse(text: str | bytes, where: str) -> object:
    """JSON text as plain values.

    Raises:
        UserError: `where` cannot be read: it is no JSON, no Unicode, too deep, or has a number out of range or a key
            twice.
    """
    try:
        value = msgspec.json.decode(text)
        json.loads(text, object_pairs_hook=_once)
        return value
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise UserError(f"{where} cannot be read: {error}") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object, of whose values msgspec would take the last where a key stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {named(twice)} stands there twice")
    return found


def from_text(cls: type[RecordT], text: str | bytes, where: str) -> RecordT:
    """JSON text as a record.

    Raises:
        UserError: as `parse`; an unknown key (with a did-you-mean), a missing key, or a value of another type or out of
            bounds; `where` names the file, and the message the key's path in it.
    """
    try:
        return msgspec.json.decode(text, type=cls)
    except msgspec.ValidationError as error:
        raise _explained(error, cls, parse(text, where), where) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {error}") from None
    except UserError as error:  # from __post_init__, which does not know the file
        raise UserError(f"{where}: {error.message}", error.remedy) from None


def from_json(cls: type[RecordT], data: object, where: str) -> RecordT:
    """Plain JSON values as a record.

    Raises:
        UserError: as `from_text`.
    """
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise _explained(error, cls, data, where) from None
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.remedy) from None


def checked(record: RecordT, where: str) -> RecordT:
    """A record that was made here, if it could be read again.

    Raises:
        UserError: a field is out of bounds.
    """
    return from_json(type(record), to_json(record), where)


def read_record(cls: type[RecordT], path: Path) -> RecordT:
    """A file's record.

    Raises:
        UserError: as `from_text`, or the file is a link or cannot be read.
        FileNotFoundError: there is no such file.
        NotADirectoryError: what should be its folder is a file.
    """
    try:
        text = read_bounded(own(path))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    record = from_text(cls, text, str(path))
    parse(text, str(path))  # says whether a key stands there twice
    return record


def to_json(record: object) -> dict[str, object]:
    """The record as plain JSON values (tuples become lists)."""
    return typing.cast("dict[str, object]", msgspec.json.decode(msgspec.json.encode(record, enc_hook=_native)))


def to_text(record: object, indent: int = 1) -> str:
    """The record as JSON text for a file; `indent` 0: on one line."""
    text = msgspec.json.encode(record, enc_hook=_native)
    return (msgspec.json.format(text, indent=indent) if indent else text).decode() + "\n"


def write_record(path: Path, record: object, indent: int = 1) -> None:
    """Writes a record: `path` is what it was before until all of it is on the disk."""
    write_atomically(path, to_text(record, indent))


def json_schema(cls: type) -> dict[str, object]:
    """The JSON Schema (2020-12) of what `to_json` gives for `cls` and `from_json` takes."""
    schema = msgspec.json.schema(cls, schema_hook=lambda kind: {"description": f"any {kind.__name__}"})
    return to_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def differing(a: object, b: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Where two JSON values differ, by the keys of objects: the path, and both values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in {**a, **b}:
            yield from differing(a.get(key), b.get(key), f"{path}.{named(key)}" if path else named(key))
    elif a != b:
        yield path, a, b


def _native(number: object) -> object:
    """numpy's number as Python's."""
    return number.item()  # type: ignore[attr-defined]


def _explained(error: msgspec.ValidationError, cls: type, data: object, where: str) -> UserError:
    """msgspec's error as ours, with the value in `data` that it is about."""
    for name in VERSIONS:
        found, ours = data.get(name) if isinstance(data, dict) else None, _options(cls, [name])
        if type(found) is int and ours and str(found) not in ours:
            remedy = "update rsd-trt" if found > int(ours[0]) else "make it anew"
            return UserError(f"{where} has {name} {shown(found)}, this version reads {ours[0]}: {remedy}")
    message, _, place = str(error).rpartition(" - at `$") if " - at `$" in str(error) else (str(error), "", "")
    keys, value = _walk(data, re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", place), message)
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{named(key)}" for key in keys).lstrip(".")
    prefix, found_there = f"{path}." if path else "", f"{where}: {path or 'the top level'} is {shown(value)}"
    if key := re.match(r"Object contains unknown field `(.*)`", message, re.DOTALL):
        meant = did_you_mean(key[1][:80], _options(cls, keys))
        return UserError(f"{where}: unknown key {prefix}{named(key[1])}{meant}")
    if key := re.match(r"Object missing required field `(\w+)`", message):
        return UserError(f"{where}: the key {prefix}{key[1]} is missing")
    if message.startswith("Invalid enum value"):
        return UserError(f"{found_there}{did_you_mean(str(value)[:80], _options(cls, keys))}")
    if wrong := re.fullmatch(r"Expected `(.+)`, got `\w+`", message):
        return UserError(f"{found_there}, not {' or '.join(WORDS.get(kind, kind) for kind in wrong[1].split(' | '))}")
    if wrong := re.fullmatch(r"Expected `\w+` (.+)", message):
        return UserError(f"{found_there}, which must be {wrong[1]}")
    return UserError(f"{found_there}: {named(message)}")


def _walk(data: object, place: list[tuple[str, str]], message: str) -> tuple[list[str | int], object]:
    """The keys of `place`, and the value there. msgspec does not say which entry of an object it means: it is the first
    of the type that it complains about."""
    keys: list[str | int] = []
    for name, index in place:
        key: str | int = name or (int(index) if index.isdigit() else index)
        if key == "..." and isinstance(data, dict):
            key = next((k for k, v in data.items() if message.endswith(f"got `{TYPES.get(type(v))}`")), key)
        keys.append(key)
        try:
            data = data[key]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            break
    return keys, data


def _options(cls: type, keys: Sequence[str | int]) -> list[str]:
    """The fields of the record, or the values of the literal, that `cls` has at `keys`."""
    kind: object = inspect.type_info(cls)
    for key in keys:
        kind = _plain(kind, array=isinstance(key, int))
        if isinstance(kind, inspect.StructType):
            kind = next((field.type for field in kind.fields if field.name == key), None)
        elif isinstance(kind, inspect.DictType):
            kind = kind.value_type
        elif isinstance(kind, inspect.TupleType):
            kind = kind.item_types[0]
        else:
            kind = getattr(kind, "item_type", None)
    kind = _plain(kind)
    if isinstance(kind, inspect.StructType):
        return [field.name for field in kind.fields]
    return list(map(str, kind.values)) if isinstance(kind, inspect.LiteralType) else []


def _plain(kind: object, array: bool = False) -> object:
    """A type without its description, and without its None; of a union the first one, or the first `array`."""
    if isinstance(kind, inspect.Metadata):
        return _plain(kind.type, array)
    if isinstance(kind, inspect.UnionType):
        found = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
        return _plain(next((one for one in found if array and hasattr(one, "item_type")), found[0]))
    return kind
