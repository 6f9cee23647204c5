"""Answers that are lost after the server has done what was asked, and other ways in which a network fails."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from tracking.servers import Server

from faults.commands import Command, Place, error_of, mechdiff
from faults.conftest import CELLS
from faults.harness import RUN, World, only_parent, undisturbed, with_environment
from faults.proxy import Fault, Rule, proxying
from faults.snapshot import Snapshot, snapshot
from mechdiff_mlflow.tracking.content.artifacts import dataset_input
from mechdiff_mlflow.tracking.content.records import Dataset
from mechdiff_mlflow.tracking.store.store import open_store

CREATES = {
    "runs": r"/runs/create$",
    "experiments": r"/experiments/create$",
    "logged models": r"/logged-models$",
    "registered models": r"/registered-models/create$",
    "model versions": r"/model-versions/create$",
}
BUT_THE_FIRST = "^(?!.*/experiments/search)"
"""Whether a server is there is asked once, so that an absent one is told at once."""
PROMOTED = (*RUN, "--promote", "--force")
"""A fit and a patch run, and the map registered under a name of its own pair."""


@pytest.fixture(scope="module")
def promoted(world: World) -> Snapshot:
    """What an undisturbed PROMOTED leaves."""
    return undisturbed(world, PROMOTED, world.place("promoted"))


def registry(uri: str, experiment: str) -> tuple[int, dict[str, str]]:
    """How many versions there are of runs of an experiment, and the tags of that which is champion."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    ours = {run.info.run_id for run in client.search_runs([found.experiment_id])}
    versions = [v for v in client.search_model_versions("name = 'toy-L2-attn_out'") if v.run_id in ours]
    champion = client.get_model_version_by_alias("toy-L2-attn_out", "champion")
    assert champion.run_id in ours
    return len(versions), champion.tags


def test_creates_that_arrive_after_they_were_given_up_are_deleted(
    world: World, right: Snapshot, server: Server, new_place: Callable[..., Place], experiment: str
) -> None:
    late = Rule(fault=Fault.LATE, method="POST", path=CREATES["runs"], first_of_each=True, seconds=0.7)
    with proxying(server.url, late) as proxy:
        mechdiff(new_place(proxy.url), *world.words(CELLS, experiment))
        assert proxy.counts("/runs/create")[Fault.LATE] >= 1 + 3
    found = MlflowClient(server.url).get_experiment_by_name(experiment)
    assert found is not None
    every = MlflowClient(server.url).search_runs([found.experiment_id], "", ViewType.ALL)
    assert len(every) > len(right.runs), "none arrived late enough to be made twice"
    assert snapshot(server.url, experiment).differences(right) == []


@pytest.mark.parametrize("what", ["each create", "each request but reads and uploads"])
def test_a_lost_answer_makes_nothing_twice(
    world: World,
    promoted: Snapshot,
    server: Server,
    new_place: Callable[..., Place],
    experiment: str,
    what: str,
) -> None:
    every = Rule(fault=Fault.DROP_ANSWER, method="POST|PATCH|DELETE", path=BUT_THE_FIRST, first_of_each=True)
    creates = Rule(
        fault=Fault.DROP_ANSWER, method="POST", path="|".join(CREATES.values()), first_of_each=True
    )
    with suppress(MlflowException):  # of the case before: a map that has the alias already moves nothing
        MlflowClient(server.url).delete_registered_model("toy-L2-attn_out")
    with proxying(server.url, creates if what == "each create" else every) as proxy:
        mechdiff(new_place(proxy.url), *world.words(PROMOTED, experiment))
        lost = Counter(
            name
            for seen in proxy.seen
            for name, path in CREATES.items()
            if seen.fault is Fault.DROP_ANSWER and seen.path.endswith(path.rstrip("$"))
        )
    if what == "each create":
        assert lost["runs"] >= 3
        assert all(lost[name] for name in CREATES), "every kind of create was struck"
    assert snapshot(server.url, experiment).differences(promoted) == []
    n_versions, tags = registry(server.url, experiment)
    assert n_versions == 1
    assert tags["mechdiff.verified"] == tags["mechdiff.sha256"]
    client = MlflowClient(server.url)
    assert Counter(e.name for e in client.search_experiments())[experiment] == 1
    assert len(client.search_registered_models("name = 'toy-L2-attn_out'")) == 1
    models = client.search_logged_models([client.get_experiment_by_name(experiment).experiment_id])
    assert len(models) == 1


