"""The prompt's tokenizer: a `tokenizer.json`, which may be anybody's, and the ids that it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rsd_trt.errors import UserError, reason, shown
from rsd_trt.files import check_whole, read_bounded
from rsd_trt.records import parse

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
BOS = "<s>"
MOST_GROWTH = 4096  # times as much text behind the normalisers as before
PUT_IN = ("content", "prepend", "replacement", "precompiled_charsmap")  # what a step has text of its own under
MOST_TOKENS = 4096  # of a prompt: Llama 2's context


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json of a bundle or of a Hugging Face folder. It neither pads nor cuts.

    Raises:
        UserError: it is missing, cannot be read, or blows text up.
    """
    from tokenizers import Tokenizer

    file = folder / TOKENIZER
    if not file.is_file():
        raise UserError(f"{file} is missing: {folder} is incomplete")
    check_whole(file)
    try:
        data = parse(read_bounded(file), str(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from None
    if isinstance(data, dict) and growth([data.get("normalizer"), data.get("pre_tokenizer")]) > MOST_GROWTH:
        raise UserError(f"{file}: its normalisers may make text more than {MOST_GROWTH} times as long")
    try:
        tokenizer = Tokenizer.from_str(json.dumps(data))  # what was looked at, and not another reading of the file
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics are not even that
        raise UserError(f"{file} cannot be read: {reason(error)}") from None
    tokenizer.no_padding()  # rows are padded, and prompts kept whole, by whoever makes a batch of them
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text`, at least one.

    Raises:
        UserError: the tokenizer cannot encode it, or gives no ids or far too many.
    """
    try:
        ids = list(tokenizer.encode(text).ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{TOKENIZER} cannot turn {shown(text)} into tokens: {reason(error)}") from None
    if not 0 < len(ids) <= MOST_TOKENS:
        raise UserError(f"{TOKENIZER} turns {shown(text)} into {len(ids)} tokens, a prompt has 1 to {MOST_TOKENS}")
    return ids


def growth(steps: object) -> int:
    """How many times longer the normalisers and splitters in a JSON value make a text at the most, one after the other:
    any of them twice, as bytes become letters of two bytes, and as often as the text that it puts in is long."""
    product, rest = 1, [steps]
    while rest and product <= MOST_GROWTH:
        step = rest.pop()
        if isinstance(step, dict):
            texts = [step[name] for name in PUT_IN if isinstance(step.get(name), (str, list))]
            product *= 2 * max(1, 1, *map(len, texts))
            rest += step.values()
        elif isinstance(step, list):
            rest += step
    return product
