"""The command that looks at the machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from rsd_trt import __version__
from rsd_trt.cli.console import bundle_argument, engines_option, json_option, show
from rsd_trt.errors import UserError, did_you_mean


@click.command()
@bundle_argument
@click.option("--backend", default="torch", show_default=True, help="What has to work; all else is only noted.")
@engines_option
@json_option
def doctor(bundle: Path, backend: str, engines: Path, as_json: bool) -> None:
    """Look at everything that rsd-trt needs here: what works, what does not, and what to do about it.

    Renders a frame, makes an ONNX Runtime session and loads the bundle, each in a process of its own. Exit code 1 if
    something that the backend needs is broken.

    \b
    Example: rsd-trt doctor --backend ort
    """
    from rsd_trt.doctor import EVERY, all_checks, examine

    if backend not in EVERY:
        raise UserError(f"backend {backend!r} is unknown{did_you_mean(backend, EVERY)}")
    lines = examine(all_checks(backend, bundle, engines), backend)
    broken = [line.what for line in lines if line.state == "broken"]
    if as_json:
        rows = [dataclasses.asdict(line) for line in lines]
        click.echo(json.dumps({"rsd_trt": __version__, "backend": backend, "broken": broken, "checks": rows}, indent=2))
    else:
        from rsd_trt.tables import doctor_table

        show(doctor_table(lines, backend))
    if broken:
        raise UserError(f"backend {backend} cannot work here: {', '.join(broken)}")


COMMANDS = (doctor,)
