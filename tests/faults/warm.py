"""Imported once by the process that commands are forked from, so that each starts in a fraction of a second.

Nothing here opens a store or a model: what is forked has only modules in common.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot
import mlflow.pyfunc
import mlflow.store.artifact.artifact_repository_registry
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store
import plotly.graph_objects
import plotly.io
import scipy.stats
import torch
import transformers.models.llama.modeling_llama

import mechdiff_mlflow.cli

torch.set_num_threads(1)
