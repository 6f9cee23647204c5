"""The seed's hand-kept winners as registered maps, and back."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
import torch
from cli.conftest import Invoke
from test_bundles import D, Evil, bundle, rows, saved, seed_apply

from mechdiff_mlflow import load_map

BEST = "mechdiff/artifacts/rq2/best"
WINNERS = {
    "L26_attn_out": (bundle("procrustes_scaled"), 0.3),
    "L26_resid_post": (bundle("ridge", hook="resid_post"), 0.3),
    "L24_resid_post": (bundle("procrustes", layer=24, hook="resid_post"), 0.7),
}


@pytest.fixture
def seed(here: Path) -> Path:
    """The manifest that the seed writes, in the folders that it uses."""
    (here / BEST).mkdir(parents=True)
    winners = {}
    for key, (parts, alpha) in WINNERS.items():
        saved(here / BEST, parts, f"best_{key}.pt")
        winners[key] = {"path": f"{BEST}/best_{key}.pt", "alpha": alpha}
    manifest = here / "mechdiff/artifacts/rq3/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"pair": "mechdiff/pairs/pair_cultural.py", "winners": winners}))
    return manifest


def test_the_seeds_winners_are_imported_with_one_command(
    seed: Path, mechdiff: Invoke, client: mlflow.MlflowClient, here: Path
) -> None:
    shown = mechdiff("import", str(seed), "--root", ".").output
    assert "L26_attn_out: cultural-L26-attn_out version 1 is @champion" in shown
    x = rows(9, D, seed=77).double()
    for key, (parts, alpha) in WINNERS.items():
        name = f"cultural-{key.replace('_', '-', 1)}"
        the_map = load_map(f"{name}@champion")
        torch.testing.assert_close(the_map(x), seed_apply(parts, x, alpha), rtol=1e-6, atol=1e-6)
        version = client.get_model_version_by_alias(name, "champion")
        assert version.tags["alpha"] == str(alpha)
        assert version.tags["imported_from"].startswith(f"{BEST}/best_{key}.pt (sha256 ")
    again = mechdiff("import", str(seed), "--root", ".").output
    assert "L24_resid_post: cultural-L24-resid_post version 1 was already @champion" in again
    runs = client.search_runs([client.get_experiment_by_name("cultural").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED"] * 4

    mechdiff("export", "out", "--pair", "cultural")
    written = json.loads((here / "out/manifest.json").read_text())
    assert {key: row["alpha"] for key, row in written["winners"].items()} == {
        key: alpha for key, (_, alpha) in WINNERS.items()
    }
    assert written["pair"] == "cultural"
    mechdiff("import", "out/manifest.json", "--alias", "again")
    for key in WINNERS:
        name = f"cultural-{key.replace('_', '-', 1)}"
        champion, other = (load_map(f"{name}@{alias}") for alias in ("champion", "again"))
        torch.testing.assert_close(other(x), champion(x), rtol=1e-12, atol=1e-12)
        assert other.meta["solver"] == champion.meta["solver"]
    assert "is not empty" in mechdiff("export", "out", "--pair", "cultural", code=1).output
    assert (
        "No map of pair 'cultural'"
        in mechdiff("export", "o", "--pair", "cultural", "--alias", "none", code=1).output
    )


def test_paths_start_from_the_manifests_folder_unless_said(seed: Path, mechdiff: Invoke) -> None:
    shown = " ".join(mechdiff("import", str(seed), code=1).output.split())
    assert "There is no file" in shown
    assert "--root ." in shown
    written = json.loads(seed.read_text())
    written["winners"]["L26_attn_out"]["path"] = "../rq2/best/best_L26_attn_out.pt"
    seed.write_text(json.dumps(written))
    assert "lies outside" in mechdiff("import", str(seed), code=1).output


def test_one_bad_bundle_and_nothing_is_registered(
    seed: Path, mechdiff: Invoke, client: mlflow.MlflowClient, here: Path
) -> None:
    saved(here / BEST, bundle("ridge", W=Evil(open, str(here / "trace"), "w")), "best_L24_resid_post.pt")
    shown = mechdiff("import", str(seed), "--root", ".", code=1).output
    assert "nothing was run" in shown
    assert not (here / "trace").exists()
    assert client.search_registered_models() == []
    assert client.get_experiment_by_name("cultural") is None


def test_two_winners_of_a_site_cannot_share_an_alias(seed: Path, mechdiff: Invoke) -> None:
    written = json.loads(seed.read_text())
    written["winners"]["mine"] = {"path": f"{BEST}/best_L26_attn_out.pt", "alpha": 1}
    seed.write_text(json.dumps(written))
    shown = mechdiff("import", str(seed), "--root", ".", code=1).output
    assert "Winners L26_attn_out and mine are of one site" in shown


def test_an_imported_map_is_measured_when_the_pair_is_vouched_for(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff(
        "run",
        "--pair",
        str(toy),
        "--layer",
        "3",
        "--hook",
        "attn_out",
        "--alpha",
        "1",
        "--promote",
        "--force",
    )
    name = "toy-L3-attn_out"
    width = load_map(f"{name}@champion").d_in
    parts = bundle("ridge", layer=3, W=torch.eye(width))
    parts |= {key: parts[key][:, :1].expand(1, width).clone() for key in ("mu_b", "sd_b", "mu_t", "sd_t")}
    saved(here, parts, "mine.pt")
    (here / "manifest.json").write_text(
        json.dumps({"pair": "toy", "winners": {"L3_attn_out": {"path": "mine.pt", "alpha": 0.9}}})
    )
    refusal = mechdiff("import", "manifest.json", code=1).output
    assert f"{name}@champion is version 1 with drop" in refusal
    assert [run.info.run_id for run in client.search_runs(["1"], "tags.`mechdiff.kind` = 'import'")] == []
    assert client.get_model_version_by_alias(name, "champion").version == 1
    mechdiff("import", "manifest.json", "--force")
    assert load_map(f"{name}@champion").alpha == 0.9
    words = ("patch", "--map", f"{name}@champion", "--pair", str(toy))
    assert "was fitted on pair unknown" in mechdiff(*words, code=1).output
    assert "n/a" in mechdiff("maps").output
    shown = mechdiff(*words, "--allow-pair-mismatch").output
    assert "Warning: map" in shown
    assert f"{name}/2 had not been measured; its card and `mechdiff maps` have these numbers now" in shown
    assert "n/a" not in mechdiff("maps").output
    version = client.get_model_version(name, "2")
    assert "How good" in version.description
    assert "Not measured" not in version.description
    assert float(version.tags["skill_pct"]) < 0
    assert "had not been measured" not in mechdiff(*words, "--allow-pair-mismatch").output
    mechdiff("report-pass", "--pair", str(toy), "--allow-pair-mismatch")


def test_an_export_that_comes_back_moves_nothing(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    """The alias would go from the map that was measured to a copy that was not."""
    for k in ("2", "full"):
        site = ("--layer", "3", "--hook", "attn_out", "--alpha", "1", "--k", k)
        mechdiff("run", "--pair", str(toy), *site, "--promote", "--force")
        mechdiff("export", f"out-{k}", "--pair", str(toy))
        n_runs = len(client.search_runs(["1"]))
        shown = mechdiff("import", f"out-{k}/manifest.json").output
        assert "was already @champion" in shown
        assert len(client.search_runs(["1"])) == n_runs
    assert client.get_model_version_by_alias("toy-L3-attn_out", "champion").version == 2
