"""Workers that run the models: this process, with or without a journal, or those of a Ray cluster.

Everything that an experiment asks of its models goes through `Workers`. What it asks is a task of plain
values (`tasks`), cut into shards of prompts that together give what the whole gives, to the bit (`shards`).
"""

from mechdiff_mlflow.experiments.workers.journal import Journal
from mechdiff_mlflow.experiments.workers.workers import LocalWorkers, Workers

__all__ = ["Journal", "LocalWorkers", "Workers"]
