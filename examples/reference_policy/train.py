"""Trains the reference policy: python -m examples.reference_policy.train all --data data/ --run run/ --bundle out/

Each step is a command of its own, too (codec, policy, draft, save), and goes on from its checkpoint in `--run`.
`all` does them in one process that is over after `--total-minutes`; `plot` draws the loss curves.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from msgspec import structs
from tokenizers import Tokenizer

from examples.reference_policy.data import Batches, load_actions, load_demonstrations, quantiles
from examples.reference_policy.fit_policy import PolicySettings, RsdModel, build_model, fit_draft, fit_policy
from examples.reference_policy.measure import measure
from rsd_trt.bundle import Bundle, save
from rsd_trt.config import BundleConfig, HiddenDraftConfig, Quantiles, Rotation, Size
from rsd_trt.errors import UserError, missing_extra
from rsd_trt.files import write_atomically
from rsd_trt.models.codec import Codec
from rsd_trt.presets import byte_tokenizer, preset
from rsd_trt.records import read_record, write_record
from rsd_trt.runtime.backends import check_device
from rsd_trt.training import ranks
from rsd_trt.training.codec import check_codec, fit_codec
from rsd_trt.training.loop import METRICS, LoopSettings, Trained, read_trained, write_state

log = logging.getLogger(__name__)

NAME = "reference"
REPORT = "training.json"
STORED = torch.float16  # of backbone, head and draft on disk; they are loaded as float32
DRAFT_RATE = 5e-4
LAST_MINUTE = 0.5  # of `all`, for the last measurements and the bundle


@dataclass(frozen=True)
class Request:
    """One run of this program."""

    data: Path
    run: Path
    bundle: Path
    size: Size = "reference"
    chunk: int | None = None  # T, steps of a chunk, where it is not the size's own
    rotation: Rotation = "shortest"  # convention of the recorded state
    device: str = "auto"
    policy: PolicySettings = field(default_factory=PolicySettings)
    limits: LoopSettings = field(default_factory=lambda: LoopSettings(minutes=8.0))
    draft_minutes: float | None = 1.0
    draft_steps: int | None = None


class Training:
    """The steps of a run; the data are read when the first of them needs them."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.device = check_device(ranks.own_device(request.device))
        draft = HiddenDraftConfig(width=256, mlp_width=1024, positions=1)  # see fit_vision_draft
        config = structs.replace(preset(request.size, NAME), draft=draft)
        self.config = structs.replace(
            config,
            dims=structs.replace(config.dims, T=request.chunk or config.dims.T),
            control=structs.replace(config.control, rotation=request.rotation),
        )
        self.tokenizer: Tokenizer = byte_tokenizer()
        self._batches: Batches | None = None
        request.run.mkdir(parents=True, exist_ok=True)

    def codec(self) -> Codec:
        """Fits the codec, unless that is done."""
        file = self.request.run / "codec.pt"
        if not file.is_file():
            codec = fit_codec(self.config)
            errors = check_codec(codec, load_actions(self.request.data))
            write_state(file, {"codec": codec.state_dict(), "errors": asdict(errors)})
        codec = Codec(self.config.codec, self.config.dims)
        codec.load_state_dict(torch.load(file, weights_only=True)["codec"])
        return codec.requires_grad_(False).eval().to(self.device)

    def batches(self) -> Batches:
        """The data; the proprioception's quantiles are those of the run's first reading."""
        if self._batches is None:
            started = time.perf_counter()
            data = load_demonstrations(self.request.data, self.device)
            file = self.request.run / "quantiles.json"
            if not file.is_file():
                write_record(file, quantiles(data.proprio[~data.held_out]))
            proprio = read_record(Quantiles, file)
            self.config = structs.replace(
                self.config,
                control=structs.replace(self.config.control, proprio_quantiles=proprio),
                training_actions=quantiles(data.actions),
            )
            self._batches = Batches(data, self.config, self.tokenizer, self.request.policy.seed)
            log.info("read %s in %.1f s", self.request.data, time.perf_counter() - started)
        return self._batches

    def policy(self, limits: LoopSettings) -> RsdModel:
        """Trains backbone, head and draft together."""
        return fit_policy(self.config, self.codec(), self.batches(), self.request.run, self.request.policy, limits)

    def draft(self) -> RsdModel:
        """Trains the draft on the head's tokens."""
        model = build_model(self.config, self.device, 0)
        model.load_state_dict(read_trained(self.request.run, "policy").average)
        model.requires_grad_(False).eval()
        request = self.request
        limits = replace(
            request.limits,
            minutes=request.draft_minutes if request.draft_steps is None else None,
            steps=request.draft_steps,
            learning_rate=DRAFT_RATE,
        )
        return fit_draft(self.config, self.codec(), self.batches(), model, request.run, request.policy, limits)

    def save(self) -> Bundle:
        """Measures the trained parts on all held-out frames and writes the bundle and the report."""
        codec, batches = self.codec(), self.batches()
        config = structs.replace(self.config, trained=True)
        model = build_model(config, self.device, 0)
        policy = read_trained(self.request.run, "policy")
        model.load_state_dict(policy.average)
        joint_draft = measure(model.eval(), codec, config, batches, len(batches.held_out), self.request.policy.batch)
        if (self.request.run / "draft.pt").is_file():  # else it stays as it was trained together with the head
            model.draft.load_state_dict(read_trained(self.request.run, "draft").average)
        model = model.to(STORED).float()  # what is measured is what is stored
        final = measure(model, codec, config, batches, len(batches.held_out), self.request.policy.batch)
        log.info("held out: %s", json.dumps(final))
        model = model.to("cpu", STORED)
        parts = {"backbone": model.backbone, "draft": model.draft, "head": model.head, "codec": codec.to("cpu")}
        bundle = save(self.request.bundle, config, parts, self.tokenizer)
        self._report(config, batches, policy, joint_draft, final, bundle)
        return bundle

    def _report(
        self,
        config: BundleConfig,
        batches: Batches,
        policy: Trained,
        joint_draft: dict[str, object],
        final: dict[str, object],
        bundle: Bundle,
    ) -> None:
        data = batches.data
        report = {
            "size": self.request.size,
            "frames": len(data.row),
            "held_out_frames": len(batches.held_out),
            "actions": len(data.actions),
            "policy_steps": policy.step,
            "policy_seconds": policy.elapsed,
            "policy": asdict(self.request.policy),
            "codec": torch.load(self.request.run / "codec.pt", weights_only=True)["errors"],
            "chance": 1 / config.dims.K,
            "held_out": final,
            "held_out_before_distillation": {k: v for k, v in joint_draft.items() if k[:5] in ("draft", "agree")},
            "bytes": sum(file.stat().st_size for file in bundle.path.iterdir()),
            "fingerprint": bundle.fingerprint,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }
        write_atomically(self.request.run / REPORT, json.dumps(report, indent=1) + "\n")


