"""One classifier for each RFSQ layer: as checkpoints hold them, and stacked into few large products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd_trt.models.signature import Exportable


class Classifiers(nn.ModuleList):
    """x [B, width] -> one output of each classifier, [B, layers, outputs]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([classifier(x) for classifier in self], dim=1)


class StackedClassifiers(nn.Module):
    """The same outputs from classifiers of the form Linear, GELU, LayerNorm, Linear, launched together.

    At batch 1 each small product costs about a kernel launch; eight layers in one product cost one.
    """

    def __init__(self, classifiers: Classifiers) -> None:
        super().__init__()
        parts = [list(classifier.children()) for classifier in classifiers]
        first, _, norm, last = zip(*parts, strict=True)

        def stack(modules: tuple[nn.Module, ...], name: str) -> Tensor:
            return torch.stack([module.get_parameter(name).detach() for module in modules])

        self.layers = len(parts)
        self.norm_eps = float(norm[0].eps)
        tensors = {
            "first_weight": stack(first, "weight").flatten(0, 1),  # [layers * hidden, width]
            "first_bias": stack(first, "bias").flatten(),  # [layers * hidden]
            "norm_weight": stack(norm, "weight"),  # [layers, hidden]
            "norm_bias": stack(norm, "bias"),  # [layers, hidden]
            "last_weight": stack(last, "weight").transpose(1, 2).contiguous(),  # [layers, hidden, outputs]
            "last_bias": stack(last, "bias")[:, None],  # [layers, 1, outputs]
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    first_weight: Tensor
    first_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(F.linear(x, self.first_weight, self.first_bias))
        x = x.view(x.shape[0], self.layers, -1)  # [B, layers, hidden]; `len` would fix the batch of an export
        x = torch.addcmul(self.norm_bias, F.layer_norm(x, x.shape[-1:], eps=self.norm_eps), self.norm_weight)
        return torch.baddbmm(self.last_bias, x.transpose(0, 1), self.last_weight).transpose(0, 1)


def stacked(component: Exportable) -> Exportable:
    """`component` with its classifiers stacked, in place. Those of another form stay as they are."""
    form = (nn.Linear, nn.GELU, nn.LayerNorm, nn.Linear)
    for module in list(component.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Classifiers) and all(
                tuple(map(type, classifier.children())) == form for classifier in child
            ):
                setattr(module, name, StackedClassifiers(child))
    return component
