"""The command line. Commands parse, call once and print: the result to stdout, progress to stderr."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from typing import NoReturn

import click

from rsd_trt import __version__
from rsd_trt.cli import bundles, distill, doctor, edge, evaluate, export, profile, report, serve, sweep, verify
from rsd_trt.errors import UserError, did_you_mean, missing_extra, out_of_memory, reason

# In order of use: help and the command reference have them like this.
GROUPS = {
    "Look at a policy": ("doctor", "info", "eval", "report", "compare", "sweep"),
    "Bring your own policy": ("pack", "distill", "calibrate", "init"),
    "Make it fast, and prove it equal": ("export", "verify", "verify-backbone", "profile", "profile-query"),
    "Put it on a robot": ("serve", "edge"),
}

log = logging.getLogger(__name__)

STOPPED = "stopped. What was finished is kept, and no file is half-written: run the same command again"


class Cli(click.Group):
    """Prints user errors as one line with exit code 1; offers the nearest command for a wrong name."""

    def invoke(self, ctx: click.Context) -> object:
        if closed := [number for number in (0, 1, 2) if not _is_open(number)]:
            for _ in closed:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: no file of ours may get it
            if 1 in closed:
                self._fail(ctx, "stdout is closed, and results go there. Without them: > /dev/null")
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends a command as Ctrl-C does
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except UserError as error:
            self._fail(ctx, str(error))
        except KeyboardInterrupt:
            self._fail(ctx, STOPPED)
        except OSError as error:
            if error.filename is not None:  # a folder in a file's place, no permission, too long a name
                log.debug("where it was:", exc_info=True)
                self._fail(ctx, f"{error.filename} cannot be read or written: {error.strerror}")
            if error.errno not in (errno.ENOSPC, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be flushed
            self._fail(ctx, f"stdout cannot be written: {error.strerror}. What was to be kept is in its files")
        except Warning as error:
            remedy = f"PYTHONWARNINGS is {os.environ.get('PYTHONWARNINGS')!r}. Unset it, or set it to default"
            self._fail(ctx, f"a library warns, which is an error here: {reason(error)}: {remedy}")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            self._fail(ctx, str(missing_extra("torch", "torch")))
        except Exception as error:
            if (explained := out_of_memory(error)) is None:
                raise
            self._fail(ctx, str(explained))
        finally:
            signal.signal(signal.SIGTERM, before)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In order of use."""
        return [name for names in GROUPS.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """By group, with whole summaries."""
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), _summary(self.commands[name])) for name in names])

    @staticmethod
    def _fail(ctx: click.Context, message: str) -> NoReturn:
        """What cannot be printed, such as a terminal's control characters out of a file, is written out."""
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        click.secho(f"error: {text}", fg="red", err=True)
        ctx.exit(1)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"no such command {args[0]!r}{did_you_mean(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


def _summary(command: click.Command) -> str:
    """The first sentence of a command's help."""
    return command.get_short_help_str(limit=1000)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rsd-trt")
@click.option("-v", "--verbose", is_flag=True, help="Show what the library logs, down to details.")
def main(verbose: bool) -> None:
    """Run a vision-language-action policy's big model only when something has changed, and measure what that gains.

    A policy is a bundle: one folder with its configuration, weights and tokenizer. Commands that are not given a
    BUNDLE take the reference policy, which is shipped with the toolkit and solves libero_spatial. Files go to the
    current folder, or to RSD_TRT_HOME if that is set.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


for module in (bundles, doctor, export, verify, profile, evaluate, sweep, distill, report, serve, edge):
    for command in module.COMMANDS:
        main.add_command(command)