def test_a_bad_network_changes_no_number(
    world: World, right: Snapshot, server: Server, new_place: Callable[..., Place], experiment: str
) -> None:
    faults = [
        *((fault, 0) for fault in Fault if fault not in (Fault.REFUSE, Fault.DELAY, Fault.LATE)),
        *((Fault.REFUSE, status) for status in (429, 500, 502, 503, 504)),
    ]
    rules = [
        Rule(fault=fault, path=BUT_THE_FIRST, status=status, nth=frozenset({5 + 4 * i, 60 + 4 * i}))
        for i, (fault, status) in enumerate(faults)
    ]
    with proxying(server.url, *rules) as proxy:
        mechdiff(new_place(proxy.url), *world.words(CELLS, experiment))
        struck = proxy.counts()
    assert all(struck[fault] for fault, _ in faults)
    assert struck[Fault.REFUSE] >= 5
    assert snapshot(server.url, experiment).differences(right) == []


def test_a_server_that_is_killed_and_started_again_is_waited_for(
    world: World, right: Snapshot, server: Server, new_place: Callable[..., Place], experiment: str
) -> None:
    with proxying(server.url) as proxy:  # tells how far the sweep is; the server goes away behind it
        command = Command(new_place(proxy.url), *world.words(CELLS, experiment))
        command.wait_for(lambda: proxy.counts("/runs/create", "POST").total() >= 3)
        server.kill()
        assert command.is_alive, "it was over too soon to show anything"
        server.start()
        assert command.wait() == 0, command.output
    assert snapshot(server.url, experiment).differences(right) == []


def test_a_server_that_stays_away_ends_the_sweep_with_a_sentence_and_it_is_resumed_later(
    world: World, right: Snapshot, server: Server, new_place: Callable[..., Place], experiment: str
) -> None:
    with proxying(server.url) as proxy:
        place = with_environment(new_place(proxy.url), MECHDIFF_SERVER_PATIENCE_S="1")
        command = Command(place, *world.words(CELLS, experiment))
        command.wait_for(lambda: proxy.counts("/runs/create", "POST").total() >= 3)
        proxy.rules = [Rule(fault=Fault.DROP_REQUEST)]
        assert command.wait() == 1, command.output
        assert "Traceback" not in command.output
        assert "stopped answering" in error_of(command.output)
        proxy.rules = []
        run_id = only_parent(server.url, experiment).info.run_id
        mechdiff(place, "resume", run_id)
    assert snapshot(server.url, experiment).differences(right) == []


def test_runs_that_are_the_first_to_use_a_prompt_set_at_once_all_have_it(
    server: Server, experiment: str
) -> None:
    """MLflow looks a prompt set up and then adds it, and fails whoever comes between."""
    store = open_store(server.url)
    experiment_id = store.experiment(experiment)
    runs = [store.client.create_run(experiment_id).info.run_id for _ in range(8)]
    sets = [Dataset("toy", "train", f"digest-{index}", 1) for index in range(6)]
    together = threading.Barrier(len(runs))

    def use(run_id: str) -> None:
        for one in sets:
            together.wait(30)
            try:
                store.client.log_inputs(run_id, [dataset_input(one)])
            except BaseException:
                together.abort()
                raise

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(use, runs))
    for run_id in runs:
        found = store.client.get_run(run_id).inputs.dataset_inputs
        assert sorted(given.dataset.digest for given in found) == [one.digest for one in sets]


def test_maps_that_could_not_be_stored_in_the_background_are_stored_alike_later(
    world: World, right: Snapshot, server: Server, new_place: Callable[..., Place], experiment: str
) -> None:
    """The first three maps are refused for good; what is tried once more makes the same."""
    refused = Rule(fault=Fault.REFUSE, method="PUT", path=r"map\.pt$", nth=frozenset({1, 2, 3}), status=403)
    with proxying(server.url, refused) as proxy:
        mechdiff(new_place(proxy.url), *world.words(CELLS, experiment))
        assert proxy.counts("map.pt")[Fault.REFUSE] == 3
    assert snapshot(server.url, experiment).differences(right) == []
