"""A tree of runs that several processes may have begun is there once, whole, and written by one at a time."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import requests
from mlflow.entities import Run, ViewType

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content.artifact_files import StoredFiles
from mechdiff_mlflow.tracking.content.cells import CELLS
from mechdiff_mlflow.tracking.content.records import RunRecord, key_of
from mechdiff_mlflow.tracking.content.tag_names import ARTIFACTS_TAG, KEY_TAG, ROOT_TAG
from mechdiff_mlflow.tracking.runs import run_lock
from mechdiff_mlflow.tracking.runs.open_run import EPOCH_TAG
from mechdiff_mlflow.tracking.runs.results import tables_of
from mechdiff_mlflow.tracking.runs.resuming import newest_of_mine
from mechdiff_mlflow.tracking.runs.run_lock import (
    OWNER_TAG,
    Owner,
    RunLock,
    is_alive,
    owner_in,
    taken_over,
)
from mechdiff_mlflow.tracking.runs.stuck import end_stuck, stuck_runs
from mechdiff_mlflow.tracking.runs.tracker import OpenRun, Tracker
from mechdiff_mlflow.tracking.runs.writing import RecordWriter
from mechdiff_mlflow.tracking.store.file_locks import lock_file, process_start
from mechdiff_mlflow.tracking.store.store import RunTakenOver, Store

from .conftest import flip_byte, make_map


class Crash(BaseException):
    """Stands for SIGKILL: nothing is tidied up."""


def cell(k: int, **contents: Any) -> RunRecord:
    contents = {"metrics": {"drop_pct": 10.0 * k, "time/score_s": time.monotonic()}, **contents}
    table = pd.DataFrame({"kl": [1.0, float(k)]})
    return RunRecord(
        kind="patch",
        name=f"k={k}",
        params={"k": k},
        map=make_map(k),
        tables={"per_prompt.json": table},
        **contents,
    )


def log_all(run: OpenRun, records: Iterable[RunRecord]) -> list[str]:
    for record in records:
        run.log_soon(record)
    return run.wait()


def active(store: Store) -> list[Run]:
    experiment = store.client.get_experiment_by_name("demo")
    return list(store.client.search_runs([experiment.experiment_id], "", ViewType.ACTIVE_ONLY))


def statuses(store: Store) -> dict[str, str]:
    return {run.info.run_name: run.info.status for run in active(store)}


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a command's body and leaves everything as a killed process would."""
    with ExitStack() as stack:

        def body(tracker: Tracker, then: Any) -> str:
            with monkeypatch.context() as patched:
                patched.setattr(OpenRun, "end", lambda self, error: None)
                patched.setattr(OpenRun, "_finish", lambda self, *_: None)
                with pytest.raises(Crash), tracker.run("sweep", "ranks") as run:  # noqa: PT012
                    then(run)
                    raise Crash
            return run.run_id

        yield body
        stack.close()


