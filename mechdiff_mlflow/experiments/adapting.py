"""Adapters made from maps, and how close base comes to tuned with them, measured on the written files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.engine.model.chunks import in_chunks
from mechdiff_mlflow.engine.model.forward import PromptForward
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.steering import site_of
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.maps.affine import AffineMap, identity_map
from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.measures.bootstrap import Bootstrap, Interval
from mechdiff_mlflow.measures.metrics import next_token_divergences
from mechdiff_mlflow.models import map_adapters as adapters
from mechdiff_mlflow.models.attach import Tokens, attached
from mechdiff_mlflow.models.map_adapters import Form
from mechdiff_mlflow.models.pairs import Pair, load_base
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site

_BATCH = 32
CEILING = "ceiling"


@dataclass(frozen=True, slots=True)
class Closeness:
    """KL(model ‖ tuned) of next-token distributions over n prompts, in nats."""

    kl: Interval
    closer_pct: Interval  # 100·(1 − ΣKL/ΣKL of base alone), how far it goes; undefined if that is 0
    top1: float  # fraction of prompts whose most probable token is tuned's


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter and what it achieves.

    `closeness` is by what is done to base: `base`, `map at the decision token`, `adapter`, and `ceiling`,
    tuned's own activation put there at the decision token, the most a map can do at that token; it is empty
    when base and tuned have different vocabularies.
    """

    form: Form  # `peft` or `hook`
    site: Site  # where it acts
    target: str  # path of the module that it changes
    rank: int | None  # r of the LoRA; None for a hook
    alpha: float  # α of the map in it
    merges: bool  # whether PEFT can merge it into the base's weights, which needs a bias there
    split: str  # measured on
    n: int  # prompts of it
    closeness: dict[str, Closeness]
    leak: tuple[str, ...] | None  # what was chosen for the map on those prompts; None where nobody knows


def make_adapter(
    pair: Pair, the_map: AffineMap, folder: Path, *, form: Form, split: str, n: int | None
) -> AdapterRecord:
    """Write the map as an adapter of the pair's base model into an empty folder, and load it from there.

    Then measure it on the first n prompts of a split, all when n is None.

    Raises:
        MechdiffError: The site does not exist, the widths do not fit, PEFT is asked for where it cannot say
            it or is not installed, or there are too few prompts.
    """
    prompts, site = pair.prompts_of(split, n), site_of(the_map)
    with pair.base.switch():
        decoder = Decoder.of(pair.base.model, pair.modules)
        decoder.check(site)
        if (the_map.d_in, the_map.d_out) != (decoder.width, decoder.width):
            raise MechdiffError(
                f"A map from {the_map.d_in} to {the_map.d_out} dimensions cannot be an adapter of a model of "
                f"width {decoder.width}; it takes a base and a tuned model of one width."
            )
        found = None if form is Form.HOOK else adapters.last_linear(decoder, site)
        if found is None and form is Form.PEFT:
            raise MechdiffError(
                f"The activation at {site} is no linear layer's output in {type(pair.base.model).__name__}, "
                "so a LoRA cannot say it; use --form hook."
            )
        rank, merges = None, False
        if found is None:
            adapters.write_hook(the_map, decoder, site, folder)
            target = adapters.path_of(decoder.model, decoder.module(site))
        else:
            adapters.peft_library()
            target, linear = found
            lora = adapters.lora_of(the_map, linear)
            base, revision = pair.base.checkpoint.source, pair.spec.base.revision
            adapters.write_peft(lora, linear, target, folder, base_model=base, revision=revision)
            rank, merges = lora.rank, getattr(linear, "bias", None) is not None
    return AdapterRecord(
        form=Form.HOOK if found is None else Form.PEFT,
        site=site,
        target=target,
        rank=rank,
        alpha=the_map.alpha,
        merges=merges,
        split=split,
        n=len(prompts),
        closeness=_closeness(pair, the_map, site, folder, prompts),
        leak=selection.leaks(the_map, prompts),
    )


def _closeness(
    pair: Pair, the_map: AffineMap, site: Site, folder: Path, prompts: PromptSet
) -> dict[str, Closeness]:
    if not pair.tokenizers_agree:
        return {}
    with pair.tuned.switch():
        tuned = _next_token_logits(pair, "tuned", pair.tuned.model, prompts)
    with pair.tuned.engine() as engine:
        theirs = engine.capture(pair.tokens("tuned", prompts, Position.DECISION), [site])[site]
    with pair.base.switch():
        base_model = pair.base.model
        logits = {"base": _next_token_logits(pair, "base", base_model, prompts)}
        if logits["base"].shape != tuned.shape:
            return {}
        options: dict[str, Any] = {"tokens": Tokens.DECISION, "modules": pair.modules}
        with attached(the_map, base_model, site, **options):
            logits["map at the decision token"] = _next_token_logits(pair, "base", base_model, prompts)
        unchanged = identity_map(the_map.d_out)
        logits[CEILING] = _next_token_logits(
            pair,
            "base",
            base_model,
            prompts,
            lambda index: attached(unchanged, base_model, site, source=theirs[index], **options),
        )
    with _base_with(pair, folder) as adapted:
        logits["adapter"] = _next_token_logits(pair, "base", adapted, prompts)
    bootstrap = Bootstrap(groups=prompts.groups)
    apart = {name: next_token_divergences(rows, tuned) for name, rows in logits.items()}
    kl_base = apart["base"].kl_patched_clean.numpy()
    closeness = {}
    for name, found in apart.items():
        kl = found.kl_patched_clean.numpy()
        closeness[name] = Closeness(
            kl=stats.mean(kl, bootstrap=bootstrap),
            closer_pct=stats.drop_pct(kl_base, kl, bootstrap=bootstrap),
            top1=float(found.top1_agrees.mean()),
        )
    return closeness


@contextmanager
def _base_with(pair: Pair, folder: Path) -> Iterator[nn.Module]:
    """The base with the adapter; of its own where base and tuned share a module that has one already."""
    is_shared = pair.base.model is pair.tuned.model
    model = load_base(pair) if is_shared else pair.base.model
    with nullcontext() if is_shared else pair.base.switch(), adapters.loaded(folder, model) as adapted:
        yield adapted


def _next_token_logits(
    pair: Pair,
    role: str,
    model: nn.Module,
    prompts: PromptSet,
    attachment: Callable[[Tensor], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """[n, vocabulary], float32 on the CPU; `attachment` is entered around each chunk, given its prompts."""
    forward = PromptForward(Decoder.of(model, pair.modules))
    index, rows = [], []
    for chunk in in_chunks(pair.tokens(role, prompts, Position.DECISION), _BATCH, forward.device):
        with attachment(chunk.index):
            rows.append(forward(chunk).float().cpu())
        index.append(chunk.index)
    return torch.cat(rows)[torch.argsort(torch.cat(index))]
