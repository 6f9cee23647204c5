"""How many requests commands send to a server: each may take as long as the network does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from tracking.servers import serving

from faults.proxy import FaultProxy, proxying
from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.tracking.registry.fetch import load_map
from mechdiff_mlflow.tracking.store.store import open_store

A_CELL = 12
RUN_AND_PROMOTE = 45


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before a server of its own, to which commands go."""
    (tmp_path / "server").mkdir()
    monkeypatch.setenv("MECHDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "server") as server, proxying(server.url) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        yield proxy


def requests_of(proxy: FaultProxy, *words: str) -> list[str]:
    proxy.seen.clear()
    result = CliRunner().invoke(cli, list(words), prog_name="mechdiff")
    assert result.exit_code == 0, result.output
    return [f"{seen.method} {seen.path}" for seen in proxy.seen]


def test_requests_of_a_sweep_and_of_a_promotion(proxy: FaultProxy, toy: Path) -> None:
    n_cells = 24
    words = ("--pair", str(toy), "--sites", "L2/attn_out,L3/attn_out", "--ranks", "1,2,4,full")
    asked = requests_of(proxy, "sweep", *words, "--alphas", "0.3,0.7,1", "--targets", "10")
    assert len(asked) <= A_CELL * n_cells, Counter(asked).most_common(20)
    sent = Counter(Path(path.partition("?")[0]).name for path in asked if path.startswith("PUT "))
    assert sent["map.pt"] == n_cells
    assert (sent["spec.yaml"], sent["environment.txt"], sent["cells.json"]) == (1, 1, 1)

    # The map of a cell, which is a file of its run, is fetched as it is and becomes a model when promoted.
    store = open_store()
    experiment = store.experiment_id("toy")
    assert not store.client.search_logged_models([experiment])
    cell = store.client.search_runs([experiment], "params.k = '4'", max_results=1)[0].info.run_id
    the_map = load_map(f"runs:/{cell}", store=store)
    requests_of(proxy, "promote", cell, "--name", "of-a-cell", "--force")
    assert load_map("of-a-cell@champion", store=store) == the_map
    [model] = store.client.search_logged_models([experiment])
    assert {metric.key for metric in model.metrics} >= {"KL_mapped", "drop_pct"}
    requests_of(proxy, "promote", cell, "--name", "of-a-cell", "--alias", "again", "--force")
    assert len(store.client.search_logged_models([experiment])) == 1

    words = ("--pair", str(toy), "--layer", "3", "--experiment", "new")
    for alpha in ("1", "0.5"):  # under a new name, then in the place of another version
        command = ("run", *words, "--alpha", alpha, "--promote", "--force")
        asked = requests_of(proxy, *command)
        # How often a run's owner looks whether it still is depends on the seconds that all takes.
        beats = ("GET /api/2.0/mlflow/runs/get?", "POST /api/2.0/mlflow/runs/set-tag")
        looks = [path for path in asked if path.startswith(beats)]
        assert len(asked) - len(looks) <= RUN_AND_PROMOTE, Counter(asked).most_common(30)
        assert not {path for path, n in Counter(asked).items() if n > 1 and "PUT" in path}
