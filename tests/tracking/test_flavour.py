import json
import platform
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow.models import validate_serving_input
from mlflow.utils.virtualenv import _get_python_env

import mechdiff_mlflow
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.content.artifact_files import StoredFiles
from mechdiff_mlflow.tracking.content.card import model_card
from mechdiff_mlflow.tracking.flavour import load_model, load_verified, log_model, save_model
from mechdiff_mlflow.tracking.store.store import Store

from .conftest import D, flip_byte, make_map


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(make_map(alpha=0.3), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_saved_map_comes_back_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    the_map = make_map(alpha=0.3, dtype=dtype)
    save_model(the_map, tmp_path / "model")
    assert load_model(tmp_path / "model") == the_map
    # At the root, so that models:/NAME@champion/map.pt is a map by itself.
    assert AffineMap.load(tmp_path / "model" / "map.pt") == the_map


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pyfunc_agrees_bit_for_bit_with_the_map(tmp_path: Path, dtype: torch.dtype) -> None:
    the_map = make_map(alpha=0.3, dtype=dtype)
    save_model(the_map, tmp_path / "model")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(served.predict(x.numpy()), the_map(x).numpy())
    assert served.predict(x.numpy()).dtype == np.float32
    other = served.predict(x.numpy(), params={"alpha": 0.75})
    assert np.array_equal(other, the_map.with_alpha(0.75)(x).numpy())


def test_the_signature_is_float32_rows_of_the_width(saved: Path) -> None:
    served = mlflow.pyfunc.load_model(str(saved))
    assert served.metadata.signature.inputs.inputs[0].shape == (-1, D)
    assert served.metadata.signature.outputs.inputs[0].shape == (-1, D)
    with pytest.raises(mlflow.exceptions.MlflowException, match="schema"):
        served.predict(np.zeros((1, D + 1), np.float32))


def test_what_is_asked_as_the_signature_says_is_answered(saved: Path) -> None:
    x = torch.randn(1, D)
    asked = json.dumps({"inputs": x.tolist(), "params": {"alpha": 0.7}})
    answer = validate_serving_input(str(saved), asked)
    assert np.array_equal(answer, make_map(alpha=0.7)(x).numpy())


@pytest.mark.parametrize("name", [flavour.MAP_FILE, flavour.PROBE_FILE])
def test_a_flipped_byte_is_refused_by_every_way_of_loading(saved: Path, name: str) -> None:
    flip_byte(saved / name)
    with pytest.raises(MechdiffError, match=f"{name} has changed since it was saved"):
        load_verified(saved)
    with pytest.raises(MechdiffError, match=f"{name} has changed since it was saved"):
        mlflow.pyfunc.load_model(str(saved))


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_single_bit_of_the_map_can_change(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip") / "model"
    save_model(make_map(), folder)
    content = bytearray((folder / "map.pt").read_bytes())
    content[at % len(content)] ^= 1 << bit
    (folder / "map.pt").write_bytes(content)
    with pytest.raises(MechdiffError):
        load_verified(folder)
    shutil.rmtree(folder)


def test_a_map_that_computes_something_else_is_refused_even_with_its_digest(saved: Path) -> None:
    make_map(alpha=0.3001).save(saved / "map.pt")
    conf = yaml.safe_load((saved / "MLmodel").read_text())
    conf["flavors"]["mechdiff"]["sha256"] = file_sha256(saved / "map.pt")
    (saved / "MLmodel").write_text(yaml.safe_dump(conf))
    with pytest.raises(MechdiffError, match="computes something else than when it was saved"):
        load_verified(saved)


@pytest.mark.parametrize("name", flavour.NEEDED_FILES)
def test_an_incomplete_model_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(MechdiffError, match=f"has no {name}"):
        load_verified(saved)


@pytest.mark.parametrize(
    "content", ["flavors: {}", "flavors: {sklearn: {data: x}}", "[1, 2]", "a: [", "flavors: 3"]
)
def test_other_models_are_refused(saved: Path, content: str) -> None:
    (saved / "MLmodel").write_text(content)
    with pytest.raises(MechdiffError, match="not a map of mechdiff"):
        load_verified(saved)


def test_a_model_is_not_saved_over_another(saved: Path) -> None:
    with pytest.raises(MechdiffError, match="is not empty"):
        save_model(make_map(), saved)


def test_nothing_in_a_model_needs_unpickling_beyond_plain_tensors(saved: Path) -> None:
    torch.load(saved / "map.pt", weights_only=True)
    assert "cloudpickle" not in (saved / "MLmodel").read_text() + (saved / "conda.yaml").read_text()
    requirements = Path(mlflow.pyfunc.get_model_dependencies(str(saved))).read_text().split()
    assert all("==" in line for line in requirements)
    assert any(line.startswith("mechdiff-mlflow==") for line in requirements)
    made = _get_python_env(saved)  # what --env-manager virtualenv and uv install
    assert (made.python, made.dependencies) == (platform.python_version(), requirements)


def test_a_model_is_sent_with_the_files_that_it_names_and_no_other(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {*flavour.NEEDED_FILES, "README.md", "conda.yaml"}
    assert re.findall(r"[\w.]+\.(?:txt|yaml|json)", (saved / "MLmodel").read_text()) == ["conda.yaml"]


def test_a_logged_map_is_ready_and_belongs_to_its_run(store: Store) -> None:
    run_id = store.client.create_run(store.experiment("demo")).info.run_id
    the_map = make_map(alpha=0.3)
    logged = log_model(the_map, "L3/attn_out α=0.3", store=store, run_id=run_id, metrics={"drop_pct": 34.0})
    model = store.client.get_logged_model(logged.model_id)
    assert (model.status, model.name, model.source_run_id) == ("READY", "L3-attn_out α=0,3", run_id)
    assert logged.sha256 == the_map.sha256()
    assert "drop_pct | 34" in model.tags["mlflow.note.content"]
    assert flavour.maps_of(store, run_id) == [logged]
    mlflow.set_tracking_uri(store.uri)
    assert load_model(f"models:/{logged.model_id}") == the_map


def test_a_map_is_logged_to_the_active_run_by_name(store: Store) -> None:
    mlflow.set_tracking_uri(store.uri)
    the_map = make_map(alpha=0.3)
    with mlflow.start_run(experiment_id=store.experiment("demo")) as run:
        logged = mechdiff_mlflow.log_model(the_map, name="mine")
    assert flavour.maps_of(store, run.info.run_id) == [logged]
    assert mechdiff_mlflow.load_model(logged.model_uri) == the_map
    x = torch.randn(3, D)
    assert np.array_equal(mlflow.pyfunc.load_model(logged.model_uri).predict(x.numpy()), the_map(x).numpy())
    with pytest.raises(MechdiffError, match="No MLflow run is active"):
        log_model(the_map, "mine")


def _stored(store: Store, name: str) -> Path:
    [found] = (store.sqlite_path or Path()).parent.rglob(name)
    return found


@pytest.mark.parametrize("name", flavour.NEEDED_FILES)
def test_a_store_that_keeps_other_bytes_is_found_out(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run_id = store.client.create_run(store.experiment("demo")).info.run_id
    send = StoredFiles.send

    def damaging(files: StoredFiles, folder: Path, **_: Any) -> None:
        send(files, folder)
        flip_byte(_stored(store, name))

    monkeypatch.setattr(StoredFiles, "send", damaging)
    with pytest.raises(MechdiffError, match=rf"gave back another {name} than was sent .* check its disk"):
        log_model(make_map(), "x", store=store, run_id=run_id)
    [model] = store.client.search_logged_models([store.experiment("demo")])
    assert model.status == "FAILED"
    assert flavour.maps_of(store, run_id) == []


def test_a_lost_file_is_found_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = store.client.create_run(store.experiment("demo")).info.run_id
    send = StoredFiles.send

    def losing(files: StoredFiles, folder: Path, **_: Any) -> None:
        send(files, folder)
        _stored(store, "probe.safetensors").unlink()

    monkeypatch.setattr(StoredFiles, "send", losing)
    with pytest.raises(MechdiffError, match=r"another probe\.safetensors than was sent \(SHA-256 none"):
        log_model(make_map(), "x", store=store, run_id=run_id)
    [model] = store.client.search_logged_models([store.experiment("demo")])
    assert model.status == "FAILED"


class FailingClient:
    """A client whose n-th request that changes something is refused; later ones are not."""

    def __init__(self, client: Any, at: int) -> None:
        self._client, self._at, self.calls = client, at, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not name.startswith(("finalize_", "log_")):
            return method

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self._at:
                raise mlflow.exceptions.MlflowException(f"no {name}")
            return method(*arguments, **options)

        return call


@pytest.mark.parametrize("at", [1, 2])  # finalize_logged_model, log_outputs
def test_a_refusal_after_the_files_leaves_the_model_failed(store: Store, at: int) -> None:
    run_id = store.client.create_run(store.experiment("demo")).info.run_id
    failing = FailingClient(store.client, at)
    with pytest.raises(MechdiffError, match="refused: no "):
        log_model(make_map(), "x", store=replace(store, client=failing), run_id=run_id)  # type: ignore[arg-type]
    assert failing.calls == at + 1
    [model] = store.client.search_logged_models([store.experiment("demo")])
    assert model.status == "FAILED"
    assert flavour.maps_of(store, run_id) == []


def test_maps_are_logged_by_several_threads_at_once(store: Store) -> None:
    experiment_id = store.experiment("demo")

    def log(seed: int) -> tuple[str, str]:
        run_id = store.client.create_run(experiment_id).info.run_id
        log_model(make_map(seed), f"map {seed}", store=store, run_id=run_id, experiment_id=experiment_id)
        return run_id, make_map(seed).sha256()

    with ThreadPoolExecutor(4) as pool:
        logged = list(pool.map(log, range(12)))
    mlflow.set_tracking_uri(store.uri)
    for run_id, sha256 in logged:
        [found] = flavour.maps_of(store, run_id)
        assert found.sha256 == sha256
        assert load_model(found.model_uri).sha256() == sha256


def test_the_card_shows_what_is_known_and_says_what_is_not() -> None:
    card = model_card(
        make_map(alpha=0.3), {"drop_pct": 34.25, "ci/drop_pct_low": 30.0, "ci/drop_pct_high": 38.0}
    )
    assert "at L3/attn_out" in card
    assert "α = 0.3" in card
    assert "| drop_pct | 34.25 | 30 to 38 |" in card
    assert "skill_pct |" not in card
    assert "what the attention of decoder block 3 adds" in card
    assert "Measure its skill" in card
    assert make_map(alpha=0.3).sha256() in card
    assert "Not measured yet" in model_card(make_map(), {})


def test_the_card_puts_the_numbers_into_words() -> None:
    metrics = {"KL_raw": 2.263, "KL_mapped": 0.566, "drop_pct": 75.0, "skill_pct": 74.9}
    metrics |= {"ci/drop_pct_low": 66.0, "ci/drop_pct_high": 82.0}
    metrics |= {"ci/skill_pct_low": 66.5, "ci/skill_pct_high": 82.5}
    facts = {"n": 150, "split": "test", "null": "mean_only", "selection_leak": "false"}
    card = model_card(make_map(), metrics, "models:/demo-L3-attn_out@champion", facts)
    assert (
        "better than no map at all: 75.0 % less KL, a **drop of 75.0 %** (95 %: 66.0 to 82.0) on 150" in card
    )
    assert (
        "better than the best control (here `mean_only`, which knows nothing of the pairing): 74.9 %" in card
    )
    wrong = model_card(make_map(), metrics, "x", {**facts, "null": "wrong_layer"})
    assert "(here `wrong_layer`, the map of another layer, fitted on the true pairs of that layer)" in wrong
    harmful = {**metrics, "skill_pct": -1060.0, "ci/skill_pct_low": -1200.0, "ci/skill_pct_high": -900.0}
    assert "It is **worse** than the best control" in model_card(make_map(), harmful, "x", facts)
    unsure = {**metrics, "ci/skill_pct_low": -2.0}
    assert "It is not to be told apart from the best control" in model_card(make_map(), unsure, "x", facts)
    assert "No leak" in card
    assert "mechdiff fetch demo-L3-attn_out@champion -o map.pt" in card
    assert "md.attached(the_map, tuned, source=base, " in card
    assert "  -m models:/demo-L3-attn_out@champion" in card
    assert "**Leak:" in model_card(make_map(), metrics, "x", {**facts, "selection_leak": "true"})
