"""A draft with eyes of its own: fresh camera frames, the robot's state and the instruction -> logits of L0..L{C-1}.

A small vision transformer. It sees neither the chunk that it judges nor the backbone's hidden state that the chunk came
from: a draft fed with either learns to repeat it, and agrees even when it is shown the frames of another episode.

All that happens to a frame is inside: rotation by 180 degrees, the middle's crop and the antialiased bicubic resize are
two constant matrices, which every backend multiplies alike (TensorRT 10 refuses an antialiased resize).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsd_trt.config import PROPRIO_DIM, ControlConfig, Dims, Quantiles, VisionDraftConfig
from rsd_trt.models.classifiers import Classifiers
from rsd_trt.models.signature import Exportable, Port, Signature
from rsd_trt.models.vision import MLP, NORM_EPS, Attention, cut, drawn

GREY = 127.5  # pixels become x / GREY - 1
POSITION_PERIOD = 1000.0  # tokens, the longest wave of an instruction's positions is 2 pi times as long
TINY = 1e-6
UNLIMITED = 1e9  # of a state that is not normalised; infinity is not for every backend


class Resize(nn.Module):
    """Frames as rendered -> what the transformer sees: uint8 [B, cameras, F, F, 3] -> [B, cameras, S, S, 3] in 0..255.

    Rotation, crop and PIL's bicubic resize of a known size are the same matrix on both axes: rows @ image @ rows^T.
    Non-obvious: PIL goes across first, and rounds to 8 bits after either axis; this goes down first, and does not
    round. They differ by about one level, and by more only where the overshoot beside a sharp edge is clipped.
    """

    matrix: Tensor

    def __init__(self, frame: int, side: int, rotate: bool, center_crop: float) -> None:
        super().__init__()
        with torch.device("cpu"):  # parameters may be built without numbers, on the meta device
            self.register_buffer("matrix", resize_matrix(frame, side, rotate, center_crop), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        side, frame = self.matrix.shape
        batch, cameras = frames.shape[:2]
        x = frames.to(self.matrix.dtype).reshape(batch * cameras, frame, frame * 3)
        x = (self.matrix @ x).clamp(0, 255).view(batch * cameras, side, frame, 3)
        # One large product for the other axis; with the colours last it would be many of three columns.
        x = (x.transpose(2, 3).reshape(-1, frame) @ self.matrix.T).clamp(0, 255)
        return x.view(batch, cameras, side, 3, side).transpose(3, 4)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionDraftConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, config.mlp_width, "exact")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class InstructionPool(nn.Module):
    """Instruction embeddings [B, rows, E], zero where there is none -> one token [B, width].

    The rows carry their positions, and a GELU stands between them and their mean: word order counts.
    """

    def __init__(self, embedding: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embedding, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.fc1.weight.dtype)
        real = (x.abs().amax(-1, keepdim=True) > 0).to(x.dtype)  # [B, rows, 1]
        mean = (F.gelu(self.fc1(x)) * real).sum(1) / real.sum(1).clamp(1, x.shape[1])
        return self.fc2(mean)


class VisionDraft(Exportable):
    """frames, state, instruction -> logits [B, C, T*D, K]; the position index is t * D + d.

    Takes uint8 and float32 and gives float32, whatever the precision of its weights. The state is the robot's own, in
    its units: its normalisation (`control.proprio_quantiles`) is inside, too.
    """

    state_scale: Tensor
    state_offset: Tensor
    state_limit: Tensor

    def __init__(self, config: VisionDraftConfig, dims: Dims, control: ControlConfig, embedding: int) -> None:
        """embedding: E, the width of the instruction's embeddings."""
        super().__init__()
        self.config, self.dims = config, dims
        cameras, frame = len(control.cameras), control.camera_size
        self.resize = Resize(frame, config.side, control.rotate_images, control.center_crop)
        self.patch_embed = nn.Linear(3 * config.patch**2, config.width)
        self.pos_embed = drawn(cameras, config.patches, config.width)
        self.readout = drawn(1, 1, config.width)
        self.state = (
            nn.Sequential(nn.Linear(PROPRIO_DIM, config.width), nn.GELU(), nn.Linear(config.width, config.width))
            if config.state
            else None
        )
        self.instruction = InstructionPool(embedding, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.classification_heads = Classifiers(
            nn.Sequential(
                nn.Linear(config.width, config.classifier),
                nn.GELU(),
                nn.LayerNorm(config.classifier),
                nn.Linear(config.classifier, dims.T * dims.D * dims.K),
            )
            for _ in range(dims.C)
        )
        with torch.device("cpu"):
            for name, values in _normalisation(control.proprio_quantiles).items():
                self.register_buffer(f"state_{name}", values, persistent=False)
        state = (Port("state", ("B", "state")),) if config.state else ()
        self.signature = Signature(
            inputs=(
                Port("frames", ("B", "cameras", "side", "side", "3"), "uint8"),
                *state,
                Port("instruction", ("B", "P", "E")),
            ),
            outputs=(Port("logits", ("B", "C", "T*D", "K")),),
            sizes={
                "cameras": cameras,
                "side": frame,
                "3": 3,
                "state": PROPRIO_DIM,
                "P": config.instruction,
                "E": embedding,
                "C": dims.C,
                "T*D": dims.T * dims.D,
                "K": dims.K,
            },
        )

    def forward(self, frames: Tensor, *rest: Tensor) -> Tensor:
        """frames [B, cameras, side, side, 3] uint8(, state [B, 8]), instruction [B, P, E]."""
        state = self.normalised(rest[0]) if self.config.state else None
        return self.classify(self.see(self.resize(frames), state, rest[-1])[0])

    def normalised(self, state: Tensor) -> Tensor:
        """The robot's state [B, 8] in its own units -> as the transformer reads it."""
        state = state.float() * self.state_scale + self.state_offset
        return torch.minimum(torch.maximum(state, -self.state_limit), self.state_limit)

    def see(self, images: Tensor, state: Tensor | None, instruction: Tensor) -> tuple[Tensor, Tensor]:
        """Images that are rotated and resized already, [B, cameras, S, S, 3] in 0..255, and the normalised state [B, 8]
        -> the readout [B, width] and the patches' features [B, cameras, P, width]."""
        batch, cameras = images.shape[:2]
        dtype = self.patch_embed.weight.dtype
        pixels = (images.to(dtype) / GREY - 1).flatten(0, 1).permute(0, 3, 1, 2)  # [B * cameras, 3, S, S]
        x = self.patch_embed(cut(pixels, self.config.patch))  # [B * cameras, P, width]
        x = (x.view(batch, cameras, -1, self.config.width) + self.pos_embed).flatten(1, 2)
        prefix = [self.readout.expand(batch, -1, -1), self.instruction(instruction)[:, None]]
        if self.state is not None:
            assert state is not None, "this draft reads the robot's state"
            prefix.append(self.state(state.to(dtype))[:, None])
        x = torch.cat([*(token.to(x.dtype) for token in prefix), x], dim=1)
        for block in self.blocks:
            x = block(x)
        patches = x[:, len(prefix) :].view(batch, cameras, -1, self.config.width)
        return self.norm(x[:, 0]), patches

    def classify(self, readout: Tensor) -> Tensor:
        """The readout [B, width] -> float32 logits [B, C, T*D, K]."""
        logits = self.classification_heads(readout).float()  # [B, C, T*D*K]
        return logits.view(readout.shape[0], self.dims.C, self.dims.T * self.dims.D, self.dims.K)


def resize_matrix(frame: int, side: int, rotate: bool, center_crop: float) -> Tensor:
    """[side, frame]: what `Preprocessor.pixels` does along one axis. `rotate`: by 180 degrees, that is both axes
    backwards."""
    keep = round(frame * math.sqrt(center_crop))
    start = (frame - keep) // 2
    square = torch.eye(keep, dtype=torch.float64)[None, None]
    rows = F.interpolate(square, (side, keep), mode="bicubic", antialias=True)[0, 0] if keep != side else square[0, 0]
    matrix = torch.zeros(side, frame, dtype=torch.float64)
    matrix[:, start : start + keep] = rows
    return (matrix.flip(1) if rotate else matrix).float().contiguous()


def instruction_rows(embeddings: Tensor, rows: int) -> Tensor:
    """The prompt's token embeddings [P, E] -> what the draft reads of an instruction: float32 [rows, E].

    Each embedding is brought to a root mean square of 1 and gets its position (sines and cosines); rows behind the
    last one are zero. A prompt of more than `rows` tokens is averaged in `rows` groups of neighbours.
    """
    x = embeddings.detach().float()
    count, width = x.shape
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + TINY)
    half = (width + 1) // 2
    rates = POSITION_PERIOD ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(count, device=x.device)[:, None] * rates  # [P, half]
    x = x + torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
    if count > rows:
        group = torch.arange(count, device=x.device) * rows // count
        sums = torch.zeros(rows, width, device=x.device).index_add_(0, group, x)
        return sums / torch.bincount(group, minlength=rows)[:, None]
    return F.pad(x, (0, 0, 0, rows - count))


def _normalisation(quantiles: Quantiles | None) -> dict[str, Tensor]:
    """`Preprocessor.proprio` as scale, offset and limit [8] each: clip(x * scale + offset, -limit, limit)."""
    scale, offset = torch.ones(PROPRIO_DIM), torch.zeros(PROPRIO_DIM)
    limit = torch.full((PROPRIO_DIM,), UNLIMITED)
    if quantiles is not None:
        q01, q99, mask = torch.tensor(quantiles.q01), torch.tensor(quantiles.q99), torch.tensor(quantiles.mask)
        span = q99 - q01 + 1e-8
        scale = torch.where(mask, 2 / span, scale)
        offset = torch.where(mask, -2 * q01 / span - 1, offset)
        limit = torch.ones(PROPRIO_DIM)
    return {"scale": scale, "offset": offset, "limit": limit}
