"""Where the tensors of an ONNX graph lie that are not in its file: found in the bytes, without the package onnx.

A graph names files, and ONNX Runtime would open them. Here they are named before it sees the graph.
"""

from __future__ import annotations

from collections.abc import Iterator

MOST_DEPTH = 64  # of graphs in attributes of nodes; ours have none

# Of each message on the way to a tensor: the fields that lead on, and to what (onnx.proto).
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
FIXED = {1: 8, 5: 4}  # bytes of a field, by its wire type
VARINT, BYTES = 0, 2


def locations(graph: bytes) -> set[str]:
    """The names of files that hold weights of a serialised ModelProto.

    Raises:
        ValueError: it is none.
    """
    return set(_locations(memoryview(graph), "model", 0))


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > MOST_DEPTH:
        raise ValueError("its graphs are nested too deeply")
    for number, value in _fields(message):
        inner = FIELDS[kind].get(number)
        if inner == "entry":
            entry = {name: bytes(text).decode() for name, text in _fields(value)}
            if entry.get(1) == "location":
                yield entry.get(2, "")
        elif inner is not None:
            yield from _locations(value, inner, depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Numbers and contents of the fields that have a length; of others nothing is to be known."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            _, at = _varint(message, at)
            continue
        if wire == BYTES:
            length, at = _varint(message, at)
        elif wire in FIXED:
            length = FIXED[wire]
        else:
            raise ValueError(f"it has a field of type {wire}")
        if at + length > len(message):
            raise ValueError("it ends early")
        if wire == BYTES:
            yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number there, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends early")
        byte = message[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("it has a number of more than ten bytes")
