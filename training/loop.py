"""A training loop that is limited by time or by steps, and goes on from its last checkpoint."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rsd_trt.errors import UserError
from rsd_trt.files import write_atomically, writing
from rsd_trt.training import ranks

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, and how often to say so. Either `minutes` or `steps` is the limit."""

    minutes: float | None = None
    steps: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: int = 200  # steps
    clip: float = 1.0  # of the gradient's norm
    average: float = 0.999  # decay of the weights' moving average
    log_every: float = 15.0  # s
    save_every: float = 60.0  # s


class Loop:
    """Steps of AdamW with warm-up, cosine decay to zero, clipped gradients and averaged weights.

    The learning rate follows the share of the time or steps that is used up. Time spent before a resume counts.
    Of several processes (`ranks`) all average their gradients, and the first logs and saves.
    """

    def __init__(
        self,
        name: str,
        run: Path,
        model: nn.Module,
        settings: LoopSettings,
        on_record: Callable[[Mapping[str, object]], None] | None = None,
    ) -> None:
        """on_record: is given each line of metrics."""
        if (settings.minutes is None) == (settings.steps is None):
            raise UserError("give either minutes or steps as the limit of the training")
        self.name, self.run, self.model, self.settings = name, run, model, settings
        self._on_record = on_record
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.device = next(model.parameters()).device
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim >= 2 and min(p.shape) > 1]
        others = [p for p in trained if not (p.ndim >= 2 and min(p.shape) > 1)]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(
            groups, settings.learning_rate, betas=(0.9, 0.95), fused=self.device.type == "cuda"
        )
        self.trained = trained
        self.step = 0
        self._told: Tensor | None = None
        self._used = 0.0  # s, before this process
        self._started = time.perf_counter()
        self._losses: dict[str, Tensor] = {}
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)  # loss and gradient of every step so far
        self._resume()
        self._shared = self._own_progress()  # what the processes agree on

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._used + time.perf_counter() - self._started

    @property
    def progress(self) -> float:
        """The share of the limit that is used up; of time, where there are several processes, the average of theirs."""
        alone = ranks.world() == 1 or self.settings.steps is not None
        return self._own_progress() if alone else self._shared

    def _own_progress(self) -> float:
        if self.settings.steps is not None:
            return self.step / self.settings.steps
        assert self.settings.minutes is not None
        return self.elapsed / (60 * self.settings.minutes)

    def steps(self, samples: int) -> Iterator[int]:
        """Counts the steps until the limit; the caller gives each one to `update`. `samples` is the batch size.

        Raises:
            UserError: a loss is not finite; the last checkpoint is from before it.
        """
        logged, logged_step, saved = time.perf_counter(), self.step, time.perf_counter()
        while self.progress < 1:
            yield self.step
            now = time.perf_counter()
            if now - logged > self.settings.log_every or self.progress >= 1:
                self._check_finite()  # waits for the device
                losses = {name: value.item() for name, value in self._losses.items()}
                now = time.perf_counter()
                rate = (self.step - logged_step) * samples / (now - logged)
                self.record(kind="train", samples_per_s=round(rate), lr=self._rate(), **losses)
                logged, logged_step = now, self.step
            if now - saved > self.settings.save_every:
                self.save()
                saved = time.perf_counter()
        self.save()

    def update(self, loss: Tensor, losses: Mapping[str, Tensor]) -> None:
        """One step down the gradient of `loss`; `losses` are what it is made of, for the log."""
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if ranks.world() > 1:
            gradients = [p.grad for p in self.trained if p.grad is not None]
            told, self._told = self._told, ranks.average(gradients, self._own_progress())
            if told is not None:  # the last step's, so that the device is not waited for
                self._shared = float(told)
        norm = nn.utils.clip_grad_norm_(self.trained, self.settings.clip)
        self._finite &= (loss.detach() + norm).isfinite()
        self.optimiser.step()
        self.step += 1
        decay = min(self.settings.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self._losses = {name: value.detach() for name, value in losses.items()}

    def record(self, **values: object) -> None:
        """One line of metrics, on disk and in the log."""
        if ranks.rank():
            return
        line = {"stage": self.name, "step": self.step, "seconds": round(self.elapsed, 1)} | values
        line |= {"gpu_percent": gpu_percent(self.device)} if values.get("kind") == "train" else {}
        line = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in line.items()}
        if self._on_record is not None:
            self._on_record(line)
        with (self.run / METRICS).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        log.info(
            "%s", "  ".join(f"{key} {value}" for key, value in line.items() if not isinstance(value, (list, dict)))
        )

    def save(self) -> None:
        """Writes the checkpoint."""
        self._check_finite()
        if ranks.rank():
            return
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        write_state(self.run / f"{self.name}.pt", state)

    def _check_finite(self) -> None:
        if not self._finite:
            raise UserError(
                f"{self.name}: the loss is not finite before step {self.step}",
                "Start over with a smaller --lr: --fresh",
            )

    def _resume(self) -> None:
        file = self.run / f"{self.name}.pt"
        if not file.is_file():
            return
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self._used = state["step"], state["elapsed"]
        self._forget_later_metrics()
        log.info("%s goes on from step %d, after %.0f s", file, self.step, self._used)

    def _forget_later_metrics(self) -> None:
        """Drops what a killed process recorded behind its last checkpoint: those steps are made again."""
        file = self.run / METRICS
        if ranks.rank() or not file.is_file():
            return
        kept = []
        for text in file.read_text("utf-8").splitlines(keepends=True):
            line = json.loads(text) if text.endswith("\n") else None  # half a line
            if line is not None and (line["stage"] != self.name or line["step"] <= self.step):
                kept.append(text)
        write_atomically(file, "".join(kept))

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.settings.warm_up)
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.progress, 1.0)))
        return self.settings.learning_rate * warm * cosine


@dataclass(frozen=True)
class Trained:
    """What a loop has come to."""

    average: dict[str, Tensor]  # the averaged weights
    step: int
    elapsed: float  # s


def read_trained(run: Path, name: str) -> Trained:
    """The last checkpoint of the loop `name`, on the CPU.

    Raises:
        UserError: there is none.
    """
    file = run / f"{name}.pt"
    if not file.is_file():
        raise UserError(f"{file} is missing: {name} is not trained yet")
    state = torch.load(file, map_location="cpu", weights_only=True)
    return Trained(state["average"], state["step"], state["elapsed"])


def write_state(file: Path, state: dict[str, object]) -> None:
    """torch.save; `file` is what it was before until all of it is on the disk.

    Raises:
        UserError: it cannot be written.
    """
    stream = io.BytesIO()  # torch itself ends in a RuntimeError where the disk is full
    torch.save(state, stream)
    with writing(file):
        write_atomically(file, stream.getbuffer())


def gpu_percent(device: torch.device) -> int | None:
    """How busy the GPU is; None where that can't be read."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device)
    except Exception as error:  # no NVML, no driver for it, or one that refuses: NVML's errors share no base
        log.debug("the GPU's utilisation cannot be read: %s", error)
        return None
