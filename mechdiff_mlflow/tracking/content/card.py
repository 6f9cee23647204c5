"""The model card: what a map is, how good, and how to use it, from what the map and its run say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.maps.selection import META
from mechdiff_mlflow.measures.bootstrap import Interval
from mechdiff_mlflow.report import wording
from mechdiff_mlflow.text import markdown, text_of

if TYPE_CHECKING:
    from mechdiff_mlflow.maps.affine import AffineMap

_QUALITY = {
    "KL_raw": "KL(patched ‖ clean) with the base activation as it is, nats",
    "KL_mapped": "the same with the mapped one, nats",
    "drop_pct": "100·(1 − KL_mapped/KL_raw)",
    "skill_pct": "100·(1 − KL_mapped/KL of the best control)",
    "noise_floor": "KL of putting the tuned model's own activation back, or of two clean runs if more, nats",
    "rho": "‖Y − Ŷ‖ / ‖Y − X‖: 0 is a perfect map, 1 no better than none",
    "top1_agreement": "prompts whose most probable next token stays",
}
_WIDE_HEADS = "| {} | value{} | 95 % interval{} | meaning |".format(*("\u00a0" * n for n in (34, 6, 14)))
"""MLflow's pages leave no room between the columns of a table; spaces that do not break do."""
PORT = 5001
"""In the examples of serving; 5000 is where `mlflow ui` listens."""


def model_card(
    the_map: AffineMap,
    metrics: Mapping[str, float],
    uri: str = "path/to/this/directory",
    facts: Mapping[str, object] | None = None,
) -> str:
    """Markdown: what the map is, how good it was measured to be, how to use it, where it comes from.

    Args:
        the_map: With its meta.
        metrics: Of the run that measured it; may be empty.
        uri: How a reader gets this very map.
        facts: What that run says beside its metrics: n, split, null, selection_leak.
    """
    meta = {markdown(key, 60): markdown(_text(value)) for key, value in the_map.meta.items()}
    facts = {key: markdown(value) for key, value in (facts or {}).items()}
    site = str(meta.get("site", "a site"))
    of = f" of the pair `{meta['pair']}`" if "pair" in meta else ""
    lines = [
        f"# Base → tuned map at {site}",
        "",
        f"Takes the *base* model's activation at {site}{_meaning(site)} to what the *tuned* "
        f"model{of} has there: ŷ = α·((x − μ_base)·W + μ_tuned), "
        f"{the_map.d_in} → {the_map.d_out} dimensions, α = {text_of(the_map.alpha)}.{_fitted(meta)}",
        "",
        "## How good",
        "",
        *_quality(the_map, metrics, facts),
        "",
        "## How to use it",
        "",
        *_use(the_map, uri),
        "",
        "## Where it comes from",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in sorted(meta.items()) if key != META),
        f"| chosen | {markdown(_chosen(the_map))} |",
        f"| sha256 of map.pt | {the_map.sha256()} |",
        "",
    ]
    return "\n".join(lines)


def version_card(
    the_map: AffineMap, metrics: Mapping[str, float], uri: str, facts: Mapping[str, object]
) -> str:
    """The model card under a line that says all, which is what a list of versions shows of it."""
    shown = [f"{key} {metrics[f'{key}_pct']:.1f} %" for key in ("drop", "skill") if f"{key}_pct" in metrics]
    settings = [
        f"α = {text_of(the_map.alpha)}",
        *(f"k = {markdown(the_map.meta[key])}" for key in ("k",) if key in the_map.meta),
    ]
    line = f"{', '.join(shown).capitalize() or 'Not measured'} ({', '.join(settings)})"
    _, _, rest = model_card(the_map, metrics, uri, facts).partition("\n\n")
    return f"{line}\n\n{rest}"


def collection_card(name: str, facts: Mapping[str, object]) -> str:
    """Markdown for the page of a registered map, whatever its versions."""
    facts = {key: markdown(value) for key, value in facts.items()}
    site = f"L{facts['layer']}/{facts['hook']}" if {"layer", "hook"} <= facts.keys() else "a site"
    pair = f" of the pair `{facts['pair']}`" if "pair" in facts else ""
    return "\n".join(
        [
            f"Affine maps from the *base* to the *tuned* model's activation at **{site}**{_meaning(site)}"
            f"{pair}. Put into the tuned model in place of its own activation, a good one leaves the next "
            "token as it is: what the fine-tune changed there is then what the map says.",
            "",
            "Each version is one map with its numbers; open one to see how good it is. The alias `champion` "
            "names the one to use; its files were read back and verified before the alias moved. Tags "
            "`mechdiff.move.…` of the versions are the history of an alias.",
            "",
            "```bash",
            f"mechdiff fetch {name}@champion -o map.pt  # verified",
            f'mechdiff steer --map {name}@champion --prompt "…"',
            "```",
            "",
            "```python",
            "import mechdiff_mlflow",
            f'the_map = mechdiff_mlflow.load_map("models:/{name}@champion")',
            "```",
        ]
    )


def _meaning(site: str) -> str:
    layer, _, hook = site.removeprefix("L").partition("/")
    return f", {wording.WHERE[hook].format(layer=layer)}," if hook in wording.WHERE else ""


