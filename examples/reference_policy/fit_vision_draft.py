"""The draft with eyes of its own, distilled on what the main head says of the same frames.

    python -m examples.reference_policy.fit_vision_draft --data data/ --run run/ --minutes 5

Teacher and draft look at the same augmented frames, so that every step has new labels (a consistent teacher, Beyer et
al. 2022). Two auxiliary losses, of the training alone: the draft's patches should tell the features of main's vision
towers, and its readout where bowl and plate are.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.reference_policy.data import Batches
from examples.reference_policy.demonstrate import SCENE_DIM
from examples.reference_policy.fit_policy import SCENE_UNIT, SEEDS, RsdModel, build_model
from examples.reference_policy.measure_draft import measure_draft
from examples.reference_policy.train import Request, Training
from rsd_trt.config import BundleConfig, VisionDraftConfig
from rsd_trt.errors import UserError
from rsd_trt.files import write_atomically
from rsd_trt.models.codec import Codec
from rsd_trt.models.vision_draft import VisionDraft, instruction_rows
from rsd_trt.records import from_json, to_json, to_text
from rsd_trt.training import ranks
from rsd_trt.training.fit import autocast
from rsd_trt.training.loop import Loop, LoopSettings, read_trained
from rsd_trt.training.targets import corrected_targets, decode_z, layer_losses, total_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

NAME = "vision_draft"
STORED = torch.float16
TINY = VisionDraftConfig(side=32, patch=16, width=24, blocks=2, heads=2, mlp_width=48, classifier=32)


@dataclass(frozen=True)
class DraftSettings:
    """What the distillation minimises, and how."""

    draft: VisionDraftConfig = field(default_factory=VisionDraftConfig)
    batch: int = 1024
    feature_weight: float = 0.5
    scene_weight: float = 0.3
    measure_every: float = 90.0  # s
    measured: int = 2048  # held-out frames, at the most, while it trains
    compiled: bool = False
    seed: int = 0


class Student(nn.Module):
    """The draft, and the auxiliary outputs that only the training uses."""

    def __init__(self, config: BundleConfig, draft: VisionDraftConfig) -> None:
        super().__init__()
        self.draft = VisionDraft(draft, config.dims, config.control, config.hidden)
        towers = config.backbone.towers
        same_grid = config.backbone.image_size // towers[0].patch == draft.side // draft.patch
        self.features = nn.Linear(draft.width, sum(tower.width for tower in towers)) if same_grid else None
        self.scene = nn.Linear(draft.width, SCENE_DIM)

    def forward(self, images: Tensor, state: Tensor, instruction: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images [B, cameras, size, size, 3] in 0..255 as main sees them, normalised state, instruction rows -> logits,
        features [B, cameras, P, widths], scene [B, 6]."""
        readout, patches = self.draft.see(fitted(images, self.draft.config.side), state, instruction)
        with torch.autocast(readout.device.type, enabled=False):  # the targets depend on an exact argmax
            logits = self.draft.classify(readout.float())
        return logits, self.features(patches) if self.features is not None else None, self.scene(readout)


def fitted(images: Tensor, side: int) -> Tensor:
    """[B, cameras, S, S, 3] -> [B, cameras, side, side, 3]."""
    if images.shape[2] == side:
        return images
    x = images.flatten(0, 1).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 255)
    return x.permute(0, 2, 3, 1).view(*images.shape[:2], side, side, 3)


def instructions(config: BundleConfig, model: RsdModel, batches: Batches, rows: int) -> Tensor:
    """[tasks, rows, E]: what the draft reads of each task's instruction, from main's own token embeddings."""
    embed = model.backbone.llama.embed_tokens.weight
    return torch.stack(
        [
            instruction_rows(embed[tokens[: int(length)]], rows)
            for tokens, length in zip(batches.tokens, batches.lengths, strict=True)
        ]
    )


