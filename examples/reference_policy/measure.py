"""What the model says of frames that it was not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.reference_policy.data import Batches
from rsd_trt.config import ARM_DIMS, BundleConfig
from rsd_trt.models.codec import Codec
from rsd_trt.models.components import agreeing_steps
from rsd_trt.training.targets import corrected_targets, decode_z, layer_losses

if TYPE_CHECKING:
    from examples.reference_policy.fit_policy import RsdModel


@torch.no_grad()
def measure(
    model: RsdModel, codec: Codec, config: BundleConfig, batches: Batches, frames: int, batch: int
) -> dict[str, object]:
    """Held-out numbers over at most `frames` frames, in float32, by name:

    head, draft: per layer `ce` and `accuracy` (chance is 1/K), per layer prefix `error` (mean absolute error of the
    arm's dimensions over the chunk, in action units) and `first_error` (of its first step), and `gripper`, the
    share of right gripper signs. agreement: the share of frames where draft and head agree on the first step, and
    the mean number of leading steps on which they do. task_error: first_error of all layers, by task.
    """
    index = batches.held_out
    index = index[torch.linspace(0, len(index) - 1, min(frames, len(index)), device=index.device).long()]
    if not len(index):
        return {"frames": 0}
    table, dims = codec.rfsq.table(), (config.dims.T, config.dims.D)
    tolerance = torch.tensor(config.rsd.tolerance, device=index.device)
    sums: dict[str, list[Tensor]] = {}
    firsts = []
    for some in index.split(batch):
        out = model(batches.inputs(some, augmented=False))
        actions = batches.actions(some)
        z = codec.encoder(actions)
        found: dict[str, Tensor] = {}
        plans = {}
        for name, logits in (("head", out.head), ("draft", out.draft)):
            targets, choices = corrected_targets(z, logits, table), logits.argmax(-1)
            found[f"{name}_ce"] = layer_losses(logits, targets, config.dims.T)
            found[f"{name}_accuracy"] = (choices == targets).float().mean((0, 2))
            decoded = [codec.decoder(decode_z(choices[:, :n], table, dims)) for n in range(1, choices.shape[1] + 1)]
            deltas = [(plan - actions)[..., :ARM_DIMS].abs() for plan in decoded]
            found[f"{name}_error"] = torch.stack([delta.mean() for delta in deltas])
            found[f"{name}_first_error"] = torch.stack([delta[:, 0].mean() for delta in deltas])
            right = (decoded[-1][..., ARM_DIMS] > 0) == (actions[..., ARM_DIMS] > 0)
            found[f"{name}_gripper"] = right.float().mean()[None]
            plans[name] = decoded[-1]
            if name == "head":
                firsts.append(deltas[-1][:, 0].mean(1))
        agreed = agreeing_steps(plans["draft"], plans["head"], tolerance)  # [B, T]
        found["agreement"] = torch.stack([agreed[:, 0].float().mean(), agreed.cumprod(1).sum(1).float().mean()])
        for name, value in found.items():
            sums.setdefault(name, []).append(value * len(some))
    report: dict[str, object] = {"frames": len(index)}
    for name, values in sums.items():
        report[name] = _rounded(torch.stack(values).sum(0) / len(index))
    first, task = torch.cat(firsts), batches.data.task[index]
    report["task_error"] = {str(int(t)): round(float(first[task == t].mean()), 5) for t in task.unique()}
    return report


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
