"""Shared fixtures: one thread is fastest on tiny tensors; hypothesis must not time torch's first call."""

from pathlib import Path

import hypothesis
import pytest
import torch
from toy import write_pair

torch.set_num_threads(1)
hypothesis.settings.register_profile("mechdiff", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("mechdiff")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spec of a toy pair; tests that change its files copy its folder first."""
    return write_pair(tmp_path_factory.mktemp("toy"))
