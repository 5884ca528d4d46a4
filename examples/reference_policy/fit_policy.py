"""Backbone and main head, trained together on the expert's chunks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.reference_policy.data import Batches
from examples.reference_policy.demonstrate import SCENE_DIM
from examples.reference_policy.measure import measure
from rsd_trt.config import BundleConfig
from rsd_trt.models.backbone import Backbone, BackboneInputs
from rsd_trt.models.codec import Codec
from rsd_trt.models.head import build_head
from rsd_trt.training import ranks
from rsd_trt.training.fit import autocast
from rsd_trt.training.loop import Loop, LoopSettings
from rsd_trt.training.targets import corrected_targets, layer_losses, total_loss

log = logging.getLogger(__name__)

EMBEDDING_SCALE = 0.1  # of the token embeddings at the start: the blocks' outputs are small then, too
SCENE_UNIT = 0.1  # m, of the auxiliary loss
SEEDS = 10_000_000  # between the batches of two processes


@dataclass(frozen=True)
class PolicySettings:
    """What the training minimises, and how."""

    batch: int = 512
    scene_weight: float = 0.3  # of the auxiliary loss
    measure_every: float = 90.0  # s between two measurements on held-out frames
    measured: int = 2048  # held-out frames, at the most, of those measurements
    compiled: bool = False
    augmented: bool = True
    seed: int = 0


class MainModel(nn.Module):
    """The parts that are trained, and the auxiliary outputs that only the training uses.

    `scene` tells, from the hidden state, where bowl and plate are relative to the grip site: it gives the vision
    towers something to learn in every frame, also where the expert's action is at its limit.
    """

    def __init__(self, config: BundleConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone)
        self.head = build_head(config.head, config.dims, config.hidden)
        self.scene = nn.Linear(config.hidden, SCENE_DIM)
        with torch.no_grad():
            self.backbone.llama.embed_tokens.weight.mul_(EMBEDDING_SCALE)

    def forward(self, inputs: BackboneInputs) -> tuple[Tensor, Tensor]:
        """The hidden state [B, H], and the head's logits [B, L, T*D, K]."""
        hidden = self.backbone(inputs)
        with torch.autocast(hidden.device.type, enabled=False):  # the targets depend on an exact argmax
            return hidden, self.head(hidden.float())

    def compile_blocks(self, enabled: bool = True) -> None:
        """Compiles each kind of block once: about as fast as compiling the whole, and done in a fraction of the
        time. `enabled=False` takes it back."""
        towers = [block for tower in self.backbone.vision_backbone.values() for block in tower.blocks]  # type: ignore[union-attr]
        for block in [*towers, *self.backbone.llama.layers]:
            if enabled:
                block.compile(dynamic=False)
            else:
                block._compiled_call_impl = None


def build_model(config: BundleConfig, device: torch.device, seed: int) -> MainModel:
    """A model with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MainModel(config).to(device)


def fit_policy(
    config: BundleConfig, codec: Codec, batches: Batches, run: Path, settings: PolicySettings, limits: LoopSettings
) -> MainModel:
    """Trains both -> the averaged weights."""
    device = batches.data.images.device
    model = build_model(config, device, settings.seed)
    loop = Loop("policy", run, model, limits)
    batches.generator.manual_seed(settings.seed + loop.step + SEEDS * ranks.rank())
    if settings.compiled:
        _compile(model, batches.inputs(batches.draw(settings.batch), settings.augmented), device)
    table = codec.rfsq.table()
    measured = loop.elapsed
    for _ in loop.steps(settings.batch):
        index = batches.draw(settings.batch)
        inputs, actions = batches.inputs(index, settings.augmented), batches.actions(index)
        with torch.no_grad():
            z = codec.encoder(actions)
        with autocast(device):
            hidden, logits = model(inputs)
            found = model.scene(hidden)
        losses = layer_losses(logits, corrected_targets(z, logits, table), config.dims.T)
        scene = nn.functional.smooth_l1_loss(found.float(), batches.data.scene[index] / SCENE_UNIT)
        loss = total_loss(losses) + settings.scene_weight * scene
        parts = {f"ce{i}": value for i, value in enumerate(losses)}
        loop.update(loss, {"loss": loss, "scene": scene, **parts})
        if loop.elapsed - measured > settings.measure_every and not ranks.rank():
            assert isinstance(loop.average, MainModel)
            report = measure(loop.average, codec, config, batches, settings.measured, settings.batch)
            loop.record(kind="held_out", **report)
            log.info("held out: %s", {key: report.get(key) for key in ("first_error", "gripper")})
            measured = loop.elapsed
    assert isinstance(loop.average, MainModel)
    return loop.average


def _compile(model: MainModel, inputs: BackboneInputs, device: torch.device) -> None:
    """Compiles the blocks by a first pass; where that does not work, says so and leaves them as they were."""
    log.info("compiling the blocks; without: --no-compile")
    model.compile_blocks()
    try:
        with autocast(device):
            model(inputs)[0].float().sum().backward()
    except Exception:  # whatever the compiler, its back end or the driver raises
        log.exception("the blocks cannot be compiled here: training goes on without, at about half the speed")
        model.compile_blocks(enabled=False)
    model.zero_grad(set_to_none=True)
