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
def environment() -> str:
    """The file that MLflow makes a conda, virtualenv or uv environment from; the same for every map."""
    pins = [
        f"mechdiff-mlflow=={__version__}",
        f"mlflow=={mlflow.__version__}",
        f"torch=={torch.__version__.split('+')[0]}",
        f"numpy=={np.__version__}",
    ]
    conda = {
        "name": "mechdiff-map",
        "channels": ["conda-forge"],
        "dependencies": [f"python={platform.python_version()}", "pip", {"pip": pins}],
    }
    return str(yaml.safe_dump(conda, sort_keys=False))
