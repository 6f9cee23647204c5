"""The command line: options become a request, which is carried out, and what it found is printed."""

# ruff: noqa: F401
from mechdiff_mlflow.cli import experiments, reports, resume, servers, using, winners
from mechdiff_mlflow.cli.group import cli, main

__all__ = ["cli", "main"]
