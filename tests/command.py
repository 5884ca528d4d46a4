"""The command line, run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from rsd_trt.cli import main


def rsd_trt(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
