"""Registered maps: versions, the aliases that name winners, and the history of each alias.

Everything is in MLflow's own registry. A version is trusted when its tag `mechdiff.verified` equals its
digest. A move of an alias is recorded in a tag of the version that gets it (or, when it is taken away, had
it), then made, then marked as made. The history is read off these records. MLflow has no compare-and-set: of
moves made at once from several machines the last one stays, and each mover reads back and says so.
"""

from __future__ import annotations

import difflib
import getpass
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from pydantic import Field, TypeAdapter

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.tracking.content.names import check_alias
from mechdiff_mlflow.tracking.store.file_locks import file_lock, lock_file
from mechdiff_mlflow.tracking.store.server import A_TOKEN, login_name
from mechdiff_mlflow.tracking.store.store import NotAllowed, Store

KIND_TAG = "mechdiff.kind"
SHA256_TAG = "mechdiff.sha256"
VERIFIED_TAG = "mechdiff.verified"
RUN_TAG = "mechdiff.run_id"
_MOVE_TAG = "mechdiff.move."
_OURS = f"tags.`{KIND_TAG}` = 'map'"
_PAGE = 100
# MLflow says INVALID_PARAMETER_VALUE for an alias that is not there.
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Version:
    """One registered version of a map.

    Args:
        name: Of the registered map.
        number: Counted from 1.
        source: URI of its files.
        run_id: The run that vouches for it.
        aliases: The names it bears, such as champion.
        tags: Provenance: params and metrics of that run, digests, code version.
        created_ms: Unix time in ms.
    """

    name: str
    number: int
    source: str
    run_id: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    created_ms: int

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"

    def with_tags(self, tags: Mapping[str, str]) -> Version:
        """The same after tags were set."""
        return replace(self, tags={**self.tags, **tags})

    @property
    def uri(self) -> str:
        """What `load_map` and MLflow take."""
        return f"models:/{self.name}/{self.number}"

    @property
    def sha256(self) -> str:
        """Hex digest of its `map.pt`, empty when the version is not ours."""
        return self.tags.get(SHA256_TAG, "")

    @property
    def is_verified(self) -> bool:
        """Whether its files were read back and found right before it was offered."""
        is_digest = re.fullmatch("[0-9a-f]{64}", self.sha256) is not None
        return is_digest and self.tags.get(VERIFIED_TAG) == self.sha256


_Time = Annotated[int, Field(ge=0, lt=1 << 43)]  # what a calendar can show


class MovedMeanwhile(MechdiffError):
    """Another program moved the alias at the same time, and it stays where that one put it."""


@dataclass(frozen=True, slots=True)
class Move:
    """An alias going from one version to another.

    Args:
        action: `promote`, `rollback`, `demote`, or `outside` for one that another program made.
        source: The version it left, None for none.
        target: The version it went to, None when it was taken away.
        who: The user.
        when_ms: Unix time in ms when it began, later than the move that its source got the alias by; 0 when
            not known.
        why: In the user's words.
        rules: The policy that a promotion met.
        made_ms: Unix time in ms when it was seen to be made; 0 when not known.
    """

    action: str
    source: Annotated[int, Field(ge=0, lt=1 << 31)] | None
    target: Annotated[int, Field(ge=0, lt=1 << 31)] | None
    who: str = ""
    when_ms: _Time = 0
    why: str = ""
    rules: str = ""
    made_ms: _Time = 0


_MOVE = TypeAdapter(Move)


def list_winners(store: Store) -> list[Version]:
    """Every version of ours that bears an alias, by name and number."""
    winners = []
    for model in our_models(store):
        for number in sorted({int(v) for v in model.aliases.values()}):
            winners.append(get_version(store, model.name, number))
    return sorted(winners, key=lambda v: (v.name, v.number))


def winners_of(store: Store, pair: str, alias: str) -> list[Version]:
    """The versions of a pair's maps that bear `alias`, by name.

    Raises:
        MechdiffError: There is none.
    """
    found = []
    for version in list_winners(store):
        if alias in version.aliases and version.tags.get("pair") == pair:
            try:
                foreign.number({"alpha": 0, **version.tags}, "alpha")
                found.append(version)
            except foreign.Malformed as error:
                foreign.left_out(f"map {version}", error)
    if not found:
        raise MechdiffError(
            f"No map of pair {pair!r} has the alias {alias!r}; promote one with "
            f"{store.command('promote', 'RUN', '--alias', alias)}"
        )
    return found


def list_versions(store: Store, name: str) -> list[Version]:
    """Every version of `name`, oldest first.

    Raises:
        MechdiffError: No map has that name.
    """
    return _versions(store, registered(store, name))


def _versions(store: Store, model: RegisteredModel) -> list[Version]:
    found: list[Version] = []
    token = None
    with store.errors():
        while True:
            where = f"name = '{model.name}'"
            page = store.client.search_model_versions(where, max_results=_PAGE, page_token=token)
            found += [version_of(v, _aliases(model, int(v.version))) for v in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda v: v.number)


