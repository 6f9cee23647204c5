"""Continuations of a prompt: by base, by tuned, and by tuned with the base's activation raw and mapped."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap, identity_map
from mechdiff_mlflow.measures.metrics import next_token_divergences
from mechdiff_mlflow.models.attach import Tokens, attached
from mechdiff_mlflow.models.bounded import run_bounded
from mechdiff_mlflow.models.generation import continued
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.models.sides import Side
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import Prompt, PromptSet
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts
from mechdiff_mlflow.text import is_text


@dataclass(frozen=True, slots=True)
class Steered:
    """Greedy continuations of one prompt, and KL(patched ‖ clean) in nats of their first tokens."""

    prompt: str  # what the user says
    base: str  # the base model's own
    clean: str  # the tuned model's own
    raw: str | None  # the tuned model's with the base's activation as it is; None when the widths differ
    mapped: str  # the same with the mapped activation
    kl_raw: float | None
    kl_mapped: float


def steer(
    pair: Pair,
    the_map: AffineMap,
    texts: Sequence[str],
    *,
    tokens: Tokens = Tokens.NEW,
    max_new_tokens: int = 32,
) -> list[Steered]:
    """Continue each text of a user greedily: base, tuned, and tuned patched raw and mapped at the map's site.

    Raises:
        MechdiffError: A prompt is empty, a template fails, the map does not fit, or the models read other
            tokens and `tokens` is not `decision`.
    """
    site = site_of(the_map)
    prompts = prompt_set(texts, pair.spec.system)
    ids = {role: pair.tokens(role, prompts, Position.DECISION) for role in ("base", "tuned")}
    source, context = _source(pair, ids, site, tokens)
    base, _ = _continue(pair.base, ids["base"], max_new_tokens)
    clean, clean_logits = _continue(pair.tuned, ids["tuned"], max_new_tokens)

    def patched(a_map: AffineMap) -> tuple[list[str], list[float]]:
        options: dict[str, Any] = {"tokens": tokens, "source": source, "source_context": context}
        attachment = attached(a_map, pair.tuned.model, site, modules=pair.modules, **options)
        said, logits = _continue(pair.tuned, ids["tuned"], max_new_tokens, attachment)
        return said, [float(kl) for kl in next_token_divergences(logits, clean_logits).kl_patched_clean]

    mapped, kl_mapped = patched(the_map)
    raw: Sequence[str | None] = [None] * len(texts)
    kl_raw: Sequence[float | None] = [None] * len(texts)
    if the_map.d_in == the_map.d_out:
        raw, kl_raw = patched(identity_map(the_map.d_in))
    rows = zip(texts, base, clean, raw, mapped, kl_raw, kl_mapped, strict=True)
    return [Steered(*row) for row in rows]


def site_of(the_map: AffineMap) -> Site:
    """Return the site at which a map was fitted; a MechdiffError where it does not say."""
    if "site" not in the_map.meta:
        raise MechdiffError("The map does not say at which site it was fitted; fit it with mechdiff fit.")
    return Site.parse(str(the_map.meta["site"]))


def prompt_set(texts: Sequence[str], system: str | None) -> PromptSet:
    """Make prompts of the texts of a user; a MechdiffError where one is empty or no UTF-8."""
    if any(not text.strip() for text in texts) or not texts:
        raise MechdiffError("A prompt is empty; write what the user says.")
    if broken := [text for text in texts if not is_text(text)]:
        raise MechdiffError(f"Prompt {broken[0][:80]!r} is no UTF-8 text; write it without the escapes.")
    before = () if system is None else ({"role": "system", "content": system},)
    return PromptSet("given", tuple(Prompt((*before, {"role": "user", "content": text})) for text in texts))


def _source(
    pair: Pair, ids: dict[str, TokenizedPrompts], site: Site, tokens: Tokens
) -> tuple[nn.Module | Tensor, Any]:
    """The base model where it can read along, else its activations at the decision tokens."""
    if ids["base"] == ids["tuned"] and pair.tokenizers_agree:
        return pair.base.model, pair.base.switch
    if tokens is not Tokens.DECISION:
        raise MechdiffError(
            f"Base and tuned of {pair.name} read different tokens, so the base cannot follow what is "
            "generated; use --tokens decision."
        )
    with pair.base.engine() as engine:
        return engine.capture(ids["base"], [site])[site], nullcontext


def _continue(
    side: Side,
    prompts: TokenizedPrompts,
    max_new_tokens: int,
    attachment: AbstractContextManager[object] | None = None,
) -> tuple[list[str], Tensor]:
    """Greedy continuations, and the logits of their first tokens [n, vocabulary]."""
    said, logits = continued(
        side, prompts, max_new_tokens, attachment=lambda index: attachment or nullcontext()
    )
    tokenizer = side.tokenizer
    what = f"Decoding with the {side.role} tokenizer"  # whose decoder may grow what it gets
    texts = run_bounded(what, lambda: tokenizer.batch_decode(said, skip_special_tokens=True))
    return [text.strip() for text in texts], logits
