from pathlib import Path

import pytest
from toy import write_pair, write_prompts


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy pair in float64, so that both sides agree far below what a wrong choice would change."""
    path = write_pair(tmp_path_factory.mktemp("reference"))
    path.write_text(path.read_text() + "dtype: float64\n")
    write_prompts(path.parent, n_train=40, n_val=8, n_test=8)
    return path
