"""The command group, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from mechdiff_mlflow import __version__
from mechdiff_mlflow.errors import MechdiffError

# What a disk says for which the user can make room, or give a right: no fault of the program.
_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
}


class ErrorsAsMessages(click.Group):
    """Shows a `MechdiffError` as `Error: …` with exit code 1, and never as a traceback; a full disk likewise.

    Inside `mlflow run`, what stops a command before it has taken its run over is noted on that run.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except MechdiffError as error:
            _note_on_enclosing_run(str(error))
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno not in _DISK:
                raise
            message = _about_disk(error)
            _note_on_enclosing_run(message)
            raise click.ClickException(message) from error
        except click.UsageError as error:
            _note_on_enclosing_run(error.format_message())
            raise


@click.group(
    cls=ErrorsAsMessages, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__)
def cli() -> None:
    """What did this fine-tune change, and where?

    Fits linear maps from a base to a tuned model's activations, patches the tuned model with the mapped
    activations, measures how far next-token KL falls, and keeps every fit and patch as an MLflow run.

    \b
    Example:
      mechdiff run --pair cultural-demo --layer 26
    """


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # α on a terminal that is not UTF-8
    cli(prog_name="mechdiff")


def _about_disk(error: OSError) -> str:
    where = f" {error.filename}" if error.filename else ""
    remedy = "allow it" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else "make room"
    return (
        f"Writing or reading{where} failed ({error.strerror}); {remedy} there or on the disk of the "
        "temporary files (TMPDIR), then run this again, or finish its run with mechdiff resume."
    )


def _note_on_enclosing_run(reason: str) -> None:
    from mechdiff_mlflow.tracking.enclosing import note_failure

    note_failure(reason)
