"""What did this fine-tune change, and where? Maps, causal patching and low-rank control, in MLflow.

import mechdiff_mlflow as md
done = md.run(md.RunRequest(pair="cultural-demo", layer=26))  # what `mechdiff run --layer 26` does
map_ = md.load_map("models:/cultural-demo-L26-attn_out@champion")
mapped = map_(base_activations)  # [..., d_base] -> [..., d_tuned], its α included
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mechdiff_mlflow.spec.version import __version__

if TYPE_CHECKING:
    from mechdiff_mlflow.errors import MechdiffError
    from mechdiff_mlflow.experiments import FitRecord, PatchRecord, Protocol, Study
    from mechdiff_mlflow.experiments.requests import (
        AtlasRequest,
        CompareRequest,
        FitRequest,
        HeadsRequest,
        LayersRequest,
        PatchRequest,
        ReportPassRequest,
        ReportRequest,
        RunRequest,
        SweepRequest,
    )
    from mechdiff_mlflow.experiments.sweep import SweepSite, Targets
    from mechdiff_mlflow.maps.affine import AffineMap
    from mechdiff_mlflow.models.attach import attached
    from mechdiff_mlflow.models.pairs import load_pair
    from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Position, Rank
    from mechdiff_mlflow.spec.sites import Hook, Site
    from mechdiff_mlflow.tracking.commands.documents import write_comparison, write_report
    from mechdiff_mlflow.tracking.commands.measuring import fit, patch, report_pass, run, sweep
    from mechdiff_mlflow.tracking.commands.profiling import atlas, heads, layers
    from mechdiff_mlflow.tracking.commands.session import Result
    from mechdiff_mlflow.tracking.flavour import load_model, log_model, save_model
    from mechdiff_mlflow.tracking.registry.fetch import load_map

__all__ = ["AffineMap", "Alpha", "Cell", "Hook", "MechdiffError", "PairSpec", "Position", "Protocol", "Rank"]
__all__ += ["AtlasRequest", "CompareRequest", "FitRequest", "HeadsRequest", "LayersRequest", "PatchRequest"]
__all__ += ["FitRecord", "PatchRecord", "Result", "Site", "Study", "SweepSite", "Targets", "__version__"]
__all__ += ["ReportPassRequest", "ReportRequest", "RunRequest", "SweepRequest", "attached", "load_pair"]
__all__ += ["atlas", "fit", "heads", "layers", "patch", "report_pass", "run", "sweep", "write_comparison"]
__all__ += ["load_map", "load_model", "log_model", "save_model", "write_report"]

_NAMES_OF = {
    "errors": "MechdiffError",
    "experiments": "FitRecord PatchRecord Protocol Study",
    "experiments.requests": "AtlasRequest CompareRequest FitRequest HeadsRequest LayersRequest PatchRequest "
    "ReportPassRequest ReportRequest RunRequest SweepRequest",
    "experiments.sweep": "SweepSite Targets",
    "maps.affine": "AffineMap",
    "models.attach": "attached",
    "models.pairs": "load_pair",
    "spec.pair_spec": "Alpha Cell PairSpec Position Rank",
    "spec.sites": "Hook Site",
    "tracking.commands.documents": "write_comparison write_report",
    "tracking.commands.measuring": "fit patch report_pass run sweep",
    "tracking.commands.profiling": "atlas heads layers",
    "tracking.commands.session": "Result",
    "tracking.flavour": "load_model log_model save_model",
    "tracking.registry.fetch": "load_map",
}


def __getattr__(name: str) -> Any:
    """Import what needs MLflow and torch only when it is asked for: `import mechdiff_mlflow` stays fast."""
    for module, names in _NAMES_OF.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
