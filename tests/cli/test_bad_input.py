"""Bad input: one sentence with the remedy, exit code not 0, nothing lost, no run left RUNNING."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import toy as toys
from cli.conftest import Invoke
from cli.test_run import SITE, runs_of
from safetensors.torch import load_file, save_file

from mechdiff_mlflow.models.checkpoints import Checkpoint
from mechdiff_mlflow.tracking.commands import computing


def statuses(client: mlflow.MlflowClient) -> set[str]:
    experiments = [e.experiment_id for e in client.search_experiments()]
    return {run.info.status for run in client.search_runs(experiments)}


def refused(result_output: str) -> str:
    """The error of a command, which is its last line and one sentence."""
    (line,) = [line for line in result_output.splitlines() if line.startswith("Error: ")]
    assert result_output.rstrip().splitlines()[-1] == line
    return line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--layer", "abc"], "Layer 'abc' is not a whole number"),
        (["--layer", "-1"], "Layer '-1' is not a whole number"),
        (["--layer", "99"], "Layer 99 does not exist: the model has 4 layers, 0 to 3."),
        (["--hook", "attention"], "Hook 'attention' is unknown; use one of resid_pre, attn_out"),
        (["--solver", "magic"], "Solver 'magic' is unknown; use one of procrustes_scaled"),
        (["--family", "both"], "Family 'both' is unknown; use one of update, content"),
        (["--k", "17"], "Rank 17 is out of range at a site of width 16"),
        (["--k", "-2"], "Rank -2 is not at least 1"),
        (["--alpha", "-0.3"], "α=-0.3 is not a finite number of at least 0"),
        (["--alpha", "nan"], "α=nan is not a finite number of at least 0"),
        (["--alpha", "big"], "α='big' is not a number"),
        (["--shrink", "1.5"], "shrink is 1.5; give a number from 0 to 1"),
        (["--shrink", "much"], "--shrink 'much' is not a number"),
        (["--n", "500"], "500 test prompts were asked for and there are 40; pass --n 1 to 40"),
        (["--n", "0"], "--n '0' is not a whole number of at least 1"),
        (["--n-train", "41"], "41 train prompts were asked for and there are 40; pass --n-train 1 to 40"),
        (["--split", "train"], "Split 'train' is unknown; use one of test, val"),
        (["--position", "first"], "Position 'first' is unknown; use one of decision, last_content"),
        (["--dtype", "int8"], "--dtype 'int8' is unknown"),
        (["--off-span", "random"], "--off-span 'random' is unknown"),
        (["--memory-budget", "lots"], "Memory budget 'lots' is not a size; write e.g. 8GiB or 500MB"),
        (["--memory-budget", "1KiB"], "tokens needs more than the memory budget leaves for it"),
        (["--seed", "-1"], "--seed '-1' is not a whole number"),
        (["--device", "tpu:9"], "Device 'tpu:9' cannot be used here"),
        (["--layer", "0"], "No drop at L0/resid_post: below noise floor"),
        (["--promote", "v1"], "v1"),
        (["--solver", "mean_shift", "--k", "2"], "no maps of rank 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient, words: list[str], says: str
) -> None:
    line = refused(mechdiff("run", "--pair", str(toy), *SITE, *words, code=1).output)
    assert says in line
    assert statuses(client) <= {"FAILED", "FINISHED"}
    if parents := runs_of(client).get("run") if client.get_experiment_by_name("toy") else None:
        assert parents[0].info.status == "FAILED"
        assert parents[0].data.tags["mechdiff.failure"] in line


@pytest.mark.parametrize("words", [["run", "--nonsense", "3"], ["run", "--layer"], ["nonsense"]])
def test_words_that_no_command_knows(mechdiff: Invoke, words: list[str]) -> None:
    assert "Error: " in mechdiff(*words, code=2).output


def damaged(toy: Path, here: Path, damage: Callable[[Path], object]) -> str:
    """A copy of the toy pair with something wrong; the path of its spec."""
    folder = here / "pair"
    shutil.copytree(toy.parent, folder)
    damage(folder)
    return str(folder / "toy.yaml")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def break_template(folder: Path) -> None:
    (folder / "tuned/chat_template.jinja").write_text("{{ raise_exception('only users') }}")


def one_wider(folder: Path) -> None:
    shutil.rmtree(folder / "tuned")
    toys.write_model(folder / "tuned", toys.model(1, width=24))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty prompts": (lambda f: (f / "val.jsonl").write_text(""), "val.jsonl is empty"),
    "malformed prompts": (
        lambda f: (f / "val.jsonl").write_text(json.dumps({"text": "tea"}) + "\n{oops\n"),
        "val.jsonl, line 2 is not JSON",
    ),
    "missing prompts": (lambda f: (f / "test.jsonl").unlink(), "test.jsonl does not exist"),
    "shared prompts": (lambda f: shutil.copy(f / "val.jsonl", f / "test.jsonl"), "remove it from one"),
    "missing weights": (lambda f: (f / "tuned/model.safetensors").unlink(), "has neither model.safetensors"),
    "missing model": (lambda f: shutil.rmtree(f / "tuned"), "tuned"),
    "failing template": (break_template, "fails on"),
    "infinite weights": (
        lambda f: edit_weights(
            f / "tuned", lambda w: w["model.layers.1.mlp.down_proj.weight"].fill_(torch.inf)
        ),
        "is NaN or infinite",
    ),
    "other width": (one_wider, "needs equal widths"),
    "unknown key": (
        lambda f: (f / "toy.yaml").write_text((f / "toy.yaml").read_text() + "colour: red\n"),
        "colour: unknown key",
    ),
    "same model twice": (
        lambda f: shutil.copy(f / "base/model.safetensors", f / "tuned/model.safetensors"),
        "below noise floor",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_pairs(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient, what: str
) -> None:
    damage, says = DAMAGES[what]
    spec = damaged(toy, here, damage)
    line = refused(mechdiff("run", "--pair", spec, *SITE, code=1).output)
    assert says in line
    assert "RUNNING" not in statuses(client)


def test_one_prompt_gives_no_interval_which_is_said_before_any_work(
    toy: Path, mechdiff: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "load", lambda self: pytest.fail("loaded weights"))
        line = refused(mechdiff("run", "--pair", str(toy), *SITE, "--n", "1", code=1).output)
    assert "1 test prompts, 1 of them independent, give no interval; pass a larger --n" in line
    mechdiff("run", "--pair", str(toy), *SITE, "--n", "2")


def test_broken_plumbing_stops_a_run_before_any_number(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that does more than its weights say: activations below the first changed layer differ."""
    load = Checkpoint.load

    def tampered(checkpoint: Checkpoint) -> Any:
        model: Any = load(checkpoint)
        if checkpoint.reference == "tuned":
            model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, out: out + 1e-3)
        return model

    monkeypatch.setattr(Checkpoint, "load", tampered)
    line = refused(mechdiff("run", "--pair", str(toy), *SITE, code=1).output)
    assert "Weights agree below layer 2 and activations at L1/mlp_out do not" in line
    (run,) = runs_of(client)["run"]
    assert run.info.status == "FAILED"
    assert not run.data.metrics


