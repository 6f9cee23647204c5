"""The command line: options become a request, which is carried out, and what it found is printed."""

from mechdiff_mlflow.cli import (  # each adds its commands to the group
    exchange as exchange,
)
from mechdiff_mlflow.cli import (
    experiments as experiments,
)
from mechdiff_mlflow.cli import (
    pairs as pairs,
)
from mechdiff_mlflow.cli import (
    recovery as recovery,
)
from mechdiff_mlflow.cli import (
    reports as reports,
)
from mechdiff_mlflow.cli import (
    servers as servers,
)
from mechdiff_mlflow.cli import (
    using as using,
)
from mechdiff_mlflow.cli import (
    winners as winners,
)
from mechdiff_mlflow.cli.group import cli, main

__all__ = ["cli", "main"]
