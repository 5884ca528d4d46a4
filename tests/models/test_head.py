"""The three heads: the original experiment's state dicts, and forwards assembled from its description."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from msgspec import structs
from torch import nn

from rsd_trt.config import Dims, HeadConfig
from rsd_trt.models.head import ConditionedRFSQHead, Head, RFSQClassificationHead, RFSQHead, build_head

Shapes = dict[str, tuple[int, ...]]
TINY = Dims(T=2, D=3, L=4, C=2, K=5)
HIDDEN = 10


def project(prefix: str, first: int, inputs: int, outputs: int) -> Shapes:
    """Linear, GELU, LayerNorm, of which the Linear is number `first` of its sequence."""
    return {
        f"{prefix}.{first}.weight": (outputs, inputs),
        f"{prefix}.{first}.bias": (outputs,),
        f"{prefix}.{first + 2}.weight": (outputs,),
        f"{prefix}.{first + 2}.bias": (outputs,),
    }


def linear(prefix: str, inputs: int, outputs: int) -> Shapes:
    return {f"{prefix}.weight": (outputs, inputs), f"{prefix}.bias": (outputs,)}


LAYER_HEADS = {
    key: shape
    for i in range(8)
    for key, shape in (project(f"layer_heads.{i}", 0, 1024, 512) | linear(f"layer_heads.{i}.3", 512, 896)).items()
}
RFSQ = project("feature_proj", 0, 4096, 1024) | LAYER_HEADS
CONDITIONED = (
    RFSQ
    | {"token_embedding.weight": (7, 64)}
    | project("token_proj", 0, 24576, 1024)
    | project("fusion", 0, 2048, 1024)
)
CLASSIFICATION = {
    key: shape
    for i in range(8)
    for key, shape in (
        project(f"classification_heads.{i}", 0, 4096, 2048)
        | project(f"classification_heads.{i}", 3, 2048, 1024)
        | linear(f"classification_heads.{i}.6", 1024, 896)
    ).items()
}


@pytest.mark.parametrize(
    ("config", "kind", "shapes"),
    [
        (HeadConfig(), RFSQHead, RFSQ),
        (HeadConfig(kind="conditioned"), ConditionedRFSQHead, CONDITIONED),
        (HeadConfig(kind="classification", width=2048), RFSQClassificationHead, CLASSIFICATION),
    ],
    ids=lambda value: value.kind if isinstance(value, HeadConfig) else "",
)
def test_names_and_shapes_are_the_originals(config: HeadConfig, kind: type[Head], shapes: Shapes) -> None:
    with torch.device("meta"):
        head = build_head(config, Dims(), 4096)
    assert type(head) is kind
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == shapes


def sequence(head: Head, prefix: str, *layers: nn.Module) -> nn.Sequential:
    """Fresh layers with the head's weights under `prefix`."""
    module = nn.Sequential(*layers)
    state = head.state_dict()
    module.load_state_dict({k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")})
    return module


def projection(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs), nn.GELU(), nn.LayerNorm(outputs)


def reference(head: Head, config: HeadConfig, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """The forwards of facts about the original experiment, layer by layer."""
    f, w, out = config.feature, config.width, TINY.T * TINY.D * TINY.K
    logits = []
    for i in range(TINY.L):
        if config.kind == "classification":
            layers = (*projection(HIDDEN, w), *projection(w, w // 2), nn.Linear(w // 2, out))
            logits.append(sequence(head, f"classification_heads.{i}", *layers)(hidden))
            continue
        x = sequence(head, "feature_proj", *projection(HIDDEN, f))(hidden)
        if config.kind == "conditioned":
            vectors = head.state_dict()["token_embedding.weight"][condition]  # [B, T, D, C, embedding]
            flat = vectors.reshape(len(condition), -1)
            tokens = sequence(head, "token_proj", *projection(flat.shape[1], f))(flat)
            x = sequence(head, "fusion", *projection(2 * f, f))(torch.cat([x, tokens], dim=1))
        logits.append(sequence(head, f"layer_heads.{i}", *projection(f, w), nn.Linear(w, out))(x))
    return torch.stack(logits, dim=1).view(len(hidden), TINY.L, TINY.T * TINY.D, TINY.K)


@pytest.mark.parametrize("kind", ["rfsq", "conditioned", "classification"])
@torch.no_grad()
def test_equals_the_original_forward(kind: str, randomise: Callable[..., None]) -> None:
    config = structs.replace(HeadConfig(feature=8, width=6, embedding=4), kind=kind)
    head = build_head(config, TINY, HIDDEN)
    randomise(head)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, HIDDEN, generator=generator)
    condition = torch.randint(0, TINY.K, (3, TINY.T, TINY.D, TINY.C), generator=generator)
    logits = head(hidden, condition) if head.conditioned else head(hidden)
    torch.testing.assert_close(logits, reference(head, config, hidden, condition))


@pytest.mark.parametrize("kind", ["rfsq", "conditioned", "classification"])
def test_the_signature_fits_the_forward(kind: str) -> None:
    head = build_head(structs.replace(HeadConfig(feature=8, width=6, embedding=4), kind=kind), TINY, HIDDEN)
    signature = head.signature
    inputs = [torch.zeros(signature.shape(port, 2), dtype=getattr(torch, port.dtype)) for port in signature.inputs]
    assert [port.name for port in signature.inputs] == ["hidden", "condition"][: 2 if kind == "conditioned" else 1]
    (logits,) = signature.outputs
    assert head(*inputs).shape == signature.shape(logits, 2) == (2, 4, 6, 5)
    assert signature.describe(logits) == "logits [B, L=4, T*D=6, K=5] float32"
