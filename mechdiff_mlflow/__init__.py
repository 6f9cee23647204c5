"""What did this fine-tune change, and where? Maps, causal patching and low-rank control, in MLflow.

import mechdiff_mlflow
map_ = mechdiff_mlflow.load_map("models:/cultural-demo-L26-attn_out@champion")
mapped = map_(base_activations)  # [..., d_base] -> [..., d_tuned], its α included
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mechdiff_mlflow.spec.version import __version__ as __version__

if TYPE_CHECKING:
    from mechdiff_mlflow.errors import MechdiffError as MechdiffError
    from mechdiff_mlflow.experiments import Protocol as Protocol
    from mechdiff_mlflow.experiments import Study as Study
    from mechdiff_mlflow.maps.affine import AffineMap as AffineMap
    from mechdiff_mlflow.models.attach import attached as attached
    from mechdiff_mlflow.models.pairs import load_pair as load_pair
    from mechdiff_mlflow.spec.pair_spec import PairSpec as PairSpec
    from mechdiff_mlflow.spec.sites import Site as Site
    from mechdiff_mlflow.tracking.flavour import load_model as load_model
    from mechdiff_mlflow.tracking.flavour import log_model as log_model
    from mechdiff_mlflow.tracking.flavour import save_model as save_model
    from mechdiff_mlflow.tracking.registry.fetch import load_map as load_map


_HOMES = {
    "AffineMap": "maps.affine",
    "attached": "models.attach",
    "MechdiffError": "errors",
    "PairSpec": "spec.pair_spec",
    "Protocol": "experiments",
    "Site": "spec.sites",
    "Study": "experiments",
    "load_map": "tracking.registry.fetch",
    "load_model": "tracking.flavour",
    "load_pair": "models.pairs",
    "log_model": "tracking.flavour",
    "save_model": "tracking.flavour",
}


def __getattr__(name: str) -> Any:
    """Import what needs MLflow and torch only when it is asked for: `import mechdiff_mlflow` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
