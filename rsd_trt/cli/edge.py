"""The command that looks at a server from a robot's side."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rsd_trt.cli.console import Choice, FiniteRange, engines_option, json_option, precision_option, show


@click.command()
@click.argument("url")
@engines_option
@precision_option
@click.option(
    "--mode",
    type=Choice(("rsd", "baseline")),
    default="rsd",
    show_default=True,
    help="Check here, with the exported draft (rsd), or without one (baseline).",
)
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="Check on so many; 0: all.")
@click.option("-n", "--samples", type=click.IntRange(2), default=100, show_default=True, help="Time so many of each.")
@click.option("--instruction", default="pick up the bowl", show_default=True, help="Ask with this instruction.")
@click.option("--timeout", type=FiniteRange(0.01, 3600), default=30, show_default=True, help="Wait so many s at most.")
@click.option("--api-key", envvar="RSD_TRT_API_KEY", help="Show the server this key. Better set it as RSD_TRT_API_KEY.")
@json_option
def edge(
    url: str,
    engines: Path,
    precision: str,
    mode: str,
    threads: int,
    samples: int,
    instruction: str,
    timeout: float,
    api_key: str | None,
    as_json: bool,
) -> None:
    """Time checks on this machine, and full queries through the network, against the server at URL.

    Needs no torch: pip install 'rsd-trt[edge]'. The draft comes from a folder of exports that was copied here.

    \b
    Example: rsd-trt edge ws://gpu-box:8000 --engines engines
    """
    import numpy as np

    from rsd_trt.eval.table import Column, Table
    from rsd_trt.runtime.serve.edge import EdgePolicy

    with EdgePolicy(
        url,
        engines,
        mode=mode,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        threads=threads,
        timeout_s=timeout,
        api_key=api_key,
    ) as policy:
        timing = policy.measure(instruction, samples)
        name = policy.name
    found = {"check": timing.check, "full query": timing.full, "of that, in the server": timing.server}
    rows = {what: [float(np.percentile(ms, p)) for p in (50, 90, 99)] for what, ms in found.items() if ms}
    if as_json:
        named = {what: dict(zip(("p50_ms", "p90_ms", "p99_ms"), values, strict=True)) for what, values in rows.items()}
        click.echo(json.dumps({"policy": name, "url": url, "samples": samples, **named}))
        return
    columns = Column("what"), Column("p50", "ms"), Column("p90", "ms"), Column("p99", "ms")
    show(Table(f"{name} at {url}, n = {samples}", columns, tuple((what, *values) for what, values in rows.items())))


COMMANDS = (edge,)
