"""Which matrix products of a backbone may be computed in E4M3? What some of them in it, and no other, do to states and
answers, beside the same backbone all in bfloat16.

    python -m examples.reference_policy.studies.fp8_sensitivity bundles/7b --device cuda > fp8_sensitivity.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

from rsd_trt.bundle import Bundle
from rsd_trt.config import DEFAULT_BUNDLE, SUITES
from rsd_trt.eval.verify.backbone import Answers, joined, open_head, steps_beyond_tolerance, token_mismatch
from rsd_trt.eval.verify.components import BATCHES
from rsd_trt.eval.verify.inputs import libero_observations, random_observations
from rsd_trt.eval.verify.oracle import last_positions
from rsd_trt.eval.verify.result import record
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.models.fast.products import PRODUCTS, Fp8Product, Product, ProductName, every_product, fp8_products
from rsd_trt.runtime.backends import check_device, check_fp8
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor

Choice = Collection[tuple[int, ProductName]]


@dataclass(frozen=True)
class Sensitivity:
    """What a choice of products in E4M3 does to hidden states, tokens and actions."""

    what: str
    products: int
    cosine: float  # of the hidden state, the worst input
    mean_cosine: float
    token_mismatch: float  # share of different tokens in the main head's worst layer
    action_mean_abs: float  # of the chunks, in environment units
    steps_beyond_tolerance: float  # share of the chunks' steps that differ by more than the bundle's tolerance
    inputs: int


@torch.inference_mode()
def sensitivity(bundle: Bundle, device: torch.device, observations: Sequence[Observation]) -> Iterator[Sensitivity]:
    """All products; the MLPs', as `fp8` computes them; each kind alone, and all but it; all but the first blocks; each
    block alone (counted from 0).

    Raises:
        UserError: the device or the backbone's widths allow no E4M3.
    """
    check_fp8(bundle, device)
    config, batch = bundle.config.backbone, BATCHES["dynamic"]
    process = Preprocessor(bundle.config.control, config, bundle.tokenizer(), device)
    fused = FusedBackbone(bundle.backbone(device)).to(torch.bfloat16)
    embedded = []
    for start in range(0, len(observations), batch):
        inputs = process(observations[start : start + batch])
        stream = fused.embed(inputs.pixels.bfloat16(), inputs.tokens, inputs.proprio)
        embedded.append((stream, last_positions(inputs, stream)))
    read = open_head(bundle, device)

    def answers() -> Answers:
        return joined([read(fused.language(*x)) for x in embedded])

    expected = answers()
    for what, choice in choices(config.language.blocks).items():
        plain = {pair: getattr(fused.layers[pair[0]], pair[1]) for pair in choice}
        try:
            for (block, name), module in plain.items():
                assert isinstance(module, Product)
                setattr(fused.layers[block], name, Fp8Product(module.weight))
            found = answers()
        finally:
            for (block, name), module in plain.items():
                setattr(fused.layers[block], name, module)
        final = cosine_similarity(found.final.double(), expected.final.double(), dim=-1)
        yield Sensitivity(
            what=what,
            products=len(choice),
            cosine=float(final.min()),
            mean_cosine=float(final.mean()),
            token_mismatch=max(token_mismatch(found.tokens, expected.tokens)),
            action_mean_abs=float((found.actions - expected.actions).abs().mean()),
            steps_beyond_tolerance=steps_beyond_tolerance(found, expected, bundle.config),
            inputs=len(final),
        )


def choices(blocks: int) -> dict[str, Choice]:
    """The choices of products that are measured, by name."""
    every = every_product(blocks)
    only = {f"only {name}": {pair for pair in every if pair[1] == name} for name in PRODUCTS}
    but = {f"all but {name}": {pair for pair in every if pair[1] != name} for name in PRODUCTS}
    single = {f"block {i}": {pair for pair in every if pair[0] == i} for i in range(blocks - 1)}
    first = {f"all but blocks < {n}": {pair for pair in every if pair[0] >= n} for n in range(1, min(4, blocks - 1))}
    return {"all": every, "the MLPs": fp8_products(blocks), **only, **but, **first, **single}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a record of all choices as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=DEFAULT_BUNDLE)
    parser.add_argument("--libero", choices=SUITES, help="show a suite's first scenes, not noise")
    parser.add_argument("-n", "--inputs", type=int, default=64, help="how many images of noise")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    bundle, device = Bundle.open(given.bundle), check_device(given.device)
    control = bundle.config.control
    seen = (
        list(libero_observations(given.libero, control)) if given.libero else random_observations(control, given.inputs)
    )
    rows = []
    for row in sensitivity(bundle, device, seen):
        print(f"{row.what}: cosine {row.cosine:.6f}", file=sys.stderr)
        rows.append(asdict(row))
    command = shlex.join(["python", "-m", "examples.reference_policy.studies.fp8_sensitivity", *sys.argv[1:]])
    print(json.dumps(record(bundle, device, command, rows=rows), indent=2))


if __name__ == "__main__":
    main()
