"""Turns between processes on different machines, kept in the tags of what they are about.

MLflow has no compare-and-set, so moving an alias (read it, announce the move, make it) or taking over a
run must not happen twice at once. Tags are single registers that everybody reads and only their owner writes,
which is what Lamport's bakery algorithm needs: draw a number above all that are seen, wait until no lower one
is left.

What holds: of processes that keep running, one at a time is in its turn, in the order of the numbers. A
ticket that has not changed for `LEASE_S` seconds of an observer's clock counts as left behind by a dead
process; one of the observer's own machine does at once, as there the lock file tells. A process that was
stopped for half of that does not go on. What remains is a stop between its last look at the clock and the
arrival of its one request: of two promoters both then read back, and whoever finds the alias elsewhere says
so; of two owners of a run see `lease`.

Reference: Lamport (1974), A new solution of Dijkstra's concurrent programming problem.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Protocol

from pydantic import Field

from mechdiff_mlflow import foreign
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.locks import lock_file, machine_of
from mechdiff_mlflow.tracking.store import Store

TURN_TAG = "mechdiff.turn."
LEASE_S = 60.0
_WAIT_S = 600.0
_POLL_S = 0.1
_SLOWEST_POLL_S = 2.0


class Board(Protocol):
    """Tags that everybody reads; each key is written by one."""

    what: str
    """For messages: `promotions of demo-L3-attn_out`."""

    def read(self) -> Mapping[str, str]:
        """All tags."""

    def write(self, key: str, text: str) -> None:
        """Set a tag."""

    def delete(self, key: str) -> None:
        """Take a tag away."""


class MapBoard:
    """The tags of a registered map."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self.what = store, name, f"promotions of {name}"

    def read(self) -> Mapping[str, str]:
        """All tags."""
        with self._store.errors():
            tags: Mapping[str, str] = self._store.client.get_registered_model(self._name).tags
        return tags

    def write(self, key: str, text: str) -> None:
        """Set a tag."""
        with self._store.errors():
            self._store.client.set_registered_model_tag(self._name, key, text)

    def delete(self, key: str) -> None:
        """Take a tag away."""
        with self._store.errors():
            self._store.client.delete_registered_model_tag(self._name, key)


class RunBoard:
    """The tags of a run."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id, self.what = store, run_id, f"attempts to take over run {run_id}"

    def read(self) -> Mapping[str, str]:
        """All tags."""
        with self._store.errors():
            tags: Mapping[str, str] = self._store.client.get_run(self._run_id).data.tags
        return tags

    def write(self, key: str, text: str) -> None:
        """Set a tag."""
        with self._store.errors():
            self._store.client.set_tag(self._run_id, key, text)

    def delete(self, key: str) -> None:
        """Take a tag away."""
        with self._store.errors():
            self._store.client.delete_tag(self._run_id, key)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A process's place in the queue.

    Args:
        number: Drawn; 0 while it is being drawn.
        machine: Which machine's lock file its owner holds.
        beat: Counts up while its owner waits, to show that it lives.
    """

    number: Annotated[int, Field(ge=0, lt=1 << 53)]
    machine: str
    beat: int = 0


class Turn:
    """A process's turn at what a board belongs to; made by `turn`."""

    def __init__(self, board: Board, machine: str) -> None:
        self._board = board
        self._token = uuid.uuid4().hex[:16]
        self._ticket = Ticket(0, machine)
        self._written_s = 0.0

    def demand(self) -> None:
        """Make sure that nobody can have taken this process for dead.

        Raises:
            MechdiffError: It was stopped for too long.
        """
        if time.monotonic() - self._written_s > LEASE_S / 2:
            raise MechdiffError(
                f"This program stood still for over {LEASE_S / 2:g} s, so others may have moved on; run it "
                "again."
            )

    def wait(self) -> None:
        """Queue until it is this process's turn.

        Raises:
            MechdiffError: Others kept it for ten minutes.
        """
        until = time.monotonic() + _WAIT_S
        seen: dict[str, tuple[Ticket, float]] = {}
        self._draw()
        while ahead := self._ahead(seen):
            if time.monotonic() > until:
                raise MechdiffError(
                    f"{len(ahead)} other {self._board.what} have been ahead for {_WAIT_S:g} s; try again "
                    "later."
                )
            time.sleep(min(_POLL_S * (1 + len(ahead)), _SLOWEST_POLL_S))

    def leave(self) -> None:
        """Give the place up."""
        self._delete(self._token)

    def _draw(self) -> None:
        self._write(replace(self._ticket, number=0))  # others wait while a number is being drawn
        numbers = [ticket.number for ticket in self._tickets().values()]
        self._write(replace(self._ticket, number=1 + max(numbers, default=0)))

    def _ahead(self, seen: dict[str, tuple[Ticket, float]]) -> list[str]:
        """Tokens of the processes that come first; those that died are taken out."""
        now = time.monotonic()
        tickets = self._tickets()
        if self._token not in tickets or now - self._written_s > LEASE_S / 2:
            self._again()
            return [self._token]
        mine = (self._ticket.number, self._token)
        ahead = []
        for token, ticket in tickets.items():
            if token == self._token or (ticket.number != 0 and (ticket.number, token) > mine):
                continue
            if seen.get(token, (None, 0.0))[0] != ticket:
                seen[token] = (ticket, now)
            is_dead = ticket.machine == self._ticket.machine or now - seen[token][1] > LEASE_S
            if is_dead:
                self._delete(token)
            else:
                ahead.append(token)
        if ahead and now - self._written_s > LEASE_S / 4:
            self._write(replace(self._ticket, beat=self._ticket.beat + 1))
        return ahead

    def _again(self) -> None:
        """Queue anew: somebody took this process for dead, or could have."""
        self._delete(self._token)
        self._token = uuid.uuid4().hex[:16]
        self._draw()

    def _write(self, ticket: Ticket) -> None:
        before = time.monotonic()
        self._board.write(TURN_TAG + self._token, json.dumps(asdict(ticket)))
        self._ticket, self._written_s = ticket, before

    def _delete(self, token: str) -> None:
        with suppress(MechdiffError):  # somebody else took it out
            self._board.delete(TURN_TAG + token)

    def _tickets(self) -> dict[str, Ticket]:
        return tickets_in(self._board.read())


@contextmanager
def turn(board: Board, machine: str) -> Iterator[Turn]:
    """This process's turn at what `board` belongs to; the caller holds the lock of its `machine`.

    Raises:
        MechdiffError: Others kept it for ten minutes, or the store refuses.
    """
    mine = Turn(board, machine)
    try:
        mine.wait()
        yield mine
    finally:
        mine.leave()


def tickets_in(tags: Mapping[str, str]) -> dict[str, Ticket]:
    """The queue in the tags of a registered map, by token."""
    found = {}
    for key, text in tags.items():
        if key.startswith(TURN_TAG):
            try:
                found[key.removeprefix(TURN_TAG)] = foreign.record(Ticket, key, text)
            except foreign.Malformed:  # written by something else: it ages like a dead one's
                found[key.removeprefix(TURN_TAG)] = Ticket(0, "")
    return found


def promoting_machine(store: Store) -> str:
    """The name of whoever shares the lock file of promotions."""
    with store.errors():
        return machine_of(lock_file(store.uri, "promotion"))
