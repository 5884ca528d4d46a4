"""Training on several GPUs: every process has all data and its own batches, and they average their gradients.

`torchrun` starts the processes; one that was not started by it, or does not `join`, trains alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Of this process; 0 writes, logs and measures."""
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_device(device: str) -> str:
    """The device of this process; where there are several processes, each has its own GPU (on the CPU, all the CPU)."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ['LOCAL_RANK']}" if several and device in ("auto", "cuda") else device


def join(device: torch.device) -> None:
    """Waits for the others. Nothing where there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    """Ends the group of processes."""
    if world() > 1:
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
