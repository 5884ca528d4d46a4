"""Training on several GPUs: every process has all data and its own batches, and they average their gradients.

RANK, WORLD_SIZE and RENDEZVOUS (a file that does not exist yet) in the environment say who takes part, and TRAIN_UNTIL
(s since 1970) when this part of the training ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Of this process; 0 writes, logs and measures."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def until() -> float:
    """When the processes end their part, in s since 1970; infinite where nobody says."""
    return float(os.environ.get("TRAIN_UNTIL", "inf"))


def own_device(device: str) -> str:
    """The device of this process; where there are several processes, each has its own GPU (on the CPU, all the CPU)."""
    return f"cuda:{rank()}" if world() > 1 and device in ("auto", "cuda") else device


def join(device: torch.device) -> None:
    """Waits for the others. Nothing where there are none."""
    if world() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    rendezvous = Path(os.environ["RENDEZVOUS"]).resolve().as_uri()
    dist.init_process_group(backend, init_method=rendezvous, rank=rank(), world_size=world())


def leave() -> None:
    """Ends the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def average(gradients: Sequence[Tensor], number: float) -> Tensor:
    """Averages the gradients over the processes in place, and `number` with them -> its average, on the device."""
    flat = torch.cat([*(x.flatten() for x in gradients), gradients[0].new_tensor([number])])
    dist.all_reduce(flat)
    flat /= world()
    for x, part in zip(gradients, flat[:-1].split([x.numel() for x in gradients]), strict=True):
        x.copy_(part.view_as(x))
    return flat[-1].clone()
