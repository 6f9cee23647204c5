"""Moving an alias from one version to another, and the history of its moves.

A move is recorded in a tag of the version that gets the alias (or, when it is taken away, had it), then made,
then marked as made. The history is read off these records. MLflow has no compare-and-set: of moves made at
once from several machines the last one stays, and each mover reads back and says so.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated

from mlflow.entities.model_registry import RegisteredModel
from pydantic import Field, TypeAdapter

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.tracking.content.names import check_alias
from mechdiff_mlflow.tracking.registry.versions import (
    Version,
    aliases_of,
    holder,
    list_versions,
    number_of,
    registered,
)
from mechdiff_mlflow.tracking.runs.provenance import provenance_tags
from mechdiff_mlflow.tracking.store.file_locks import file_lock, lock_file
from mechdiff_mlflow.tracking.store.server import A_TOKEN, login_name
from mechdiff_mlflow.tracking.store.store import Store

_MOVE_TAG = "mechdiff.move."
_Time = Annotated[int, Field(ge=0, lt=1 << 43)]  # what a calendar can show
_Number = Annotated[int, Field(ge=0, lt=1 << 31)]


class MovedMeanwhile(MechdiffError):
    """Another program moved the alias at the same time, and it stays where that one put it."""


@dataclass(frozen=True, slots=True)
class Move:
    """An alias going from one version to another; times are Unix times in ms, 0 when not known."""

    action: str  # `promote`, `rollback`, `demote`, or `outside` for one that another program made
    source: _Number | None  # the version it left, None for none
    target: _Number | None  # the version it went to, None when it was taken away
    who: str = ""
    when_ms: _Time = 0  # when it began, later than the moves that were seen then
    why: str = ""  # in the user's words
    rules: str = ""  # the policy that a promotion met
    made_ms: _Time = 0  # when it was seen to be made

    def text(self) -> str:
        """What the tag of its record holds."""
        return TypeAdapter(Move).dump_json(self).decode()


@contextmanager
def promotion_lock(store: Store) -> Iterator[None]:
    """One promoter at a time on this machine, and wherever else the lock file of a SQLite store is seen."""
    with store.errors(), file_lock(lock_file(store.uri, "promotion")):
        yield


def history(store: Store, name: str, alias: str = "champion") -> list[Move]:
    """The moves of an alias, oldest first.

    Raises:
        MechdiffError: No map has that name.
    """
    model = registered(store, name)
    records = _all_recorded(store, model, alias)
    return happened([records[key] for key in sorted(records, key=_order)], number_of(model, alias))


def move_alias(
    store: Store,
    name: str,
    alias: str,
    target: Version | None,
    action: str,
    *,
    expected: Version | None,
    check: Callable[[Version | None], None] | None = None,
    why: str = "",
    rules: str = "",
) -> Version:
    """Record the move, make it, read it back; the caller holds the lock and has verified the target.

    Gives the version that got the alias, or had it where `target` is None, which takes it away. Where another
    than the `expected` version has it by now, `check` is told and may raise; without it, that is refused.

    Raises:
        MovedMeanwhile: The alias is elsewhere, as another program moved it.
    """
    check_alias(alias)
    began_ms = _now_ms()
    model = registered(store, name)
    source = holder(store, model, alias, expected)
    if source is not expected:
        if check is None:
            raise MovedMeanwhile(f"Alias {alias!r} of {name} was moved meanwhile; see its history.")
        check(source)
    bearer = target or source
    assert bearer is not None, "an alias is taken from who has it"
    start, end = (None if one is None else one.number for one in (source, target))
    if start == end:
        return bearer
    if source is None:
        before = _all_recorded(store, model, alias)
    else:
        before = _recorded(name, {**bearer.tags, **source.tags}, alias)
    # Whatever the clocks say, a move comes after those that it saw.
    when_ms = max([began_ms, *(one.when_ms + 1 for one in before.values())])
    move = Move(action, start, end, _who(store), when_ms, why, rules)
    # The end makes the key its own: what one program writes never overwrites what another did.
    key, number = f"{_MOVE_TAG}{alias}.{when_ms}.{uuid.uuid4().hex[:8]}", str(bearer.number)
    with store.errors():
        store.client.set_model_version_tag(name, number, key, move.text())
        if target is None:
            store.client.delete_registered_model_alias(name, alias)
        else:
            store.client.set_registered_model_alias(name, alias, number)
    now = registered(store, name)
    made = replace(move, made_ms=max(_now_ms(), when_ms)).text()
    with store.errors():
        store.client.set_model_version_tag(name, number, key, made)
    if (at := number_of(now, alias)) != end:
        raise MovedMeanwhile(
            f"Alias {alias!r} of {name} went to version {end} and is at version {at} now: another "
            f"program moved it at the same time, and the last move stays; see "
            f"{store.command('maps', 'history', name, '--alias', alias)} and repeat yours if it should stand."
        )
    return replace(bearer.with_tags({key: made}), aliases=tuple(aliases_of(now, bearer.number)))


def _all_recorded(store: Store, model: RegisteredModel, alias: str) -> dict[str, Move]:
    # Up to 0.1.0 the records were tags of the registered model.
    found = _recorded(model.name, model.tags, alias)
    for version in list_versions(store, model.name):
        found |= _recorded(str(version), version.tags, alias)
    return found


def _recorded(owner: str, tags: Mapping[str, str], alias: str) -> dict[str, Move]:
    """The records of an alias's moves among the tags of `owner`; what is none is left out with a warning."""
    found = {}
    for key, text in tags.items():
        if re.fullmatch(rf"{re.escape(_MOVE_TAG + alias)}\.[0-9]{{1,15}}\.[0-9a-f]{{8}}", key):
            try:
                found[key] = foreign.record(Move, key, text)
            except foreign.Malformed as error:
                foreign.left_out(f"a move of {owner}", error)
    return found


