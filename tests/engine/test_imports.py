"""The engine works where neither MLflow nor what specs and reports need is installed: on a compute node."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mechdiff_mlflow.engine", ("mlflow", "pydantic", "plotly", "click", "pandas")),
        (
            "benchmarks.gpu",
            ("mlflow", "plotly", "click"),
        ),  # maps are checked with pydantic when they are read
    ],
)
def test_what_is_not_needed_may_be_absent(module: str, absent: tuple[str, ...]) -> None:
    code = (
        "import sys, transformers.modeling_utils\n"
        f"for name in {absent!r}: sys.modules[name] = None\n"
        f"import {module}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
