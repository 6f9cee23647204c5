"""What did this fine-tune change, and where? Maps, causal patching and low-rank control, in MLflow.

import mechdiff_mlflow
map_ = mechdiff_mlflow.load_map("models:/cultural-demo-L26-attn_out@champion")
mapped = map_(base_activations)  # [..., d_base] -> [..., d_tuned], its α included
"""

from __future__ import annotations

from typing import Any

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechdiff_mlflow.tracking.fetch import load_map as load_map
    from mechdiff_mlflow.tracking.flavour import load_model as load_model
    from mechdiff_mlflow.tracking.flavour import log_model as log_model
    from mechdiff_mlflow.tracking.flavour import save_model as save_model

__version__ = "0.1.0"

<<<<<<< HEAD
__all__ = ["AffineMap", "MechdiffError", "PairSpec", "Protocol", "Site", "Study", "load_map", "load_pair"]

_HOMES = {
    "AffineMap": "maps",
    "MechdiffError": "errors",
    "PairSpec": "spec",
    "Protocol": "experiments",
    "Site": "sites",
    "Study": "experiments",
    "load_map": "tracking.fetch",
    "load_pair": "pairs",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: torch, transformers and MLflow take seconds, and `--version` needs none of them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
=======
_FROM = {"load_map": "fetch", "load_model": "flavour", "log_model": "flavour", "save_model": "flavour"}


def __getattr__(name: str) -> Any:
    """Import what needs MLflow and torch only when it is asked for: `import mechdiff_mlflow` stays fast."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mechdiff_mlflow.tracking.{_FROM[name]}"), name)
>>>>>>> tracking
