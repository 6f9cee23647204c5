import pytest

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.runs import lookup, results
from mechdiff_mlflow.tracking.runs.results import summarised
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import Store


def log(tracker: Tracker) -> str:
    with tracker.run("sweep", "s") as run:
        for k, drop in ((1, 5.0), (8, 30.0), ("full", 34.0)):
            params = {"k": k, "alpha": 0.3, "revision": "007", "seed": 1, "peft": False}
            run.log(RunRecord(kind="patch", name=f"k={k}", params=params, metrics={"drop_pct": drop}))
    return run.run_id


def test_params_are_numbers_where_they_read_as_numbers(store: Store, tracker: Tracker) -> None:
    parent = log(tracker)
    table = summarised(store, "demo", {})[0].query("kind == 'patch'").set_index("name")
    assert table["k"].to_dict() == {"k=1": 1, "k=8": 8, "k=full": "full"}
    assert table["alpha"].max() == 0.3
    assert set(table["revision"]) == {"007"}
    assert not table["peft"].any()
    assert table.loc["k=8", "drop_pct"] == 30.0
    assert set(table["parent_id"]) == {parent}
    assert set(table["status"]) == {"FINISHED"}
    assert str(table["started"].dt.tz) == "UTC"


def test_mlflows_filters_and_every_page_are_used(
    store: Store, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(tracker)
    monkeypatch.setattr(lookup, "_PAGE", 2)
    assert len(lookup.all_runs(store, [store.experiment_id("demo")])) == 4
    found = lookup.all_runs(store, [store.experiment_id("demo")], "metrics.drop_pct > 10")
    assert [run.info.run_name for run in found] == ["k=full", "k=8"]


def test_an_experiment_that_is_not_there_is_an_error(store: Store, tracker: Tracker) -> None:
    log(tracker)
    with pytest.raises(MechdiffError, match="no experiment 'other'"):
        summarised(store, "other", {})


def test_an_empty_experiment_has_the_first_columns(store: Store) -> None:
    store.experiment("empty")
    table, _ = summarised(store, "empty", {})
    assert table.empty
    assert list(table)[:3] == ["run_id", "name", "kind"]


@pytest.mark.parametrize("text", ["1_000", "nan", "inf", "007", "1e999", "0x1", " 1", "١"])
def test_what_only_python_reads_as_a_number_stays_text(text: str) -> None:
    assert results._value(text) == text
