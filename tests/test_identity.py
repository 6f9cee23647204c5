"""What identifies a pair: commits of the hub, and a fingerprint of all that changes numbers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import toy as toys
from peft import LoraConfig, get_peft_model
from test_pairs import activations
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_base, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position

OLD, NEW = "a1" * 20, "b2" * 20


@pytest.fixture
def spec(toy: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy.parent, tmp_path / "pair")
    return tmp_path / "pair" / "toy.yaml"


def load(spec: Path, text: str = toys.SPEC, **options: Any) -> Pair:
    """The pair, without its models unless they are asked for: what identifies it needs none of them."""
    spec.write_text(text)
    return load_pair(PairSpec.load(str(spec)), **{"lazily": True, "device": "cpu", **options})


# --- the hub


class Hub:
    """A cache as huggingface_hub leaves it, made by hand: blobs, links to them, and refs."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def add(self, repository: str, commit: str, folder: Path, *refs: str) -> None:
        place = self.cache / f"models--{repository.replace('/', '--')}"
        snapshot = place / "snapshots" / commit
        for path in (path for path in folder.rglob("*") if path.is_file()):
            blob = place / "blobs" / f"{commit[:4]}-{path.name}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        for ref in refs:
            self.point(repository, ref, commit)

    def point(self, repository: str, ref: str, commit: str) -> None:
        path = self.cache / f"models--{repository.replace('/', '--')}" / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)


