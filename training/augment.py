"""Changes of frames and state that the draft should not mind: a little of each, so that old labels still hold."""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 3  # pixels, of an image in either direction
GAIN, CONTRAST, TINT = 0.15, 0.15, 0.05  # the largest changes of brightness, contrast and of one colour
STATE_NOISE = 0.01  # standard deviation, after normalisation
STATE_DROPOUT = 0.1  # of the samples see no state


def augment(images: Tensor, generator: torch.Generator, shift: int = SHIFT) -> Tensor:
    """uint8 [B, cameras, S, S, 3] -> float32 in 0..255: shifted with repeated edges, brightness, contrast and colour
    changed a little, every camera by itself."""
    batch, cameras, side = images.shape[:3]
    device = images.device

    def uniform(amount: float, channels: int = 1) -> Tensor:
        shape = (batch, cameras, 1, 1, channels)
        return 1 + amount * (2 * torch.rand(shape, device=device, generator=generator) - 1)

    offsets = torch.randint(-shift, shift + 1, (2, batch, cameras, 1), device=device, generator=generator)
    rows, columns = (torch.arange(side, device=device) + offsets).clamp(0, side - 1)  # [B, cameras, S] each
    sample = torch.arange(batch, device=device)[:, None, None, None]
    camera = torch.arange(cameras, device=device)[None, :, None, None]
    x = images[sample, camera, rows[..., :, None], columns[..., None, :]].float()
    mean = x.mean((2, 3, 4), keepdim=True)
    x = (x - mean) * uniform(CONTRAST) + mean
    return (x * uniform(GAIN) * uniform(TINT, 3)).clamp(0, 255)


def augment_state(state: Tensor, generator: torch.Generator) -> Tensor:
    """The normalised state [B, 8], with noise, and left out (zeros) for some samples."""
    noise = torch.randn(state.shape, device=state.device, generator=generator) * STATE_NOISE
    kept = torch.rand(len(state), 1, device=state.device, generator=generator) >= STATE_DROPOUT
    return (state + noise) * kept
