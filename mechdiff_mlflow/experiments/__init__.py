"""Experiments: they take pairs and specs and yield frozen records; nothing here knows MLflow."""

from mechdiff_mlflow.experiments.protocol import Protocol
from mechdiff_mlflow.experiments.records import FitRecord, PatchRecord
from mechdiff_mlflow.experiments.study import Study

__all__ = ["FitRecord", "PatchRecord", "Protocol", "Study"]
