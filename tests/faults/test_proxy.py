"""The proxy does what its rules say, and nothing to the rest."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from faults.harness import wait_until
from faults.proxy import Fault, FaultProxy, Rule, proxying


class Upstream(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    got: list[bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).got.append(body)
        self.send_response(200)
        self.send_header("Content-Length", str(2 * len(body)))
        self.end_headers()
        self.wfile.write(2 * body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def got() -> list[bytes]:
    return []


@pytest.fixture
def proxy(got: list[bytes]) -> Iterator[FaultProxy]:
    handler = type("Handler", (Upstream,), {"got": got})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with proxying(f"http://127.0.0.1:{server.server_port}") as running:
            yield running
        server.shutdown()


def post(proxy: FaultProxy, body: bytes, path: str = "/create") -> tuple[int, bytes] | str:
    """Status and body of the answer, or what kept it from arriving."""
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
    try:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fault", "answer", "arrived"),
    [
        (Fault.DROP_ANSWER, "RemoteDisconnected", [b"body"]),
        (Fault.LATE, "RemoteDisconnected", [b"body"]),
        (Fault.DROP_REQUEST, "RemoteDisconnected", []),
        (Fault.REFUSE, (503, b"refused by the proxy"), []),
        (Fault.DELAY, (200, b"bodybody"), [b"body"]),
        (Fault.TRUNCATE_ANSWER, "IncompleteRead", [b"body"]),
    ],
)
def test_each_fault(
    proxy: FaultProxy, got: list[bytes], fault: Fault, answer: object, arrived: list[bytes]
) -> None:
    proxy.rules = [Rule(fault=fault, method="POST", path="/create$")]
    assert post(proxy, b"body", "/other") == (200, b"bodybody")
    assert post(proxy, b"body") == answer
    wait_until(lambda: proxy.counts().total() == 2)
    assert got == [b"body", *arrived]
    assert proxy.counts() == {None: 1, fault: 1}


def test_only_the_chosen_requests_are_struck(proxy: FaultProxy, got: list[bytes]) -> None:
    proxy.rules = [Rule(fault=Fault.REFUSE, status=429, nth=frozenset({2}))]
    assert [post(proxy, b"x")[0] for _ in range(3)] == [200, 429, 200]
    proxy.rules = [Rule(fault=Fault.REFUSE, first_of_each=True)]
    bodies = (b"a 1700000000001", b"b 1", b"a 1700000000002", b"b 1", b"b 2")
    assert [post(proxy, body)[0] for body in bodies] == [503, 503, 200, 200, 503]


def test_chance_is_that_of_the_seed() -> None:
    rule = Rule(fault=Fault.DROP_REQUEST, probability=0.5)

    def drawn(seed: int) -> list[bool]:
        proxy = FaultProxy("http://127.0.0.1:1", [rule], seed)
        return [proxy.rule_for("GET", "/", b"") is not None for _ in range(40)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert 10 < sum(drawn(1)) < 30


def test_a_server_that_is_away_looks_away(proxy: FaultProxy) -> None:
    proxy.upstream = ("127.0.0.1", 1)
    assert post(proxy, b"x") == "RemoteDisconnected"
