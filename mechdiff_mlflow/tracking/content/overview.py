"""What MLflow opens an experiment with: its description, of models, findings and links, and its views."""

from __future__ import annotations

import logging
import re

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.text import markdown
from mechdiff_mlflow.tracking.content.records import MAX_TAG_CHARS
from mechdiff_mlflow.tracking.content.view import COMMANDS, install_views, view_path
from mechdiff_mlflow.tracking.store.store import Store

_NOTE = "mlflow.note.content"
_OURS = "**mechdiff**: "
"""Begins our part of a description; what a person wrote before it stays."""
_LINE = re.compile(r"- \*\*([^*]+)\*\* \(\[run\].*")
_FIRST = ("atlas", "run", "sweep", "layers")
"""Kinds whose finding is the headline, the best first: the UI shows one line until it is unfolded."""
_log = logging.getLogger(__name__)


def models_of(spec: PairSpec) -> str:
    """Base and tuned of a pair by name, as Markdown."""
    base, tuned = (markdown(name, 80) for name in (spec.base.model, spec.tuned.name))
    return f"base `{base}`, tuned `{tuned}`"


def renew(
    store: Store, experiment_id: str, run_id: str, *, about: str, headline: str, kind: str, curves: list[str]
) -> None:
    """Put what a run of some kind found into its experiment's description, in place of what one found before.

    Never fails, for it is only a convenience. `about` names the models; `curves` are stepped metrics to draw.
    """
    try:
        with store.errors():
            tags = store.client.get_experiment(experiment_id).tags
            if headline:
                line = f"- **{kind}** ([run](#/experiments/{experiment_id}/runs/{run_id})): {headline}"
                text = _description(tags.get(_NOTE, ""), experiment_id, about, kind, line)
                if text != tags.get(_NOTE) and len(text) <= MAX_TAG_CHARS:
                    store.client.set_experiment_tag(experiment_id, _NOTE, text)
        install_views(store, experiment_id, tags, curves)
    except MechdiffError as error:
        _log.debug("The description of experiment %s was not renewed: %s", experiment_id, error)


def _description(before: str, experiment_id: str, about: str, kind: str, line: str) -> str:
    theirs, _, ours = before.partition(_OURS)
    lines = {found[1]: found[0] for text in ours.splitlines() if (found := _LINE.fullmatch(text))}
    models = about or ours.partition(". ")[0]
    lines[kind] = line
    best = next((lines[name].partition("): ")[2] for name in _FIRST if name in lines), "")
    views = " · ".join(
        f"[{name}]({view_path(experiment_id, key)})"
        for name, key in (("maps, best first", "mechdiff"), ("commands, newest first", COMMANDS))
    )
    return "\n".join([f"{theirs}{_OURS}{models}. {best}", "", f"Look at {views}.", "", *lines.values()])
