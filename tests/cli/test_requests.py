"""What can be refused is refused before any weights are loaded, in one sentence, by every command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import mlflow
import pytest
from cli.conftest import Invoke
from cli.test_bad_input import refused, statuses
from cli.test_examples import every
from cli.test_resume import crash_in
from cli.test_run import SITE, runs_of
from click.testing import CliRunner

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.cli.options import Typed
from mechdiff_mlflow.models.checkpoints import Checkpoint
from mechdiff_mlflow.spec.options import Kind

LONG = "x" * 300
VERY_LONG = "x" * 1000
TRILLION = "1000000000000"
SWEEP = ("sweep", "--sites", "L3/attn_out:0.3")
ONE = "is not a whole number of at least"
AT_LAYER_9 = "Layer 9 does not exist: the model has 4 layers, 0 to 3."

IMPOSSIBLE: list[tuple[tuple[str, ...], str]] = [
    (("run", *SITE, "--layer", "9"), AT_LAYER_9),
    (("fit", *SITE, "--layer", "9"), AT_LAYER_9),
    (("heads", "--layer", "9"), AT_LAYER_9),
    (("sweep", "--sites", "L3/attn_out,L9/attn_out"), AT_LAYER_9),
    (("run", *SITE, "--k", "17"), "Rank 17 is out of range at a site of width 16; give 0 to 16, or full."),
    ((*SWEEP, "--ranks", "8,17"), "Rank 17 is out of range at a site of width 16"),
    ((*SWEEP, "--ranks", "16,full"), "Rank 16 and full are the same at L3/attn_out, whose width is 16"),
    ((*SWEEP, "--ranks", "8,8"), "has 8 more than once"),
    ((*SWEEP, "--ranks", "0,full"), "has full more than once"),
    (("sweep", "--sites", "L3/attn_out,L3/attn_out"), "has L3/attn_out more than once"),
    (("sweep", "--sites", "L3/attn_out:0.3,L3/attn_out", "--alphas", "0.3"), "more than once"),
    ((*SWEEP, "--alphas", "0.30,0.3"), "has 0.3 more than once"),
    ((*SWEEP, "--targets", "30,12"), "2 targets were given for 1 sites; give --targets one for all"),
    ((*SWEEP, "--targets", "abc"), "Target 'abc' is not a drop in percent above 0 and up to 100"),
    ((*SWEEP, "--targets", "nan"), "Target 'nan' is not a drop in percent"),
    ((*SWEEP, "--targets", "L2/attn_out:30"), "names L2/attn_out, which the sweep does not visit"),
    ((*SWEEP, "--targets", "L3/attn_out:30,L3/attn_out:12"), "Site L3/attn_out has two targets"),
    ((*SWEEP, "--n", TRILLION), f"{TRILLION} test prompts were asked for and there are 40"),
    ((*SWEEP, "--n-train", "41"), "41 train prompts were asked for and there are 40"),
    ((*SWEEP, "--n-train", "1"), "1 train prompt is too little to fit on"),
    ((*SWEEP, "--permutations", TRILLION), f"--permutations '{TRILLION}' {ONE} 0 and at most 100000"),
    ((*SWEEP, "--workers", TRILLION), f"--workers '{TRILLION}' {ONE} 1 and at most 4096"),
    ((*SWEEP, "--batch-size", TRILLION), f"--batch-size '{TRILLION}' {ONE} 1 and at most 100000"),
    ((*SWEEP, "--gpus-per-worker", TRILLION), f"--gpus-per-worker '{TRILLION}' {ONE} 1 and at most 64"),
    ((*SWEEP, "--directions", TRILLION), f"directions is {TRILLION}; give a whole number from 1 to 100000."),
    (
        (*SWEEP, "--solver", "logit_subspace", "--directions", "17"),
        "17 output directions are more",
    ),
    ((*SWEEP, "--seed", "9" * 19), f"--seed '{'9' * 19}' {ONE} 0 and at most {2**63 - 1}"),
    ((*SWEEP, "--seed", "1_0"), f"--seed '1_0' {ONE} 0; pass e.g."),
    ((*SWEEP, "--shrink", "nan"), "--shrink 'nan' is not a number; pass e.g. 0.05."),
    ((*SWEEP, "--shrink", "1.5"), "shrink is 1.5; give a number from 0 to 1."),
    ((*SWEEP, "--ridge", "-1"), "ridge is -1.0; give a number from 0 up."),
    ((*SWEEP, "--solver", "mean_shift", "--ranks", "2"), "The solver mean_shift has no maps of rank 2"),
    ((*SWEEP, "--solver", "identity", "--family", "content"), "The solver identity has no content family"),
    ((*SWEEP, "--ranks", "2", "--off-span", "zero", "--n-train", "9"), "9 train prompts do not span 16"),
    (("sweep", "--sites", "L3/attn_out:0", "--alpha-fit", "inside"), "α=0 cannot be taken inside a fit"),
    (("atlas", "--n-train", "1"), "1 train prompt is too little to fit on"),
    (("atlas", "--alias", "v1"), "Alias 'v1' is not possible"),
    (("atlas", "--solver", "identity", "--family", "content"), "has no content family"),
    (("layers", "--n", "41"), "41 test prompts were asked for and there are 40"),
    (("heads", "--layer", "3", "--n-random", TRILLION), f"--n-random '{TRILLION}' {ONE} 2 and at most 10000"),
    (("run", *SITE, "--promote", "v1"), "Alias 'v1' is not possible"),
    (("run", *SITE, "--device", "tpu:9"), "Device 'tpu:9' cannot be used here"),
    (("report-pass",), "No map of pair 'toy' has the alias 'champion'"),
    (("patch", "--map", "toy-L3@champion"), "toy-L3"),
]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(checkpoint: Checkpoint) -> Any:
        raise AssertionError(f"{checkpoint.reference} was loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


def test_what_is_impossible_is_refused_before_the_weights(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient, no_weights: None
) -> None:
    for words, says in IMPOSSIBLE:
        line = refused(mechdiff(*words, "--pair", str(toy), code=1).output)
        assert says in line, words
        assert len(line) < 500, words
    assert statuses(client) <= {"FAILED"}


UNUSABLE: list[tuple[tuple[str, ...], str]] = [
    (("run", "--pair", VERY_LONG), "is neither a YAML file nor a shipped pair"),
    (("run", "--pair", "a\udcff"), "is no UTF-8 text"),
    (("run", "--pair", "a\0b"), "is no UTF-8 text"),
    (("steer", "--map", "m.pt", "--prompt", "caf\udce9"), "is no UTF-8 text"),
    (("promote", "0" * 32, "--why", "caf\udce9"), "is no UTF-8 text"),
    (("maps", "demote", "n", "--why", "caf\udce9"), "is no UTF-8 text"),
    (("report", "--out", "out.txt"), "has an unknown suffix"),
    (("fetch", "n@champion", "-o", f"{LONG}.txt"), "has an unknown suffix"),
    (("fetch", VERY_LONG, "-o", "map.pt"), "x"),
    (("patch", "--map", VERY_LONG), "x"),
    (("patch", "--map", f"{VERY_LONG}.pt"), "File name too long"),
    (("promote", VERY_LONG), "x"),
    (("promote", "0" * 32, "--policy", "nowhere.yaml"), "nowhere.yaml"),
    (("promote", "0" * 32, "--policy", VERY_LONG), "File name too long"),
    (("promote", "0" * 32, "--min-drop", "nan"), "--min-drop 'nan' is not a number"),
    (("import", VERY_LONG), "File name too long"),
    (("export", VERY_LONG, "--pair", "toy"), "No map of pair 'toy' has the alias"),
    (("runs", "--pair", VERY_LONG), "x"),
    (("runs", "--site", VERY_LONG), "is not of the form"),
    (("doctor", VERY_LONG), "is neither a YAML file nor a shipped pair"),
    (("layers", "--tracking-uri", f"sqlite:///{VERY_LONG}.db"), "x"),
    (("steer", "--map", "m.pt", "--prompt", "x", "--max-new-tokens", TRILLION), ONE),
    (("adapter", "--map", "m.pt", "--to", VERY_LONG), "File name too long"),
]


def test_texts_that_are_no_file_name_and_no_text(here: Path, mechdiff: Invoke, no_weights: None) -> None:
    for words, says in UNUSABLE:
        line = refused(mechdiff(*words, code=1).output)
        assert says in line, (words, line)
        assert len(line) < 1500, words
        assert "Unexpected" not in line, (words, line)


def test_a_fault_of_ours_is_one_sentence_and_a_traceback_where_it_is_asked_for(
    here: Path, mechdiff: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechdiff_mlflow.cli.reports.find_runs", lambda store, **what: 1 / 0)
    line = refused(mechdiff("runs", code=1).output)
    assert "Unexpected ZeroDivisionError (division by zero) at test_requests.py" in line
    monkeypatch.setenv("MECHDIFF_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(cli, ["runs"]).exception, ZeroDivisionError)


def typed_options() -> Iterator[tuple[str, Kind, str]]:
    for name, command in every(cli):
        for parameter in command.params:
            if isinstance(parameter.type, Typed):
                yield f"{name} {parameter.name}", parameter.type.kind, str(parameter.default or "")


SPELLINGS = {
    "alpha": ["0.30", "1e0", "0.1,0.20,1", "auto", "map"],
    "alphas": ["0.5,1", "0.50,1.0", "1e-7"],
    "targets": ["30.0", "30,12", "30.0,12.50", "L3/attn_out:30,12", "auto"],
    "sites": ["L26/attn_out:0.30,L24/resid_post", "L26-attn_out:.5, L1/mlp_out"],
    "ranks": ["1, 8,0", "full,32"],
    "k": ["0", "full", "8"],
    "n": ["all", "12", "500-or-all"],
    "memory_budget": ["none", "8GiB", "1.5GB"],
    "off_span": ["auto", "zero", "nearest_identity"],
    "gpus_per_worker": ["auto", "2"],
    "shrink": ["0.050", "1", "1e-3"],
    "seed": ["007", str(2**63 - 1)],
}


def test_every_option_types_its_own_value() -> None:
    """So that a command can be written down, resumed, and compared with what `mlflow run` logged."""
    for title, kind, default in typed_options():
        tried = 0
        for text in [default, *SPELLINGS.get(title.split()[-1], [])]:
            try:
                value = kind.read(text)
            except Exception:  # another command's spelling
                continue
            tried += 1
            again = kind.read(kind.text(value))
            assert (again, type(again)) == (value, type(value)), (title, text)
            assert kind.text(again) == kind.text(value)
        assert tried or not default, title


def test_a_seed_of_nineteen_digits_is_kept(toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    seed = str(2**63 - 1)
    mechdiff("run", "--pair", str(toy), *SITE, "--alpha", "1", "--seed", seed)
    assert {runs_of(client)[kind][0].data.params["seed"] for kind in ("run", "fit", "patch")} == {seed}


def test_one_site_and_three_sites_are_swept_and_resumed_with_default_targets(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = "L3/attn_out,L3/resid_post,L2/resid_post"
    chosen = "L3/resid_post:12,30"
    for sites, targets in (("L3/attn_out:0.3", "auto"), (three, "auto"), (three, chosen)):
        shown = mechdiff(
            *("sweep", "--pair", str(toy), "--sites", sites, "--ranks", "8,full", "--targets", targets)
        ).output
        n_sites = sites.count("L")
        assert shown.count("min k for 30 %") == (n_sites if targets == "auto" else n_sites - 1)
        assert shown.count("min k for 12 % @ L3/resid_post") == (targets != "auto")
    crash_in(
        *(mechdiff, "sweep", toy, monkeypatch, "--sites", three, "--ranks", "8,full", "--targets", chosen)
    )
    sweep = sorted(runs_of(client)["sweep"], key=lambda run: run.info.start_time)[-1]
    assert "min k for 12 % @ L3/resid_post" in mechdiff("resume", sweep.info.run_id).output


def test_printed_commands_are_quoted_for_a_shell(
    toy: Path, here: Path, mechdiff: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = here / "it's a $HOME `id` place"
    place.mkdir()
    (here / "mlflow.db").rename(place / "mlflow.db")
    uri = f"sqlite:///{place / 'mlflow.db'}"
    shown = mechdiff(
        *("run", "--pair", str(toy), *SITE, "--alpha", "1", "--promote", "--force", "--tracking-uri", uri)
    ).output
    look, fetch = (
        shlex.split(line.partition(":")[2])
        for line in shown.splitlines()
        if line.startswith(("Look:", "Fetch:"))
    )
    assert look == ["mlflow", "ui", "--backend-store-uri", uri]
    assert fetch[:3] == ["mechdiff", "fetch", "toy-L3-resid_post@champion"]
    monkeypatch.chdir(toy.parent)  # where no store is
    mechdiff(*fetch[1:-4], "-o", str(here / "map.pt"), "--tracking-uri", fetch[-1])
    assert (here / "map.pt").is_file()
    words = mechdiff("maps", "demote", "toy-L3-resid_post", "--tracking-uri", uri).output
    undo = shlex.split(words.partition(" now; ")[2].removesuffix(" undoes this\n"))
    mechdiff(*undo[1:])


@pytest.mark.parametrize("name", sorted(name for name, _ in every(cli)))
def test_help_of_every_option_is_there(name: str) -> None:
    command = dict(every(cli))[name]
    assert all(p.help for p in command.params if isinstance(p, click.Option))
