"""What a saved map says it needs to be served: versions, never guessed from what is imported."""

from __future__ import annotations

import platform
from functools import lru_cache

import mlflow
import numpy as np
import torch
import yaml

from mechdiff_mlflow.spec.version import __version__


@lru_cache(maxsize=1)
def environment_files() -> tuple[tuple[str, str], ...]:
    """Names and texts of the files that MLflow makes an environment from; the same for every map."""
    python = platform.python_version()
    requirements = [
        f"mechdiff-mlflow=={__version__}",
        f"mlflow=={mlflow.__version__}",
        f"torch=={torch.__version__.split('+')[0]}",
        f"numpy=={np.__version__}",
    ]
    python_env = {"python": python, "dependencies": ["-r requirements.txt"]}
    conda = {
        "name": "mechdiff-map",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
    }
    return (
        ("requirements.txt", "\n".join(requirements) + "\n"),
        ("python_env.yaml", yaml.safe_dump(python_env, sort_keys=False)),
        ("conda.yaml", yaml.safe_dump(conda, sort_keys=False)),
    )
