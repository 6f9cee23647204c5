"""Requests that survive an absence of the store, and creations that happen exactly once.

Requests that set or read are sent again. MLflow's own retries also repeat a creation whose answer was lost,
which leaves two runs; so MLflow retries nothing in here, and a creation is looked up before it is repeated.
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
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"

_T = TypeVar("_T")

_CREATES = re.compile("create_(run|experiment|logged_model|registered_model|model_version)|log_outputs")
"""Calls that make another thing each time they are repeated."""
_BUSY = ("database is locked", "deadlock", "could not serialize")
_DATABASE_AWAY = ("could not connect", "connection", "starting up", "shutting down", "terminating")
_NO_ANSWER = (
    "failed with exception",
    "failed with timeout exception",
    "was successful but the response body was not in a valid JSON format",  # cut off
)
_INTERNAL = ("too many 500 error responses", "failed with error code 500")
_TWICE = ("UniqueViolation", "UNIQUE constraint", "unique constraint", "Duplicate entry")
_FULL = re.compile(
    "database or disk is full|disk I/O error|No space left on device|Disk quota exceeded|File too large"
)
_LATER = (408, 429, 502, 503, 504)
_LOST = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class Retries:
    """How long requests are repeated while a store is away.

    Args:
        seconds: For a store that does not answer; None reads the environment.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = _from_environment() if seconds is None else seconds
        self.hurry = threading.Event()
        """Set: nothing is tried again, and what waits stops waiting. For the ending of a program."""
        self.has_retried = False
        """Whether anything had to be tried again, so that a request may still arrive late."""

    def run(self, request: Callable[[], _T]) -> _T:
        """The answer to `request`, which may be repeated; repeated while the store is away."""
        return self.once(request, lambda: None)

    def once(self, create: Callable[[], _T], find: Callable[[], _T | None]) -> _T:
        """The result of `create`, made exactly once, however often its answer is lost.

        Args:
            create: Makes it.
            find: Looks up what an earlier attempt made; None if there is nothing.
        """
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_passing),
            stop=self._is_over,
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=_SLOWEST_WAIT_S),
            sleep=tenacity.sleep_using_event(self.hurry),
            before_sleep=self._note,
            reraise=True,
        )
        for attempt in attempts:
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

    def _note(self, state: tenacity.RetryCallState) -> None:
        self.has_retried = True

    def _is_over(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        limit = self.seconds if error is None or is_away(error) else min(self.seconds, _BROKEN_S)
        return self.hurry.is_set() or (state.seconds_since_start or 0.0) >= limit


class DirectClient(MlflowClient):  # type: ignore[misc]
    """MLflow's client, without its question before each request whether a registered model is a prompt."""

    def _raise_if_prompt(self, name: str) -> None:
        """Do nothing: what we register says what it is."""

    def set_model_versions_tags(self, name: str, number: str, model_id: str) -> None:
        """Tell the page of a logged model that a version was registered of it, as MLflow's server does."""
        self._tracking_client.store.set_model_versions_tags(name, number, model_id)


class RetryingClient:
    """An `MlflowClient` that asks again while the store is away; it sends creations once (`Retries.once`)."""

    def __init__(self, client: Any, retries: Retries) -> None:
        self._client, self._retries = client, retries

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method

        def ask(*args: Any, **kwargs: Any) -> Any:
            n_sent = 0

            def request() -> Any:
                nonlocal n_sent
                n_sent += 1
                try:
                    return method(*args, **kwargs)
                except MlflowException as error:
                    # A deletion that finds nothing is done if it was asked for before.
                    is_gone = error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
                    if is_gone and n_sent > 1 and name.startswith("delete_"):
                        return None
                    raise

            if _CREATES.fullmatch(name) is None:
                return self._retries.run(request)
            with _no_blind_retries():
                return request()

        return ask


def full_disk(error: object) -> str | None:
    """The words in an error, or its text, that say a disk is full; None for another error."""
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
    """Whether a request that failed so may succeed when sent again."""
    # Two writers made the same row at once; MLflow looks before it makes one, and finds it then.
    is_collision = (
        isinstance(error, MlflowException)
        and error.error_code != "RESOURCE_ALREADY_EXISTS"
        and any(words in str(error) for words in _TWICE)
    )
    return is_collision or is_away(error) or _is_broken(error)


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


_lock = threading.Lock()
_inside = 0
_outside: str | None = None


@contextmanager
def _no_blind_retries() -> Iterator[None]:
    """MLflow repeats no request in here; other code of the process keeps its setting.

    MLflow looks only in the environment, which is everybody's: the first of several threads changes it and
    the last changes it back.
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
                del os.environ[_RETRIES]
                os.environ |= {} if _outside is None else {_RETRIES: _outside}
