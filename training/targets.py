"""What the head and the draft are trained to say.

Plain RFSQ tokens are bad targets for classifiers that work side by side: where the action is uncertain near a
boundary of layer 0, layer 0 takes one level while layer 1 expects the other. So the target of layer i is the level
nearest to what the classifiers' own choices of the layers before it have left,

    r_i = z - sum_{j<i} table[j, argmax_j]        target_i = argmin_k |r_i - table[i, k]|

and each layer learns to correct what the earlier ones really chose. Where they chose the nearest level, this is the
RFSQ token. It is still plain cross-entropy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEP_WEIGHTS = (1.5, 0.5)  # of the first and of the last step of a chunk
LAYER_DECAY = 0.75  # each layer's weight relative to the one before: fine layers are mostly chance


def corrected_targets(z: Tensor, logits: Tensor, table: Tensor) -> Tensor:
    """z [B, T, D], logits [B, n, T*D, K], table [L, K] (what each token adds to z) -> targets [B, n, T*D] int64."""
    choices = logits.argmax(-1)  # [B, n, T*D]
    residual, targets = z.flatten(1), []
    for i in range(logits.shape[1]):
        targets.append((residual[..., None] - table[i]).abs().argmin(-1))
        residual = residual - table[i][choices[:, i]]
    return torch.stack(targets, dim=1)


def layer_losses(logits: Tensor, targets: Tensor, steps: int) -> Tensor:
    """Cross-entropy of each layer [n], with the steps of the chunk weighted."""
    batch, layers, positions, levels = logits.shape
    losses = F.cross_entropy(logits.reshape(-1, levels).float(), targets.reshape(-1), reduction="none")
    losses = losses.view(batch, layers, steps, positions // steps).mean((0, 3))  # [n, T]
    weights = torch.linspace(*STEP_WEIGHTS, steps, device=logits.device)
    return losses @ (weights / weights.sum())


def total_loss(losses: Tensor) -> Tensor:
    """The layers' losses [n] as one number."""
    weights = LAYER_DECAY ** torch.arange(len(losses), device=losses.device)
    return losses @ (weights / weights.sum())


def decode_z(choices: Tensor, table: Tensor, dims: tuple[int, int]) -> Tensor:
    """choices [B, n, T*D] of the first n layers -> z [B, T, D]; dims is (T, D)."""
    z = torch.stack([table[i][choices[:, i]] for i in range(choices.shape[1])]).sum(0)
    return z.view(len(choices), *dims)
