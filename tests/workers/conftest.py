from pathlib import Path

import pytest

from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec

BATCH = 4


@pytest.fixture(scope="session")
def small_batches(toy: Path) -> Pair:
    """The toy pair in chunks of four, so that a split has several."""
    return load_pair(PairSpec.load(str(toy)), options=EngineOptions(batch_size=BATCH))
