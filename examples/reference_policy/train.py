"""Trains the reference policy's backbone and main head on the expert's demonstrations, and makes a bundle of them.

    python -m examples.reference_policy.train --data data/ --work run/ --bundle bundles/main
    torchrun --nproc-per-node 4 -m examples.reference_policy.train ...    # on several GPUs

The same command goes on from the checkpoint in `--work`. The bundle has no draft: `rsd-trt distill` makes one.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from msgspec import structs

from examples.reference_policy.collect import conventions
from examples.reference_policy.data import Batches, load_demonstrations, quantiles
from examples.reference_policy.fit_policy import PolicySettings, build_model, fit_policy
from examples.reference_policy.measure import measure
from rsd_trt.bundle import save
from rsd_trt.config import Quantiles, Size
from rsd_trt.errors import UserError
from rsd_trt.files import write_atomically
from rsd_trt.models.codec import Codec
from rsd_trt.presets import byte_tokenizer, preset
from rsd_trt.records import read_record, write_record
from rsd_trt.runtime.backends import check_device
from rsd_trt.training import ranks
from rsd_trt.training.codec import check_codec, fit_codec
from rsd_trt.training.loop import LoopSettings, read_trained, write_state

log = logging.getLogger(__name__)

NAME = "reference"
REPORT = "training.json"
STORED = torch.float16  # of backbone and head on disk; they are loaded as float32


@dataclass(frozen=True)
class Request:
    """One run of this program."""

    data: Path
    run: Path
    bundle: Path
    size: Size = "reference"
    device: str = "auto"
    policy: PolicySettings = field(default_factory=PolicySettings)
    limits: LoopSettings = field(default_factory=lambda: LoopSettings(minutes=8.0))


def train(request: Request) -> None:
    """Trains as long as the request says, and writes bundle and report, with the measures of all held-out frames.

    Raises:
        UserError: the bundle exists, or there are no demonstrations.
    """
    if request.bundle.exists():  # said before the training, not after it
        raise UserError(f"{request.bundle} exists; choose another path or remove it first")
    device = check_device(ranks.own_device(request.device))
    ranks.join(device)
    run, settings = request.run, request.policy
    run.mkdir(parents=True, exist_ok=True)
    data = load_demonstrations(request.data, device)
    if not (run / "quantiles.json").is_file():  # they stay those of the run's first data
        write_record(run / "quantiles.json", quantiles(data.proprio[~data.held_out]))
    config = structs.replace(
        preset(request.size, NAME),
        control=structs.replace(conventions(), proprio_quantiles=read_record(Quantiles, run / "quantiles.json")),
        training_actions=quantiles(data.actions),
        trained=True,
    )
    if not (run / "codec.pt").is_file():
        write_state(run / "codec.pt", {**fit_codec(config).state_dict()})
    codec, tokenizer = Codec(config.codec, config.dims), byte_tokenizer()
    codec.load_state_dict(torch.load(run / "codec.pt", weights_only=True))
    codec = codec.requires_grad_(False).eval().to(device)
    batches = Batches(data, config, tokenizer, settings.seed)
    fit_policy(config, codec, batches, run, settings, request.limits)
    if ranks.rank():
        return
    model, policy = build_model(config, device, 0), read_trained(run, "policy")
    model.load_state_dict(policy.average)
    model = model.eval().to(STORED).float()  # what is measured is what is stored
    held_out = measure(model, codec, config, batches, len(batches.held_out), settings.batch)
    log.info("held out: %s", json.dumps(held_out))
    errors = asdict(check_codec(codec, data.actions))
    model = model.to("cpu", STORED)
    parts = {"backbone": model.backbone, "head": model.head, "codec": codec.to("cpu")}
    bundle = save(request.bundle, config, parts, tokenizer)
    report = {
        "size": request.size,
        "frames": len(data.row),
        "held_out_frames": len(batches.held_out),
        "actions": len(data.actions),
        "policy_steps": policy.step,
        "policy_seconds": policy.elapsed,
        "policy": asdict(settings),
        "codec": errors,
        "chance": 1 / config.dims.K,
        "held_out": held_out,
        "bytes": sum(file.stat().st_size for file in bundle.path.iterdir()),
        "fingerprint": bundle.fingerprint,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    write_atomically(run / REPORT, json.dumps(report, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.reference_policy.train", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the demonstrations")
    parser.add_argument("--work", type=Path, default=Path("run"), help="folder of checkpoint, metrics and report")
    parser.add_argument("--bundle", type=Path, default=Path("run/bundle"), help="the folder to write the policy to")
    parser.add_argument("--size", choices=("reference", "tiny"), default="reference")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, help="in place of --minutes")
    parser.add_argument("--batch", type=int, default=PolicySettings.batch)
    parser.add_argument("--lr", type=float, default=LoopSettings.learning_rate)
    parser.add_argument("--warm-up", type=int, default=LoopSettings.warm_up)
    parser.add_argument("--no-augment", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the blocks (default: on CUDA)")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    minutes = args.minutes if args.steps is None else None
    try:
        compiled = check_device(ranks.own_device(args.device)).type == "cuda" if args.compile is None else args.compile
        policy = PolicySettings(batch=args.batch, compiled=compiled, augmented=not args.no_augment)
        limits = LoopSettings(minutes, args.steps, learning_rate=args.lr, warm_up=args.warm_up)
        train(Request(args.data, args.work, args.bundle, args.size, args.device, policy, limits))
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    finally:
        ranks.leave()


if __name__ == "__main__":
    main()
