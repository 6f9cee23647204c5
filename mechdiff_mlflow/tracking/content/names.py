"""Names of registered maps, their versions' aliases and logged models: what MLflow and we accept."""

from __future__ import annotations

import re

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Site

# MLflow refuses / and :, its logged models also . % " ', its pages and URIs stumble over others.
_NAME = re.compile(r"[^\W_][\w-]{0,199}")
_ALIAS = re.compile(r"[\w-]{1,200}")


def registered_name(pair: str, site: Site) -> str:
    """The name under which maps of `pair` at `site` are registered: `cultural-demo-L26-attn_out`."""
    return check_name(f"{pair}-{site.slug}")


def check_name(name: str) -> str:
    """`name` itself; refused where no map can be registered under it."""
    if _NAME.fullmatch(name) is None:
        raise MechdiffError(
            f"Maps cannot be registered as {name!r}; use up to 200 letters, digits, `_` and `-`, starting "
            "with a letter or digit."
        )
    return name


def check_alias(alias: str) -> str:
    """`alias` itself; refused where no version can bear it, as `latest` and `v3`, which MLflow reads."""
    if _ALIAS.fullmatch(alias) is None or alias.lower() == "latest" or re.fullmatch(r"[vV]?\d+", alias):
        raise MechdiffError(
            f"Alias {alias!r} is not possible; use letters, digits, `_` and `-` and neither `latest` nor a "
            "version number, e.g. champion."
        )
    return alias


def logged_model_name(text: str) -> str:
    """`text` with `-` for what MLflow refuses there: `L26/mlp_out α=0.3` → `L26-mlp_out α=0,3`."""
    return re.sub(r"[/:%\"']+", "-", text.replace(".", ",")).strip("- ")[:200] or "map"