def get_version(store: Store, name: str, which: int | str) -> Version:
    """Version number or alias `which` of `name`, in one request.

    Raises:
        MechdiffError: There is no such name, alias or version; says which there are.
    """
    client = store.client
    try:
        with store.errors():
            found = (
                client.get_model_version_by_alias(name, which)
                if isinstance(which, str)
                else client.get_model_version(name, str(which))
            )
            return version_of(found, found.aliases)
    except MechdiffError as error:
        cause = error.__cause__
        if not isinstance(cause, MlflowException) or cause.error_code not in _MISSING:
            raise
    model = registered(store, name)
    if isinstance(which, str):
        known = ", ".join(sorted(model.aliases)) or "none"
        raise MechdiffError(f"Map {name} has no alias {which!r}; it has {known}.")
    numbers = ", ".join(str(v.number) for v in list_versions(store, name)) or "none"
    raise MechdiffError(f"Map {name} has no version {which}; it has {numbers}.")


def versions_of_run(store: Store, name: str, run_id: str) -> list[Version]:
    """The versions of `name` that `run_id` vouches for, oldest first."""
    with store.errors():
        page = store.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return sorted((version_of(found, found.aliases) for found in page), key=lambda v: v.number)


def history(store: Store, name: str, alias: str = "champion") -> list[Move]:
    """The moves of an alias, oldest first.

    Raises:
        MechdiffError: No map has that name.
    """
    return _moves(store, registered(store, name), alias)


def _moves(store: Store, model: RegisteredModel, alias: str) -> list[Move]:
    # Up to 0.1.0 the records were tags of the registered model.
    owners = [(model.name, model.tags), *((str(one), one.tags) for one in _versions(store, model))]
    records = {key: move for owner in owners for key, move in _recorded(*owner, alias).items()}
    return _happened([records[key] for key in sorted(records, key=_order)], holder_of(model, alias))


@contextmanager
def promotion_lock(store: Store) -> Iterator[None]:
    """One promoter at a time on this machine, and wherever else the lock file of a SQLite store is seen."""
    with store.errors(), file_lock(lock_file(store.uri, "promotion")):
        yield


def move_alias(
    store: Store,
    name: str,
    alias: str,
    target: Version | None,
    action: str,
    *,
    check: Callable[[RegisteredModel], Version | None],
    why: str = "",
    rules: str = "",
) -> Version:
    """Record the move, make it, read it back; the caller holds the lock and has verified the target.

    Args:
        store: Where.
        name: Of the registered map.
        alias: To move.
        target: Version that gets it; None to take it away from its holder.
        action: What the history calls the move.
        check: Which version has it in the registered map as it is before; raises to refuse.
        why: In the user's words.
        rules: The policy that was met.

    Returns:
        The version that got it, or had it.

    Raises:
        MechdiffError: `check` refuses.
        MovedMeanwhile: The alias is elsewhere afterwards, as another program moved it.
    """
    check_alias(alias)
    began_ms = _now_ms()
    model = registered(store, name)
    source = check(model)
    if (bearer := target or source) is None:
        return get_version(store, name, alias)  # says that there is none
    if target is not None and source is not None and source.number == target.number:
        return target
    start, end = (None if one is None else one.number for one in (source, target))
    move = Move(action, start, end, _who(store), began_ms, why, rules)
    key, move = _record_of(store, model, alias, move, bearer, source)
    number = str(bearer.number)
    with store.errors():
        store.client.set_model_version_tag(name, number, key, _text(move))
        if target is None:
            store.client.delete_registered_model_alias(name, alias)
        else:
            store.client.set_registered_model_alias(name, alias, number)
    now = registered(store, name)
    with store.errors():
        made = replace(move, made_ms=max(_now_ms(), move.when_ms))
        store.client.set_model_version_tag(name, number, key, _text(made))
    if (at := holder_of(now, alias)) != end:
        raise MovedMeanwhile(
            f"Alias {alias!r} of {name} went to version {end} and is at version {at} now: another "
            f"program moved it at the same time, and the last move stays; see "
            f"{store.command('maps', 'history', name, '--alias', alias)} and repeat yours if it should stand."
        )
    return replace(bearer.with_tags({key: _text(made)}), aliases=_aliases(now, bearer.number))


def _record_of(
    store: Store, model: RegisteredModel, alias: str, move: Move, bearer: Version, source: Version | None
) -> tuple[str, Move]:
    """The tag and content of a move's record: what a crashed attempt left of the same move, or a new one."""
    left = [
        (key, one)
        for key, one in _recorded(str(bearer), bearer.tags, alias).items()
        if not one.made_ms and (one.action, one.source, one.target) == (move.action, move.source, move.target)
    ]
    if left:
        return max(left, key=lambda found: _order(found[0]))
    # Whatever the clocks say, a move comes after the one that it saw.
    is_only = all(int(one.version) <= 1 for one in model.latest_versions)
    last = source or (bearer if is_only else None)
    before = _moves(store, model, alias) if last is None else _recorded(str(last), last.tags, alias).values()
    when_ms = max([move.when_ms, *(one.when_ms + 1 for one in before)])
    # The end makes the key its own: what one program writes never overwrites what another did.
    return f"{_MOVE_TAG}{alias}.{when_ms}.{uuid.uuid4().hex[:8]}", replace(move, when_ms=when_ms)


