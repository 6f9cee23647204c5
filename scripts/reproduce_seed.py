"""Types the commands of the seed experiment (§2 to §5) for both shipped pairs, in one process.

Python needs ten seconds to import torch, transformers and MLflow; in one process it does so once.
"""

from __future__ import annotations

import shlex
import sys
import time

import click

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.errors import MechdiffError

PAIRS = ("cultural-demo", "cognitive-demo")
WINNERS = (("26", "attn_out", "0.3"), ("26", "resid_post", "0.3"), ("24", "resid_post", "0.7"))


def commands_for(pair: str) -> list[str]:
    """What to type for one pair."""
    return [
        # §2 and §3: the winners, pinned with their α, and measured once more.
        *(
            f"run --pair {pair} --layer {layer} --hook {hook} --alpha {alpha} --promote --force"
            for layer, hook, alpha in WINNERS
        ),
        f"report-pass --pair {pair}",
        # §4: drop over k, in the reading of rank that a fine-tune calls for and in the seed's own.
        f"sweep --pair {pair} --family update",
        f"sweep --pair {pair} --family content",
        # Around it: where the models differ at all.
        f"layers --pair {pair}",
        # What enters a block is what left the one before: resid_pre would show resid_post again.
        f"atlas --pair {pair} --hooks attn_out,mlp_out,resid_post",
        f"heads --pair {pair}",
        # §5.
        f"report --pair {pair} --out reports/{pair}.md",
    ]


def main() -> None:
    started = time.perf_counter()
    commands = [command for pair in PAIRS for command in commands_for(pair)]
    commands.append(f"compare {' '.join(PAIRS)} --out reports/comparison.md")
    for command in commands:
        print(f"\n[{time.perf_counter() - started:4.0f} s] $ mechdiff {command}", flush=True)
        try:
            cli.main(shlex.split(command), prog_name="mechdiff", standalone_mode=False)
        except (click.ClickException, MechdiffError) as error:
            sys.exit(f"Error: {error}")
    print(f"\nDone in {time.perf_counter() - started:.0f} s: open reports/*.html, or mlflow ui.")


if __name__ == "__main__":
    main()