@contextmanager
def tower_features(model: RsdModel) -> Iterator[list[Tensor]]:
    """Collects what main's towers give, [B * cameras, P, width] each, while the block runs."""
    found: list[Tensor] = []
    towers = model.backbone.vision_backbone.values()
    hooks = [tower.register_forward_hook(lambda module, given, out: found.append(out)) for tower in towers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def fit_vision_draft(
    config: BundleConfig,
    codec: Codec,
    batches: Batches,
    model: RsdModel,
    run: Path,
    settings: DraftSettings,
    limits: LoopSettings,
) -> VisionDraft:
    """Trains the draft on main's chunks -> the averaged weights. `model` is main, and stays as it is."""
    device = batches.data.images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        student = Student(config, settings.draft).to(device)
    loop = Loop(NAME, run, student, limits)
    batches.generator.manual_seed(settings.seed + loop.step + SEEDS * ranks.rank())
    words = instructions(config, model, batches, settings.draft.instruction)
    plain = copy.deepcopy(model)  # to measure: other batches and float32 would be compiled anew
    if settings.compiled:
        model.compile_blocks()
        for block in student.draft.blocks:
            block.compile(dynamic=False)
    table, dims = codec.rfsq.table(), (config.dims.T, config.dims.D)
    measured = loop.elapsed
    for _ in loop.steps(settings.batch):
        index = batches.draw(settings.batch)
        images, state = batches.see(index, augmented=True)
        with torch.no_grad(), autocast(device), tower_features(model) as towers:
            read = batches.read(index, images, state)
            hidden = model.backbone(read)
        with torch.no_grad():
            z = decode_z(model.head(hidden.float()).argmax(-1), table, dims)
        with autocast(device):
            logits, features, scene = student(images, state, words[batches.data.task[index]])
        losses = layer_losses(logits, corrected_targets(z, logits, table), config.dims.T)
        aims = F.smooth_l1_loss(scene.float(), batches.data.scene[index] / SCENE_UNIT)
        seen = _feature_loss(features, towers) if features is not None else aims.new_zeros(())
        loss = total_loss(losses) + settings.feature_weight * seen + settings.scene_weight * aims
        parts = {f"draft_ce{i}": value for i, value in enumerate(losses)}
        loop.update(loss, {"loss": loss, "features": seen, "scene": aims, **parts})
        if loop.elapsed - measured > settings.measure_every and not ranks.rank():
            assert isinstance(loop.average, Student)
            report = measure_draft(loop.average.draft, plain, codec, config, batches, words, settings.measured)
            loop.record(kind="held_out", **report)
            log.info("held out: %s", {key: report.get(key) for key in ("agreement", "blind", "accuracy")})
            measured = loop.elapsed
    assert isinstance(loop.average, Student)
    return loop.average.draft


def _feature_loss(found: Tensor, towers: Sequence[Tensor]) -> Tensor:
    """1 - cosine between the student's patches [B, cameras, P, widths] and each tower's features, on average."""
    parts = found.flatten(0, 1).float().split([tower.shape[-1] for tower in towers], dim=-1)
    losses = [
        1 - F.cosine_similarity(part, tower.float(), dim=-1).mean() for part, tower in zip(parts, towers, strict=True)
    ]
    return torch.stack(losses).mean()


def load_main(training: Training) -> RsdModel:
    """The trained main policy of the run, as it is stored."""
    model = build_model(training.config, training.device, 0)
    model.load_state_dict(read_trained(training.request.run, "policy").average)
    model.requires_grad_(False).eval()
    return model.to(STORED).float()


def finish(training: Training, settings: DraftSettings) -> dict[str, object]:
    """Measures the trained draft on all held-out frames, as it is stored, and writes weights, configuration, report."""
    from safetensors.torch import save_file

    run, batches, model = training.request.run, training.batches(), load_main(training)
    student = Student(training.config, settings.draft)
    trained = read_trained(run, NAME)
    student.load_state_dict(trained.average)
    draft = student.draft.to(STORED).float().to(training.device).requires_grad_(False).eval()
    words = instructions(training.config, model, batches, settings.draft.instruction)
    report: dict[str, object] = {"steps": trained.step, "seconds": round(trained.elapsed, 1)}
    report |= {"settings": asdict(settings) | {"draft": to_json(settings.draft)}}
    report |= measure_draft(draft, model, training.codec(), training.config, batches, words)
    state = {name: value.to("cpu", STORED).contiguous() for name, value in draft.state_dict().items()}
    save_file(state, run / f"{NAME}.safetensors")
    write_atomically(run / f"{NAME}.json", to_text(settings.draft))
    write_atomically(run / f"{NAME}_report.json", json.dumps(report, indent=1) + "\n")
    log.info("%s", json.dumps({key: value for key, value in report.items() if key != "settings"}))
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.reference_policy.fit_vision_draft", description=__doc__)
    parser.add_argument("step", choices=("fit", "report", "all"), nargs="?", default="all")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="with main's checkpoint policy.pt")
    parser.add_argument("--size", choices=("reference", "tiny"), default="reference")
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--rotation", choices=("shortest", "robosuite"), default="robosuite")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, help="in place of --minutes")
    parser.add_argument("--batch", type=int, default=DraftSettings.batch, help="of each process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", type=float, default=DraftSettings.feature_weight, help="weight of their loss")
    parser.add_argument("--draft", default="{}", help="JSON of what differs from the default draft")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks (default: on CUDA)")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(args)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")


def _run(args: argparse.Namespace) -> None:
    request = Request(args.data, args.run, Path(), args.size, args.chunk, args.rotation, args.device)
    training = Training(request)
    base = to_json(TINY if args.size == "tiny" else VisionDraftConfig())
    draft = from_json(VisionDraftConfig, base | json.loads(args.draft), "--draft")
    compiled = training.device.type == "cuda" if args.compile is None else args.compile
    settings = DraftSettings(draft, args.batch, args.features, compiled=compiled, seed=args.seed)
    minutes = args.minutes if args.steps is None else None
    limits = LoopSettings(minutes, args.steps, learning_rate=args.lr, until=ranks.until())
    if args.step != "report":
        batches = training.batches()
        fit_vision_draft(training.config, training.codec(), batches, load_main(training), args.run, settings, limits)
    if args.step != "fit" and not ranks.rank():
        finish(training, replace(settings, compiled=False))
    ranks.leave()


if __name__ == "__main__":
    main()
