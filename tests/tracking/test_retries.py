"""Requests that may be repeated are; creations are looked up first; what is lasting is not waited for."""

from __future__ import annotations

import os
import threading
import time

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    TEMPORARILY_UNAVAILABLE,
)

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.retries import (
    PATIENCE_VARIABLE,
    Retries,
    RetryingClient,
    is_away,
    is_passing,
)

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


class Flaky:
    """A client whose answers are lost `n_lost` times, after the work is done."""

    def __init__(self, n_lost: int, error: Exception | None = None) -> None:
        self.n_lost, self.error = n_lost, error or requests.ConnectionError("reset")
        self.done: list[str] = []
        self.retries: list[str | None] = []

    def _answer(self, what: str) -> str:
        self.done.append(what)
        self.retries.append(os.environ.get(RETRIES))
        if self.n_lost:
            self.n_lost -= 1
            raise self.error
        return what

    def create_run(self) -> str:
        return self._answer("run")

    def set_tag(self) -> str:
        return self._answer("tag")


def client_of(flaky: Flaky, seconds: float = 30.0) -> tuple[RetryingClient, Retries]:
    retries = Retries(seconds)
    return RetryingClient(flaky, retries), retries


def test_what_may_be_repeated_is_repeated_and_mlflow_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RETRIES, "9")
    flaky = Flaky(2)
    client, retries = client_of(flaky)
    assert client.set_tag() == "tag"
    assert flaky.done == ["tag"] * 3
    assert flaky.retries == ["0"] * 3
    assert os.environ[RETRIES] == "9"
    assert retries.has_retried


def test_what_creates_is_asked_once_and_then_looked_up() -> None:
    flaky = Flaky(1)
    client, retries = client_of(flaky)
    with pytest.raises(requests.ConnectionError):
        client.create_run()
    assert flaky.done == ["run"]

    flaky = Flaky(1)
    client, retries = client_of(flaky)
    assert retries.once(client.create_run, lambda: "found" if flaky.done else None) == "found"
    assert flaky.done == ["run"]

    flaky = Flaky(1)
    client, retries = client_of(flaky)
    assert retries.once(client.create_run, lambda: None) == "run"  # it never arrived
    assert flaky.done == ["run"] * 2


def test_a_deletion_whose_answer_was_lost_is_done() -> None:
    class Gone(Flaky):
        def delete_tag(self) -> None:
            if "deleted" in self.done:
                raise MlflowException("No such tag", error_code=RESOURCE_DOES_NOT_EXIST)
            self._answer("deleted")

    client, _ = client_of(Gone(1))
    client.delete_tag()
    with pytest.raises(MlflowException, match="No such tag"):
        client.delete_tag()  # nobody asked for this one before


def test_patience_ends_and_hurry_ends_it_at_once() -> None:
    flaky = Flaky(10**9)
    client, _ = client_of(flaky, seconds=0.5)
    with pytest.raises(requests.ConnectionError):
        client.set_tag()
    assert len(flaky.done) > 1

    flaky = Flaky(10**9)
    client, retries = client_of(flaky, seconds=1e5)
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(requests.ConnectionError):
            client.set_tag()
        ended.append("so")

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    retries.hurry.set()
    waiting.join(30)
    assert ended == ["so"]

    flaky = Flaky(10**9)
    client, retries = client_of(flaky, seconds=1e5)
    with retries.one_attempt(), pytest.raises(requests.ConnectionError):
        client.set_tag()
    assert len(flaky.done) == 1
    assert not retries.hurry.is_set()


def test_threads_share_the_setting_and_leave_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RETRIES, raising=False)
    flaky = Flaky(0)
    client, _ = client_of(flaky)

    def ask() -> None:
        for _ in range(200):
            client.set_tag()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(flaky.retries) == {"0"}
    assert RETRIES not in os.environ


@pytest.mark.parametrize(
    ("error", "away", "passing"),
    [
        (requests.ConnectionError("refused"), True, True),
        (requests.ReadTimeout("slow"), True, True),
        (requests.exceptions.InvalidURL("x"), False, False),
        (MlflowException("API request to u failed with exception HTTPConnectionPool: refused"), True, True),
        (
            MlflowException("u failed with exception … too many 503 error responses"),
            True,
            True,
        ),
        (
            MlflowException("u failed with exception … too many 500 error responses"),
            False,
            True,
        ),
        (MlflowException("API request to endpoint e failed with error code 502 != 200."), True, True),
        (MlflowException("API request to u failed with exception SSLError: bad certificate"), False, False),
        (MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE), True, True),
        (MlflowException("database or disk is full", error_code=TEMPORARILY_UNAVAILABLE), False, False),
        (MlflowException("(psycopg2.errors.UniqueViolation) dataset_pk"), False, True),
        (MlflowException("x (UniqueViolation)", error_code=RESOURCE_ALREADY_EXISTS), False, False),
        (MlflowException("No run with id x"), False, False),
        (ValueError("x"), False, False),
    ],
)
def test_what_is_waited_for(error: Exception, away: bool, passing: bool) -> None:
    assert (is_away(error), is_passing(error)) == (away, passing)


def test_an_impossible_patience_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "soon")
    with pytest.raises(MechdiffError, match="is 'soon'; give seconds"):
        Retries()
