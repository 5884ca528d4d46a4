"""Tokenizers that others wrote: what they may not do to a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile import SECONDS, memory, within

from rsd_trt.errors import UserError
from rsd_trt.presets import byte_tokenizer
from rsd_trt.prompts import MOST_TOKENS, TOKENIZER, encode, growth, read_tokenizer

PROMPT = "In: What action should the robot take to pick up the black bowl?\nOut:"
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LLAMA = [
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
COPIES = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 5000,
    "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
    "special_tokens": {},
}


def sequence(*steps: object) -> dict[str, object]:
    return {"type": "Sequence", "normalizers": list(steps)}


def encoded(folder: Path, **changes: object) -> list[int]:
    (folder / TOKENIZER).write_text(json.dumps({**json.loads(byte_tokenizer().to_str()), **changes}))
    return encode(read_tokenizer(folder), PROMPT)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": sequence(*[DOUBLE] * 40)},
        {"normalizer": sequence(*[{k: v for k, v in DOUBLE.items() if k != "type"}] * 40)},
        {"normalizer": sequence({"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1_000_000})},
        {"normalizer": sequence(*[{"type": "ByteLevel"}] * 40)},
        {"normalizer": sequence({"type": "Prepend", "prepend": "x" * 1_000_000}, DOUBLE)},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}},
    ],
    ids=["doubled", "without a type", "by a long text", "bytes", "a prefix", "splitters"],
)
def test_a_small_tokenizer_blows_no_prompt_up(changes: dict[str, object], tmp_path: Path) -> None:
    before = memory(anew=True)
    with within(SECONDS), pytest.raises(UserError, match=r"tokenizer\.json: its normalisers may make text more than"):
        encoded(tmp_path, **changes)
    assert memory() - before < 64 << 20


@pytest.mark.parametrize(
    ("steps", "times"), [(LLAMA, 8), ([BYTES], 2), ([sequence(*LLAMA), BYTES], 32), (None, 1), ([DOUBLE], 8)]
)
def test_what_usual_steps_may_add(steps: object, times: int) -> None:
    assert growth(steps) == times


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "[UNK]"}}, "Missing [UNK] token"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}}, "`unk_id` is missing"),
        ({"model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}, "post_processor": None}, "into 0 tokens"),
        ({"post_processor": COPIES}, f"into 345000 tokens, a prompt has 1 to {MOST_TOKENS}"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_is_one_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        encoded(tmp_path, **changes)
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_llamas_normalisers_pass(tmp_path: Path) -> None:
    assert len(encoded(tmp_path, normalizer=sequence(*LLAMA))) > len(PROMPT)
