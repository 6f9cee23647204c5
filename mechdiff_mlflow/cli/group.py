"""The command group, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import click

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.version import __version__
from mechdiff_mlflow.text import is_text

_as_python_shows = warnings.showwarning
TRACEBACK = "MECHDIFF_TRACEBACK"
"""Environment variable: show where an unexpected error came from."""


class ErrorsAsMessages(click.Group):
    """Shows errors as `Error: …` with exit code 1, and as a traceback only if `MECHDIFF_TRACEBACK` is set.

    Inside `mlflow run`, what stops a command before it has taken its run over is noted on that run.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse words that no store, file or terminal takes, whichever option they are of."""
        for word in args:
            if "\0" in word or not is_text(word):
                raise _shown(
                    f"{word[:80]!r} is no UTF-8 text; write it without the characters shown as escapes."
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except MechdiffError as error:
            raise _shown(str(error)) from error
        except click.UsageError as error:
            _note_on_enclosing_run(error.format_message())
            raise
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            about = _about_files(error) if isinstance(error, OSError) else _about_fault(error)
            raise _shown(about) from error


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
    warnings.showwarning = _show_warning
    cli(prog_name="mechdiff")


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print what users are to hear of on one line; what is meant for programmers as Python does."""
    if category is UserWarning:
        click.echo(f"Warning: {str(message).rstrip('.')}.", err=True)
    else:
        _as_python_shows(message, category, *where, **more)


_REMEDIES = {
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "allow it there, or name another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there or in TMPDIR"),
    errno.ENAMETOOLONG: "give it a shorter name",
}


def _about_files(error: OSError) -> str:
    where = f" {str(error.filename)[:200]}" if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0, "see what is there")
    return (
        f"Writing or reading{where} failed ({error.strerror or str(error)[:200]}); {remedy}, then run this "
        "again, or finish its run with mechdiff resume."
    )


def _about_fault(error: Exception) -> str:
    at = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return (
        f"Unexpected {type(error).__name__} ({text}) at {Path(at.filename).name}:{at.lineno}, a fault of "
        f"mechdiff; set {TRACEBACK}=1, run this again and report what it prints."
    )


def _shown(reason: str) -> click.ClickException:
    _note_on_enclosing_run(reason)
    return click.ClickException(reason)


def _note_on_enclosing_run(reason: str) -> None:
    from mechdiff_mlflow.tracking.runs.mlflow_run import note_failure

    note_failure(reason)
