"""Registered maps: versions, the aliases that name winners, and the history of each alias.

Everything is in MLflow's own registry. A version is trusted when its tag `mechdiff.verified` equals its
digest. A move of an alias is announced by a tag of the registered model, one a move, and then made; reading
the history tells the moves that happened from those that a crash prevented.
"""

from __future__ import annotations

import difflib
import getpass
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.locks import file_lock, lock_file
from mechdiff_mlflow.tracking.names import check_alias
from mechdiff_mlflow.tracking.store import A_TOKEN, Store, login_name
from mechdiff_mlflow.tracking.turns import MapBoard, promoting_machine, turn

KIND_TAG = "mechdiff.kind"
SHA256_TAG = "mechdiff.sha256"
VERIFIED_TAG = "mechdiff.verified"
RUN_TAG = "mechdiff.run_id"
_MOVE_TAG = "mechdiff.move."
_OURS = f"tags.`{KIND_TAG}` = 'map'"
_PAGE = 100
# MLflow says INVALID_PARAMETER_VALUE for an alias that is not there.
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


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


@dataclass(frozen=True, slots=True)
class Move:
    """An alias going from one version to another.

    Args:
        action: `promote`, `rollback`, `demote`, or `outside` for one that another program made.
        source: The version it left, None for none.
        target: The version it went to, None when it was taken away.
        who: The user.
        when_ms: Unix time in ms; 0 when not known.
        why: In the user's words.
        rules: The policy that a promotion met.
    """

    action: str
    source: int | None
    target: int | None
    who: str = ""
    when_ms: int = 0
    why: str = ""
    rules: str = ""


def list_winners(store: Store) -> list[Version]:
    """Every version of ours that bears an alias, by name and number."""
    winners = []
    for model in _our_models(store):
        for number in sorted({int(v) for v in model.aliases.values()}):
            winners.append(get_version(store, model.name, number))
    return sorted(winners, key=lambda v: (v.name, v.number))


def winners_of(store: Store, pair: str, alias: str) -> list[Version]:
    """The versions of a pair's maps that bear `alias`, by name.

    Raises:
        MechdiffError: There is none.
    """
    found = [v for v in list_winners(store) if alias in v.aliases and v.tags.get("pair") == pair]
    if not found:
        raise MechdiffError(
            f"No map of pair {pair!r} has the alias {alias!r}; promote one with mechdiff promote RUN --alias "
            f"{alias}."
        )
    return found


def list_versions(store: Store, name: str) -> list[Version]:
    """Every version of `name`, oldest first.

    Raises:
        MechdiffError: No map has that name.
    """
    aliases = registered(store, name).aliases
    found: list[Version] = []
    token = None
    with store.errors():
        while True:
            page = store.client.search_model_versions(f"name = '{name}'", max_results=_PAGE, page_token=token)
            found += [
                _version(v, [a for a, number in aliases.items() if int(number) == int(v.version)])
                for v in page
            ]
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
            return _version(found, found.aliases)
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
    return sorted((_version(found, found.aliases) for found in page), key=lambda v: v.number)


def history(store: Store, name: str, alias: str = "champion") -> list[Move]:
    """The moves of an alias, oldest first.

    Raises:
        MechdiffError: No map has that name.
    """
    return history_of(registered(store, name), alias)


def history_of(model: RegisteredModel, alias: str) -> list[Move]:
    """The moves of an alias, oldest first, by what `model` says."""
    return _happened(_announced(model, alias), holder_of(model, alias))


@contextmanager
def promotion_lock(store: Store) -> Iterator[None]:
    """One promoter at a time on this machine, and wherever else the lock file of a SQLite store is seen."""
    with store.errors(), file_lock(lock_file(store.uri, "promotion")):
        yield


@contextmanager
def alone(store: Store, name: str) -> Iterator[Callable[[], None]]:
    """One promoter of `name` at a time on all machines; the caller holds `promotion_lock`.

    Yields what to call right before the alias is moved: it raises when others may have gone on. Who uses a
    SQLite store sees its lock file, so that nothing more is needed there.

    Raises:
        MechdiffError: Others kept their turn for ten minutes.
    """
    if store.sqlite_path is not None:
        yield lambda: None
        return
    with turn(MapBoard(store, name), promoting_machine(store)) as mine:
        yield mine.demand


