"""Shared fixtures: one thread is fastest on tiny tensors; hypothesis must not time torch's first call."""

from pathlib import Path

import hypothesis
import pytest
import torch
from toy import write_pair

torch.set_num_threads(1)
hypothesis.settings.register_profile("mechdiff", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("mechdiff")

TESTS = Path(__file__).parent
LONG = ("faults", "team", "workers", "test_docs_commands.py", "test_mlflow_run.py", "reference")
"""Folders and files that take minutes; the tests of a folder share servers or a cluster."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: one process does all tests of a file, or of a folder of `LONG`.

    So what a module or a folder shares is made once, and no process is left with minutes of work at the end.
    """
    places = {item: item.path.relative_to(TESTS) for item in items}
    for item, place in places.items():
        name = place.parts[0] if place.parts[0] in LONG else str(place)
        item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: places[item].parts[0] not in LONG)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spec of a toy pair; tests that change its files copy its folder first."""
    return write_pair(tmp_path_factory.mktemp("toy"))
