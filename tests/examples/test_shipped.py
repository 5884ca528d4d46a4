"""The shipped bundle is the one that was measured."""

from __future__ import annotations

from rsd_trt.bundle import Bundle
from rsd_trt.config import ACTION_NAMES, DEFAULT_BUNDLE

MOST_BYTES = 40_000_000

# `rsd-trt info --json` gives them. A new bundle has new ones; its results are to be measured again.
SHA256 = {
    "config.json": "e0d36ef8daac651884521cf0add3f665dac461e3b2441a0d47ae6d64e4ce6d42",
    "tokenizer.json": "00b317bd6dbca4948b3abea74da3533ee205a45af7ea71cd21cb358f3c6f5057",
    "backbone.safetensors": "c5f682b09d0066aada51d49e01032585ea65a24092b93114e3769441b4a0db2b",
    "draft.safetensors": "8ead7e11185586efca1446364ff8e74c01d79b161b76528a9f6c77ab41248144",
    "head.safetensors": "20137fdd7ed0697571829c490ee09179f322104a5d93240f97d1f2be80f699a0",
    "codec.safetensors": "c562722046569064dcf055d686eb37c09f6896cf5437ec3b17e6035df1fc8995",
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
