"""The model card: what a stranger needs to know about a map, from what the map and its run say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechdiff_mlflow.maps import AffineMap

_QUALITY = {
    "KL_raw": "KL(patched ‖ clean) with the base activation as it is, nats",
    "KL_mapped": "the same with the mapped one, nats",
    "drop_pct": "100·(1 − KL_mapped/KL_raw)",
    "skill_pct": "100·(1 − KL_mapped/KL of the best control)",
    "noise_floor": "KL of putting the tuned model's own activation back, nats",
    "rho": "‖Y − Ŷ‖ / ‖Y − X‖",
}


def model_card(the_map: AffineMap, metrics: Mapping[str, float], uri: str = "path/to/this/directory") -> str:
    """Markdown: what the map is, how good it was measured to be, how to use it, where it comes from.

    Args:
        the_map: With its meta.
        metrics: Of the run that measured it; may be empty.
        uri: How a reader gets this very map.
    """
    meta = the_map.meta
    site = meta.get("site", "a site")
    of = f" of the pair {meta['pair']}" if "pair" in meta else ""
    lines = [
        f"# Base → tuned map at {site}",
        "",
        f"Sends the base model's activation at {site} to what the tuned model has there{of}: "
        "ŷ = α·((x − μ_base)·W + μ_tuned), "
        f"{the_map.d_in} → {the_map.d_out} dimensions, α = {the_map.alpha:g}.",
        "",
        "## How good",
        "",
        *_quality(metrics),
        "",
        "A drop alone does not show that a map is right: one fitted on shuffled pairs earns a drop wherever "
        "the unmapped activation is confidently wrong. Read the skill, measured against the best control.",
        "",
        "## How to use it",
        "",
        "```python",
        "import mechdiff_mlflow",
        f'the_map = mechdiff_mlflow.load_map("{uri}")',
        f"tuned_like = the_map(base_activations)  # [n, {the_map.d_in}] -> [n, {the_map.d_out}]",
        "```",
        "",
        '`mlflow models serve` works too; send `params: {"alpha": …}` for another α. The file `map.pt` holds '
        "plain tensors and loads with `torch.load(weights_only=True)`.",
        "",
        "## Where it comes from",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(key)} | {_cell(value)} |" for key, value in sorted(meta.items())),
        f"| sha256 of map.pt | {the_map.sha256()} |",
        "",
    ]
    return "\n".join(lines)


def _quality(metrics: Mapping[str, float]) -> list[str]:
    known = [(key, what) for key, what in _QUALITY.items() if key in metrics]
    if not known:
        return ["Not measured yet: no patched run has used this map."]
    rows = ["| | value | 95 % interval | meaning |", "|---|---|---|---|"]
    for key, what in known:
        low, high = metrics.get(f"ci/{key}_low"), metrics.get(f"ci/{key}_high")
        interval = f"{low:.4g} to {high:.4g}" if low is not None and high is not None else ""
        rows.append(f"| {key} | {metrics[key]:.4g} | {interval} | {what} |")
    return rows


def _cell(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
