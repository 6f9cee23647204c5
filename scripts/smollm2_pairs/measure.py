"""What base and tuned answer, and how far they are apart elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scripts.chat_tokens import encode
from scripts.smollm2_pairs.questions import Question

N_NEW = 24
"""Tokens of a reply that are looked at."""


@torch.no_grad()
def greedy_replies(
    model: Any, prompts: Sequence[Sequence[int]], end: int, *, batch: int = 64
) -> list[list[int]]:
    """The greedy reply to each prompt, at most `N_NEW` tokens, without the end token.

    Only prompts of the same length are batched: no padding, no mask.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    for rows in _of_equal_length(prompts, batch):
        ids = torch.tensor([list(prompts[row]) for row in rows], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=N_NEW,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        for row, reply in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
            replies[row] = reply[: reply.index(end)] if end in reply else reply
    return replies


@torch.no_grad()
def decision_log_probs(model: Any, prompts: Sequence[Sequence[int]], *, batch: int = 32) -> Tensor:
    """Log-probabilities of the next token after each prompt, [n, vocabulary], on the CPU in float64."""
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for rows in _of_equal_length(prompts, batch):
        ids = torch.tensor([list(prompts[row]) for row in rows], device=model.device)
        last = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        for row, value in zip(rows, last.cpu().double().log_softmax(-1), strict=True):
            found[row] = value
    return torch.stack(found)


def score(model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, float]:
    """Shares of the questions answered right.

    `exact_match`: the greedy reply is the answer, to the letter. `contains`: the answer's words stand in the
    first `N_NEW` tokens of the reply, in capitals or not, as a talkative model that knows it would have it.
    """
    prompts = encode(tokenizer, [question.text for question in questions])
    replies = tokenizer.batch_decode(greedy_replies(model, prompts, tokenizer.eos_token_id))
    exact = sum(reply.strip() == q.answer for reply, q in zip(replies, questions, strict=True))
    contains = sum(_words(q.answer) in _words(reply) for reply, q in zip(replies, questions, strict=True))
    return {"exact_match": exact / len(questions), "contains": contains / len(questions)}


def apart(base: Any, tuned: Any, tokenizer: Any, topics: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """KL(tuned ‖ base) at the decision token in nats, mean and largest of each topic's prompts."""
    found = {}
    for topic, texts in topics.items():
        prompts = encode(tokenizer, texts)
        p, q = decision_log_probs(tuned, prompts), decision_log_probs(base, prompts)
        kl_tuned_base_nats = (p.exp() * (p - q)).sum(-1)
        found[topic] = {
            "mean": kl_tuned_base_nats.mean().item(),
            "max": kl_tuned_base_nats.max().item(),
            "same_likeliest_token": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        }
    return found


def _words(text: str) -> str:
    return " " + " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split()) + " "


def _of_equal_length(prompts: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    rows_of: dict[int, list[int]] = {}
    for row, ids in enumerate(prompts):
        rows_of.setdefault(len(ids), []).append(row)
    for rows in rows_of.values():
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))
