"""A cluster of three nodes on this machine: the numbers of one process, to the bit, whoever dies then."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from asking import SITES, answers, assert_same

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.progress import Advance, Stage
from mechdiff_mlflow.experiments.workers import LocalWorkers, Workers
from mechdiff_mlflow.experiments.workers.cluster import _of_our_own
from mechdiff_mlflow.experiments.workers.tasks import Capture, Task, Tensors
from mechdiff_mlflow.experiments.workers.workers import model_sizes, n_heads_of, unembedding
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Position, Rank
from mechdiff_mlflow.spec.sites import Hook, Site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

N_NODES = 3
OPTIONS = EngineOptions(batch_size=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one CPU each, on loopback, with a token."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _of_our_own().items():
            patch.setenv(name, value)
        ray = importlib.import_module("ray")
        nodes = importlib.import_module("ray.cluster_utils").Cluster()
        for _ in range(N_NODES):
            nodes.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 << 20)
        # Tasks of this file are not installed on any node.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield nodes
        nodes.shutdown()


@pytest.fixture(scope="module")
def local(toy: Path) -> Pair:
    return load_pair(PairSpec.load(str(toy)), options=OPTIONS)


@pytest.fixture(scope="module")
def workers(cluster: Any, toy: Path) -> Iterator[Any]:
    from mechdiff_mlflow.experiments.workers.ray_workers import RayWorkers

    pair = load_pair(PairSpec.load(str(toy)), options=OPTIONS, lazily=True)
    with RayWorkers(pair, N_NODES, address=cluster.address) as ready:
        yield ready


def study(pair: Pair, workers: Workers | None = None, stage: Stage | None = None) -> list[pd.DataFrame]:
    """Per-prompt numbers of a small sweep."""
    cells = [
        Cell(site, solver, "update", rank, Alpha.parse("0.5,1"))
        for site in SITES[:2]
        for solver in ("procrustes_scaled", "reduced_rank")
        for rank in (Rank(2), Rank(None))
    ]
    now = Study(pair, Protocol(permutations=2), **({"stage": stage} if stage else {}), workers=workers)
    return [record.per_prompt for record in now.patch([fit.to_patch for fit in now.fit(cells)])]


def assert_same_tables(found: list[pd.DataFrame], expected: list[pd.DataFrame]) -> None:
    for table, other in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(table, other, check_exact=True)


@dataclass(frozen=True, eq=False)
class HasModule(Task):
    """1 where the process that does it has imported a module."""

    module: str

    def run(self, pair: Pair) -> Tensors:
        return {"found": torch.full((len(self.prompts),), float(self.module in sys.modules))}


@dataclass(frozen=True, eq=False)
class Deadly(HasModule):
    """Kills whoever does it."""

    def run(self, pair: Pair) -> Tensors:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_numbers_are_those_of_one_process_to_the_bit(workers: Any, local: Pair) -> None:
    assert_same(answers(workers), answers(LocalWorkers(local)))
    assert_same_tables(study(workers.pair, workers), study(local))
    assert workers.ask(model_sizes) == LocalWorkers(local).ask(model_sizes)
    assert workers.ask(n_heads_of, 1) == 2
    assert torch.equal(workers.ask(unembedding, "base"), local.base.unembedding())
    assert not workers.pair.base.model_cache._models, "the driver holds no model"


def test_workers_import_no_mlflow(workers: Any) -> None:
    prompts = workers.pair.prompts_of("val")
    found = workers.whole(HasModule(prompts, Position.DECISION, "mlflow"))["found"]
    assert not found.any()
    assert workers.whole(HasModule(prompts, Position.DECISION, "torch"))["found"].all()


def test_what_a_task_says_ends_the_work_with_its_sentence(workers: Any, local: Pair) -> None:
    bad = Capture(local.prompts_of("val"), Position.DECISION, "base", (Site(99, Hook.ATTN_OUT),))
    with pytest.raises(MechdiffError) as expected:
        bad.run(local)
    with pytest.raises(MechdiffError) as found:
        workers.whole(bad)
    assert str(found.value) == str(expected.value)
    assert_same(answers(workers), answers(LocalWorkers(local)))


def test_a_task_that_kills_three_workers_is_given_up(workers: Any) -> None:
    prompts = workers.pair.prompts_of("val").first(2)
    with pytest.raises(MechdiffError, match=r"Deadly of 2 val prompts killed 3 workers one after the other"):
        workers.whole(Deadly(prompts, Position.DECISION, "x"))


def killing(workers: Any, n: int, then: Any = None) -> Stage:
    """Progress that kills a worker at each of the first n steps, then calls something once."""
    left = [n]

    @contextmanager
    def stage(name: str, total: int) -> Iterator[Advance]:
        def advance(steps: int) -> None:
            if left[0] > 0 and workers.loaded:
                os.kill(workers.loaded[0].pid, signal.SIGKILL)
            elif left[0] == 0 and then is not None:
                then()
            left[0] -= 1

        yield advance

    return stage


def test_workers_are_killed_and_a_node_goes_and_the_numbers_stay(
    workers: Any, local: Pair, cluster: Any
) -> None:
    expected = study(local)
    driver = importlib.import_module("ray").get_runtime_context().get_node_id()

    def remove_a_node() -> None:
        other = next(node for node in cluster.list_all_nodes() if node.node_id != driver)
        cluster.remove_node(other, allow_graceful=False)

    assert_same_tables(study(workers.pair, workers, killing(workers, 2, remove_a_node)), expected)
    assert len(cluster.list_all_nodes()) == N_NODES - 1
    cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80 << 20)
    prompts = workers.pair.prompts_of("val")
    for _ in range(600):  # the worker that found no room starts on the new node
        workers.whole(HasModule(prompts, Position.DECISION, "torch"))
        if len(workers.loaded) == N_NODES:
            break
        time.sleep(0.1)
    assert len(workers.loaded) == N_NODES
    assert_same_tables(study(workers.pair, workers), expected)
