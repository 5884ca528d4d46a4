"""Stacked classifiers against the plain ones that checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rsd_trt.config import Dims, HeadConfig, HiddenDraftConfig
from rsd_trt.models.classifiers import Classifiers, StackedClassifiers, stacked
from rsd_trt.models.draft import DraftModel
from rsd_trt.models.head import build_head

DIMS = Dims(T=3, D=2, L=4, C=2, K=3)
HIDDEN = 10


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("part", ["draft", "rfsq", "conditioned"])
@torch.no_grad()
def test_stacked_equals_plain(part: str, batch: int, randomise: Callable[..., None]) -> None:
    if part == "draft":
        module = DraftModel(HiddenDraftConfig(width=8, mlp_width=16, positions=1), DIMS, HIDDEN)
    else:
        module = build_head(HeadConfig(kind=part, feature=8, width=6, embedding=4), DIMS, HIDDEN)  # type: ignore[arg-type, assignment]
    randomise(module)
    inputs = [torch.randn(batch, HIDDEN)]
    if part == "conditioned":
        inputs.append(torch.randint(0, DIMS.K, (batch, DIMS.T, DIMS.D, DIMS.C)))
    plain = module(*inputs)
    fast = stacked(module)
    assert any(isinstance(child, StackedClassifiers) for child in fast.modules())
    assert not any(isinstance(child, Classifiers) for child in fast.modules())
    torch.testing.assert_close(fast(*inputs), plain, rtol=1e-5, atol=1e-5)


def test_deeper_classifiers_stay_plain() -> None:
    head = build_head(HeadConfig(kind="classification", width=8), DIMS, HIDDEN)
    assert not any(isinstance(child, StackedClassifiers) for child in stacked(head).modules())
