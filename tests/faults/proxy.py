"""A reverse proxy on loopback that loses, delays, damages or refuses what its rules say.

It stands in front of a real MLflow server, so that a client meets the failures of a network: above all an
answer that never arrives though the server has done what was asked.
"""

from __future__ import annotations

import hashlib
import http.client
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

UPSTREAM_S = 120
_TIME = re.compile(rb"\b\d{13}\b")
_NOT_FORWARDED = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "expect"}


class Fault(str, Enum):
    """What happens to a request."""

    DROP_ANSWER = "the answer is dropped after the server has committed"
    DROP_REQUEST = "dropped before the server sees it"
    REFUSE = "refused with an error status"
    DELAY = "delayed"
    LATE = "the client is cut off at once, and the server sees the request later"
    TRUNCATE_ANSWER = "half of the answer's body, then the connection ends"
    TRUNCATE_REQUEST = "half of the request's body reaches the server, then both connections end"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which requests meet which fault.

    Args:
        fault: What happens.
        method: Of the requests, several separated by `|`; empty for any.
        path: Regular expression searched for in path and query; empty for any.
        nth: Which of the requests that match, counted from 1; None for all.
        first_of_each: Only the first request of each method, path and body: what is sent again passes. Times
            in ms do not count, since they are others when something is sent again.
        probability: Of the fault, drawn for each request.
        status: With which `REFUSE` answers.
        seconds: How long `DELAY` and `LATE` take; REFUSE sends it as Retry-After where it is not 0.
    """

    fault: Fault
    method: str = ""
    path: str = ""
    nth: frozenset[int] | None = None
    first_of_each: bool = False
    probability: float = 1.0
    status: int = 503
    seconds: float = 0.0


@dataclass(frozen=True)
class Seen:
    """One request that the proxy got.

    Args:
        method: Of the request.
        path: With its query.
        fault: What happened to it, None for nothing.
        status: Of the server's answer, None where the server was not asked or did not answer.
    """

    method: str
    path: str
    fault: Fault | None
    status: int | None


class FaultProxy:
    """A running proxy; made by `proxying`. `rules` may be exchanged while it runs."""

    def __init__(self, upstream: str, rules: Sequence[Rule], seed: int) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.rules = list(rules)
        self.seen: list[Seen] = []
        self.sizes: list[int] = []
        """Bytes of each answer of the server."""
        self.url = ""
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._matched: Counter[Rule] = Counter()
        self._bodies: set[tuple[Rule, str]] = set()

    def counts(self, path: str = "", method: str = "") -> Counter[Fault | None]:
        """How many requests met each fault (None: no fault), of those whose path has `path` in it."""
        with self._lock:
            return Counter(s.fault for s in self.seen if path in s.path and method in ("", s.method))

    def rule_for(self, method: str, path: str, body: bytes) -> Rule | None:
        """The first rule that strikes this request."""
        with self._lock:
            return next((rule for rule in self.rules if self._strikes(rule, method, path, body)), None)

    def note(self, seen: Seen) -> None:
        """Keep what happened to a request."""
        with self._lock:
            self.seen.append(seen)

    def _strikes(self, rule: Rule, method: str, path: str, body: bytes) -> bool:
        if (rule.method and method not in rule.method.split("|")) or re.search(rule.path, path) is None:
            return False
        self._matched[rule] += 1
        if rule.nth is not None and self._matched[rule] not in rule.nth:
            return False
        if rule.first_of_each:
            asked = b"\0".join([method.encode(), path.encode(), _TIME.sub(b"", body)])
            key = (rule, hashlib.sha256(asked).hexdigest())
            if key in self._bodies:
                return False
            self._bodies.add(key)
        return rule.probability >= 1 or self._random.random() < rule.probability


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in two small packets would wait 40 ms for each other.
    disable_nagle_algorithm = True
    wbufsize = -1
    proxy: FaultProxy

    def handle_any(self) -> None:
        """One request of any method."""
        body = self._body()
        rule = self.proxy.rule_for(self.command, self.path, body)
        fault = rule.fault if rule else None
        if fault is Fault.LATE:
            self._hang_up()
        if rule is not None and fault in (Fault.DELAY, Fault.LATE):
            time.sleep(rule.seconds)
        if fault is Fault.DROP_REQUEST:
            return self._end(fault, None)
        if rule is not None and fault is Fault.REFUSE:
            more = {"Retry-After": f"{rule.seconds:g}"} if rule.seconds else {}
            self.proxy.note(Seen(self.command, self.path, fault, None))
            return self._answer(rule.status, {"Content-Type": "text/plain", **more}, b"refused by the proxy")
        try:
            status, headers, content = self._ask(body, whole=fault is not Fault.TRUNCATE_REQUEST)
        except (OSError, http.client.HTTPException):
            return self._end(fault, None)  # the server is away: the client sees what it would without a proxy
        self.proxy.sizes.append(len(content))
        if fault in (Fault.DROP_ANSWER, Fault.LATE):
            return self._end(fault, status)
        self.proxy.note(Seen(self.command, self.path, fault, status))
        self._answer(status, headers, content, half=fault is Fault.TRUNCATE_ANSWER)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _ask(self, body: bytes, *, whole: bool) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.proxy.upstream, timeout=UPSTREAM_S)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            connection.putheader("Host", "{}:{}".format(*self.proxy.upstream))
            for name, value in self.headers.items():
                if name.lower() not in _NOT_FORWARDED:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body if whole else body[: len(body) // 2])
            if not whole:
                raise http.client.HTTPException("cut on purpose")
            answer = connection.getresponse()
            content = answer.read()
            kept = {n: v for n, v in answer.getheaders() if n.lower() not in _NOT_FORWARDED}
            return answer.status, kept, content
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, *, half: bool = False) -> None:
        with suppress(OSError):  # the client did not wait
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self._hang_up()

    def _end(self, fault: Fault | None, status: int | None) -> None:
        self.proxy.note(Seen(self.command, self.path, fault, status))
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def proxying(upstream: str, *rules: Rule, seed: int = 0) -> Iterator[FaultProxy]:
    """A proxy on a free port of loopback in front of `upstream`."""
    proxy = FaultProxy(upstream, rules, seed)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with _Server(("127.0.0.1", 0), handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
