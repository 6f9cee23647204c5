import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Param, Run

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content.records import Dataset, RunRecord
from mechdiff_mlflow.tracking.runs import writing
from mechdiff_mlflow.tracking.runs.tracker import RUN_ID_VARIABLE, Tracker
from mechdiff_mlflow.tracking.store.store import Store

from .conftest import make_map

ROOT = Path(__file__).parents[2]


def patch(name: str = "L3/attn_out k=2 α=0.3", **contents: Any) -> RunRecord:
    return RunRecord(kind="patch", name=name, **contents)


def all_runs(store: Store) -> list[Run]:
    return list(store.client.search_runs([e.experiment_id for e in store.client.search_experiments()]))


def by_name(store: Store) -> dict[str, Run]:
    return {run.info.run_name: run for run in all_runs(store)}


def test_a_tree_of_runs(store: Store, tracker: Tracker) -> None:
    with tracker.run("sweep", "ranks", {"pair": "demo", "alpha": "auto"}, description="# Asked") as run:
        fit = run.log(RunRecord(kind="fit", name="a fit", params={"k": 2}))
        run.log(patch("a patch", params={"alpha": 0.7}), under=fit)
    found = by_name(store)
    assert {name: r.info.status for name, r in found.items()} == dict.fromkeys(
        ("ranks", "a fit", "a patch"), "FINISHED"
    )
    assert found["a fit"].data.tags["mlflow.parentRunId"] == run.run_id
    assert found["a patch"].data.tags["mlflow.parentRunId"] == fit
    assert {r.data.tags["mechdiff.kind"] for r in found.values()} == {"sweep", "fit", "patch"}
    assert found["ranks"].data.params == {"pair": "demo", "alpha": "auto"}
    assert found["a patch"].data.params == {"alpha": "0.7"}
    assert found["ranks"].data.tags["mlflow.note.content"] == "# Asked"
    assert {r.info.experiment_id for r in found.values()} == {store.experiment("demo")}
    experiment_id = store.experiment("demo")
    assert experiment_id != "0"
    assert "mlflow.sharedViewState.mechdiff" in store.client.get_experiment(experiment_id).tags


def test_secrets_in_addresses_are_not_stored(store: Store, tracker: Tracker) -> None:
    address = "https://ann:tell-nobody@host/x"
    tags = {"from": address, "to": "L3/attn_out"}
    with suppress(ValueError), tracker.run("run", "r", {"pair": address}, tags=tags) as run:
        raise ValueError(f"cannot reach {address}")
    data = store.client.get_run(run.run_id).data
    assert "tell-nobody" not in str(data.params) + str(data.tags)
    assert data.params["pair"] == data.tags["from"] == "https://***@host/x"
    assert data.tags["mechdiff.failure"] == "ValueError: cannot reach https://***@host/x"
    assert data.tags["to"] == "L3/attn_out"


def test_numbers_are_stored_as_they_are_and_once(store: Store, tracker: Tracker) -> None:
    value = 0.1 + 0.2
    with tracker.run("run", "r") as run:
        child = run.log(
            patch(metrics={"drop_pct": value, "ci/drop_pct_low": np.float64(-1.5)}, ended_ms=1234)
        )
    history = store.client.get_metric_history(child, "drop_pct")
    assert [(m.value, m.timestamp, m.step) for m in history] == [(value, 1234, 0)]
    assert store.client.get_run(child).data.metrics["ci/drop_pct_low"] == -1.5


def test_work_done_before_it_is_logged_keeps_its_times(store: Store, tracker: Tracker) -> None:
    with tracker.run("run", "r") as run:
        child = run.log(patch(started_ms=1_000, ended_ms=2_500))
    info = store.client.get_run(child).info
    assert (info.start_time, info.end_time) == (1_000, 2_500)


def test_undefined_metrics_say_why_instead_of_lying(store: Store, tracker: Tracker) -> None:
    record = patch(
        metrics={"a": float("nan"), "b": float("-inf"), "c": 1.0},
        stepped_metrics={"curve": {1: 2.0, 8: float("nan")}},
        undefined={"drop_pct": "KL_raw is below the noise floor"},
    )
    run_id = tracker.log(record)
    data = store.client.get_run(run_id).data
    assert data.metrics == {"c": 1.0, "curve": 2.0}
    assert {k: v for k, v in data.tags.items() if k.startswith("mechdiff.undefined.")} == {
        "mechdiff.undefined.a": "nan",
        "mechdiff.undefined.b": "-inf",
        "mechdiff.undefined.curve": "nan",
        "mechdiff.undefined.drop_pct": "KL_raw is below the noise floor",
    }


