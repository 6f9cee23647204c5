"""Workers that run the models: this process, with or without a journal, or those of a Ray cluster."""

from mechdiff_mlflow.experiments.workers.journal import Journal
from mechdiff_mlflow.experiments.workers.workers import LocalWorkers, Workers

__all__ = ["Journal", "LocalWorkers", "Workers"]