def move_alias(
    store: Store,
    name: str,
    alias: str,
    target: int | None,
    action: str,
    *,
    check: Callable[[RegisteredModel], None],
    why: str = "",
    rules: str = "",
) -> None:
    """Announce the move, then make it; the caller holds the lock and has verified the target.

    Args:
        store: Where.
        name: Of the registered map.
        alias: To move.
        target: Version that gets it; None to take it away.
        action: What the history calls the move.
        check: Looks at the registered map when nobody else can move the alias any more; raises to refuse.
        why: In the user's words.
        rules: The policy that was met.

    Raises:
        MechdiffError: `check` refuses, or the alias is elsewhere afterwards, as another program moved it.
    """
    check_alias(alias)
    with alone(store, name) as demand_alone:
        model = registered(store, name)
        source = holder_of(model, alias)
        if source == target:
            return
        check(model)
        _announce(store, model, alias, Move(action, source, target, _who(store), _now_ms(), why, rules))
        demand_alone()
        with store.errors():
            if target is None:
                store.client.delete_registered_model_alias(name, alias)
            else:
                store.client.set_registered_model_alias(name, alias, str(target))
        now = holder_of(registered(store, name), alias)
    if now != target:
        raise MechdiffError(
            f"Alias {alias!r} of {name} points at version {now} though it was just moved to {target}: "
            "another program is moving it too; see mechdiff maps history, then try again."
        )


def _announce(store: Store, model: RegisteredModel, alias: str, move: Move) -> None:
    moves = _announced(model, alias)
    last = moves[-1] if moves else None
    # After a crash between announcement and move, the announcement is there already.
    if last is None or (last.action, last.source, last.target) != (move.action, move.source, move.target):
        text = json.dumps(asdict(move), ensure_ascii=False)
        # The end makes the key its own: what one program writes never overwrites what another did.
        key = f"{_MOVE_TAG}{alias}.{len(moves):06d}.{uuid.uuid4().hex[:8]}"
        with store.errors():
            store.client.set_registered_model_tag(model.name, key, text)


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
    known = sorted(model.name for model in _our_models(store))
    close = difflib.get_close_matches(name, known, n=5) or known[:10]
    raise MechdiffError(f"No map is registered as {name!r}; there is {', '.join(close) or 'none yet'}.")


def _our_models(store: Store) -> list[RegisteredModel]:
    found: list[RegisteredModel] = []
    token = None
    with store.errors():
        while True:
            page = store.client.search_registered_models(_OURS, max_results=_PAGE, page_token=token)
            found += page
            token = page.token
            if not token:
                return found


def _version(found: ModelVersion, aliases: Iterable[str]) -> Version:
    return Version(
        name=found.name,
        number=int(found.version),
        source=found.source,
        run_id=found.run_id or "",
        aliases=tuple(sorted(aliases)),
        tags=dict(found.tags),
        created_ms=found.creation_timestamp,
    )


def holder_of(model: RegisteredModel, alias: str) -> int | None:
    """The number of the version that bears `alias`."""
    number = model.aliases.get(alias)
    return None if number is None else int(number)


def _announced(model: RegisteredModel, alias: str) -> list[Move]:
    prefix = f"{_MOVE_TAG}{alias}."
    return [Move(**json.loads(model.tags[key])) for key in sorted(model.tags) if key.startswith(prefix)]


def _happened(announced: Sequence[Move], holder: int | None) -> list[Move]:
    """The announced moves that were made, with `outside` ones where the alias was found elsewhere.

    A move happened unless the alias was still at its source when the next one was announced (or is now). That
    misreads one case: another program moving the alias straight back to where it came from.
    """
    found_later = [*(later.source for later in announced[1:]), holder]
    done: list[Move] = []
    at: int | None = None
    for move, found in zip(announced, found_later, strict=False):  # nothing announced: nothing to do
        if move.source != at:
            done.append(Move("outside", at, move.source))
            at = move.source
        if found != at:
            done.append(move)
            at = move.target
    if holder != at:
        done.append(Move("outside", at, holder))
    return done


def holders(moves: Sequence[Move]) -> list[int | None]:
    """Which versions had the alias, undone moves left out, the present one last; None for none."""
    stack: list[int | None] = [None]
    for move in moves:
        if move.action == "rollback":
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
