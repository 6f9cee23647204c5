"""Requests that ride out a store which is away for a while, and creations that happen exactly once.

What sets or reads can be asked again. What creates cannot: MLflow's own retries repeat a creation whose
answer was lost, and leave two runs. So MLflow retries nothing in here, and a creation is looked up before it
is repeated.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, TypeVar

import requests
import tenacity
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from mechdiff_mlflow.errors import MechdiffError

PATIENCE_VARIABLE = "MECHDIFF_SERVER_PATIENCE_S"
"""Environment variable: how long a store that worked may be silent, in seconds; the restart of a server."""

_PATIENCE_S = 120.0
_BROKEN_S = 15.0
"""For a store that answers, but with an internal error, which may be lasting."""
_SLOWEST_WAIT_S = 5.0

_T = TypeVar("_T")

# Calls that make another thing each time they are repeated.
_MAKES_ANEW = (
    *("create_run", "create_experiment", "create_logged_model", "create_registered_model"),
    *("create_model_version", "log_outputs"),
)
_BUSY = ("database is locked", "deadlock", "could not serialize")
_DATABASE_AWAY = ("could not connect", "connection", "starting up", "shutting down", "terminating")
_NO_ANSWER = (
    *("failed with exception", "failed with timeout exception"),
    "was successful but the response body was not in a valid JSON format",  # cut off
)
_INTERNAL = ("too many 500 error responses", "failed with error code 500")
_TWICE = ("UniqueViolation", "UNIQUE constraint", "unique constraint", "Duplicate entry")
_FULL = re.compile(
    "database or disk is full|disk I/O error|No space left on device|Disk quota exceeded|File too large"
)
_LATER = (408, 429, 502, 503, 504)
_LOST = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class Patience:
    """How long is waited for a store.

    Args:
        seconds: For one that does not answer; None reads the environment.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = _from_environment() if seconds is None else seconds
        self.hurry = threading.Event()
        """Set: nothing is tried again, and what waits stops waiting. For the ending of a program."""
        self.was_tested = False
        """Whether anything had to be tried again, so that a request may still arrive late."""

    def run(self, request: Callable[[], _T]) -> _T:
        """What `request`, which may be repeated, answers; repeated while the store is away."""
        for attempt in self._attempts():
            with attempt, _no_blind_retries():
                return request()
        raise AssertionError("the last attempt raises")

    def once(self, create: Callable[[], _T], find: Callable[[], _T | None]) -> _T:
        """What `create` makes, exactly once, however often its answer is lost.

        Args:
            create: Makes it.
            find: What an earlier attempt made; None if none did.
        """
        for attempt in self._attempts():
            with attempt, _no_blind_retries():
                made = find() if attempt.retry_state.attempt_number > 1 else None
                return create() if made is None else made
        raise AssertionError("the last attempt raises")

    @contextmanager
    def one_attempt(self) -> Iterator[None]:
        """Nothing is tried again in here."""
        before = self.hurry.is_set()
        self.hurry.set()
        try:
            yield
        finally:
            if not before:
                self.hurry.clear()

    def _attempts(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_passing),
            stop=self._is_over,
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=_SLOWEST_WAIT_S),
            sleep=tenacity.sleep_using_event(self.hurry),
            before_sleep=self._note,
            reraise=True,
        )

    def _note(self, state: tenacity.RetryCallState) -> None:
        self.was_tested = True

    def _is_over(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        limit = self.seconds if error is None or is_away(error) else min(self.seconds, _BROKEN_S)
        return self.hurry.is_set() or (state.seconds_since_start or 0.0) >= limit


class DirectClient(MlflowClient):  # type: ignore[misc]
    """MLflow's client, without the request before each request.

    It looks whether a registered model is a prompt before it does anything with one.
    """

    def _raise_if_prompt(self, name: str) -> None:
        """Nothing: what we register says what it is."""

    def set_model_versions_tags(self, name: str, number: str, model_id: str) -> None:
        """Tell the page of a logged model that a version was registered of it, as MLflow's server does."""
        self._tracking_client.store.set_model_versions_tags(name, number, model_id)


class PatientClient:
    """An `MlflowClient` that asks again while the store is away, where that is harmless.

    What makes something anew is asked once: use `Patience.once`.

    Args:
        client: MLflow's own.
        patience: For how long.
    """

    def __init__(self, client: Any, patience: Patience) -> None:
        self._client, self._patience = client, patience

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method
        if name in _MAKES_ANEW:
            return _without_retries(method)
        if name.startswith("delete_"):
            return self._deleting(method)
        return lambda *args, **kwargs: self._patience.run(lambda: method(*args, **kwargs))

    def _deleting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A deletion that finds nothing is done if it was asked for before."""

        def delete(*args: Any, **kwargs: Any) -> Any:
            asked = False

            def request() -> Any:
                nonlocal asked
                before, asked = asked, True
                try:
                    return method(*args, **kwargs)
                except MlflowException as error:
                    if not (before and error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")):
                        raise
                    return None

            return self._patience.run(request)

        return delete


def full_disk(error: object) -> str | None:
    """What an error, or its text, says of a disk without room; None for another error."""
    found = _FULL.search(str(error).partition("[SQL: ")[0])
    return None if found is None else found[0]


def is_away(error: BaseException) -> bool:
    """Whether an error says that the store could not be reached, or not now."""
    if full_disk(error) is not None:
        return False
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code in _LATER
    if isinstance(error, requests.RequestException):
        return isinstance(error, _LOST)
    if not isinstance(error, MlflowException) or _is_broken(error):
        return False
    text = str(error)
    if any(words in text for words in _NO_ANSWER):
        return "SSL" not in text
    if any(f"error code {status}" in text for status in _LATER):
        return True
    if error.error_code == "TEMPORARILY_UNAVAILABLE":
        return any(words in text.lower() for words in (*_BUSY, *_DATABASE_AWAY))
    return error.error_code in ("REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")


def is_passing(error: BaseException) -> bool:
    """Whether it may be otherwise when asked again."""
    return is_away(error) or _is_broken(error) or _is_collision(error)


def _is_collision(error: BaseException) -> bool:
    """Whether two writers made the same row at once; MLflow looks before it makes one, and finds it then."""
    if not isinstance(error, MlflowException) or error.error_code == "RESOURCE_ALREADY_EXISTS":
        return False
    return any(words in str(error) for words in _TWICE)


def _is_broken(error: BaseException) -> bool:
    """Whether a server answered with an internal error."""
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code == HTTPStatus.INTERNAL_SERVER_ERROR
    is_internal = isinstance(error, MlflowException) and any(words in str(error) for words in _INTERNAL)
    return is_internal and full_disk(error) is None


def _from_environment() -> float:
    text = os.environ.get(PATIENCE_VARIABLE, str(_PATIENCE_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise MechdiffError(f"{PATIENCE_VARIABLE} is {text!r}; give seconds, e.g. 120.")
    return seconds


_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_lock = threading.Lock()
_inside = 0
_outside: str | None = None


@contextmanager
def _no_blind_retries() -> Iterator[None]:
    """MLflow repeats no request in here, whatever it is; other code of the process keeps its setting.

    The environment is the only place where MLflow looks, and is everybody's: the first of several threads
    changes it and the last changes it back.
    """
    global _inside, _outside
    with _lock:
        if _inside == 0:
            _outside = os.environ.get(_RETRIES)
            os.environ[_RETRIES] = "0"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                if _outside is None:
                    del os.environ[_RETRIES]
                else:
                    os.environ[_RETRIES] = _outside


def _without_retries(method: Callable[..., _T]) -> Callable[..., _T]:
    def ask(*args: Any, **kwargs: Any) -> _T:
        with _no_blind_retries():
            return method(*args, **kwargs)

    return ask
