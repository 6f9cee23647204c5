"""Write docs/supported-models.md from the table that the engine's tests walk.

python scripts/supported_models.py          writes the page
python scripts/supported_models.py --check  fails if the page is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "supported-models.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "engine")]

from families import FAMILIES  # noqa: E402

INTRODUCTION = """\
# Supported models

Any decoder-only model of transformers 4.57 or 5 whose blocks can be found. The families below are tested: a
tiny random model of each, whose patched logits must be those of one plain forward hook per variant. The test
pads, uses prompts longer than the windows, replaces at all four hooks, at the last token and before it, with
every attention implementation listed, and allows 5e-6 of the largest logit in float32 (1e-12 in float64 for
models with layer norms). It passes with transformers 4.57.6 and 5.23.0, as do all tests of the engine and of
pairs, both on torch 2.13.0.

`attn_out` and `mlp_out` are what a sublayer adds to the residual stream. The table names the module of a
block whose output that is; `resid_pre` and `resid_post` are the block's own input and output.

| family | patched runs | attention | `attn_out` | `mlp_out` | |
| --- | --- | --- | --- | --- | --- |
"""

END = """
**Patched runs.** `sweep`: one recording forward, then all variants of all sites in one pass up the blocks.
`masked`: as many forwards, but every variant goes through all blocks. `naive`: one forward for each variant.
When a model is loaded the engine takes the first of sweep, masked and naive that gives the logits of naive on
a few short prompts. It warns when that is not
the sweep, and every run records which it was. Models loaded with flash or flex attention are run with SDPA.
The mean over a span (`--position content_mean`) is patched by masked, or by naive in models whose blocks see
a window of the prompt only.

**Placement.** Blocks may lie on several GPUs, in main memory or on disk (`device_map`), and weights may have
8 or 4 bits (`quantization`). Tests offload a tiny Llama to main memory, to disk and in part, and load one in
8 and 4 bits on the CPU; those that need two GPUs run where there are two. On two H100s, with torch 2.11 for
CUDA 13.0 and transformers 5.17, 62 tests passed, all of placement among them.

**Another model.** If its blocks are not recognised, the error says what there is. Name the modules in the
pair's spec:

```yaml
modules:
  layers: model.layers         # path of the list of blocks
  attention: self_attn         # names in a block
  mlp: mlp
  attn_out: post_attn_norm     # only where a sublayer's own output is not what is added
  mlp_out: post_mlp_norm
```

Loading then replaces the activation at every hook of a block and requires the logits to change, and
`mechdiff doctor` checks that the two sublayers add up to what the block does to the residual stream.
"""


def page() -> str:
    """The whole page."""
    rows = (
        f"| {f.name} | {f.mode} | {', '.join(f.attentions)} | `{f.attn_out}` | `{f.mlp_out}` | {f.note} |"
        for f in FAMILIES
    )
    return INTRODUCTION + "\n".join(rows) + "\n" + END


def main() -> int:
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE.name} is out of date; run python scripts/supported_models.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
