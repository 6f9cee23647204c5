"""Turns at a registered map between machines that share nothing but the store."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking import turns
from mechdiff_mlflow.tracking.store import Store, open_store
from mechdiff_mlflow.tracking.turns import TURN_TAG, MapBoard, Ticket, Turn, tickets_in

NAME = "demo"


@pytest.fixture
def queue(store: Store) -> Store:
    store.client.create_registered_model(NAME)
    return store


def tickets(store: Store) -> dict[str, Ticket]:
    return tickets_in(store.client.get_registered_model(NAME).tags)


def put(store: Store, token: str, ticket: Ticket | None) -> None:
    text = "garbage" if ticket is None else json.dumps({"number": ticket.number, "machine": ticket.machine})
    store.client.set_registered_model_tag(NAME, TURN_TAG + token, text)


def test_machines_come_one_after_the_other(queue: Store, tmp_path: Path) -> None:
    counter, inside, most = tmp_path / "counter", [0], [0]
    counter.write_text("0")
    problems: list[BaseException] = []

    def machine(name: str) -> None:
        try:
            store = open_store(queue.uri)
            for _ in range(3):
                turn = Turn(MapBoard(store, NAME), name)
                turn.wait()
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                count = int(counter.read_text())
                time.sleep(0.02)
                turn.demand()
                counter.write_text(str(count + 1))
                inside[0] -= 1
                turn.leave()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=machine, args=(f"m{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert (counter.read_text(), most) == ("12", [1])
    assert tickets(queue) == {}


def test_a_dead_promoter_of_the_own_machine_is_passed_at_once(queue: Store) -> None:
    put(queue, "dead", Ticket(1, "here"))
    put(queue, "drawing", Ticket(0, "here"))
    before = time.monotonic()
    turn = Turn(MapBoard(queue, NAME), "here")
    turn.wait()
    assert time.monotonic() - before < turns.LEASE_S / 4
    turn.leave()
    assert tickets(queue) == {}


@pytest.mark.parametrize("left", [Ticket(0, "there"), None])
def test_a_dead_promoter_elsewhere_is_passed_when_its_lease_is_over(
    queue: Store, left: Ticket | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LEASE_S", 2.0)
    put(queue, "dead", left)
    before = time.monotonic()
    turn = Turn(MapBoard(queue, NAME), "here")
    turn.wait()
    assert time.monotonic() - before >= 2.0
    turn.leave()
    assert tickets(queue) == {}


def test_a_promoter_that_lives_is_waited_for(queue: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LEASE_S", 2.0)
    monkeypatch.setattr(turns, "_WAIT_S", 3.0)
    stop = threading.Event()

    def alive() -> None:
        store, beat = open_store(queue.uri), 0
        while not stop.wait(0.2):
            beat += 1
            text = json.dumps({"number": 1, "machine": "there", "beat": beat})
            store.client.set_registered_model_tag(NAME, f"{TURN_TAG}alive", text)

    put(queue, "alive", Ticket(1, "there"))
    thread = threading.Thread(target=alive)
    thread.start()
    try:
        with pytest.raises(MechdiffError, match="other promotions of demo have been ahead for 3 s"):
            Turn(MapBoard(queue, NAME), "here").wait()
    finally:
        stop.set()
        thread.join()
    assert "alive" in tickets(queue)


def test_who_was_taken_for_dead_queues_anew_and_who_stood_still_stops(
    queue: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = Turn(MapBoard(queue, NAME), "here")
    turn._draw()
    [first] = tickets(queue)
    queue.client.delete_registered_model_tag(NAME, TURN_TAG + first)
    assert turn._ahead({}) == [turn._token]
    assert [*tickets(queue)] == [turn._token] != [first]
    monkeypatch.setattr(turns, "LEASE_S", 0.02)
    time.sleep(0.05)
    with pytest.raises(MechdiffError, match="stood still for over"):
        turn.demand()
