"""The command that serves robots."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import click

from rsd_trt.cli.console import (
    Choice,
    FiniteRange,
    backbone_option,
    backbone_precision_option,
    bundle_argument,
    device_option,
    engines_option,
    precision_option,
)
from rsd_trt.config import BACKENDS
from rsd_trt.errors import missing_extra


@click.command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address; 0.0.0.0 is all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Listen on it; 0: any.")
@click.option("--sessions", type=click.IntRange(1, 1024), default=16, show_default=True, help="Refuse more clients.")
@click.option(
    "--mode",
    type=Choice(("baseline", "rsd")),
    default="rsd",
    show_default=True,
    help="Choose how queries are answered.",
)
@click.option(
    "--backend", type=Choice(BACKENDS), default="torch", show_default=True, help="Choose what runs draft and head."
)
@device_option
@click.option(
    "--n-action-steps",
    type=click.IntRange(1),
    help="Put so many actions into every reply: as many as the client executes. [default: the bundle's]",
)
@click.option(
    "--frames",
    type=Choice(("upright", "rendered")),
    default="upright",
    show_default=True,
    help="upright: clients turn the cameras' images by 180 degrees where the bundle's were, as LIBERO's clients do; "
    "rendered: they send them as the cameras give them.",
)
@click.option("--resize", is_flag=True, help="Make frames of another size fit, instead of refusing them.")
@click.option(
    "--deadline-ms",
    type=FiniteRange(1, 1e6),
    help="Answer a full query that is due and late with what is left of the chunk, and any other with an error.",
)
@click.option(
    "--idle", type=FiniteRange(1, 1e6), default=600, show_default=True, help="Close silent connections after s."
)
@click.option("--api-key", envvar="RSD_TRT_API_KEY", help="Ask for this key. Better set it as RSD_TRT_API_KEY.")
@click.option(
    "--max-message", type=click.IntRange(1, 1024), default=16, show_default=True, help="Refuse larger messages, in MiB."
)
@click.option(
    "--expected-rejections",
    type=FiniteRange(0, 1),
    help="Raise the alarm of a reply when many more of a robot's last checks were rejected than this share.",
)
@click.option("--instruction", "instructions", multiple=True, help="Warm up for it before the server is ready.")
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), help="Record episodes into this folder.")
@click.option(
    "--replay",
    type=click.Path(path_type=Path, file_okay=False),
    help="Serve the recordings in this folder, without a model.",
)
@precision_option
@backbone_option
@backbone_precision_option
@engines_option
def serve(**options: object) -> None:
    """Serve robots on one port: openpi's websocket on any path, vla-eval's on /vla-eval, and POST /act.

    /healthz says whether it lives, /readyz whether it is warm, /metrics what it did, for Prometheus. Ctrl-C answers
    what is under way, and ends.

    \b
    Example: rsd-trt serve --port 8000 --n-action-steps 4
    """
    try:
        from rsd_trt.runtime.serve import server
    except ImportError as error:
        raise missing_extra(error.name or "uvicorn", "serve") from None
    from rsd_trt.runtime.serve.launch import ServedPolicy, open_service
    from rsd_trt.runtime.serve.service import ServeOptions

    options["idle_s"] = options.pop("idle")
    options["max_message"] = int(str(options["max_message"])) << 20
    names = {field.name for field in dataclasses.fields(ServedPolicy)}
    served = ServedPolicy(**{name: value for name, value in options.items() if name in names})  # type: ignore[arg-type]
    how = ServeOptions(**{name: value for name, value in options.items() if name not in names})  # type: ignore[arg-type]
    if served.replay is not None and how.record is not None:
        raise click.UsageError("--record keeps what a policy answers, and --replay runs none: leave one of them out")
    service = open_service(served, how)
    with server.listen(how) as listening:
        host, port = listening.getsockname()[:2]
        click.echo(f"{service.interface.name}: ws://{host}:{port} (openpi), ws://{host}:{port}{server.VLA_EVAL}")
        ended, unanswered = server.serve(service, listening)
    told = f"{unanswered} not answered" if unanswered else "everybody was answered"
    click.echo(f"stopped: {told}", err=True)
    if not ended:  # a thread in the middle of loading would be torn down with an abort
        sys.stdout.flush()
        os._exit(unanswered > 0)
    sys.exit(unanswered > 0)


COMMANDS = (serve,)