def test_curves_keep_their_steps(store: Store, tracker: Tracker) -> None:
    with tracker.run("sweep", "s") as run:
        run.add(RunRecord(kind="sweep", name="s", stepped_metrics={"drop_pct": {1: 3.0, 8: 30.0, 96: 34.5}}))
    history = store.client.get_metric_history(run.run_id, "drop_pct")
    assert [(m.step, m.value) for m in history] == [(1, 3.0), (8, 30.0), (96, 34.5)]


def test_tables_come_back_digit_for_digit(store: Store, tracker: Tracker) -> None:
    table = pd.DataFrame(
        {"prompt": ["a", "π\n"], "KL": [1e-17 / 3, float("nan")], "n": np.array([1, 2]), "ok": [True, False]}
    )
    run_id = tracker.log(patch(tables={"per_prompt.json": table}))
    mlflow.set_tracking_uri(store.uri)  # which MLflow's load_table searches
    back = store.client.load_table(store.experiment("demo"), "per_prompt.json", [run_id])
    assert np.isnan(back["KL"][1])
    assert back[["prompt", "n", "ok"]].to_dict() == table[["prompt", "n", "ok"]].to_dict()
    # The file is exact; MLflow's reader rounds the last digit.
    kept = json.loads(Path(store.client.download_artifacts(run_id, "per_prompt.json")).read_text())
    assert kept["columns"] == list(table)
    assert [row[1] for row in kept["data"]] == [table["KL"][0], None]


def test_texts_files_and_folders_are_artifacts(store: Store, tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "figs").mkdir()
    (tmp_path / "figs" / "a.png").write_bytes(b"png")
    record = patch(texts={"spec/spec.yaml": "a: ü"}, files={"figures": tmp_path / "figs"})
    local = Path(store.client.download_artifacts(tracker.log(record), ""))
    assert (local / "spec" / "spec.yaml").read_text(encoding="utf-8") == "a: ü"
    assert (local / "figures" / "a.png").read_bytes() == b"png"


def test_prompt_sets_are_inputs_with_our_digest_and_split(store: Store, tracker: Tracker) -> None:
    digest = "0123abcd" * 4
    run = store.client.get_run(tracker.log(patch(datasets=(Dataset("demo", "val", digest, 2, "a.jsonl"),))))
    [given] = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("demo", digest)
    assert json.loads(given.dataset.profile) == {"num_rows": 2}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "val")]


def test_a_patch_points_at_the_map_it_used(store: Store, tracker: Tracker) -> None:
    with tracker.run("run", "r") as run:
        fit = run.log(RunRecord(kind="fit", name="f", map=make_map()))
        used = run.log(patch(map_run=fit, metrics={"drop_pct": 30.0}), under=fit)
    [output] = store.client.get_run(fit).outputs.model_outputs
    [given] = store.client.get_run(used).inputs.model_inputs
    assert given.model_id == output.model_id
    model = store.client.get_logged_model(output.model_id)
    assert [(m.key, m.value, m.run_id) for m in model.metrics] == [("drop_pct", 30.0, used)]
    assert model.status == "READY"


def test_evaluating_the_map_of_a_run_without_one_is_an_error(store: Store, tracker: Tracker) -> None:
    with tracker.run("run", "r") as run:
        other = run.log(patch())
        with pytest.raises(MechdiffError, match=f"Run {other} has no map to evaluate"):
            run.log(patch("bad", map_run=other))
    assert by_name(store)["bad"].info.status == "FAILED"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (MechdiffError("n is 500 but there are 150 prompts; lower --n."), "FAILED", "n is 500 but there are"),
        (ZeroDivisionError("boom"), "FAILED", "ZeroDivisionError: boom"),
        (KeyboardInterrupt(), "KILLED", "Ended by Ctrl-C."),
        (SystemExit(3), "FAILED", "Exit code 3."),
        (MemoryError("x" * 9000), "FAILED", "MemoryError: xxx"),
    ],
)
def test_what_ends_a_run_is_written_down(
    store: Store, tracker: Tracker, error: BaseException, status: str, reason: str
) -> None:
    with pytest.raises(type(error)), tracker.run("run", "r", description="Asked."):
        raise error
    [run] = all_runs(store)
    assert run.info.status == status
    assert run.info.end_time is not None
    assert run.data.tags["mechdiff.failure"].startswith(reason)
    assert run.data.tags["mlflow.note.content"].startswith(f"**{status}:** {reason}")


