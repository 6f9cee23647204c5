"""One toy pair, one empty store and one server for all tests of a process, and an undisturbed sweep."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator

import pytest
from tracking.servers import Server, serving

from faults.commands import Place
from faults.harness import World, clean_environment, make_world, undisturbed
from faults.snapshot import Snapshot

CELLS = ("sweep", "--sites", "L2/attn_out", "--ranks", "1,2,full", "--targets", "30")
"""Three cells."""


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context():
        clean_environment()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context():
        clean_environment()
        return make_world(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def right(world: World) -> Snapshot:
    """What the store holds after an undisturbed sweep of CELLS."""
    return undisturbed(world, CELLS, world.place("right"))


_numbers = itertools.count()


@pytest.fixture
def new_place(world: World) -> Callable[..., Place]:
    """Makes a fresh directory with an empty SQLite store, or for the server at an address."""
    return lambda uri="": world.place(f"place-{next(_numbers)}", uri)


@pytest.fixture
def place(new_place: Callable[..., Place]) -> Place:
    return new_place()


@pytest.fixture(scope="session")
def server(world: World) -> Iterator[Server]:
    folder = world.folder / f"server-{next(_numbers)}"
    folder.mkdir()
    shutil.copy(world.empty, folder / "mlflow.db")
    with serving(folder) as running:
        yield running


@pytest.fixture
def experiment() -> str:
    """A name that no other test uses on the shared server."""
    return f"faults-{next(_numbers)}"
