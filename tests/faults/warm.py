"""Imported once by the process that commands are forked from, so that each starts in a fraction of a second.

Nothing here opens a store or a model: what is forked has only modules in common.
"""

import importlib
import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "agg")

# The command line, and what it imports late.
for _name in (
    "mechdiff_mlflow.cli",
    "matplotlib.pyplot",
    "mlflow.pyfunc",
    "mlflow.store.artifact.artifact_repository_registry",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "plotly.graph_objects",
    "plotly.io",
    "scipy.stats",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(_name)

importlib.import_module("torch").set_num_threads(1)
