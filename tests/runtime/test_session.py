"""Sessions check what they are given and name what they give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rsd_trt.models.signature import Exportable, Port, Signature
from rsd_trt.runtime.session import TorchSession


class Pair(Exportable):
    """Two inputs, one of them without a batch, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.signature = Signature(
            inputs=(Port("x", ("B", "W")), Port("index", ("W",), "int64")),
            outputs=(Port("sum", ("B",)), Port("positive", ("B", "W"), "bool")),
            sizes={"W": 3},
        )

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, index].sum(1), x > 0


class Single(Exportable):
    """One output, which is no tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.signature = Signature((Port("x", ("B", "W")),), (Port("y", ("B", "W")),), {"W": 3})
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


X = torch.tensor([[1.0, -2.0, 4.0], [0.0, 0.5, -1.0]])
INDEX = torch.tensor([0, 0, 2])


def test_inputs_go_in_and_outputs_come_out_by_name() -> None:
    outputs = TorchSession(Pair()).run({"index": INDEX, "x": X})
    assert list(outputs) == ["sum", "positive"]
    assert outputs["sum"].tolist() == [6.0, -1.0]
    assert outputs["positive"].tolist() == [[True, False, True], [False, True, False]]


def test_a_single_output_needs_no_tuple_and_no_gradient() -> None:
    (y,) = TorchSession(Single()).run({"x": X}).values()
    assert torch.equal(y, X)
    assert not y.requires_grad


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X}, r"\['x'\] are not the ports \['x', 'index'\]"),
        ({"x": X, "index": INDEX, "z": X}, "are not the ports"),
        ({"x": X[:, :2], "index": INDEX}, r"x \[B, W=3\] float32 got \[2, 2\] torch.float32"),
        ({"x": X[0], "index": INDEX}, r"x \[B, W=3\] float32 got \[3\]"),
        ({"x": X.double(), "index": INDEX}, r"got \[2, 3\] torch.float64"),
        ({"x": X, "index": INDEX.float()}, r"index \[W=3\] int64 got \[3\] torch.float32"),
        ({"x": X, "index": INDEX[:2]}, r"index \[W=3\] int64 got \[2\]"),
    ],
)
def test_what_does_not_fit_the_signature_is_refused(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchSession(Pair()).run(inputs)
