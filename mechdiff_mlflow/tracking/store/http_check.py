"""The checks that an MLflow server answers over HTTP: login, version, authentication, encryption, clock."""

from __future__ import annotations

import ipaddress
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit, urlunsplit

import mlflow
import requests
from mlflow.environment_variables import MLFLOW_TRACKING_INSECURE_TLS
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from mechdiff_mlflow.tracking.store.check_result import Finding, Level
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.store import login_name

SLOW_MS = 100
"""A run costs half a dozen requests, a sweep thousands."""
SKEW_WARN_S, SKEW_FAIL_S = 5, 60
"""Beyond the first, times on the run page mislead; beyond the second, signed requests (S3, tokens) fail."""
_ANSWER_S = 10
_REQUESTS = 5
_SEARCH = "/api/2.0/mlflow/experiments/search"


def check_http(uri: str) -> Iterator[Finding]:
    """Everything about the server at `uri` but what needs a scratch experiment; one line if none answers."""
    answer, reached = _reach(uri)
    yield reached
    if answer is None:
        return
    yield _login(uri, answer)
    try:
        if answer.status_code == requests.codes.ok:
            yield _version(uri)
        else:
            yield Finding("version", Level.SKIP, "not told before the login")
        yield _authentication(uri)
    except (MlflowException, requests.RequestException) as error:
        yield _unreachable(uri, error)
    yield _encryption(uri)
    yield _clock(answer)


def _reach(uri: str) -> tuple[requests.Response | None, Finding]:
    """The answer to a request that every MLflow server knows, None if what answers is none."""
    took = []
    try:
        for _ in range(_REQUESTS):
            start = time.perf_counter()
            answer = _ask(uri, _SEARCH, "POST")
            took.append(1000 * (time.perf_counter() - start))
            if answer.status_code != requests.codes.ok:
                break
    except (MlflowException, requests.RequestException) as error:
        return None, _unreachable(uri, error)
    if not _is_mlflow(answer):
        seen = f"what answers at {redact(uri)} (HTTP {answer.status_code}) is no MLflow server"
        return None, Finding("reachable", Level.FAIL, seen, "check host, port and path of the address")
    ms = statistics.median(took[1:] or took)
    seen = f"{redact(uri)} answers a search in {ms:.0f} ms"
    if ms <= SLOW_MS:
        return answer, Finding("reachable", Level.OK, seen)
    remedy = "with basic-auth set auth_cache_ttl_seconds = 60; one worker, or several with uvloop"
    return answer, Finding("reachable", Level.WARN, seen, remedy)


def _unreachable(uri: str, error: Exception) -> Finding:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "SSLError" in text:
        remedy = "have it signed by a known authority, or name its file in MLFLOW_TRACKING_SERVER_CERT_PATH"
        return Finding("reachable", Level.FAIL, f"the certificate of {redact(uri)} is not trusted", remedy)
    remedy = "start the server, and check address, firewall and reverse proxy"
    return Finding("reachable", Level.FAIL, f"nothing answers at {redact(uri)} within {_ANSWER_S} s", remedy)


def _is_mlflow(answer: requests.Response) -> bool:
    refused = answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden)
    return refused or _is_found(answer)


def _is_found(answer: requests.Response) -> bool:
    """Whether this is what MLflow answers to a search."""
    try:
        return answer.status_code == requests.codes.ok and isinstance(answer.json(), dict)
    except ValueError:
        return False


def _login(uri: str, answer: requests.Response) -> Finding:
    name = login_name(uri)
    if answer.status_code == requests.codes.ok:
        return Finding("login", Level.OK, f"as {name}" if name else "none given, none needed")
    seen = f"user {name!r} is refused" if name else "no user is given and one is needed"
    remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    return Finding("login", Level.FAIL, f"{seen} (HTTP {answer.status_code})", remedy)


