"""Maps put to use from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli.conftest import Invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechdiff_mlflow import load_map
from mechdiff_mlflow.maps import AffineMap

PROMPTS = ("does subject3 verb2 subject5", "does subject1 verb7 subject2 well well")
STEER = ("steer", "--max-new-tokens", "4", *(word for text in PROMPTS for word in ("--prompt", text)))


@pytest.fixture(scope="module")
def fitted(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of the toy pair at L3/attn_out."""
    from click.testing import CliRunner

    from mechdiff_mlflow.cli import cli

    folder = tmp_path_factory.mktemp("fitted")
    store = ("--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}")
    site = ("--layer", "3", "--hook", "attn_out", "--alpha", "1", "--k", "4")
    for words in (
        ("run", "--pair", str(toy), *site, "--promote", *store),
        ("fetch", "toy-L3-attn_out@champion", "-o", str(folder / "map.pt"), *store),
    ):
        result = CliRunner().invoke(cli, list(words))
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def map_file(fitted: Path, here: Path) -> Path:
    """A copy of the map in `here`."""
    return Path(shutil.copy(fitted / "map.pt", here))


def said(toy: Path, side: str, text: str) -> str:
    """What one model says, prompt by prompt, without a batch."""
    model = AutoModelForCausalLM.from_pretrained(toy.parent / side)
    tokenizer = AutoTokenizer.from_pretrained(toy.parent / side)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("tokens", ["new", "decision"])
def test_steer_says_what_each_model_says(toy: Path, mechdiff: Invoke, map_file: Path, tokens: str) -> None:
    shown = mechdiff(*STEER, "--map", "map.pt", "--pair", str(toy), "--tokens", tokens, "--json").output
    found = json.loads(shown)
    assert (found["site"], found["alpha"], found["pair"]) == ("L3/attn_out", 1.0, "toy")
    rows = found["continuations"]
    for text, row in zip(PROMPTS, rows, strict=True):
        assert row["prompt"] == text
        assert (row["base"], row["clean"]) == (said(toy, "base", text), said(toy, "tuned", text))
    assert any(row["kl_raw"] > row["kl_mapped"] > 0 for row in rows)


def test_steer_takes_a_registered_map_and_another_alpha(fitted: Path, toy: Path, mechdiff: Invoke) -> None:
    store = ("--tracking-uri", f"sqlite:///{fitted / 'mlflow.db'}")
    words = (*STEER, "--map", "toy-L3-attn_out@champion", "--pair", str(toy), *store)
    table = mechdiff(*words).output
    assert "tuned (clean)" in table
    assert "subject3" in table
    own, other = (json.loads(mechdiff(*words, "--json", *more).output) for more in ((), ("--alpha", "0.2")))
    assert other["alpha"] == 0.2
    assert own["continuations"][0]["kl_mapped"] != other["continuations"][0]["kl_mapped"]
    assert own["continuations"][0]["kl_raw"] == other["continuations"][0]["kl_raw"]


def test_steer_with_models_that_read_other_tokens(toy: Path, mechdiff: Invoke, map_file: Path) -> None:
    """Their decision tokens still correspond; what follows does not."""
    other = map_file.parent / "other"
    shutil.copytree(toy.parent, other)
    config = json.loads((other / "base" / "tokenizer_config.json").read_text())
    template = (other / "base" / "chat_template.jinja").read_text()
    (other / "base" / "chat_template.jinja").write_text(
        template.replace("{{ m.content }}", "well {{ m.content }}")
    )
    assert "chat_template" not in config
    words = (*STEER, "--map", "map.pt", "--pair", str(other / "toy.yaml"), "--allow-pair-mismatch")
    assert "use --tokens decision" in mechdiff(*words, code=1).output
    rows = json.loads(mechdiff(*words, "--tokens", "decision", "--json").output)["continuations"]
    assert all(row["kl_mapped"] > 0 for row in rows)


def test_errors_of_steer_are_one_sentence(toy: Path, mechdiff: Invoke, map_file: Path) -> None:
    def refusal(*words: str) -> str:
        return " ".join(mechdiff("steer", *words, code=1).output.split())

    toy_pair = ("--pair", str(toy))
    assert "The pair toy of map map.pt does not ship" in refusal("--map", "map.pt", "--prompt", "x")
    assert "A prompt is empty" in refusal("--map", "map.pt", "--prompt", " ", *toy_pair)
    assert "was fitted on pair" in refusal("--map", "map.pt", "--prompt", "x", "--pair", "cultural-demo")
    assert "Cannot read the map" in refusal("--map", "none.pt", "--prompt", "x", *toy_pair)
    assert "No map is registered" in refusal("--map", "nobody@champion", "--prompt", "x", *toy_pair)
    bare = load_map(map_file)
    AffineMap(bare.mean_in, bare.mean_out, bare.weight).save("bare.pt")
    assert "does not say its pair" in refusal("--map", "bare.pt", "--prompt", "x")
    mismatch = ("--map", "bare.pt", "--prompt", "x", *toy_pair, "--allow-pair-mismatch")
    assert "does not say at which site" in refusal(*mismatch)
