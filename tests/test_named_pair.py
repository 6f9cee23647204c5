"""Pairs by the names of their models: which base is meant, what is written down, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import pandas as pd
import pytest
import torch
from cli.conftest import Invoke, empty_store, here, mechdiff  # noqa: F401
from peft import LoraConfig, get_peft_model
from test_identity import NEW, Hub
from transformers import AutoModelForCausalLM

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.named_pair import named_pair, pair_name_of, write_pair
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec, TunedModelSpec
from mechdiff_mlflow.spec.prompt_files import PromptFiles


@pytest.fixture
def models(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `base`, `tuned`, an `adapter` of that base, and prompts in one file."""
    shutil.copytree(toy.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    lines = [(tmp_path / f"{split}.jsonl").read_text() for split in ("train", "val", "test")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    return tmp_path


def says(folder: Path, base: str) -> None:
    """Have an adapter's configuration name its base."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


PROMPTS = PromptFiles.parse("p.jsonl")


@pytest.mark.parametrize("stated", ["{here}/base", "../base"])
def test_an_adapter_says_its_base(models: Path, stated: str) -> None:
    says(models / "adapter", stated.format(here=models))
    spec = named_pair("adapter", PROMPTS)
    assert spec.tuned.adapter == str(models / "adapter")
    assert Path(spec.base.model).resolve() == models / "base"
    assert spec.name == "adapter"
    pair = load_pair(spec, device="cpu")
    assert {split: len(one) for split, one in pair.prompts.items()} == {"train": 57, "val": 15, "test": 24}


def test_the_card_says_the_base_of_a_whole_model(models: Path) -> None:
    (models / "tuned" / "README.md").write_text(f"---\nbase_model:\n- {models / 'base'}\n---\n# A model\n")
    spec = named_pair("tuned", PROMPTS)
    assert spec.tuned.model == str(models / "tuned")
    assert spec.base.model == str(models / "base")


def test_what_is_typed_comes_first(models: Path) -> None:
    says(models / "adapter", "org/elsewhere")
    spec = named_pair("adapter", PROMPTS, base="base", name="mine")
    assert (spec.base.model, spec.name) == (str(models / "base"), "mine")


def test_ids_of_the_hub_are_looked_up_there(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = Hub(tmp_path / "hub")
    says(models / "adapter", "org/base")
    hub.add("org/adapter", NEW, models / "adapter", "main")
    hub.add("org/base", NEW, models / "base", "main")
    (models / "tuned" / "README.md").write_text("---\nbase_model: org/base\n---\n")
    hub.add("org/tuned", NEW, models / "tuned", "main")
    spec = named_pair("org/adapter", PROMPTS)
    assert (spec.base.model, spec.tuned.adapter, spec.name) == ("org/base", "org/adapter", "adapter")
    spec = named_pair("org/tuned", PROMPTS)
    assert (spec.base.model, spec.tuned.model) == ("org/base", "org/tuned")
    pair = load_pair(spec, device="cpu")
    assert pair.base.revision == f"org/base@{NEW}"


def test_one_of_several_adapters_is_chosen_by_its_name(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder and in a repository of the hub, each below its name; without one, a sentence names them."""
    says(models / "adapter", str(models / "base"))
    for name in ("kk", "ru"):
        shutil.copytree(models / "adapter", models / "several" / name)
    sentence = r"adapters below it \(kk, ru\); name one, e\.g\. {}:kk\."
    with pytest.raises(MechdiffError, match=sentence.format("several")):
        named_pair("several", PROMPTS)
    spec = named_pair("several:ru", PROMPTS)
    assert spec.tuned.adapter == str(models / "several" / "ru")
    assert load_pair(spec, device="cpu", lazily=True).tuned.revision.count("sha256:") == 2

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    Hub(tmp_path / "hub").add("org/several", NEW, models / "several", "main")
    spec = named_pair("org/several:ru", PROMPTS)
    assert (spec.tuned.adapter, spec.name) == ("org/several:ru", "several-ru")
    pair = load_pair(spec, device="cpu")
    assert pair.tuned.revision.endswith(f"+org/several:ru@{NEW}")
    assert pair.first_changed_layer() is None, "one module, whose adapter is switched"
    listed = ["kk/adapter_config.json", "ru/adapter_config.json", "README.md"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: listed)
    with pytest.raises(MechdiffError, match=sentence.format("org/several")):
        named_pair("org/several", PROMPTS)
    unnamed = spec.model_copy(update={"tuned": TunedModelSpec(adapter="org/several")})
    with pytest.raises(MechdiffError, match=sentence.format("org/several")):
        load_pair(unnamed, device="cpu")


@pytest.mark.parametrize(
    "card", ["# no front matter", "---\nlicense: mit\n---\n", "---\nbase_model: 3\n---\n"]
)
def test_a_model_that_does_not_say_its_base_is_refused(models: Path, card: str) -> None:
    (models / "tuned" / "README.md").write_text(card)
    with pytest.raises(MechdiffError, match=r"tuned does not say what it was tuned from .* with --base"):
        named_pair("tuned", PROMPTS)
    assert named_pair("tuned", PROMPTS, base="base").base.model == str(models / "base")


def test_malformed_files_end_in_one_sentence(models: Path) -> None:
    (models / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(MechdiffError, match=r"adapter_config\.json is not JSON"):
        named_pair("adapter", PROMPTS)
    (models / "tuned" / "README.md").write_text("---\nbase_model: [\n---\n")
    with pytest.raises(MechdiffError, match="The card of tuned cannot be loaded"):
        named_pair("tuned", PROMPTS)


def test_names_of_pairs() -> None:
    assert pair_name_of("org/Llama-3.1 8B (kk)") == "Llama-3-1-8B-kk"
    assert pair_name_of("models/x.Q4_1.gguf") == "x-Q4_1"
    assert pair_name_of("///") == "pair"


def test_a_written_spec_is_the_same_pair(models: Path) -> None:
    (models / "kept").mkdir()
    spec = named_pair("tuned", PROMPTS, base="base")
    files = write_pair(spec, models / "kept" / "mine.yaml")
    again = PairSpec.load(str(files[0]))
    assert again.read_prompts() == spec.read_prompts()
    pairs = [load_pair(one, device="cpu", lazily=True) for one in (spec, again)]
    assert pairs[0].fingerprint == pairs[1].fingerprint
    with pytest.raises(MechdiffError, match="exists already"):
        write_pair(spec, files[0])


def test_two_names_are_enough_for_the_doctor(models: Path, mechdiff: Invoke) -> None:  # noqa: F811
    words = ("--tuned", "adapter", "--base", "base", "--prompts", "p.jsonl")
    said = mechdiff("doctor", *words).output
    assert said.startswith("pair adapter, fingerprint ")
    assert "FAIL" not in said
    assert "--base is given without --tuned" in mechdiff("doctor", "--base", "base", code=1).output


def test_two_names_are_enough_for_a_run(models: Path, mechdiff: Invoke) -> None:  # noqa: F811
    says(models / "adapter", str(models / "base"))
    named = ("--tuned", "adapter", "--prompts", "p.jsonl")
    done = mechdiff("run", *named, "--layer", "3", "--alpha", "1")
    assert "adapter, 24 test prompts" in " ".join(done.output.split())
    spec = mechdiff("pair", "init", *named)
    assert "pair-test.jsonl" in spec.output
    assert (
        "adapter, 24 test prompts"
        in mechdiff("run", "--pair", "pair.yaml", "--layer", "3", "--alpha", "1").output
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--tuned", "adapter"), "--tuned adapter needs prompts to compare the models on"),
        (("--base", "base"), "--base is given without --tuned"),
        (("--prompts", "p.jsonl"), "--prompts is given without --tuned"),
        (("--tuned", "nothing/here", "--prompts", "p.jsonl"), "nothing/here does not say what it was tuned"),
        (("--tuned", "adapter", "--prompts", "none.jsonl", "--base", "base"), "none.jsonl does not exist"),
        (("--tuned", "adapter", "--prompts-from", "org/x", "--base", "base"), "org/x"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_any_weights(
    models: Path,
    mechdiff: Invoke,  # noqa: F811
    words: tuple[str, ...],
    says: str,
) -> None:
    assert says in " ".join(mechdiff("run", *words, "--layer", "3", code=1).output.split())


def test_a_data_set_is_the_source_of_its_prompts(
    models: Path,
    mechdiff: Invoke,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library is not needed to test what is done with its table."""
    table = pd.read_json(models / "p.jsonl", lines=True).rename(columns={"text": "question"})
    library = ModuleType("datasets")
    library.load_dataset = lambda name, split: SimpleNamespace(to_pandas=lambda: table)  # type: ignore[attr-defined]
    library.__spec__ = ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", library)
    named = ("--tuned", "tuned", "--base", "base", "--prompts-from", "org/questions:question")
    assert "24 test prompts" in " ".join(
        mechdiff("run", *named, "--layer", "3", "--alpha", "1").output.split()
    )
