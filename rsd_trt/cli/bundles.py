"""Commands that make and show bundles."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rsd_trt.cli.console import Choice, Several, bundle_argument, engines_option, from_options, json_option, show
from rsd_trt.config import GRIPPERS, PRESETS, ROTATIONS, SIZES, BundleConfig, Dims, HeadKind, Size


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--size", type=Choice(SIZES), default="reference", show_default=True, help="Make it of this size.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed the weights.")
@click.option(
    "--device",
    type=Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Draw the weights on this device: cuda is faster for 7B, and its numbers are others.",
)
@click.option(
    "--head", type=Choice(["rfsq", "oft-l1"]), default="rfsq", show_default=True, help="Give it this main head."
)
@click.option("--without-backbone", is_flag=True, help="Write draft, head and codec only (7B: saves 15 GB).")
def init(path: Path, size: Size, seed: int, device: str, head: HeadKind, without_backbone: bool) -> None:
    """Write an UNTRAINED bundle with random weights, to try the tools on.

    \b
    Example: rsd-trt init bundles/tiny --size tiny --seed 0
    """
    from rsd_trt.presets import initialise

    bundle = initialise(path, size, seed, with_backbone=not without_backbone, device=device, head=head)
    click.echo(f"{bundle.path}: size {size}, seed {seed}, UNTRAINED (its actions mean nothing)")


@click.command()
@bundle_argument
@engines_option
@click.option("--hash", "whole", is_flag=True, help="Hash backbone weights that lie elsewhere, too.")
@json_option
def info(bundle: Path, engines: Path, whole: bool, as_json: bool) -> None:
    """Show a bundle: parts, parameters, dimensions, fingerprints, conventions, and whether its exports are fresh.

    \b
    Example: rsd-trt info bundles/tiny --json
    """
    from rsd_trt.bundle import Bundle
    from rsd_trt.cli.info import bundle_table, conventions_table, describe, exports_table

    opened = Bundle.open(bundle)
    description = describe(opened, engines, whole)
    if as_json:
        click.echo(json.dumps(description, indent=2))
        return
    show(bundle_table(description), conventions_table(description))
    if description["exports"]:
        show(exports_table(description))
    else:
        click.echo(f"nothing exported yet: rsd-trt export {bundle}")
    if opened.has("draft") and opened.config.late_draft:
        click.echo(f"note: {opened.config.late_draft}")


@click.command()
@click.option("--backbone", required=True, help="Take this folder or hub id of OpenVLA or OpenVLA-OFT.")
@click.option("--draft", type=click.Path(path_type=Path), help="Take the draft of this .pt file.")
@click.option(
    "--head",
    type=click.Path(path_type=Path),
    help="Take the main head of this .pt file. [openvla-oft: its folder's]",
)
@click.option("--codec", type=click.Path(path_type=Path), help="Take the RFSQ codec of this .pt file.")
@click.option("--preset", type=Choice(PRESETS), required=True, help="Drive the policy by these conventions.")
@click.option("--statistics", help="Normalise by this data set's statistics. [default: the only ones]")
@click.option(
    "--codec-scale",
    type=Choice(["plain", "layernorm"]),
    help="Scale layers so. [default: as the codec's file says]",
)
@click.option("--chunk", type=click.IntRange(1), default=Dims().T, show_default=True, help="Give chunks so many steps.")
@click.option("--prompt", help="Ask with openvla, instruction (bare), or a text with {instruction}. [the preset's]")
@click.option("--cameras", type=Several(), help="Show these cameras, in this order. [default: the preset's]")
@click.option(
    "--rotate-images/--images-as-rendered",
    default=None,
    help="Turn images by 180 degrees. [default: the preset's]",
)
@click.option("--rotation", type=Choice(ROTATIONS), help="Compute the hand's axis-angle so. [default: the preset's]")
@click.option(
    "--gripper",
    type=Choice(GRIPPERS),
    help="Read the gripper so: env 1 closes, openvla 1 opens. [the preset's]",
)
@click.option("--copy", is_flag=True, help="Copy the backbone's weights into the bundle (7B: 15 GB).")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Write the bundle to this folder.")
@json_option
def pack(as_json: bool, **options: object) -> None:
    """Make a bundle of OpenVLA's weights and OpenVLA-OFT's head or the original RSD experiment's draft, head and codec.

    Code that lies beside the weights is not run, and the weights stay where they are unless --copy is given. The preset
    sets attention, prompt, image rotation and crop, gripper convention and normalisation: openvla and openvla-oft as
    those projects evaluate on LIBERO, rvq as the original RSD experiment does. What was assumed is printed.

    \b
    Example: rsd-trt pack --backbone moojink/openvla-7b-oft-finetuned-libero-spatial --preset openvla-oft -o bundles/oft
    """
    from rsd_trt.importers.pack import PackRequest
    from rsd_trt.importers.pack import pack as make
    from rsd_trt.records import to_json

    request = from_options(PackRequest, options)
    if request.codec_scale is not None and request.codec is None:
        raise click.UsageError("--codec-scale is of the codec: it needs --codec")
    if request.preset == "rvq" and request.statistics is not None:
        raise click.UsageError("--preset rvq takes actions as the environment does: leave out --statistics")
    packed = make(request, lambda shard: click.echo(f"checking {shard}", err=True))
    if as_json:
        click.echo(json.dumps(to_json(packed), indent=2))
        return
    note = f", normalised by {packed.statistics}" if packed.statistics else ""
    click.echo(f"{packed.bundle}: {', '.join(packed.parts)}; preset {request.preset}{note}")
    how = "copied" if request.copy else "referenced"
    click.echo(f"{how}: {packed.bytes / 1e9:.2f} GB of backbone weights in {packed.backbone}")
    if packed.not_read:
        click.echo(f"not read: {', '.join(packed.not_read)}")
    from rsd_trt.bundle import Bundle

    config = Bundle.open(request.out).config
    click.echo(f"assumed: {assumptions(config)} (rsd-trt info {request.out} shows all)")
    if "head" not in packed.parts:
        click.echo(
            "note: nothing can act by it without --head: OpenVLA's own action tokens (greedy decoding) are not read"
        )
    if "draft" in packed.parts and config.late_draft:
        click.echo(f"note: {config.late_draft}")


def assumptions(config: BundleConfig) -> str:
    """The conventions that no file states, in words."""
    control = config.control
    jpeg = "" if control.jpeg_quality is None else f", through JPEG {control.jpeg_quality}"
    return "; ".join(
        (
            f"prompt {control.prompt!r}{', lower case' * control.lowercase}",
            f"cameras {', '.join(control.cameras)}",
            f"images {'rotated by 180 degrees' if control.rotate_images else 'as rendered'}{jpeg}, "
            f"{control.resampling}, crop {control.center_crop:g}",
            f"rotation {control.rotation}",
            f"gripper {control.gripper}",
            f"attention {config.backbone.attention}",
        )
    )


COMMANDS = (init, pack, info)
