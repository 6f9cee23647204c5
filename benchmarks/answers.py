"""What a token more of an answer costs in a sweep: the bound is 1.3 times T one-token sweeps.

Compared are marginal costs, of V variants at a site beyond a recorded clean run, with the patch at the
decision token and at every token; on a CPU in processor time, which other processes do not lengthen.

    python benchmarks/answers.py --device cpu --out benchmarks/results/answers.md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mechdiff_mlflow.engine import PatchEngine, VariantGroup
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import Answers, TokenizedPrompts

TOKENS, BOUND = (1, 4, 16), 1.3


def seconds(
    engine: PatchEngine, prompts: TokenizedPrompts, site: Site, n_variants: int, rounds: int
) -> float:
    """The least time of scoring variants of recorded prompts."""
    recorded, device = engine.record(prompts, [site]), engine.forward.device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    noise = torch.linspace(0.5, 1.5, n_variants, device=device).view(1, -1, 1)
    group = VariantGroup(site, lambda index, clean: clean.unsqueeze(1) * noise.to(clean.dtype), n_variants)
    times = []
    for _ in range(rounds + 1):
        started = clock()
        engine.score(recorded, [group])
        times.append(clock() - started)
    return min(times)


def main() -> None:
    """Print a table, and write it where that is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--variants", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(args.device)
    engine, site = PatchEngine(model, batch_size=32), Site(args.layers // 2, Hook.ATTN_OUT)
    rows = torch.randint(args.vocabulary, (args.prompts, 64 + max(TOKENS)))
    plain = TokenizedPrompts(tuple(map(tuple, rows[:, :64].tolist())), (63,) * args.prompts)
    one = seconds(engine, plain, site, args.variants, args.rounds)
    about = f"{args.layers} layers of width {args.width}, vocabulary {args.vocabulary}, {args.device}"
    work = f"{args.prompts} prompts of 64 tokens, {args.variants} variants at {site}"
    said = [
        f"{about}, engine {engine.mode}; {work}: {one:.3f} s for one token.",
        "",
        "| T | patch at | seconds | times T one-token sweeps | bound |",
        "| --- | --- | --- | --- | --- |",
    ]
    for n_tokens in TOKENS:
        ids = tuple(map(tuple, rows[:, 64 : 64 + n_tokens].tolist()))
        for each in (False, True):
            prompts = plain.answered(Answers(ids, n_tokens, each))
            took = seconds(engine, prompts, site, args.variants, args.rounds)
            ratio = took / one / n_tokens
            where = "answer" if each else "decision"
            said.append(f"| {n_tokens} | {where} | {took:.3f} | {ratio:.2f} | {BOUND} |")
    print("\n".join(said))
    if args.out is not None:
        args.out.write_text("# What an answer costs\n\n" + "\n".join(said) + "\n")


if __name__ == "__main__":
    main()