def test_a_pair_that_passed_the_checks_is_not_checked_again(
    toy: Path, mechdiff: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless something differs that numbers depend on: how many prompts go together, or the dtype."""
    checked: list[tuple[int, str]] = []
    monkeypatch.setattr(
        computing,
        "require_sound",
        lambda pair: checked.append((pair.options.batch_size, pair.spec.dtype)),
    )
    for words in ((), (), ("--batch-size", "8"), ("--dtype", "float64"), ("--dtype", "float64")):
        mechdiff("fit", "--pair", str(toy), *SITE, *words)
    assert checked == [(32, "float32"), (8, "float32"), (32, "float64")]


def test_widths_that_differ_are_mapped_in_the_content_family_without_a_raw_patch(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    spec = damaged(toy, here, one_wider)
    mechdiff(
        *("run", "--pair", spec, *SITE),
        *("--family", "content", "--solver", "reduced_rank", "--k", "3"),
    )
    (patch,) = runs_of(client)["patch"]
    assert patch.info.status == "FINISHED"
    assert "skill_pct" in patch.data.metrics
    assert "KL_raw" not in patch.data.metrics


def test_below_the_floor_what_was_measured_is_kept(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("run", "--pair", str(toy), "--layer", "1", "--hook", "mlp_out", code=1)
    (patch,) = runs_of(client)["patch"]
    assert patch.info.status == "FINISHED"
    assert patch.data.metrics["KL_raw"] == 0.0
    assert "drop_pct" not in patch.data.metrics
    assert "below noise floor" in patch.data.tags["mechdiff.undefined.drop_pct"]


def test_only_finished_runs_with_a_map_are_promoted(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("run", "--pair", str(toy), *SITE, "--k", "17", code=1)
    failed = runs_of(client)["run"][0].info.run_id
    assert "is FAILED and only FINISHED runs" in refused(mechdiff("promote", failed, code=1).output)
    mechdiff("sweep", "--pair", str(toy), "--sites", "L3/resid_post:1", "--ranks", "2,4", "--targets", "9")
    (sweep,) = runs_of(client)["sweep"]
    line = refused(mechdiff("promote", sweep.info.run_id, code=1).output)
    assert "has several maps below it; give the id of one of those runs" in line
    without = client.create_run(sweep.info.experiment_id)
    client.set_terminated(without.info.run_id, "FINISHED")
    assert "has no map" in refused(mechdiff("promote", without.info.run_id, code=1).output)
    assert "0123" in refused(mechdiff("promote", "0123", code=1).output)


def test_names_and_aliases_that_do_not_exist(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    assert "no map has an alias" in mechdiff("maps").output.lower()
    assert "toy-L3" in refused(mechdiff("fetch", "toy-L3-resid_post@champion", "-o", "map.pt", code=1).output)
    mechdiff("run", "--pair", str(toy), *SITE, "--alpha", "1", "--promote", "--force")
    line = refused(mechdiff("fetch", "toy-L3-resid_post@winner", "-o", "map.pt", code=1).output)
    assert "has no alias 'winner'; it has champion" in line
    assert ".safetensors" in refused(
        mechdiff("fetch", "toy-L3-resid_post@champion", "-o", "map.bin", code=1).output
    )
    missing = refused(mechdiff("patch", "--map", "nothing.pt", "--pair", str(toy), code=1).output)
    assert "nothing.pt" in missing


def test_a_tracking_server_that_is_not_there(toy: Path, mechdiff: Invoke) -> None:
    line = refused(
        mechdiff("run", "--pair", str(toy), *SITE, "--tracking-uri", "http://127.0.0.1:9", code=1).output
    )
    assert "No tracking server answers at http://127.0.0.1:9" in line


def test_an_unexpected_mlflow_run_parameter_fails_with_its_reason(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow run -P layer=abc` makes the run before we see the value."""
    made = client.create_run(client.create_experiment("toy"))
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'mlflow.db'}")
    mechdiff("run", "--pair", str(toy), "--layer", "abc", code=1)
    tags = client.get_run(made.info.run_id).data.tags
    assert tags["mechdiff.failure"].startswith("Layer 'abc' is not a whole number")
