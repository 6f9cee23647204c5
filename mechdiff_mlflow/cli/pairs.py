"""Commands about pairs: doctor."""

from __future__ import annotations

from typing import Any

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.cli.computing import load_as_asked, settle_threads
from mechdiff_mlflow.cli.progress import bars
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.doctor import examine
from mechdiff_mlflow.spec.pair_spec import PairSpec


@click.command("doctor")
@click.argument("pair", default="cultural-demo")
@options.models
def doctor_command(pair: str, **given: Any) -> None:
    """Load PAIR and check the plumbing that every number depends on.

    \b
    Example:
      mechdiff doctor cultural-demo
    """
    spec = PairSpec.load(pair)
    with bars() as stage, stage("loading both models", 1):
        loaded = load_as_asked(spec, given)
    settle_threads(loaded)
    show.lines(
        [f"pair {loaded.name}, fingerprint {loaded.fingerprint}, {loaded.spec.dtype} on {loaded.device}"]
    )
    failed = []
    for check in examine(loaded):
        show.lines([f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.seen}"])
        failed += [] if check.passed else [check.name]
    if failed:
        raise MechdiffError(f"{spec.name} fails {', '.join(failed)}; mend that before trusting any number.")
