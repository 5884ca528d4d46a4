"""Valid files made hostile: strategies for damaged bytes, damaged JSON, and what lies in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

from hypothesis import strategies as st

DEEP = 20_000  # brackets inside one another
DIGITS = 6_000  # of a whole number: more than Python converts
LONG = 50_000  # characters

# Stand-ins for text that json.dumps does not write.
RAW = {
    "@deep list@": "[" * DEEP + "]" * DEEP,
    "@nearly too deep@": "[" * 900 + "]" * 900,
    "@deep object@": '{"a":' * DEEP + "1" + "}" * DEEP,
    "@digits@": "9" * DIGITS,
    "@surrogate@": r'"\ud800"',
    "@twice@": '{"a": 1, "a": 2}',
    "@infinite@": "1e999",
}

values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 64, 255, 4097, 2**20, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]),
    st.integers(),
    st.sampled_from([0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(
        [
            *("", ".", "..", "/", "../../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "con\n", "\x1b[2J", "\u202e", "é"),
            *("x" * LONG, "{instruction}", "%s%n", "{0.__class__}", "__import__('os').system('true')", "bfloat16"),
            *("F64", "I64", "F8_E4M3", "BOOL", "layernorm", "conditioned", "tokens", "onnx", "dynamic", "draft"),
        ]
    ),
    st.text(max_size=20),
    st.sampled_from(sorted(RAW)),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-2, 2), max_size=9),
    st.just([0] * 5000),
)


def nodes(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value inside a JSON value, itself excepted."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from nodes(value[key], (*path, key))


@st.composite
def damaged_json(draw: st.DrawFn, valid: object, most: int = 3) -> str:
    """`valid` with up to `most` values replaced, removed, added or renamed."""
    changed = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, most))):
        paths = list(nodes(changed))
        if not paths or draw(st.integers(0, 40)) == 0:
            changed = copy.deepcopy(draw(values))
            break
        *parents, key = draw(st.sampled_from(paths))
        holder: object = changed
        for parent in parents:
            holder = holder[parent]  # type: ignore[index]
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "rename"]))
        if isinstance(holder, list):
            if what == "remove":
                del holder[key]  # type: ignore[arg-type]
            elif what == "add":
                holder.insert(key, copy.deepcopy(holder[key]))  # type: ignore[arg-type, index]
            else:
                holder[key] = copy.deepcopy(draw(values))  # type: ignore[index]
        elif isinstance(holder, dict):
            if what == "remove":
                del holder[key]
            elif what == "add":
                name = draw(st.sampled_from(["extra", "con\n", "", "\x1b[2J", "__class__"]))
                holder[name] = copy.deepcopy(draw(values))
            elif what == "rename":
                holder[str(key)[:-1]] = holder.pop(key)
            else:
                holder[key] = copy.deepcopy(draw(values))
    text = json.dumps(changed)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """`valid` cut short, with bytes changed, removed, repeated or put in, or something else altogether."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(data), draw(st.sampled_from([16, 256, len(valid)]))) - 1)))
        what = draw(st.sampled_from(["cut", "flip", "remove", "insert", "repeat", "replace"]))
        if what == "cut":
            del data[at:]
        elif what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        elif what == "insert":
            marks = st.sampled_from([b"\xff\xfe", b"\xef\xbb\xbf", b"\0"])
            data[at:at] = draw(st.one_of(st.binary(max_size=16), marks))
        elif what == "repeat":
            data[at:at] = data[at : at + 64] * draw(st.integers(1, 50))
        elif what == "replace":
            data = bytearray(draw(st.binary(max_size=64)))
    return bytes(data)


def damaged_file(valid: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file made hostile, mostly inside its values."""
    inside = damaged_json(json.loads(valid)).map(str.encode)
    encoded = damaged_json(json.loads(valid)).map(lambda text: text.encode("utf-16"))
    return st.one_of(inside, inside, inside, damaged_bytes(valid), encoded)