def _text(move: Move) -> str:
    return _MOVE.dump_json(move).decode()


def find(store: Store, name: str) -> RegisteredModel | None:
    """MLflow's entity of the registered map `name`; None where there is none, or this account may not look.

    Raises:
        MechdiffError: Another kind of model has that name.
    """
    try:
        with store.errors():
            model = store.client.get_registered_model(name)
    except NotAllowed:
        return None
    except MechdiffError as error:
        if not _is_missing(error):
            raise
        return None
    if model.tags.get(KIND_TAG) != "map":
        raise MechdiffError(
            f"A registered model {name!r} that is no map exists already; give another name with --name."
        )
    return model


def holder(store: Store, model: RegisteredModel, alias: str) -> Version | None:
    """The version that bears `alias`."""
    number = holder_of(model, alias)
    return None if number is None else get_version(store, model.name, number)


def registered(store: Store, name: str) -> RegisteredModel:
    """MLflow's entity of the registered map `name`.

    Raises:
        MechdiffError: No map has that name; says which there are.
    """
    try:
        with store.errors():
            return store.client.get_registered_model(name)
    except MechdiffError as error:
        if not _is_missing(error):
            raise
    known = sorted(model.name for model in our_models(store))
    close = difflib.get_close_matches(name, known, n=5) or known[:10]
    raise MechdiffError(f"No map is registered as {name!r}; there is {', '.join(close) or 'none yet'}.")


def our_models(store: Store, where: str = "") -> list[RegisteredModel]:
    """Every registered map that MLflow's filter finds."""
    where = " and ".join(filter(None, (_OURS, where)))
    found: list[RegisteredModel] = []
    token = None
    with store.errors():
        while True:
            page = store.client.search_registered_models(where, max_results=_PAGE, page_token=token)
            found += page
            token = page.token
            if not token:
                return found


def version_of(found: ModelVersion, aliases: Iterable[str]) -> Version:
    """MLflow's entity as ours."""
    return Version(
        name=found.name,
        number=int(found.version),
        source=found.source,
        run_id=found.run_id or "",
        aliases=tuple(sorted(aliases)),
        tags=dict(found.tags),
        created_ms=found.creation_timestamp,
    )


def _aliases(model: RegisteredModel, number: int) -> tuple[str, ...]:
    return tuple(sorted(alias for alias, at in model.aliases.items() if int(at) == number))


def holder_of(model: RegisteredModel, alias: str) -> int | None:
    """The number of the version that bears `alias`."""
    number = model.aliases.get(alias)
    return None if number is None else int(number)


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


def _happened(recorded: Sequence[Move], holder: int | None) -> list[Move]:
    """The recorded moves that were made, with `outside` ones where the alias was found elsewhere.

    A move that is not marked as made happened unless the alias was still at its source when the next one was
    recorded (or is now). That misreads one case: another program moving the alias straight back.
    """
    found_later = [*(later.source for later in recorded[1:]), holder]
    done: list[Move] = []
    for move, found in zip(recorded, found_later, strict=False):  # nothing recorded: nothing to do
        at = done[-1].target if done else None
        # Who looked before the last move was made saw what was there before, which is no move.
        if move.source != at and not (done and done[-1].made_ms >= move.when_ms):
            _found_at(done, move.source)
        if move.made_ms or found != move.source:
            done.append(move)
    if holder != (done[-1].target if done else None):
        _found_at(done, holder)
    return done


def _found_at(done: list[Move], holder: int | None) -> None:
    """Explain why the alias is not where the last move put it: one made at the same time arrived later."""
    for index, move in enumerate(done[:-1]):
        if move.target == holder and move.made_ms >= done[-1].when_ms:
            done.append(done.pop(index))
            return
    done.append(Move("outside", done[-1].target if done else None, holder))


def holders(moves: Sequence[Move]) -> list[int | None]:
    """Which versions had the alias, undone moves left out, the present one last; None for none."""
    stack: list[int | None] = [None]
    for move in moves:
        if move.action == "rollback" and stack[-2:-1] == [move.target]:
            stack.pop()
        else:
            stack.append(move.target)
    return stack


def _is_missing(error: MechdiffError) -> bool:
    cause = error.__cause__
    return isinstance(cause, MlflowException) and cause.error_code == "RESOURCE_DOES_NOT_EXIST"


def _now_ms() -> int:
    return int(time.time() * 1000)


def _who(store: Store) -> str:
    """The login, where there is one; else the user of this machine."""
    login = login_name(store.uri) if store.is_server else None
    if login not in (None, A_TOKEN):
        return str(login)
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
