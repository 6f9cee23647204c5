import subprocess
import sys
from pathlib import Path

import pytest

import mechdiff_mlflow
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.registry import fetch

ROOT = Path(__file__).parents[2]


def test_the_package_and_its_records_load_without_mlflow_or_torch() -> None:
    code = (
        "import sys, mechdiff_mlflow, mechdiff_mlflow.tracking.content.records\n"
        "print(*sorted({'mlflow', 'torch', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_only_the_tracking_package_imports_mlflow() -> None:
    package = ROOT / "mechdiff_mlflow"
    found = [
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if any(
            line.strip().startswith(("import mlflow", "from mlflow"))
            for line in file.read_text().splitlines()
        )
    ]
    assert found
    assert all(name.startswith("tracking/") for name in found)


def test_the_front_door() -> None:
    assert mechdiff_mlflow.load_map is fetch.load_map
    assert mechdiff_mlflow.save_model is flavour.save_model
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = mechdiff_mlflow.no_such_thing
