"""Commands that make and show bundles."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rsd_trt.cli.console import bundle_argument, engines_option, json_option, show
from rsd_trt.config import SIZES, Size


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--size", type=click.Choice(SIZES), default="reference", show_default=True, help="Size preset.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the random weights.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What draws the weights: cuda is faster for 7B, and its numbers are others.",
)
@click.option("--without-backbone", is_flag=True, help="Write draft, head and codec only (7B: saves 15 GB).")
def init(path: Path, size: Size, seed: int, device: str, without_backbone: bool) -> None:
    """Write an UNTRAINED bundle with random weights, to try the tools on.

    \b
    Example: rsd-trt init bundles/tiny --size tiny --seed 0
    """
    from rsd_trt.initialise import initialise

    bundle = initialise(path, size, seed, with_backbone=not without_backbone, device=device)
    click.echo(f"{bundle.path}: size {size}, seed {seed}, UNTRAINED (its actions mean nothing)")


@click.command()
@bundle_argument
@engines_option
@json_option
def info(bundle: Path, engines: Path, as_json: bool) -> None:
    """Show a bundle: parts, parameters, dimensions, fingerprints, conventions, and whether its exports are fresh.

    \b
    Example: rsd-trt info bundles/tiny --json
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.info import describe

    description = describe(Bundle.open(bundle), engines)
    if as_json:
        click.echo(json.dumps(description, indent=2))
        return
    from rsd_trt.tables import artefacts_table, bundle_table, conventions_table

    show(bundle_table(description), conventions_table(description), artefacts_table(description))


COMMANDS = (init, info)
