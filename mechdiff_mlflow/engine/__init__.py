"""Capturing activations of a model and scoring replacements of them, for about one forward in all.

engine = PatchEngine(model)
captured = engine.capture(prompts, [Site.parse("L26/attn_out")])
result = engine.score(prompts, [VariantGroup(site, replacements), VariantGroup.identity(site)])
result.divergences[0].kl_patched_clean  # [N, v] nats
"""

from mechdiff_mlflow.engine.architecture import ModuleNames
from mechdiff_mlflow.engine.budget import MemoryBudget
from mechdiff_mlflow.engine.patch_engine import PatchEngine
from mechdiff_mlflow.engine.plumbing import PlumbingCheck, check_plumbing
from mechdiff_mlflow.engine.recorded import Recorded, Shelf
from mechdiff_mlflow.engine.startup import MODES
from mechdiff_mlflow.engine.variants import ScoreResult, VariantGroup

__all__ = [
    "MODES",
    "MemoryBudget",
    "ModuleNames",
    "PatchEngine",
    "PlumbingCheck",
    "Recorded",
    "ScoreResult",
    "Shelf",
    "VariantGroup",
    "check_plumbing",
]
