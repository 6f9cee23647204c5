from importlib.metadata import version

from mechdiff_mlflow.tracking.provenance import environment_text


def test_the_environment_names_every_package_once_with_its_version() -> None:
    lines = environment_text().splitlines()
    assert f"mlflow=={version('mlflow')}" in lines
    assert f"torch=={version('torch')}" in lines
    assert lines == sorted(set(lines))
    assert environment_text().endswith("\n")
