"""The training loop: what ends it leaves the last checkpoint."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from rsd_trt.errors import UserError
from rsd_trt.training.loop import Loop, LoopSettings, read_trained, write_state


def trained(run: Path, steps: int, bad_from: int | None = None, save_every: float = 0.0) -> None:
    """Steps on a model of one number, whose loss is not finite from the step `bad_from` on."""
    model = torch.nn.Linear(1, 1, bias=False)
    loop = Loop("tiny", run, model, LoopSettings(steps=steps, save_every=save_every))
    for step in loop.steps(1):
        loss = model(torch.ones(1, 1)).square().sum()
        loss = loss * torch.nan if step == bad_from else loss
        loop.update(loss, {"loss": loss})


@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_a_loss_that_is_not_finite_ends_the_training(save_every: float, tmp_path: Path) -> None:
    trained(tmp_path, 2)
    with pytest.raises(UserError, match=r"tiny: the loss is not finite before step \d\. Start over"):
        trained(tmp_path, 6, bad_from=4, save_every=save_every)
    found = read_trained(tmp_path, "tiny")
    assert found.step in (2, 4) and all(x.isfinite().all() for x in found.average.values())


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trained(tmp_path, 2)
    monkeypatch.setattr("rsd_trt.files.os.fsync", full)
    with pytest.raises(UserError, match=r"tiny\.pt cannot be written: No space left on device"):
        write_state(tmp_path / "tiny.pt", {"average": torch.zeros(9)})
    assert read_trained(tmp_path, "tiny").step == 2
    assert {file.name for file in tmp_path.iterdir()} == {"tiny.pt", "metrics.jsonl"}
