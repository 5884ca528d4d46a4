"""What the model says of frames that it was not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.reference_policy.data import Batches
from rsd_trt.config import ARM_DIMS, BundleConfig
from rsd_trt.models.codec import Codec
from rsd_trt.training.targets import corrected_targets, decode_z, layer_losses

if TYPE_CHECKING:
    from examples.reference_policy.fit_policy import MainModel


@torch.no_grad()
def measure(
    model: MainModel, codec: Codec, config: BundleConfig, batches: Batches, frames: int, batch: int
) -> dict[str, object]:
    """Held-out numbers of the main head over at most `frames` frames, in float32, by name:

    ce, accuracy: by layer (chance is 1/K). error, first_error: by number of layers, the mean absolute error of the
    arm's dimensions over the chunk and of its first step, in action units. gripper: the share of right gripper signs.
    task_error: first_error of all layers, by task.
    """
    index = batches.held_out
    index = index[torch.linspace(0, len(index) - 1, min(frames, len(index)), device=index.device).long()]
    if not len(index):
        return {"frames": 0}
    table, dims = codec.rfsq.table(), (config.dims.T, config.dims.D)
    sums: dict[str, list[Tensor]] = {}
    firsts = []
    for some in index.split(batch):
        logits = model(batches.inputs(some, augmented=False))[1]
        actions = batches.actions(some)
        targets, choices = corrected_targets(codec.encoder(actions), logits, table), logits.argmax(-1)
        decoded = [codec.decoder(decode_z(choices[:, :n], table, dims)) for n in range(1, choices.shape[1] + 1)]
        deltas = [(chunk - actions)[..., :ARM_DIMS].abs() for chunk in decoded]
        right = (decoded[-1][..., ARM_DIMS] > 0) == (actions[..., ARM_DIMS] > 0)
        firsts.append(deltas[-1][:, 0].mean(1))
        found = {
            "ce": layer_losses(logits, targets, config.dims.T),
            "accuracy": (choices == targets).float().mean((0, 2)),
            "error": torch.stack([delta.mean() for delta in deltas]),
            "first_error": torch.stack([delta[:, 0].mean() for delta in deltas]),
            "gripper": right.float().mean()[None],
        }
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