def _version(uri: str) -> Finding:
    answer = _ask(uri, "/version", "GET")
    theirs, ours = answer.text.strip(), str(mlflow.__version__)
    parts = [_release(theirs), _release(ours)]
    if answer.status_code != requests.codes.ok or not parts[0]:
        seen = f"the server does not say (HTTP {answer.status_code} from /version), client {ours}"
        return Finding("version", Level.WARN, seen, "let the reverse proxy pass /version on")
    seen = f"server {theirs}, client {ours}"
    if parts[0] == parts[1]:
        return Finding("version", Level.OK, seen)
    if parts[0][0] != parts[1][0]:
        return Finding("version", Level.FAIL, seen, "upgrade the older one")
    if parts[0] < parts[1]:
        remedy = f"upgrade the server, or pip install mlflow=={theirs} here"
        return Finding("version", Level.WARN, seen, remedy)
    return Finding("version", Level.OK, f"{seen}; servers may be newer")


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number; empty when it is no version."""
    numbers = version.split(".")[:2]
    return tuple(map(int, numbers)) if len(numbers) == 2 and all(n.isdigit() for n in numbers) else ()


def _authentication(uri: str) -> Finding:
    # Not by the status alone: a single sign-on answers strangers with a login page.
    if not _is_found(_ask(uri, _SEARCH, "POST", anonymous=True)):
        return Finding("authentication", Level.OK, "who gives no credentials is refused")
    remedy = "mlflow server --app-name basic-auth, or bind it to 127.0.0.1"
    parts = urlsplit(uri)
    if not is_loopback(parts.hostname or ""):
        seen = f"anybody who reaches {parts.hostname} may read, change and delete everything"
        return Finding("authentication", Level.FAIL, seen, remedy)
    others = [address for address in own_addresses() if _listens(address, parts.port or 80)]
    if others:
        seen = f"none, and port {parts.port} is also open on {', '.join(others)}: anybody may do everything"
        return Finding("authentication", Level.FAIL, seen, remedy)
    seen = "none: whoever is logged in to this machine may do everything"
    return Finding("authentication", Level.WARN, seen, "for more than one person: --app-name basic-auth")


def own_addresses() -> list[str]:
    """This machine's addresses that others can reach, as far as its own name and its routes tell."""
    found = set()
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))  # only looks the route up: UDP sends nothing here
                found.add(str(probe.getsockname()[0]))
        except OSError:
            continue
    with suppress(OSError):
        found |= {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    return sorted(address for address in found if not is_loopback(address))


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _encryption(uri: str) -> Finding:
    parts = urlsplit(uri)
    if parts.scheme == "https":
        if MLFLOW_TRACKING_INSECURE_TLS.get():
            seen = "https, but MLFLOW_TRACKING_INSECURE_TLS trusts any certificate"
            return Finding("encryption", Level.WARN, seen, "name the certificate's authority instead")
        return Finding("encryption", Level.OK, "https, certificate trusted")
    if is_loopback(parts.hostname or ""):
        return Finding("encryption", Level.OK, "http, which does not leave this machine")
    remedy = "a reverse proxy with TLS before the server, and its https:// address here"
    if login_name(uri):
        return Finding("encryption", Level.FAIL, "http: the password crosses the network readable", remedy)
    return Finding("encryption", Level.WARN, "http: whoever is on the way can read and change all", remedy)


def _clock(answer: requests.Response) -> Finding:
    try:
        theirs = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, ValueError):
        return Finding("clock", Level.SKIP, "the server's answers have no Date")
    # The header counts whole seconds; the answer came a moment ago.
    return skew(time.time() - theirs - 0.5)


def skew(seconds: float) -> Finding:
    """What it means that this machine's clock is so far ahead."""
    ahead = "ahead of" if seconds > 0 else "behind"
    seen = f"this machine is {abs(seconds):.0f} s {ahead} the server"
    if abs(seconds) <= SKEW_WARN_S:
        return Finding("clock", Level.OK, f"within {SKEW_WARN_S} s of the server's")
    level = Level.WARN if abs(seconds) <= SKEW_FAIL_S else Level.FAIL
    return Finding("clock", level, seen, "synchronise both clocks (NTP)")


def _ask(uri: str, path: str, method: str, *, anonymous: bool = False) -> requests.Response:
    """One attempt at a request; anonymous ones carry no credentials from anywhere, .netrc included."""
    json = {"max_results": 1} if method == "POST" else None
    credentials = get_default_host_creds(uri)
    if anonymous:
        parts = urlsplit(uri)
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        return requests.request(
            method,
            bare + path,
            json=json,
            timeout=_ANSWER_S,
            verify=credentials.verify,
            auth=lambda request: request,
        )
    answer: requests.Response = http_request(
        credentials, path, method, json=json, max_retries=0, timeout=_ANSWER_S, raise_on_status=False
    )
    return answer


def is_loopback(host: str) -> bool:
    """Whether a host name says that the server is on this machine; other names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
