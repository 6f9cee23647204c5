"""The engine works where neither MLflow nor what specs and reports need is installed: on a compute node."""

import subprocess
import sys
from pathlib import Path


def test_the_engine_needs_torch_and_transformers_only() -> None:
    code = (
        "import sys, transformers.modeling_utils\n"
        "for name in ('mlflow', 'pydantic', 'plotly'): sys.modules[name] = None\n"
        "import mechdiff_mlflow.engine, benchmarks.gpu"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