def test_a_resumed_tree_is_that_of_an_undisturbed_run(
    store: Store, tracker: Tracker, crash: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(run: OpenRun) -> None:
        run.log(cell(1))
        with monkeypatch.context() as patched:  # dies between the files and the numbers
            patched.setattr(store.client, "log_batch", _raise)
            run.log(cell(2))

    run_id = crash(tracker, half)
    assert statuses(store) == {"ranks": "RUNNING", "k=1": "FINISHED", "k=2": "RUNNING"}
    before = {run.info.run_name: run for run in active(store)}
    with Tracker(store, "demo", resume=run_id).run("sweep", "ranks") as run:
        ids = log_all(run, (cell(k) for k in (1, 2, 3)))
    assert statuses(store) == dict.fromkeys(("ranks", "k=1", "k=2", "k=3"), "FINISHED")
    after = {run.info.run_name: run for run in active(store)}
    assert [after[f"k={k}"].info.run_id for k in (1, 2, 3)] == ids
    assert [before[f"k={k}"].info.run_id for k in (1, 2)] == ids[:2]
    with Tracker(store, "other").run("sweep", "ranks") as undisturbed:
        for k in (1, 2, 3):
            undisturbed.log(cell(k))
    for run in store.client.search_runs([store.experiment("other")]):
        same = after[run.info.run_name]
        sent = [json.loads(one.data.tags.get(ARTIFACTS_TAG, "{}")) for one in (same, run)]
        # The parent's table of cells names runs and when they began.
        assert [one.pop(CELLS, None) is None for one in sent] == [run.info.run_name != "ranks"] * 2
        assert sent[0] == sent[1]
        assert same.data.metrics.keys() == run.data.metrics.keys()
        for key in same.data.metrics:
            assert len(store.client.get_metric_history(same.info.run_id, key)) == 1, key
    assert len(after["k=2"].outputs.model_outputs) == 1


def _raise(*_: Any, **__: Any) -> None:
    raise Crash


def test_other_numbers_than_a_run_holds_are_refused(store: Store, tracker: Tracker, crash: Any) -> None:
    run_id = crash(tracker, lambda run: run.log(cell(1)))
    again = Tracker(store, "demo", resume=run_id)
    words = r"holds drop_pct = 10 and the same was now computed as 11; something changed"
    with pytest.raises(MechdiffError, match=words), again.run("sweep", "ranks") as run:
        run.log(cell(1, metrics={"drop_pct": 11.0}))
    assert statuses(store)["k=1"] == "FINISHED"


def test_what_is_pinned_cannot_change(store: Store, tracker: Tracker, crash: Any) -> None:
    run_id = crash(tracker, lambda run: run.pin("pair_fingerprint", "f1", "the pair"))
    with (
        pytest.raises(MechdiffError, match=r"begun with pair_fingerprint f1 and now it is f2: the pair has"),
        Tracker(store, "demo", resume=run_id).run("sweep", "ranks") as run,
    ):
        run.pin("pair_fingerprint", "f2", "the pair")


def test_a_lost_answer_makes_no_second_run(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, lost = store.client._client.create_run, []

    def create_and_lose(*args: Any, **kwargs: Any) -> Run:
        made = create(*args, **kwargs)
        if len(lost) < 5 and not (lost and lost[-1] == args[3]):
            lost.append(args[3])
            raise requests.ConnectionError("reset after the commit")
        return made

    monkeypatch.setattr(store.client._client, "create_run", create_and_lose)
    with tracker.run("sweep", "ranks") as run:
        log_all(run, (cell(k) for k in range(1, 4)))
    assert lost == ["ranks", "k=1", "k=2", "k=3"]
    assert statuses(store) == dict.fromkeys(("ranks", "k=1", "k=2", "k=3"), "FINISHED")
    assert len(active(store)) == 4


def test_a_request_that_arrives_late_leaves_no_ghost(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request was not there yet when it was looked up, and came through later."""
    create, late = store.client._client.create_run, []

    def slow(experiment: str, started: int, tags: dict[str, str], name: str) -> Run:
        if name == "k=1" and not late:
            late.append((experiment, started, tags, name))
            raise requests.ReadTimeout("no answer")
        made = create(experiment, started, tags, name)
        if name == "k=1":
            create(*late[0])
        return made

    monkeypatch.setattr(store.client._client, "create_run", slow)
    with tracker.run("sweep", "ranks") as run:
        kept = run.log(cell(1))
    assert [(run.info.run_id, run.info.status) for run in active(store) if run.info.run_name == "k=1"] == [
        (kept, "FINISHED")
    ]


def test_a_live_owner_is_not_disturbed_and_a_dead_one_is_replaced(
    store: Store, tracker: Tracker, crash: Any
) -> None:
    with tracker.run("sweep", "ranks") as run:
        other = Tracker(store, "demo", resume=run.run_id)
        words = rf"Run {run.run_id} is being written by process \d+ on"
        with pytest.raises(MechdiffError, match=words), other.run("sweep", "ranks"):
            pytest.fail("both wrote")
        assert is_alive(store, store.client.get_run(run.run_id)) is True
        assert stuck_runs(store) == []
        assert newest_of_mine(store) == (None, [])
    assert statuses(store) == {"ranks": "FINISHED"}
    assert not list(Path(f"{store.sqlite_path}.running").glob("*"))
    dead = crash(tracker, lambda run: run.log(cell(1)))
    assert is_alive(store, store.client.get_run(dead)) is False


def test_of_two_resumers_one_goes_on(store: Store, tracker: Tracker, crash: Any) -> None:
    run = store.client.get_run(crash(tracker, lambda run: None))
    inside, refused = [], []

    def resume() -> None:
        try:
            with taken_over(store, run) as lock:
                inside.append(lock.owner.epoch)
                time.sleep(0.5)
        except MechdiffError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=resume) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [2]
    assert len(refused) == 3
    assert all("is being written by" in text for text in refused)


def test_a_process_that_was_taken_for_dead_writes_nothing_more(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(run_lock, "now_s", lambda: clock[0])
    words = "was taken over by process 7 on elsewhere"
    with pytest.raises(RunTakenOver, match=words), tracker.run("run", "r") as run:  # noqa: PT012
        run.log(cell(1))
        mine = owner_in(store.client.get_run(run.run_id).data.tags)
        assert mine is not None
        theirs = replace(mine, epoch=2, token="t", host="elsewhere", pid=7)
        ((key, text),) = theirs.tag.items()
        store.client.set_tag(run.run_id, key, text)
        clock[0] += run_lock.OWNER_TIMEOUT_S  # as after SIGSTOP, or a laptop's sleep
        run.log(cell(2))
    assert "k=2" not in statuses(store)


def theirs(mine: Owner) -> dict[str, str]:
    return replace(mine, epoch=mine.epoch + 1, token="t", host="elsewhere", pid=7).tag


def set_tags(store: Store, run_id: str, tags: dict[str, str]) -> None:
    for key, text in tags.items():
        store.client.set_tag(run_id, key, text)


@pytest.mark.parametrize("path", ["log_soon", "log"])
def test_nothing_is_made_after_a_take_over(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """As the owner stood still for a minute; the one in the background, too."""
    clock = [0.0]
    monkeypatch.setattr(run_lock, "now_s", lambda: clock[0])
    with pytest.raises(RunTakenOver, match="elsewhere"), tracker.run("sweep", "ranks") as run:  # noqa: PT012
        set_tags(store, run.run_id, theirs(run._lock.owner))
        clock[0] += run_lock.OWNER_TIMEOUT_S
        log_all(run, [cell(1), cell(2)]) if path == "log_soon" else run.log(cell(2))
    assert statuses(store) == {"ranks": "RUNNING"}
    assert not store.client.search_logged_models([store.experiment("demo")])


@pytest.mark.parametrize("has_its_own", [True, False])
def test_a_run_that_was_under_way_at_a_take_over_is_deleted_unless_the_other_needs_it(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch, has_its_own: bool
) -> None:
    clock, create, made = [0.0], store.client._client.create_run, []
    monkeypatch.setattr(run_lock, "now_s", lambda: clock[0])

    def late(experiment: str, started: int, tags: dict[str, str], name: str) -> Run:
        if (
            name == "k=1"
        ):  # stopped with the request in its hands; the other takes over, and has a k=1 of its own
            root = tags[ROOT_TAG]
            set_tags(store, root, theirs(owner_in(store.client.get_run(root).data.tags)))
            if has_its_own:
                made.append(create(experiment, started, {**tags, EPOCH_TAG: "2"}, name).info.run_id)
            clock[0] += run_lock.OWNER_TIMEOUT_S
        run = create(experiment, started, tags, name)
        if name == "k=1" and not has_its_own:
            made.append(run.info.run_id)
        return run

    monkeypatch.setattr(store.client._client, "create_run", late)
    with pytest.raises(RunTakenOver), tracker.run("sweep", "ranks") as run:
        run.log(cell(1))
    assert [r.info.run_id for r in active(store) if r.info.run_name == "k=1"] == made


def test_a_map_that_was_under_way_at_a_take_over_is_deleted(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, create = [0.0], store.client._client.create_logged_model
    monkeypatch.setattr(run_lock, "now_s", lambda: clock[0])
    others: list[str] = []

    def late(*args: Any, **more: Any) -> Any:
        root = store.client.get_run(more["source_run_id"]).data.tags[ROOT_TAG]
        set_tags(store, root, theirs(owner_in(store.client.get_run(root).data.tags)))
        others.append(create(*args, **more).model_id)
        clock[0] += run_lock.OWNER_TIMEOUT_S
        return create(*args, **more)

    monkeypatch.setattr(store.client._client, "create_logged_model", late)
    with pytest.raises(RunTakenOver), tracker.run("sweep", "ranks") as run:
        run.log(cell(1))
    assert [m.model_id for m in store.client.search_logged_models([store.experiment("demo")])] == others


def test_what_a_former_owner_made_too_late_is_deleted_at_the_end(
    store: Store, tracker: Tracker, crash: Any
) -> None:
    """A run, made after the new owner had looked what there was."""
    run_id = crash(tracker, lambda run: None)
    with Tracker(store, "demo", resume=run_id).run("sweep", "ranks") as run:
        first = store.client.get_run(run.log(cell(1)))
        late = {key: first.data.tags[key] for key in (KEY_TAG, ROOT_TAG)} | {EPOCH_TAG: "1"}
        store.client.create_run(first.info.experiment_id, tags=late, run_name="k=1")
        run.log(cell(2))
    assert sorted(r.info.run_name for r in active(store)) == ["k=1", "k=2", "ranks"]
    assert first.info.run_id in [r.info.run_id for r in active(store)]


def test_of_several_machines_that_take_over_at_once_one_owns_the_run(
    store: Store, tracker: Tracker, crash: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "OWNER_TIMEOUT_S", 9.0)
    run_id = crash(tracker, lambda run: None)
    last = owner_in(store.client.get_run(run_id).data.tags)
    far = replace(store, sqlite_path=None)  # no lock between them
    claimed: list[RunLock] = []

    def claim() -> None:
        lock = RunLock(far)
        with suppress(MechdiffError):
            lock.claim(run_id, last)
            claimed.append(lock)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(2 * run_lock._trusted_s())
    assert [lock.loss() is None for lock in claimed].count(True) == 1


def test_a_process_that_lives_is_no_dead_owner_though_its_lock_file_is_gone(
    store: Store, tracker: Tracker, crash: Any
) -> None:
    run_id = crash(tracker, lambda run: None)
    mine = owner_in(store.client.get_run(run_id).data.tags)
    assert mine is not None
    for start, lives in (
        (process_start(os.getppid()), True),
        ("1", False),
    ):  # then the id is another process's
        set_tags(store, run_id, replace(mine, pid=os.getppid(), start=start).tag)
        assert is_alive(store, store.client.get_run(run_id)) is lives
    set_tags(store, run_id, replace(mine, pid=os.getppid(), start=process_start(os.getppid())).tag)
    with pytest.raises(MechdiffError, match=f"by process {os.getppid()} on"):
        taken_over(store, store.client.get_run(run_id)).__enter__()
    store.client.set_terminated(run_id, "FAILED")  # it ended its run and went on to something else
    with taken_over(store, store.client.get_run(run_id)) as lock:
        assert lock.owner.epoch == 2


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "{", '{"epoch": Infinity}', '{"epoch": 1e400}', '{"epoch": "x", "token": []}', "7" * 5000],
)
def test_what_is_no_owner_is_passed_over(text: str) -> None:
    assert owner_in({f"{OWNER_TAG}9": text}) is None


def test_owners_of_other_machines_are_watched(
    store: Store, tracker: Tracker, crash: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "OWNER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(run_lock, "_POLL_S", 0.1)
    run_id = crash(tracker, lambda run: None)
    for thread in threading.enumerate():  # a beat that is under way would write over what is written below
        if thread.name == "mechdiff-run-lock":
            thread.join()
    store = replace(store, sqlite_path=None)  # as behind a server: the lock file of its folder tells nothing
    mine = owner_in(store.client.get_run(run_id).data.tags)
    assert mine is not None
    far = replace(mine, machine="f" * 32, host="far")
    store.client.set_tag(run_id, *next(iter(far.tag.items())))
    run = store.client.get_run(run_id)
    assert is_alive(store, run) is None
    done = threading.Event()

    def beat() -> None:
        owner = far
        while not done.wait(0.2):
            owner = replace(owner, beat=owner.beat + 1)
            store.client.set_tag(run_id, *next(iter(owner.tag.items())))

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(MechdiffError, match="is being written by process"), taken_over(store, run):
        pytest.fail("both wrote")
    done.set()
    beating.join()
    with taken_over(store, store.client.get_run(run_id)) as lock:
        assert lock.owner.epoch == 2


def test_stuck_runs_are_found_and_ended(store: Store, tracker: Tracker, crash: Any) -> None:
    run_id = crash(tracker, lambda run: run.log(cell(1)))
    plain = store.client.create_run(store.experiment("demo"), run_name="made by mlflow run").info.run_id
    found = {one.run_id: one for one in stuck_runs(store)}
    assert {key: one.is_dead for key, one in found.items()} == {run_id: True, plain: False}
    end_stuck(store, [found[run_id]])
    ended = store.client.get_run(run_id)
    assert ended.info.status == "KILLED"
    assert ended.data.tags["mechdiff.failure"].startswith("The process that wrote this run died (process ")
    assert [one.run_id for one in stuck_runs(store)] == [plain]


def test_a_lease_beats_while_it_is_kept(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "OWNER_TIMEOUT_S", 0.2)
    with tracker.run("run", "r") as run:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            owner = owner_in(store.client.get_run(run.run_id).data.tags)
            if owner is not None and owner.beat >= 2:
                break
            time.sleep(0.05)
        else:
            pytest.fail("no beat")


def test_a_damaged_table_is_noticed(store: Store, tracker: Tracker) -> None:
    with tracker.run("run", "r") as run:
        child = run.log(cell(1))
    assert tables_of(store, [child], "per_prompt.json")[child]["kl"].tolist() == [1.0, 1.0]
    path = Path(store.client.get_run(child).info.artifact_uri.removeprefix("file://"), "per_prompt.json")
    flip_byte(path, -4)
    with pytest.raises(MechdiffError, match=rf"per_prompt\.json of run {child} is not what was logged"):
        tables_of(store, [child], "per_prompt.json")


def test_a_store_that_keeps_other_bytes_fails_the_run(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = StoredFiles.send

    def and_damage(self: StoredFiles, folder: Path, **more: Any) -> None:
        send(self, folder, **more)
        flip_byte(Path(self._files.artifact_dir, "per_prompt.json"), -4)

    monkeypatch.setattr(StoredFiles, "send", and_damage)
    words = r"gave back another per_prompt\.json than was sent"
    damaged = replace(cell(1), map=None)
    with pytest.raises(MechdiffError, match=words), tracker.run("run", "r") as run:
        run.log(damaged)
    assert statuses(store) == {"r": "FAILED", "k=1": "FAILED"}


def test_keys_tell_settings_apart_and_not_results() -> None:
    key = key_of(cell(1), "0.1.0")
    assert key_of(cell(1, metrics={"drop_pct": 3.0}), "0.1.0") == key
    assert len({key, key_of(cell(2), "0.1.0"), key_of(cell(1), "0.1.1")}) == 3
    other_pair = cell(1, tags={"pair_fingerprint": "f2"})
    assert key_of(other_pair, "0.1.0") != key


def test_every_child_has_its_key_and_the_parent_its_lease(store: Store, tracker: Tracker) -> None:
    with tracker.run("run", "r") as run:
        child = run.log(cell(1))
    assert len(store.client.get_run(child).data.tags[KEY_TAG]) == 32
    assert f"{OWNER_TAG}1" in store.client.get_run(run.run_id).data.tags
    assert not lock_file(store.uri, "promotion").exists()


def test_what_failed_in_the_background_is_logged_in_the_end(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed = RecordWriter.write, []

    def write_late(self: RecordWriter, run: Run, record: RunRecord, **more: Any) -> Run:
        whole = write(self, run, record, **more)
        if record.name == "k=1" and not failed:
            failed.append(True)
            raise MechdiffError("The server stopped answering for hours.")
        return whole

    monkeypatch.setattr(RecordWriter, "write", write_late)
    interval = sys.getswitchinterval()
    with tracker.run("sweep", "ranks") as run:
        ids = log_all(run, [cell(1), cell(2)])
        assert sys.getswitchinterval() < interval
    assert sys.getswitchinterval() == interval
    assert failed == [True]
    found = {r.info.run_name: r for r in active(store)}
    assert [found["k=1"].info.run_id, found["k=2"].info.run_id] == ids
    assert statuses(store) == dict.fromkeys(("ranks", "k=1", "k=2"), "FINISHED")
    assert "mechdiff.failure" not in found["k=1"].data.tags
    assert len(found["k=1"].outputs.model_outputs) == 1
