"""Maps put to use from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import peft
import pytest
import torch
from cli.conftest import Invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechdiff_mlflow import load_map
from mechdiff_mlflow.experiments.adapting import AdapterRecord, Closeness
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.measures.stats import Interval
from mechdiff_mlflow.models.map_adapters import HOOK_FILES, Form
from mechdiff_mlflow.models.planted import plant_in
from mechdiff_mlflow.report.adapter import headline
from mechdiff_mlflow.spec.plant import Plant
from mechdiff_mlflow.spec.prompts import PromptSet, read_prompts
from mechdiff_mlflow.spec.sites import Hook, Site


def reached(estimate: float, low: float, high: float) -> str:
    way = Closeness(Interval(1.0, 0.9, 1.1, 0.95), Interval(estimate, low, high, 0.95), 0.5)
    closeness = {"adapter": way, "ceiling": way}
    where = (Form.PEFT, Site(2, Hook.ATTN_OUT), "o_proj", 2, 1.0, False, "test", 150)
    return headline(AdapterRecord(*where, closeness, ()))


def test_an_adapter_that_hardly_helps_says_so_first() -> None:
    assert reached(0.2, 0.1, 0.3).startswith(
        "**This adapter does next to nothing**: it takes base 0.2 [0.1, 0.3] % of the way to tuned, on 150"
    )
    assert reached(0.2, -0.1, 0.3).startswith("**Nobody can tell that this adapter helps**")
    assert reached(-3, -4, -2).startswith("**This adapter does harm**")
    assert reached(60, 50, 70).startswith("It takes base **60 [50, 70] %** of the way")


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
        ("run", "--pair", str(toy), *site, "--promote", "--force", *store),
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


def test_a_planted_low_rank_change_becomes_a_lora_of_its_rank_that_is_the_tuned_model(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    """Tuned is base with a rank-2 operator behind one projection: the adapter makes up for all of it."""
    folder = here / "planted"
    shutil.copytree(toy.parent, folder)
    tuned = AutoModelForCausalLM.from_pretrained(folder / "base")
    plant_in(Plant.parse("attn_out:L2:r2:gain3"), tuned.model.layers[2].self_attn)
    tuned.save_pretrained(folder / "tuned")
    pair, site = ("--pair", str(folder / "toy.yaml")), ("--layer", "2", "--hook", "attn_out")
    solver = ("--solver", "reduced_rank", "--ridge", "1e-9", "--k", "2", "--alpha", "1")
    mechdiff("run", *pair, *site, *solver, "--promote", "--force")
    shown = mechdiff("adapter", "--map", "toy-L2-attn_out@champion", "--to", "lora", *pair).output
    assert "a PEFT LoRA of rank 2 on model.layers.2.self_attn.o_proj, α = 1" in shown
    card = (here / "lora" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "the adapter, at every token" in line]
    kl, way = (float(cell.split()[0]) for cell in line.split("|")[2:4])
    assert kl < 1e-5
    assert way > 99.9
    assert "It takes base **100 [91.2, 100] %** of the way" in card
    assert "It takes base 100 [91.2, 100] % of the way" in shown
    config = json.loads((here / "lora" / "adapter_config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"]), "from any folder"
    (run,) = client.search_runs(["1"], "tags.`mechdiff.kind` = 'adapter'")
    assert (run.info.status, run.data.params["site"]) == ("FINISHED", "L2/attn_out")
    assert run.data.metrics["closer_pct/adapter"] > 99.9
    names = {item.path for item in client.list_artifacts(run.info.run_id, "adapter")}
    assert {"adapter/adapter_config.json", "adapter/README.md"} <= names
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ids = torch.tensor([[0, 8, 20, 9]])
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(base, str(here / "lora")).eval()
        torch.testing.assert_close(adapted(ids).logits, tuned(ids).logits, atol=2e-2, rtol=0)


def test_a_pair_whose_tuned_side_is_a_peft_adapter_itself(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    folder = here / "lora-pair"
    shutil.copytree(toy.parent, folder)
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    peft.get_peft_model(base, config).save_pretrained(folder / "tuned-lora")
    spec = toy.read_text().replace("{model: tuned}", "{adapter: tuned-lora}")
    (folder / "toy.yaml").write_text(spec)
    pair = ("--pair", str(folder / "toy.yaml"))
    mechdiff("run", *pair, "--layer", "3", "--hook", "attn_out", "--alpha", "1", "--promote", "--force")
    using = ("--map", "toy-L3-attn_out@champion", *pair)
    words = ("--prompt", PROMPTS[0], "--max-new-tokens", "4", "--json")
    (row,) = json.loads(mechdiff("steer", *using, *words).output)["continuations"]
    assert row["base"] == said(folder / "toy.yaml", "base", PROMPTS[0])
    assert row["kl_raw"] > 0
    (run,) = client.search_runs(["1"], "tags.`mechdiff.kind` = 'steer'")
    assert run.data.params["alpha"] == "1"
    file = client.download_artifacts(run.info.run_id, "continuations.json", str(here))
    assert PROMPTS[0] in Path(file).read_text()
    mechdiff("adapter", *using, "--to", "made")
    card = (here / "made" / "README.md").read_text()
    lines = [line.split("|") for line in card.splitlines() if line.startswith("|") and "[" in line]
    kls = {cells[1].strip(): float(cells[2].split()[0]) for cells in lines}
    clean = AutoModelForCausalLM.from_pretrained(folder / "base")
    made = peft.PeftModel.from_pretrained(clean, str(here / "made"))
    assert made.get_base_model().model.layers[3].self_attn.o_proj.r == {"default": 16}
    assert kls["the adapter, at every token"] != kls["nothing"]


def val_of(toy: Path) -> PromptSet:
    return read_prompts(toy.parent / "val.jsonl", "val")


def test_adapters_of_other_forms(toy: Path, here: Path, mechdiff: Invoke, map_file: Path) -> None:
    words = ("adapter", "--map", "map.pt", "--pair", str(toy), "--n", "8")
    mechdiff(*words, "--to", "a")
    hooked = mechdiff(*words, "--to", "b", "--form", "hook", "--split", "val").output
    assert "a hook module on model.layers.3.self_attn" in hooked
    assert "8 val prompts" in (here / "b" / "README.md").read_text()
    chosen = selection.recorded(load_map(map_file), selection.entry("alpha", val_of(toy)))
    chosen.save("chosen.pt")
    for split, leaks in (("val", True), ("test", False)):
        told = ("adapter", "--map", "chosen.pt", "--pair", str(toy), "--n", "8", "--split", split)
        shown = " ".join(mechdiff(*told, "--to", split).output.split())
        card = (here / split / "README.md").read_text()
        for text in (shown, card):
            assert ("Leak: alpha chosen on the reported prompts" in text) == leaks
            assert ("name a file of other prompts as `test`" in text) == leaks
    same = [row for row in (here / "a" / "README.md").read_text().splitlines() if row.startswith("| nothing")]
    assert same
    assert {path.name for path in (here / "b").iterdir()} == {*HOOK_FILES, "README.md"}
    assert not list(here.glob(".mechdiff-*"))


def test_errors_of_adapter_are_one_sentence(toy: Path, here: Path, mechdiff: Invoke, map_file: Path) -> None:
    def refusal(*words: str) -> str:
        found = mechdiff("adapter", "--map", "map.pt", "--pair", str(toy), *words, code=1).output
        return " ".join(found.split())

    (here / "full").mkdir()
    (here / "full" / "file").touch()
    assert "is not an empty directory" in refusal("--to", "full")
    assert "does not exist" in refusal("--to", "none/below")
    assert "were asked for and there are" in refusal("--to", "a", "--n", "1000")
    load_map(map_file).with_meta(site="L3/resid_post").save("post.pt")
    post = mechdiff(
        *["adapter", "--map", "post.pt", "--to", "a", "--form", "peft", "--pair"], str(toy), code=1
    ).output
    assert "use --form hook" in post
    assert not (here / "a").exists()


def test_errors_of_steer_are_one_sentence(toy: Path, mechdiff: Invoke, map_file: Path) -> None:
    def refusal(*words: str) -> str:
        return " ".join(mechdiff("steer", *words, code=1).output.split())

    toy_pair = ("--pair", str(toy))
    assert "The pair toy of map map.pt does not ship" in refusal("--map", "map.pt", "--prompt", "x")
    assert "A prompt is empty" in refusal("--map", "map.pt", "--prompt", " ", *toy_pair)
    other = refusal("--map", "map.pt", "--prompt", "x", "--pair", "cultural-demo")
    assert "takes 16 to 16 dimensions and L3/attn_out of this pair needs 128 to 128" in other
    load_map(map_file).with_meta(fingerprint="0" * 16).save("other.pt")
    assert "was fitted on pair 0000" in refusal("--map", "other.pt", "--prompt", "x", *toy_pair)
    assert "Cannot read the map" in refusal("--map", "none.pt", "--prompt", "x", *toy_pair)
    assert "No map is registered" in refusal("--map", "nobody@champion", "--prompt", "x", *toy_pair)
    bare = load_map(map_file)
    no_pair = AffineMap(bare.mean_in, bare.mean_out, bare.weight)
    no_pair.save("bare.pt")
    no_pair.with_meta(site="L3/attn_out").save("site.pt")
    assert "does not say its pair" in refusal("--map", "site.pt", "--prompt", "x")
    mismatch = ("--map", "bare.pt", "--prompt", "x", *toy_pair, "--allow-pair-mismatch")
    assert "does not say its site" in refusal(*mismatch)
