"""What did this fine-tune change, and where? Maps, causal patching and low-rank control, in MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechdiff_mlflow.tracking.fetch import load_map as load_map
    from mechdiff_mlflow.tracking.flavour import load_model as load_model
    from mechdiff_mlflow.tracking.flavour import log_model as log_model
    from mechdiff_mlflow.tracking.flavour import save_model as save_model

__version__ = "0.1.0"

_FROM = {"load_map": "fetch", "load_model": "flavour", "log_model": "flavour", "save_model": "flavour"}


def __getattr__(name: str) -> Any:
    """Import what needs MLflow and torch only when it is asked for: `import mechdiff_mlflow` stays fast."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mechdiff_mlflow.tracking.{_FROM[name]}"), name)
