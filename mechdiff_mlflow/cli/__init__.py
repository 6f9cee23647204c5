"""The command line: every command reads options, calls one function and prints what it found."""

from mechdiff_mlflow.cli.group import cli, main
from mechdiff_mlflow.cli import experiments, pairs, winners  # noqa: F401, I001  (the modules add their commands to cli)

__all__ = ["cli", "main"]
