"""An MLflow server over HTTP: one question to it, who we are to it, and what it means when it refuses."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import quote, unquote, urlsplit

import requests
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from mechdiff_mlflow.tracking.store.redaction import redact

A_TOKEN = "a token"
"""The name of somebody who has a token and no name."""
SEARCH = "/api/2.0/mlflow/experiments/search"
SERVER_ANSWER_S = 5


def ask_server(uri: str, method: str = "POST", path: str = SEARCH) -> requests.Response:
    """The answer to one attempt at a request that every MLflow server knows."""
    answer: requests.Response = http_request(
        get_default_host_creds(uri),
        path,
        method,
        json={"max_results": 1} if path == SEARCH else None,
        max_retries=0,
        timeout=SERVER_ANSWER_S,
        raise_on_status=False,
    )
    return answer


def is_answer_of_mlflow(answer: requests.Response) -> bool:
    """Whether this is what MLflow answers to a search."""
    try:
        return answer.status_code == requests.codes.ok and isinstance(answer.json(), dict)
    except ValueError:
        return False


def login_name(uri: str) -> str | None:
    """Who our requests to the server at `uri` say we are; None for nobody, `A_TOKEN` for a token."""
    credentials, in_address = get_default_host_creds(uri), urlsplit(uri).username
    if credentials.username:
        return str(credentials.username)
    if credentials.token or in_address is None:
        return A_TOKEN if credentials.token else None
    name = unquote(in_address)
    return name.encode("latin-1").decode() if _is_utf8_as_latin1(name) else name


def not_allowed(uri: str, status: int, what: str = "") -> str:
    """What to tell somebody whom the server turned away."""
    name = login_name(uri)
    if name is None:
        return (
            f"The tracking server {redact(uri)} wants to know who you are (HTTP {status}); set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    if status == HTTPStatus.UNAUTHORIZED:
        return (
            f"The tracking server {redact(uri)} does not know user {name!r} with that password (HTTP 401); "
            "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    return (
        f"User {name!r} has no permission for this on the tracking server {redact(uri)} (HTTP 403"
        + (f" from {what}" if what else "")
        + "); ask its administrator for EDIT on the experiment or registered model, or log in as somebody "
        "else with MLFLOW_TRACKING_USERNAME."
    )


def with_utf8_login(uri: str) -> str:
    """A server's address whose user and password are sent in UTF-8, as MLflow reads them; ASCII stays.

    What stands in an address is decoded and then sent as Latin-1 by `requests`: the bytes of UTF-8, read as
    Latin-1, come out as they should be. An address that was treated so already is left alone.
    """
    user_info, at, host = urlsplit(uri).netloc.rpartition("@")
    if not at or unquote(user_info).isascii():
        return uri
    parts = [unquote(part) for part in user_info.split(":", 1)]
    if not all(map(_is_utf8_as_latin1, parts)):
        parts = [part.encode().decode("latin-1") for part in parts]
    login = ":".join(quote(part, safe="") for part in parts)
    return urlsplit(uri)._replace(netloc=f"{login}@{host}").geturl()


def _is_utf8_as_latin1(text: str) -> bool:
    try:
        text.encode("latin-1").decode()
    except UnicodeError:
        return False
    return True
