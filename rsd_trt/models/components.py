"""The two components that a query launches: logits, argmax, decoding and action conventions in one module each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsd_trt.config import ARM_DIMS, ControlConfig, Dims
from rsd_trt.models.codec import Decoder
from rsd_trt.models.draft import DraftModel
from rsd_trt.models.head import ActionHead, Head
from rsd_trt.models.signature import Exportable, Port, Signature
from rsd_trt.models.vision_draft import VisionDraft


class ActionTransform(nn.Module):
    """The policy's actions -> the environment's, by the bundle's `control` section.

    De-normalisation a = (x + 1) / 2 * (q99 - q01) + q01 where the mask is true (OpenVLA). A gripper in the
    `openvla` convention (1 open, 0 close) becomes the environment's (-1 open, +1 close): -sign(2x - 1).
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, control: ControlConfig, dims: Dims) -> None:
        super().__init__()
        scale, offset = torch.ones(dims.A), torch.zeros(dims.A)
        if control.action_quantiles is not None:
            q = control.action_quantiles
            q01, q99, mask = torch.tensor(q.q01), torch.tensor(q.q99), torch.tensor(q.mask)
            scale = torch.where(mask, (q99 - q01) / 2, scale)
            offset = torch.where(mask, (q99 + q01) / 2, offset)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.openvla_gripper = control.gripper == "openvla"

    def inverse(self, actions: Tensor) -> Tensor:
        """The environment's actions [B, T, A] -> the policy's; where all of these are one action, as q01 is q99, 0. A
        gripper of the `openvla` convention comes out as open or close."""
        actions = actions.float()
        if self.openvla_gripper:
            gripper = (1 - actions[..., ARM_DIMS:]) / 2
            actions = torch.cat([actions[..., :ARM_DIMS], gripper], dim=-1)
        return torch.where(self.scale == 0, 0.0, (actions - self.offset) / self.scale)

    def forward(self, actions: Tensor) -> Tensor:
        """[B, T, A] -> [B, T, A]."""
        actions = actions.float() * self.scale + self.offset
        if not self.openvla_gripper:
            return actions
        gripper = -torch.sign(2 * actions[..., ARM_DIMS:] - 1)
        return torch.cat([actions[..., :ARM_DIMS], gripper], dim=-1)


def agreeing_steps(a: Tensor, b: Tensor, tolerance: Tensor) -> Tensor:
    """Which steps of two chunks [B, T, A] agree -> [B, T] bool.

    A step agrees when every arm dimension differs by at most its tolerance [6] and the gripper's sign is equal.
    NaN agrees with nothing. For many chunks on a device; the loop's own is `rsd_trt.runtime.speculate.agreeing_steps`:
    a test holds the two equal.
    """
    delta = a - b
    arm = (delta[..., :ARM_DIMS].abs() <= tolerance).all(-1)
    gripper = (a[..., ARM_DIMS] > 0) == (b[..., ARM_DIMS] > 0)
    return arm & gripper & ~delta[..., ARM_DIMS].isnan()


class Propose(Exportable):
    """A check: what the draft reads -> its coarse tokens, the coarse actions that they decode to, its logits of L0.

    With a draft that has eyes of its own this is the whole way from frames as rendered to the environment's actions.
    """

    def __init__(self, draft: DraftModel | VisionDraft, decoder: Decoder, transform: ActionTransform) -> None:
        super().__init__()
        self.draft, self.decoder, self.transform = draft, decoder, transform
        dims = draft.dims
        self.signature = Signature(
            inputs=draft.signature.inputs,
            outputs=(
                Port("tokens", ("B", "T", "D", "C"), "int64"),
                Port("actions", ("B", "T", "A")),
                Port("logits", ("B", "T*D", "K")),
                Port("finite", ("B",), "bool"),
            ),
            sizes={**draft.signature.sizes, "T": dims.T, "D": dims.D, "A": dims.A},
        )

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the draft reads -> tokens [B, T, D, C], actions [B, T, A] of the environment, logits of L0
        [B, T*D, K], finite [B]."""
        logits = self.draft(*inputs)
        tokens = most_likely(logits, self.draft.dims)
        actions = self.transform(self.decoder(tokens))
        return tokens, actions, logits[:, 0], all_finite(logits, actions)


class Predict(Exportable):
    """The backbone's last hidden state -> the main head's chunk."""

    def __init__(self, head: Head, decoder: Decoder, transform: ActionTransform) -> None:
        super().__init__()
        self.head, self.decoder, self.transform = head, decoder, transform
        dims = head.dims
        self.signature = Signature(
            inputs=head.signature.inputs,
            outputs=(
                Port("tokens", ("B", "T", "D", "L"), "int64"),
                Port("actions", ("B", "T", "A")),
                Port("finite", ("B",), "bool"),
            ),
            sizes={**head.signature.sizes, "A": dims.A},
        )

    def forward(self, hidden: Tensor, *condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, H] (, condition [B, T, D, C] int64)
        -> tokens [B, T, D, L], actions [B, T, A] of the environment, finite [B]."""
        logits = self.head(hidden, *condition)
        tokens = most_likely(logits, self.head.dims)
        actions = self.transform(self.decoder(tokens))
        return tokens, actions, all_finite(logits, actions)


class PredictActions(Exportable):
    """Action tokens' hidden states -> the chunk of a main head that gives actions."""

    def __init__(self, head: ActionHead, transform: ActionTransform) -> None:
        super().__init__()
        self.head, self.transform = head, transform
        self.signature = Signature(
            inputs=head.signature.inputs,
            outputs=(*head.signature.outputs, Port("finite", ("B",), "bool")),
            sizes=head.signature.sizes,
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, T*A, H] -> actions [B, T, A] of the environment, finite [B]."""
        normalised = self.head(hidden)
        return self.transform(normalised), all_finite(normalised)


def most_likely(logits: Tensor, dims: Dims) -> Tensor:
    """float32 logits [B, n, T*D, K] -> tokens [B, T, D, n]."""
    tokens = logits.argmax(-1)  # [B, n, T*D]
    return tokens.view(logits.shape[0], logits.shape[1], dims.T, dims.D).permute(0, 2, 3, 1)


def all_finite(*tensors: Tensor) -> Tensor:
    """Where in the batch [B, ...] none of the tensors holds NaN or infinity -> [B] bool.

    A sum is finite only if every term is, and costs one reduction where a test of each element costs several. (A
    sum of finite terms overflows only near 1e38, which is no logit and no action either.)
    """
    return torch.isfinite(torch.stack([x.flatten(1).sum(1) for x in tensors]).sum(0))
