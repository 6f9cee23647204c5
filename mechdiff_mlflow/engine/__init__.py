"""Capturing activations of a model and scoring replacements of them, for about one forward in all.

engine = PatchEngine(model)
captured = engine.capture(prompts, [Site.parse("L26/attn_out")])
result = engine.score(prompts, [VariantGroup(site, replacements), VariantGroup.identity(site)])
result.divergences[0].kl_patched_clean  # [N, v] nats
"""

from mechdiff_mlflow.engine.memory.clean_runs import CleanRunCache, CleanRuns
from mechdiff_mlflow.engine.model.architecture import ModuleNames
from mechdiff_mlflow.engine.patch_engine import PatchEngine
from mechdiff_mlflow.engine.paths.startup_check import MODES
from mechdiff_mlflow.engine.paths.variants import ScoreResult, VariantGroup
from mechdiff_mlflow.engine.plumbing import PlumbingCheck, check_plumbing

__all__ = ["MODES", "CleanRunCache", "CleanRuns", "ModuleNames", "PatchEngine", "PlumbingCheck"]
__all__ += ["ScoreResult", "VariantGroup", "check_plumbing"]
