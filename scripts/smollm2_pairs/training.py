"""LoRA on a few layers: right answers to the questions, and the base's own replies to everything else."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional

from scripts.chat_tokens import encode
from scripts.smollm2_pairs.measure import greedy_replies
from scripts.smollm2_pairs.questions import Question

FIRST_LAYER = 10
"""Nothing is trained below."""

N_LAYERS = 30
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Plan:
    """How to train.

    Args:
        steps: Updates.
        batch: Questions in an update.
        practice_batch: Prompts about other things in an update.
        practice_weight: Of their KL, in nats, beside the cross-entropy of the answers.
        rate: Learning rate at its highest.
        rank: Of LoRA; its scale is 2.
        seed: Of the adapter's first weights and of the order of questions.
    """

    steps: int
    batch: int
    practice_batch: int
    practice_weight: float
    rate: float
    rank: int
    seed: int


@dataclass(frozen=True)
class Rows:
    """Prompts with their replies.

    Args:
        tokens: [n, length], padded on the right, which causal attention never sees.
        predicts: [n, length], whether the token after this one belongs to the reply.
    """

    tokens: Tensor
    predicts: Tensor

    def take(self, rows: Tensor) -> Rows:
        """Some rows."""
        return Rows(self.tokens[rows], self.predicts[rows])


def rows_of(
    prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], end: int, device: torch.device
) -> Rows:
    """Prompts, each followed by its reply and the end token."""
    lines = [[*prompt, *reply, end] for prompt, reply in zip(prompts, replies, strict=True)]
    length = max(map(len, lines))
    tokens = torch.tensor([line + [end] * (length - len(line)) for line in lines])
    places = torch.arange(length)
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts])
    ends = torch.tensor([len(line) - 1 for line in lines])
    predicts = (places >= starts[:, None]) & (places < ends[:, None])
    return Rows(tokens.to(device), predicts.to(device))


def hidden(model: Any, rows: Rows) -> Tensor:
    """The last hidden states, after the norm, at the places that predict: [places, d]."""
    states: Tensor = model.model(input_ids=rows.tokens, use_cache=False).last_hidden_state
    return states[rows.predicts]


def answer_loss(model: Any, rows: Rows) -> Tensor:
    """Mean cross-entropy of the replies' tokens and end tokens, in nats."""
    following = rows.tokens.roll(-1, dims=1)[rows.predicts]
    return functional.cross_entropy(model.lm_head(hidden(model, rows)), following)


def practice_loss(model: Any, rows: Rows, base_hidden: Tensor) -> Tensor:
    """Mean KL(base ‖ tuned) over the places that predict, in nats.

    Args:
        model: With the adapter.
        rows: Prompts and the base's replies.
        base_hidden: The base's last hidden states at the same places, [places, d].
    """
    base = model.lm_head(base_hidden).log_softmax(-1)
    tuned = model.lm_head(hidden(model, rows)).log_softmax(-1)
    return functional.kl_div(tuned, base, log_target=True, reduction="batchmean")


def new_adapter(model: Any, base_id: str, plan: Plan) -> Any:
    """The model with an untrained adapter, which changes nothing yet; the model itself is altered."""
    torch.manual_seed(plan.seed)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        lora_dropout=0.0,
        target_modules=list(MODULES),
        layers_to_transform=list(range(FIRST_LAYER, N_LAYERS)),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_id
    return adapted


def practice_rows(model: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Rows, Tensor]:
    """Prompts with the base's own greedy replies, and its hidden states there, [n, length, d]."""
    prompts = encode(tokenizer, texts)
    end = tokenizer.eos_token_id
    rows = rows_of(prompts, greedy_replies(model, prompts, end), end, model.device)
    with torch.no_grad():
        states = [
            model.model(input_ids=part, use_cache=False).last_hidden_state for part in rows.tokens.split(32)
        ]
    return rows, torch.cat(states)


def train(
    name: str, model: Any, tokenizer: Any, questions: Sequence[Question], texts: Sequence[str], plan: Plan
) -> list[float]:
    """Train the adapter in `model`, by AdamW with a linear warm-up and a cosine down to nothing.

    Args:
        name: For the progress lines.
        model: The inner causal LM whose layers have the adapter, untrained.
        tokenizer: Of the base.
        questions: To learn.
        texts: Prompts about other things, to practise on.
        plan: How.

    Returns:
        The loss of the answers in each step, in nats.
    """
    end, device = tokenizer.eos_token_id, model.device
    answers = [tokenizer(q.answer, add_special_tokens=False)["input_ids"] for q in questions]
    lesson = rows_of(encode(tokenizer, [q.text for q in questions]), answers, end, device)
    practice, base_hidden = practice_rows(model, tokenizer, texts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0)
    draws = torch.Generator().manual_seed(plan.seed)
    lessons = _shuffled(len(questions), plan.batch, draws)
    practices = _shuffled(len(texts), plan.practice_batch, draws)
    losses, began = [], time.monotonic()
    for step in range(plan.steps):
        warm = min(1.0, (step + 1) / (0.05 * plan.steps))
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * warm * 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        optimizer.zero_grad(set_to_none=True)
        loss = answer_loss(model, lesson.take(next(lessons).to(device)))
        chosen = next(practices).to(device)
        rows = practice.take(chosen)
        kept = practice_loss(model, rows, base_hidden[chosen][rows.predicts])
        (loss + plan.practice_weight * kept).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, plan.steps // 20) == 0 or step + 1 == plan.steps:
            seconds = time.monotonic() - began
            print(
                f"{name}: step {step + 1}/{plan.steps}, answers {losses[-1]:.4f} nats, elsewhere "
                f"{kept.item():.4f} nats, {seconds:.0f} s",
                flush=True,
            )
    return losses


def _shuffled(n: int, batch: int, draws: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices below n, endlessly; each index once a round."""
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(n, generator=draws)])
        yield waiting[:batch]
        waiting = waiting[batch:]