def _fitted(meta: Mapping[str, object]) -> str:
    if "solver" not in meta:
        return ""
    family, k = meta.get("family"), str(meta.get("k", "full"))
    bound = {"update": "rank(W − I)", "content": "rank(W)"}.get(str(family), "the rank")
    rank = f"{bound} unbounded" if k == "full" else f"{bound} ≤ {k}"
    rows = f" on {meta['n_rows']} prompts" if "n_rows" in meta else ""
    where = {"decision": ", last token of the prompt", "last_content": ", last token of the user's text"}
    at = f"{rows}{where.get(str(meta.get('position')), '')}" if rows else ""
    return f" Fitted by `{meta['solver']}`, {rank},{at}." if at else f" Fitted by `{meta['solver']}`, {rank}."


def _chosen(the_map: AffineMap) -> str:
    """The record of choices in words, without the digests of the prompts."""
    record = selection.of(the_map)
    if record is None:
        return "not known"
    return "; ".join(f"{one['what']} on {selection.n_prompts(one)} prompts" for one in record) or "nothing"


def _quality(the_map: AffineMap, metrics: Mapping[str, float], facts: Mapping[str, object]) -> list[str]:
    known = [(key, what) for key, what in _QUALITY.items() if key in metrics]
    if not known:
        return ["Not measured yet: no patched run has used this map."]
    rows = [_WIDE_HEADS, "|---|---|---|---|"]
    for key, what in known:
        low, high = metrics.get(f"ci/{key}_low"), metrics.get(f"ci/{key}_high")
        interval = f"{low:.4g} to {high:.4g}" if low is not None and high is not None else ""
        rows.append(f"| {key} | {metrics[key]:.4g} | {interval} | {what} |")
    return [*_verdict(the_map, metrics, facts), "", *rows, "", "Intervals are bootstraps over the prompts."]


def _verdict(the_map: AffineMap, metrics: Mapping[str, float], facts: Mapping[str, object]) -> list[str]:
    """The numbers in words, and what they can hide."""
    on = f" on {facts['n']} {facts.get('split', '')} prompts".rstrip() if "n" in facts else ""
    lines = []
    if {"KL_raw", "KL_mapped", "drop_pct"} <= metrics.keys():
        lines.append(
            f"The base activation, put into the tuned model as it is, moves the next-token distribution by "
            f"{metrics['KL_raw']:.3g} nats; mapped, by {metrics['KL_mapped']:.3g}: the map is "
            f"{wording.against(_interval(metrics, 'drop_pct'), 'no map at all', 'drop')}{on}."
        )
    shuffled = "a map fitted on shuffled pairs earns one wherever the base is confidently wrong"
    if "skill_pct" in metrics:
        null = str(facts.get("null", "on val"))
        best = f"the best control (here `{null}`, {wording.CONTROL.get(null, wording.BLIND)})"
        lines.append(f"It is {wording.against(_interval(metrics, 'skill_pct'), best, 'skill')}.")
        lines.append(f"A drop alone does not show that a map is right: {shuffled}.")
    else:
        lines.append(
            f"A drop alone does not show that a map is right: {shuffled}. Measure its skill against the best "
            "control."
        )
    if str(facts.get("selection_leak", "")).lower() == "true":
        text = facts.get("selection", "Leak: choices made on the prompts reported; these numbers flatter it")
        lines.append(f"**{text}.**")
    elif (record := selection.of(the_map)) is None:
        lines.append(f"**{selection.sentence(None)}.**")
    elif together := [str(one["what"]) for one in record if str(one["what"]).startswith(selection.CELL)]:
        lines.append(
            f"It is a {', '.join(together)} reported together: taken for its numbers, they flatter it."
        )
    else:
        lines.append("No leak: nothing was chosen on the prompts reported.")
    return [" ".join(lines)]


def _interval(metrics: Mapping[str, float], key: str) -> Interval:
    return Interval(metrics[key], metrics.get(f"ci/{key}_low"), metrics.get(f"ci/{key}_high"), 0.95)


def _use(the_map: AffineMap, uri: str) -> list[str]:
    name = uri.removeprefix("models:/")
    fetch = [f"mechdiff fetch {name} -o map.pt   # verified; or .safetensors"] if "@" in name else []
    zeros = f"[0.0] * {the_map.d_in}"
    body = f'{{"inputs": [{zeros}]}}'
    return [
        "```python",
        "import mechdiff_mlflow as md",
        f'the_map = md.load_map("{uri}")',
        f"tuned_like = the_map(base_activations)  # [n, {the_map.d_in}] -> [n, {the_map.d_out}]",
        "",
        "with md.attached(the_map, base):  # a live transformers model: base acts as tuned there",
        "    base.generate(**inputs)",
        'with md.attached(the_map, tuned, source=base, tokens="decision"):  # the patch that was measured',
        "    tuned.generate(**inputs)",
        "```",
        "",
        "```bash",
        *fetch,
        f"mlflow models serve --env-manager local -p {PORT} \\",
        f"  -m {uri}",
        f"python -c 'import json; print(json.dumps({body}))' |",
        f"  curl -H 'Content-Type: application/json' -d @- http://127.0.0.1:{PORT}/invocations",
        "```",
        "",
        '`"params": {"alpha": 0.5}` beside `inputs` asks for another α. '
        "`map.pt` holds plain tensors: `torch.load(weights_only=True)` reads it without any of our code.",
    ]


def _text(value: object) -> str:
    return text_of(value) if isinstance(value, float) else str(value)