def _order(key: str) -> tuple[int, str]:
    _, number, end = key.rsplit(".", 2)
    return int(number), end


def happened(recorded: Sequence[Move], holding: int | None) -> list[Move]:
    """The recorded moves that were made, with `outside` ones where the alias was found elsewhere.

    A move that is not marked as made happened unless the alias was still at its source when the next one was
    recorded (or is now). That misreads one case: another program moving the alias straight back.
    """
    found_later = [*(later.source for later in recorded[1:]), holding]
    done: list[Move] = []
    for move, found in zip(recorded, found_later, strict=False):  # nothing recorded: nothing to do
        at = done[-1].target if done else None
        # Who looked before the last move was made saw what was there before, which is no move.
        if move.source != at and not (done and done[-1].made_ms >= move.when_ms):
            _found_at(done, move.source)
        if move.made_ms or found != move.source:
            done.append(move)
    if holding != (done[-1].target if done else None):
        _found_at(done, holding)
    return done


def _found_at(done: list[Move], holding: int | None) -> None:
    """Explain why the alias is not where the last move put it: one made at the same time arrived later."""
    for index, move in enumerate(done[:-1]):
        if move.target == holding and move.made_ms >= done[-1].when_ms:
            done.append(done.pop(index))
            return
    done.append(Move("outside", done[-1].target if done else None, holding))


def holders(moves: Sequence[Move]) -> list[int | None]:
    """Which versions had the alias, undone moves left out, the present one last; None for none."""
    stack: list[int | None] = [None]
    for move in moves:
        if move.action == "rollback" and stack[-2:-1] == [move.target]:
            stack.pop()
        else:
            stack.append(move.target)
    return stack


def _now_ms() -> int:
    return int(time.time() * 1000)


def _who(store: Store) -> str:
    """The login, where there is one; else the user of this machine."""
    login = login_name(store.uri) if store.is_server else None
    return provenance_tags()["mlflow.user"] if login in (None, A_TOKEN) else str(login)