def run_all(request: Request, total_minutes: float | None) -> None:
    """Every step; with `total_minutes`, the policy gets what the others leave of that time."""
    started = time.perf_counter()
    if request.bundle.exists():  # said before the training, not after it
        raise UserError(f"{request.bundle} exists; choose another path or remove it first")
    training = Training(request)
    training.codec()
    training.batches()
    limits = request.limits
    if total_minutes is not None:
        resumed = (request.run / "policy.pt").is_file()
        before = read_trained(request.run, "policy").elapsed / 60 if resumed else 0.0
        used = (time.perf_counter() - started) / 60
        left = total_minutes - used - (request.draft_minutes or 0.0) - LAST_MINUTE
        limits = replace(limits, minutes=before + max(left, 0.0), steps=None)
    training.policy(limits)
    training.draft()
    training.save()


def plot(run: Path) -> Path:
    """Draws the loss curves and the held-out errors of a run into `training.png`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise missing_extra("matplotlib", "plots") from None
    lines = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines()]
    train = [line for line in lines if line["kind"] == "train" and line["stage"] == "policy"]
    held_out = [line for line in lines if line["kind"] == "held_out" and line.get("frames")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name in ("head_ce0", "head_ce1", "head_ce2", "draft_ce0", "draft_ce1", "draft_ce2"):
        style = "-" if name.startswith("head") else "--"
        left.plot([line["step"] for line in train], [line[name] for line in train], style, label=name)
    left.set(xlabel="step", ylabel="cross-entropy", title="training, augmented")
    left.legend()
    for name in ("head", "draft"):
        points = [(line["step"], line[f"{name}_first_error"][-1]) for line in held_out]
        right.plot(*zip(*points, strict=True), label=name) if points else None
    right.set(xlabel="step", ylabel="mean |action error| of the first step", title="held out")
    right.legend()
    figure.tight_layout()
    figure.savefig(run / "training.png", dpi=120)
    return run / "training.png"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.reference_policy.train", description=__doc__)
    parser.add_argument("step", choices=("all", "codec", "policy", "draft", "save", "plot"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the demonstrations")
    parser.add_argument("--run", type=Path, default=Path("run"), help="folder of checkpoints and metrics")
    parser.add_argument("--bundle", type=Path, default=Path("run/bundle"), help="the folder to write the policy to")
    parser.add_argument("--size", choices=("reference", "tiny"), default="reference")
    parser.add_argument("--chunk", type=int, help="steps of a chunk (default: the size's)")
    parser.add_argument("--rotation", choices=("shortest", "robosuite"), default="shortest", help="as collected")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the policy's training")
    parser.add_argument("--steps", type=int, help="of the policy's training, in place of --minutes")
    parser.add_argument("--draft-minutes", type=float, default=1.0)
    parser.add_argument("--draft-steps", type=int)
    parser.add_argument("--total-minutes", type=float, help="of `all`; the policy gets what is left of it")
    parser.add_argument("--batch", type=int, default=PolicySettings.batch)
    parser.add_argument("--lr", type=float, default=LoopSettings.learning_rate)
    parser.add_argument("--warm-up", type=int, default=LoopSettings.warm_up)
    parser.add_argument("--no-augment", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks (default: on CUDA)")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(args)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")


def _run(args: argparse.Namespace) -> None:
    compiled = check_device(ranks.own_device(args.device)).type == "cuda" if args.compile is None else args.compile
    request = Request(
        args.data,
        args.run,
        args.bundle,
        args.size,
        args.chunk,
        args.rotation,
        args.device,
        PolicySettings(batch=args.batch, compiled=compiled, augmented=not args.no_augment),
        LoopSettings(
            minutes=args.minutes if args.steps is None else None,
            steps=args.steps,
            learning_rate=args.lr,
            warm_up=args.warm_up,
            until=ranks.until(),
        ),
        args.draft_minutes if args.draft_steps is None else None,
        args.draft_steps,
    )
    if args.step == "plot":
        log.info("%s", plot(args.run))
        return
    if args.step == "all":
        run_all(request, args.total_minutes)
        return
    training = Training(request)
    if args.step == "policy":
        training.batches()
        training.policy(request.limits)
    else:
        {"codec": training.codec, "draft": training.draft, "save": training.save}[args.step]()
    ranks.leave()


if __name__ == "__main__":
    main()