def test_leaving_with_exit_code_zero_is_no_failure(store: Store, tracker: Tracker) -> None:
    with pytest.raises(SystemExit), tracker.run("run", "r"):
        sys.exit(0)
    assert all_runs(store)[0].info.status == "FINISHED"


def test_a_child_that_cannot_be_written_is_failed_and_so_is_its_parent(
    store: Store, tracker: Tracker, tmp_path: Path
) -> None:
    with pytest.raises(MechdiffError, match=r"gone\.png"), tracker.run("run", "parent") as run:  # noqa: PT012
        run.log(patch("good"))
        run.log(patch("bad", files={"a.png": tmp_path / "gone.png"}))
    statuses = {name: r.info.status for name, r in by_name(store).items()}
    assert statuses == {"parent": "FAILED", "good": "FINISHED", "bad": "FAILED"}
    assert "gone.png" in by_name(store)["bad"].data.tags["mechdiff.failure"]


def test_a_signal_waits_for_the_child_being_written(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files = writing.artifacts.write_files

    def write_during_sigterm(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_files(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, tracker.run("run", "parent") as run:  # noqa: PT012
        monkeypatch.setattr(writing.artifacts, "write_files", write_during_sigterm)
        run.log(patch("child", texts={"a.txt": "whole"}))
        pytest.fail("the signal was lost")
    assert caught.value.code == 128 + signal.SIGTERM
    found = by_name(store)
    assert (found["parent"].info.status, found["child"].info.status) == ("KILLED", "FINISHED")
    assert found["parent"].data.tags["mechdiff.failure"] == "Ended by SIGTERM."
    assert [f.path for f in store.client.list_artifacts(found["child"].info.run_id)] == ["a.txt"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_a_process_with_its_run_killed(store: Store, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import time
            from mechdiff_mlflow.tracking.runs.tracker import Tracker
            from mechdiff_mlflow.tracking.store.store import open_store
            with Tracker(open_store({store.uri!r}), "demo").run("run", "job"):
                print("started", flush=True)
                time.sleep(60)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    [run] = all_runs(store)
    assert (run.info.status, run.data.tags["mechdiff.failure"]) == ("KILLED", "Ended by SIGTERM.")


def as_mlflow_run_makes_it(store: Store, name: str | None = None, **params: str) -> str:
    """A run such as `mlflow run` hands to the process it starts."""
    run = store.client.create_run(
        "0", tags={"mlflow.source.type": "PROJECT", "mlflow.user": "ann"}, run_name=name
    )
    store.client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in params.items()])
    os.environ[RUN_ID_VARIABLE] = run.info.run_id
    return str(run.info.run_id)


def test_the_run_that_mlflow_run_made_is_continued_once(store: Store, tracker: Tracker) -> None:
    run_id = as_mlflow_run_makes_it(store, layer="26", alpha="0.30", note="'two words'")
    params = {"layer": 26, "alpha": 0.3, "note": "two words", "solver": "reduced_rank"}
    with tracker.run("run", "L26/attn_out", params) as run:
        child = run.log(patch("child"))
    assert run.run_id == run_id
    with tracker.run("run", "another") as another:
        pass
    assert another.run_id != run_id
    found = store.client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "L26/attn_out"  # MLflow had made one up
    # What `mlflow run` logged stays as it logged it, and only the rest is added.
    assert found.data.params == {
        "layer": "26",
        "alpha": "0.30",
        "note": "'two words'",
        "solver": "reduced_rank",
    }
    assert found.data.tags["mlflow.source.type"] == "PROJECT"
    assert found.data.tags["mlflow.user"] == "ann"
    assert store.client.get_run(child).info.experiment_id == found.info.experiment_id == "0"


def test_a_name_that_the_user_gave_is_kept(store: Store, tracker: Tracker) -> None:
    run_id = as_mlflow_run_makes_it(store, "llama-cultural-8")
    with tracker.run("run", "L26/attn_out"):
        pass
    assert store.client.get_run(run_id).info.run_name == "llama-cultural-8"


def test_a_param_other_than_asked_for_fails_the_run(store: Store, tracker: Tracker) -> None:
    run_id = as_mlflow_run_makes_it(store, alpha="0.3")
    words = r"Param 'alpha' is 0.30001 but .* was started with 0.3"
    with pytest.raises(MechdiffError, match=words), tracker.run("run", "r", {"alpha": 0.30001}):
        pytest.fail("the body ran")
    assert store.client.get_run(run_id).info.status == "FAILED"


def test_a_run_that_is_over_is_not_continued(store: Store, tracker: Tracker) -> None:
    run_id = as_mlflow_run_makes_it(store)
    store.client.set_terminated(run_id)
    with pytest.raises(MechdiffError, match="is FINISHED already; unset it"), tracker.run("run", "r"):
        pytest.fail("the body ran")


def test_a_run_of_another_store_is_an_error(tracker: Tracker) -> None:
    os.environ[RUN_ID_VARIABLE] = "0" * 32
    with pytest.raises(MechdiffError, match=f"'?{'0' * 32}'? not found"), tracker.run("run", "r"):
        pytest.fail("the body ran")


def test_mlflow_run_and_we_make_one_tree(store: Store, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "MLproject").write_text(
        "name: t\nentry_points:\n  main:\n    parameters:\n      alpha: {type: float, default: 0.3}\n"
        f"    command: {sys.executable} job.py {{alpha}}\n"
    )
    (project / "job.py").write_text(
        textwrap.dedent(
            """
            import sys
            from mechdiff_mlflow.tracking.content.records import RunRecord
            from mechdiff_mlflow.tracking.runs.tracker import Tracker
            from mechdiff_mlflow.tracking.store.store import open_store
            with Tracker(open_store(), "unused").run("run", "job", {"alpha": sys.argv[1], "k": 8}) as run:
                run.log(RunRecord(kind="patch", name="child", metrics={"drop_pct": 1.0}))
            """
        )
    )
    os.environ["PYTHONPATH"] = str(ROOT)
    mlflow.set_tracking_uri(store.uri)
    try:
        mlflow.projects.run(str(project), env_manager="local", experiment_name="projects")
    finally:
        del os.environ["PYTHONPATH"]
    found = by_name(store)
    assert found.keys() == {"job", "child"}
    assert {r.info.experiment_id for r in found.values()} == {store.experiment("projects")}
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    assert found["job"].data.params == {"alpha": "0.3", "k": "8"}
    assert found["child"].data.tags["mlflow.parentRunId"] == found["job"].info.run_id


def test_long_params_fail_before_the_run_is_made(store: Store, tracker: Tracker) -> None:
    with pytest.raises(MechdiffError, match=r"'prompt' .* 6001 characters and MLflow keeps 6000"):
        tracker.log(patch(params={"prompt": "x" * 6001}))
    assert not all_runs(store)


def test_more_than_a_batch_of_params_and_metrics(store: Store, tracker: Tracker) -> None:
    many = {f"k{i}": i for i in range(1100)}
    run_id = tracker.log(patch(params=dict(list(many.items())[:150]), metrics=many))
    data = store.client.get_run(run_id).data
    assert len(data.params) == 150
    assert data.metrics == many


def test_runs_say_where_they_come_from(store: Store, tracker: Tracker) -> None:
    tags = store.client.get_run(tracker.log(patch(tags={"selection_leak": "true"}))).data.tags
    assert f", process {os.getpid()}" in tags["mechdiff.process"]
    assert tags["selection_leak"] == "true"
    assert {"mechdiff.version", "mlflow.user", "mlflow.source.name"} <= tags.keys()
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        assert tags["mlflow.source.git.commit"] == commit.stdout.strip()
        assert tags["mechdiff.process"].endswith((", code with changes", ", code as committed"))


def test_a_child_costs_little(store: Store, tracker: Tracker) -> None:
    calls: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(store.client, name)

    counted = Tracker(Store(store.uri, Counting(), store.sqlite_path), "demo")  # type: ignore[arg-type]
    with counted.run("run", "r") as run:
        calls.clear()
        run.log(patch(params={"k": 1}, metrics={"m": 1.0}, texts={"a.txt": "x"}))
    assert calls[:3] == ["create_run", "log_batch", "set_terminated"]  # beside the folder of artifacts


def test_unreachable_store_while_ending_does_not_hide_what_went_wrong(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def down(*_: object, **__: object) -> None:
        raise OSError("server down")

    with pytest.raises(ZeroDivisionError), tracker.run("run", "r"):  # noqa: PT012
        monkeypatch.setattr(store.client, "set_terminated", down)
        _ = 1 / 0
    assert "could not be marked FAILED" in caplog.text
    started = time.monotonic()
    with pytest.raises(MechdiffError, match="server down"), tracker.run("run", "s"):
        pass
    assert time.monotonic() - started < 5
