"""The shipped bundle is the one that was measured."""

from __future__ import annotations

from rsd_trt.bundle import Bundle
from rsd_trt.config import ACTION_NAMES, DEFAULT_BUNDLE

MOST_BYTES = 50_000_000

# `rsd-trt info --json` gives them. A new bundle has new ones; its results are to be measured again.
SHA256 = {
    "config.json": "a4564b4f7eed5695e2b5ae0575279792281350c4378a69bea4ce77d90bd0e597",
    "tokenizer.json": "00b317bd6dbca4948b3abea74da3533ee205a45af7ea71cd21cb358f3c6f5057",
    "backbone.safetensors": "71ab3968d69794ba65c7fbab1cea3528895a605219c50eb609ae64c8a06781f3",
    "draft.safetensors": "c29f6b0ef09f0132dead0ec744cfce73bff7cc3989eb22fe0c040eb63c23285a",
    "head.safetensors": "65158a763796bb4e664d9236354013695d9a1136760e8ce960e4a7baba26ff73",
    "codec.safetensors": "10062a2c9e8ff77919ba30fa2996454ddd6c9d36015f065b3ce9a80dc759d889",
}


def test_the_shipped_bundle_is_pinned() -> None:
    bundle = Bundle.open(DEFAULT_BUNDLE)
    assert bundle.fingerprints == SHA256
    assert bundle.config.trained
    assert sum(file.stat().st_size for file in DEFAULT_BUNDLE.iterdir()) <= MOST_BYTES


def test_the_shipped_bundle_knows_its_training_actions() -> None:
    found = Bundle.open(DEFAULT_BUNDLE).config.training_actions
    assert found is not None
    for name, low, high in zip(ACTION_NAMES, found.q01, found.q99, strict=True):
        assert -1 <= low < high <= 1, name
