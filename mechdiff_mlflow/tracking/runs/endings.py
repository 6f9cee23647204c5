"""How runs end, and what a run looks like that `mlflow run` began."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from mlflow.entities import Run
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.text import number_in, text_of
from mechdiff_mlflow.tracking.content.records import MAX_TAG_CHARS, RunRecord
from mechdiff_mlflow.tracking.runs.interrupts import Killed

RUN_ID_VARIABLE = "MLFLOW_RUN_ID"


def ending(error: BaseException | None) -> tuple[str, str]:
    """The status and reason that an exception ends a run with."""
    if error is None:
        return "FINISHED", ""
    if isinstance(error, Killed):
        return "KILLED", f"Ended by {error.signal_name}."
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "Ended by Ctrl-C."
    if isinstance(error, GeneratorExit):
        return "KILLED", "The program stopped before the run was over."
    if isinstance(error, SystemExit):
        return ("FAILED", f"Exit code {error.code}.") if error.code else ("FINISHED", "")
    if isinstance(error, MechdiffError):
        return "FAILED", str(error)
    return "FAILED", f"{type(error).__name__}: {error}"


def cut(text: str) -> str:
    """A failure's text, cut visibly where MLflow would refuse it."""
    mark = " … (cut)"
    return text if len(text) <= MAX_TAG_CHARS else text[: MAX_TAG_CHARS - len(mark)] + mark


def enclosing_run(run: Run, record: RunRecord, provenance: Mapping[str, str]) -> dict[str, str]:
    """The tags to add to the run that an enclosing `mlflow run` made.

    Raises:
        MechdiffError: It has ended already.
    """
    if run.info.status not in ("RUNNING", "SCHEDULED"):
        raise MechdiffError(
            f"{RUN_ID_VARIABLE} names run {run.info.run_id}, which is {run.info.status} already; unset it "
            "to start a new run."
        )
    tags = {key: value for key, value in provenance.items() if key not in run.data.tags}
    tags |= {"mechdiff.kind": record.kind}
    if _is_generated(run.info.run_name or ""):
        tags["mlflow.runName"] = record.name
    return tags


def params_of(run: Run) -> dict[str, str]:
    """A run's params as they were typed: `mlflow run` logs them quoted for the shell."""
    return {key: _unquoted(value) for key, value in run.data.params.items()}


def _unquoted(value: str) -> str:
    """A param as typed: `mlflow run` logs it quoted for the shell."""
    try:
        words = shlex.split(value)
    except ValueError:
        return value
    return words[0] if len(words) == 1 else value


def plain(key: str, text: str) -> str:
    """A param's text with a number in its one form, so that `0.30` is `0.3`; all else as it is."""
    try:
        return text_of(number_in(text))
    except ValueError:
        return text


def _is_generated(name: str) -> bool:
    """Whether MLflow made the run's name up, as in `dapper-owl-42`."""
    words = name.split("-")
    return (
        len(words) == 3
        and words[0] in {word.lower() for word in _GENERATOR_PREDICATES}
        and words[1] in {word.lower() for word in _GENERATOR_NOUNS}
    )
