"""Commands about pairs: doctor."""

from __future__ import annotations

from dataclasses import dataclass

from mechdiff_mlflow.cli import show
from mechdiff_mlflow.cli.options import command
from mechdiff_mlflow.cli.progress import bars
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.options import ModelOptions
from mechdiff_mlflow.experiments.preflight import examine
from mechdiff_mlflow.spec.options import TEXT, option
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.tracking.commands.computing import load_as_asked


@dataclass(frozen=True, kw_only=True)
class DoctorRequest(ModelOptions):
    """Load PAIR and check the plumbing that every number depends on.

    \b
    Example:
      mechdiff doctor cultural-demo
    """

    pair: str = option("cultural-demo", TEXT, "", is_argument=True)


@command(DoctorRequest)
def _doctor(request: DoctorRequest) -> None:
    with bars() as stage, stage("loading both models", 1):
        pair = load_as_asked(PairSpec.load(request.pair), request)
    show.lines([f"pair {pair.name}, fingerprint {pair.fingerprint}, {pair.spec.dtype} on {pair.device}"])
    failed = []
    for check in examine(pair):
        show.lines([f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.seen}"])
        failed += [] if check.passed else [check.name]
    if failed:
        raise MechdiffError(f"{pair.name} fails {', '.join(failed)}; mend that before trusting any number.")