@pytest.fixture
def hub(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """org/tuned with two commits of other weights, main at the new one; nothing of it can be asked for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    made = Hub(tmp_path / "hub")
    made.add("org/tuned", OLD, spec.parent / "tuned", "v1")
    toys.write_model(tmp_path / "newer", toys.model(7))
    made.add("org/tuned", NEW, tmp_path / "newer", "main", "refs/pr/3")
    return made


def of_hub(revision: str | None = None) -> str:
    given = "" if revision is None else f", revision: '{revision}'"
    return toys.SPEC.replace("{model: tuned}", f"{{model: org/tuned{given}}}")


@pytest.mark.parametrize(
    ("revision", "commit"),
    [
        (None, NEW),
        ("main", NEW),
        ("refs/pr/3", NEW),
        ("v1", OLD),
        (OLD, OLD),
        (OLD[:7], OLD),
        (NEW[:12], NEW),
    ],
)
def test_a_revision_is_the_commit_that_it_means(
    hub: Hub, spec: Path, revision: str | None, commit: str
) -> None:
    pair = load(spec, of_hub(revision), lazily=False)
    assert pair.tuned.revision == f"org/tuned@{commit}"
    assert pair.spec.tuned.revision == commit
    expected = AutoModelForCausalLM.from_pretrained(hub.cache / "models--org--tuned/snapshots" / commit)
    found = pair.tuned.model.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in expected.state_dict().items())


def test_two_revisions_are_two_pairs(hub: Hub, spec: Path) -> None:
    old, new, main = (load(spec, of_hub(revision)).fingerprint for revision in ("v1", NEW, None))
    assert old != new == main


def test_a_moved_branch_is_another_pair(hub: Hub, spec: Path) -> None:
    before = load(spec, of_hub("main")).fingerprint
    hub.point("org/tuned", "main", OLD)
    after = load(spec, of_hub("main"))
    assert after.fingerprint != before
    assert after.tuned.revision.endswith(OLD)


def test_what_was_looked_up_is_what_is_loaded(hub: Hub, spec: Path) -> None:
    """A branch that moves between look-up and load moves nothing; nor does it where others load the pair."""
    text = of_hub("main").replace("{model: base}", "{model: org/tuned, revision: main}")
    pair = load(spec, text)
    hub.point("org/tuned", "main", OLD)
    late = pair.tuned.model.state_dict()["lm_head.weight"]
    assert torch.equal(late, toys.model(7).state_dict()["lm_head.weight"])
    assert torch.equal(load_base(pair).state_dict()["lm_head.weight"], late)
    assert load_pair(pair.spec, lazily=True, device="cpu").fingerprint == pair.fingerprint


@pytest.mark.parametrize("revision", ["v2", "c3" * 20, "c3c3c3c", "a", "../../x"])
def test_a_revision_that_is_not_known_is_refused(hub: Hub, spec: Path, revision: str) -> None:
    with pytest.raises(MechdiffError, match="Model org/tuned of pair 'toy' cannot be loaded") as caught:
        load(spec, of_hub(revision))
    assert "unknown" not in str(caught.value)
    load(spec, of_hub("v1"))


def test_a_ref_to_no_commit_is_refused(hub: Hub, spec: Path) -> None:
    hub.add("org/tuned", "newest", spec.parent / "tuned", "main")
    with pytest.raises(MechdiffError, match="Revision 'main' of org/tuned is of no known commit"):
        load(spec, of_hub())


def test_a_short_commit_of_two_is_refused(hub: Hub, spec: Path) -> None:
    hub.add("org/tuned", OLD[:12] + "0" * 28, spec.parent / "tuned")
    with pytest.raises(MechdiffError, match="cannot be loaded"):
        load(spec, of_hub(OLD[:7]))
    load(spec, of_hub(OLD[:13]))


def test_code_in_another_repository_is_refused_where_code_may_run(spec: Path) -> None:
    path = spec.parent / "tuned/config.json"
    entry = {"AutoModelForCausalLM": "org/code--modeling_x.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": entry}))
    load(spec)
    with pytest.raises(MechdiffError, match=r"takes code from another repository, .* into a local copy"):
        load(spec, toys.SPEC + "trust_remote_code: true\n")


# --- adapters


def write_adapter(folder: Path, base: Path, seed: int = 3) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["o_proj"], layers_to_transform=[2], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


ADAPTED = toys.SPEC.replace("{model: tuned}", "{adapter: lora}")
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def chatml(n_more: int = 0) -> PreTrainedTokenizerFast:
    """The toy tokenizer with ChatML's tokens: in place of words that it has, or as new ones."""
    tok = toys.tokenizer()
    if n_more:
        tok.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
        tok.chat_template = CHATML
    else:
        tok.chat_template = CHATML.replace("<|im_start|>", "<user>").replace("<|im_end|>", "<end>")
    return tok


@pytest.fixture
def adapted(spec: Path) -> Path:
    """A LoRA on a base without a chat template."""
    write_adapter(spec.parent / "lora", spec.parent / "base")
    (spec.parent / "base/chat_template.jinja").unlink()
    return spec


def ids(pair: Pair, role: str) -> tuple[int, ...]:
    return pair.tokens(role, pair.prompts_of("val", 1), Position.DECISION).ids[0]


def test_own_reads_the_adapters_own_tokenizer_and_template(adapted: Path) -> None:
    toys.tokenizer().save_pretrained(adapted.parent / "base")
    plain = load(adapted, ADAPTED)
    assert ids(plain, "tuned") == ids(plain, "base")
    tok = chatml()
    tok.save_pretrained(adapted.parent / "lora")
    pair = load(adapted, ADAPTED)
    text = pair.prompts_of("val", 1).prompts[0].text
    expected = tok.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    assert ids(pair, "tuned") == tuple(expected)
    assert ids(pair, "base") == ids(plain, "base")
    assert pair.fingerprint != plain.fingerprint


@pytest.mark.parametrize("form", ["whole", "jinja", "config"])
def test_a_base_without_a_template_under_an_adapter_that_brings_one(adapted: Path, form: str) -> None:
    lora = adapted.parent / "lora"
    if form == "whole":
        chatml().save_pretrained(lora)
    elif form == "jinja":
        (lora / "chat_template.jinja").write_text(str(chatml().chat_template))
    else:
        (lora / "tokenizer_config.json").write_text(json.dumps({"chat_template": chatml().chat_template}))
    says = (
        "The base tokenizer of toy has no chat template, .* set template: tuned for both .* or template: none"
    )
    with pytest.raises(MechdiffError, match=says):
        load(adapted, ADAPTED)
    pair = load(adapted, ADAPTED + "template: tuned\n", lazily=False)
    assert ids(pair, "base") == ids(pair, "tuned")
    assert ids(pair, "base")[0] == toys.SPECIAL.index("<user>")
    assert not torch.equal(activations(pair, "base"), activations(pair, "tuned"))
    assert ids(load(adapted, ADAPTED + "template: none\n"), "base") == ids(pair, "base")[2:-3]


def test_neither_side_has_a_template(adapted: Path) -> None:
    with pytest.raises(
        MechdiffError, match=r"The base and the tuned tokenizer of toy .*; set template: none"
    ):
        load(adapted, ADAPTED)


def test_a_tuned_model_with_a_template_over_a_base_without(spec: Path) -> None:
    (spec.parent / "base/chat_template.jinja").unlink()
    with pytest.raises(MechdiffError, match="set template: tuned for both"):
        load(spec)
    with pytest.raises(MechdiffError, match="template: base asks for; set template: tuned for both"):
        load(spec, toys.SPEC + "template: base\n")
    load(spec, toys.SPEC + "template: tuned\n")


def test_tokens_that_the_base_has_no_embeddings_for(adapted: Path) -> None:
    toys.tokenizer().save_pretrained(adapted.parent / "base")
    chatml(n_more=2).save_pretrained(adapted.parent / "lora")
    n = len(toys.tokenizer())
    for template in ("own", "tuned"):
        says = rf"tuned tokenizer gives token {n + 1} \('<\|im_end\|>'\) and the \w+ model has .* for {n}"
        with pytest.raises(MechdiffError, match=says + "; set template: base, or none"):
            load(adapted, ADAPTED + f"template: {template}\n")
    load(adapted, ADAPTED + "template: base\n")
    load(adapted, ADAPTED + "template: none\n")


def test_adapters_of_the_hub_are_pinned(hub: Hub, adapted: Path, tmp_path: Path) -> None:
    chatml().save_pretrained(adapted.parent / "lora")
    hub.add("org/lora", OLD, adapted.parent / "lora", "v1")
    write_adapter(tmp_path / "newer-lora", adapted.parent / "base", seed=4)
    (tmp_path / "newer-lora/chat_template.jinja").write_text(str(chatml().chat_template) + " well")
    hub.add("org/lora", NEW, tmp_path / "newer-lora", "main")
    text = ADAPTED.replace("lora}", "org/lora}") + "template: tuned\n"
    old = load(adapted, text.replace("org/lora", "org/lora, revision: v1"), lazily=False)
    new = load(adapted, text, lazily=False)
    assert old.tuned.revision.endswith(f"+org/lora@{OLD}")
    assert new.tuned.revision.endswith(f"+org/lora@{NEW}")
    assert old.fingerprint != new.fingerprint
    assert ids(new, "tuned") == (*ids(old, "tuned"), toys.tokenizer().convert_tokens_to_ids("well"))
    hub.point("org/lora", "main", OLD)
    assert load(adapted, text).fingerprint == old.fingerprint
    with pytest.raises(MechdiffError, match="Adapter org/lora of pair 'toy' cannot be loaded"):
        load(adapted, text.replace("org/lora", "org/lora, revision: v9"))


# --- the fingerprint


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def touch_up(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def other_weights(folder: Path) -> None:
    toys.write_model(folder / "tuned", toys.model(9))


def other_prompt(folder: Path) -> None:
    touch_up(folder / "test.jsonl", "does", "well does")


def index(folder: Path) -> None:
    (folder / "tuned/model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": other_weights,
    "index of weights": index,
    "configuration": lambda f: edit_json(f / "tuned/config.json", rope_theta=5000.0),
    "template": lambda f: (f / "tuned/chat_template.jinja").write_text(toys.TEMPLATE + " well"),
    "a special token that no prompt has": lambda f: edit_json(
        f / "tuned/tokenizer_config.json", eos_token="<end>"
    ),
    "a special token that the template reads": lambda f: edit_json(
        f / "tuned/tokenizer_config.json", bos_token="<pad>"
    ),
    "another template beside it": lambda f: (
        (f / "tuned/additional_chat_templates").mkdir(),
        (f / "tuned/additional_chat_templates/tool_use.jinja").write_text("x"),
    ),
    "vocabulary": lambda f: touch_up(f / "tuned/tokenizer.json", "verb7", "verb9"),
    "prompts": other_prompt,
    "dtype": lambda f: touch_up(f / "toy.yaml", "name: toy", "name: toy\ndtype: bfloat16"),
    "quantization": lambda f: touch_up(f / "toy.yaml", "name: toy", "name: toy\nquantization: 4bit"),
    "system": lambda f: touch_up(f / "toy.yaml", "name: toy", "name: toy\nsystem: well"),
    "reader": lambda f: touch_up(f / "toy.yaml", "name: toy", "name: toy\ntemplate: base"),
    "modules": lambda f: touch_up(f / "toy.yaml", "name: toy", "name: toy\nmodules: {layers: model.layers}"),
    "remote code": lambda f: touch_up(f / "toy.yaml", "name: toy", "name: toy\ntrust_remote_code: true"),
    "which is base": lambda f: touch_up(f / "toy.yaml", "base: {model: base}", "base: {model: tuned}"),
}


def fingerprint(folder: Path) -> str:
    return load_pair(PairSpec.load(str(folder / "toy.yaml")), lazily=True, device="cpu").fingerprint


@pytest.mark.filterwarnings("ignore:.*trust_remote_code")
def test_fingerprints_change_with_all_that_changes_numbers(toy: Path, tmp_path: Path) -> None:
    seen = {fingerprint(toy.parent): "nothing"}
    for what, change in CHANGES.items():
        folder = tmp_path / what.replace(" ", "-")
        shutil.copytree(toy.parent, folder)
        change(folder)
        found = fingerprint(folder)
        assert found not in seen, f"{what} and {seen[found]}"
        seen[found] = what


@pytest.mark.filterwarnings("ignore:.*trust_remote_code")
def test_fingerprints_change_with_local_code_that_may_run(spec: Path) -> None:
    def now(more: str = "") -> str:
        return load(spec, toys.SPEC + more).fingerprint

    (spec.parent / "tuned/sub").mkdir()
    (spec.parent / "tuned/sub/model.py").write_text("A = 1\n")
    plain, trusted = now(), now("trust_remote_code: true\n")
    (spec.parent / "tuned/sub/model.py").write_text("A = 2\n")
    assert now() == plain, "it does not run"
    assert len({plain, trusted, now("trust_remote_code: true\n")}) == 3


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_fingerprints_change_with_adapters(spec: Path, file: str, tmp_path: Path) -> None:
    write_adapter(spec.parent / "lora", spec.parent / "base")
    before = load(spec, ADAPTED).fingerprint
    if file == "adapter_config.json":
        edit_json(spec.parent / "lora" / file, lora_alpha=3)
    else:
        write_adapter(tmp_path / "other", spec.parent / "base", seed=8)
        shutil.copy(tmp_path / "other" / file, spec.parent / "lora" / file)
    assert load(spec, ADAPTED).fingerprint != before


SAME: dict[str, Callable[[Path], object]] = {
    "copied elsewhere": lambda f: None,
    "touched": lambda f: [os.utime(path, (1, 1)) for path in f.rglob("*")],
    "a README": lambda f: (f / "tuned/README.md").write_text("# Mine"),
    "another name": lambda f: touch_up(f / "toy.yaml", "name: toy", "name: other\ndescription: the same"),
    "a trainer's leavings": lambda f: (f / "tuned/training_args.json").write_text("{}"),
    "a device map": lambda f: touch_up(f / "toy.yaml", "name: toy", "name: toy\ndevice_map: cpu"),
    "code that does not run": lambda f: (f / "tuned/modeling_x.py").write_text("A = 1"),
    "order of splits": lambda f: touch_up(
        f / "toy.yaml",
        "{train: train.jsonl, val: val.jsonl, test: test.jsonl}",
        "{test: test.jsonl, val: val.jsonl, train: train.jsonl}",
    ),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_fingerprints_do_not_change_with_what_changes_no_number(
    toy: Path, spec: Path, change: Callable[[Path], object]
) -> None:
    change(spec.parent)
    assert fingerprint(spec.parent) == fingerprint(toy.parent)


def test_fingerprints_do_not_change_with_how_it_is_computed(toy: Path) -> None:
    spec = PairSpec.load(str(toy))
    options = EngineOptions(batch_size=3, memory_budget=1 << 30)
    assert load_pair(spec, options=options, device="cpu").fingerprint == fingerprint(toy.parent)


def test_two_days_give_one_fingerprint(spec: Path) -> None:
    for side in ("base", "tuned"):
        dated = "{{ bos_token }}{{ 'subject' ~ strftime_now('%f')[-1] }} "
        (spec.parent / side / "chat_template.jinja").write_text(
            toys.TEMPLATE.replace("{{ bos_token }}", dated)
        )
    assert load(spec).fingerprint == load(spec).fingerprint
