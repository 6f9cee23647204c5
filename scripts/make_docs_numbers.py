"""Measure every number and draw every figure of docs/is-my-number-real.md, on the shipped pairs.

    python scripts/make_docs_numbers.py

Needs no network and no GPU; some minutes on a laptop. Each number is one that `mechdiff run` or `mechdiff
sweep` logs. Blocks of the page between `<!-- numbers: NAME -->` and `<!-- end -->` are replaced.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from mechdiff_mlflow.experiments import PatchRecord, Protocol, Study  # noqa: E402
from mechdiff_mlflow.experiments.sweep import SweepSite, cells_of, least_ranks  # noqa: E402
from mechdiff_mlflow.measures.bootstrap import Interval  # noqa: E402
from mechdiff_mlflow.models.pairs import Pair, load_pair  # noqa: E402
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Rank  # noqa: E402
from mechdiff_mlflow.spec.sites import Hook, Site  # noqa: E402

PAGE = ROOT / "docs" / "is-my-number-real.md"
IMAGES = ROOT / "docs" / "img"
PAIRS = ("cultural-demo", "cognitive-demo")
SITES = tuple(Site(layer, hook) for layer in (24, 26) for hook in Hook)
RANKS = tuple(Rank(k) for k in (1, 2, 4, 8, 16, 32, 64, None))
FAMILIES = ("update", "content")
TARGET_PCT = 30.0
PERMUTATIONS = 99
PLANTED = "planted:attn_out:L14:r4:alpha0.7"
PLANTED_RANKS = tuple(Rank(k) for k in (1, 2, 3, 4, 5, 8, None))


def patched(study: Study, cells: Sequence[Cell]) -> list[PatchRecord]:
    return study.patch([fit.to_patch for fit in study.fit(cells)])


def table(pair: Pair) -> tuple[str, dict[tuple[Site, str], list[PatchRecord]]]:
    """Rows of the page's table, and the curves over k."""
    study = Study(pair, Protocol())
    cells = [
        cell
        for family in FAMILIES
        for cell in cells_of([SweepSite(site, None) for site in SITES], RANKS, [1.0], "reduced_rank", family)
    ]
    records = patched(study, cells)
    curves = {
        (site, family): [r for r in records if (r.cell.site, r.cell.family) == (site, family)]
        for site in SITES
        for family in FAMILIES
    }
    lines = []
    for site in SITES:
        (full,) = [record for record in curves[site, "update"] if record.cell.rank.k is None]
        ranks = []
        for family in FAMILIES:
            found = least_ranks(curves[site, family], [TARGET_PCT], seed=0)
            ranks.append(min_k(found[0].found.k, found[0].found.low, found[0].found.high) if found else "–")
        lines.append(
            f"| {pair.name} | {site} | {full.kl_raw:.3g} | {percent(full.drop_pct)} | "
            f"{percent(full.skill_pct)} | {full.null} | {p_value(full.p_holm)} | {' | '.join(ranks)} |"
        )
    return "\n".join(lines), curves


def percent(interval: Interval | None) -> str:
    if interval is None or interval.estimate is None:
        return "n/a"
    return f"{interval.estimate:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def min_k(*ranks: int | None) -> str:
    k, low, high = ("none" if rank is None else "full" if rank == 128 else str(rank) for rank in ranks)
    return f"{k} [{low}, {high}]"


def p_value(p: float | None) -> str:
    return "n/a" if p is None else f"{p:.2g}"


def worked(pair: Pair) -> tuple[str, PatchRecord]:
    """What `mechdiff run` says of L26/attn_out, with the traps beside it."""
    cell = Cell(Site(26, Hook.ATTN_OUT), "procrustes_scaled", "update", Rank(None), Alpha.parse("auto"))
    (record,) = patched(Study(pair, Protocol(permutations=PERMUTATIONS)), [cell])
    found = record.cos_vs_kl
    assert record.kl_raw is not None
    assert record.kl_difference is not None
    assert found is not None
    shuffled, null = record.controls["shuffled"], record.controls[record.null]
    rows = {
        "`KL_raw`": f"{record.kl_raw:.3f} nats",
        "`KL_mapped`": f"{record.kl_mapped:.3f} nats, α = {record.map.alpha:g}",
        "`noise_floor`": f"{record.noise_floor:.1g} nats",
        "`drop_pct`": f"{percent(record.drop_pct)} %",
        "drop of the maps fitted on shuffled pairs": f"{100 * (1 - shuffled / record.kl_raw):.1f} %",
        f"drop of the best control on val, `{record.null}`": f"{100 * (1 - null / record.kl_raw):.1f} %",
        "`skill_pct`": f"{percent(record.skill_pct)} %",
        f"`p/permutation`, {PERMUTATIONS} shuffles": p_value(record.p_permutation),
        "`p/raw`, against raw": p_value(record.p_raw),
        "`p/null`, against the best control": p_value(record.p_null),
        "`rho`": f"{record.rho:.3f}",
        "`cos_mean`": f"{record.cos_mean:.3f}",
        "`explained_variance`": f"{record.explained_variance:.3f}",
        "`cka` of base and tuned": f"{record.cka:.3f}",
        "`corr/pearson`": correlated(found.pearson),
        "`corr/spearman`": correlated(found.spearman),
        "`top1_agreement`": f"{record.top1_agreement:.3f}",
        "`delta_logprob`": f"{record.delta_logprob:.2f} nats",
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items()), record


def correlated(interval: Interval) -> str:
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def planted() -> tuple[str, dict[str, list[PatchRecord]]]:
    """drop%(k) of a change whose rank and α are known, with α inside the fit and after it."""
    pair = load_pair(PairSpec.load(PLANTED))
    site = SweepSite(Site(14, Hook.ATTN_OUT), 0.7)
    curves, lines = {}, []
    for alpha_fit, alpha in (("inside", 0.7), ("after", 1.0)):
        study = Study(pair, Protocol(alpha_fit=alpha_fit, ridge=1e-9))
        cells = cells_of([SweepSite(site.site, alpha)], PLANTED_RANKS, [], "reduced_rank", "update")
        records = curves[alpha_fit] = patched(study, cells)
        (least,) = least_ranks(records, [99.0], seed=0)
        ranks = (least.found.k, least.found.low, least.found.high)
        drops = " | ".join("n/a" if r.drop_pct is None else f"{r.drop_pct.estimate:.1f}" for r in records)
        (at_truth,) = [record.rho for record in records if record.cell.rank.k == 4]
        lines.append(f"| `{alpha_fit}`, α = {alpha:g} | {drops} | {min_k(*ranks)} | {at_truth:.1g} |")
    return "\n".join(lines), curves


def draw_rank(curves: dict[tuple[Site, str], list[PatchRecord]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    sites = (Site(26, Hook.ATTN_OUT), Site(24, Hook.RESID_POST))
    for axis, site in zip(axes, sites, strict=True):
        for family, colour in zip(FAMILIES, ("tab:blue", "tab:orange"), strict=True):
            draw_curve(axis, curves[site, family], family, colour)
        axis.axhline(TARGET_PCT, color="grey", lw=0.8, ls=":")
        axis.set(title=f"cultural-demo {site}", xlabel="k (full: 128)", ylim=(-20, 105))
        axis.legend(fontsize=8)
    axes[0].set_ylabel("drop %")
    save(figure, path)


def draw_curve(axis: plt.Axes, records: Sequence[PatchRecord], name: str, colour: str) -> None:
    ks = [record.cell.rank.k or 128 for record in records]
    drops = [record.drop_pct for record in records]
    axis.plot(ks, [d.estimate for d in drops], "o-", color=colour, ms=3, label=name)
    axis.fill_between(ks, [d.low for d in drops], [d.high for d in drops], color=colour, alpha=0.2)
    axis.set_xscale("log", base=2)


def draw_controls(record: PatchRecord, path: Path) -> None:
    bars = {"raw": record.kl_raw, **record.controls, "mapped": record.kl_mapped}
    ordered = sorted(bars, key=lambda name: bars[name], reverse=True)
    special = {"raw": "tab:grey", "mapped": "tab:blue", "shuffled": "tab:red", record.null: "tab:orange"}
    figure, axis = plt.subplots(figsize=(6, 3))
    axis.barh(ordered, [bars[n] for n in ordered], color=[special.get(n, "lightgrey") for n in ordered])
    axis.set(
        xlabel="mean KL(patched ‖ clean), nats", title="cultural-demo L26/attn_out: what a map has to beat"
    )
    save(figure, path)


def draw_planted(curves: dict[str, list[PatchRecord]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(4.5, 3))
    for name, records in curves.items():
        ks = [record.cell.rank.k or 128 for record in records]
        axis.loglog(ks, [record.rho for record in records], "o-", ms=3, label=f"α {name} the fit")
    axis.axvline(4, color="grey", lw=0.8, ls=":")
    axis.set(title="planted: rank 4, α = 0.7", xlabel="k (full: 128)", ylabel="ρ", yscale="log")
    axis.legend(fontsize=8)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def with_block(page: str, name: str, lines: str) -> str:
    """The page with the block of that name replaced."""
    pattern = rf"(<!-- numbers: {name} -->\n).*?(<!-- end -->)"
    replaced, n = re.subn(pattern, lambda m: f"{m[1]}{lines}\n{m[2]}", page, flags=re.DOTALL)
    if n != 1:
        raise SystemExit(f"The page has {n} blocks called {name}; it needs one.")
    return replaced


def main() -> None:
    torch.set_num_threads(1)
    plt.switch_backend("agg")
    pairs = {name: load_pair(PairSpec.load(name)) for name in PAIRS}
    head = (
        "| pair | site | KL_raw | drop % | skill % | best control | p (Holm) "
        "| min k, update | min k, content |\n"
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |\n"
    )
    tables, curves = zip(*(table(pair) for pair in pairs.values()), strict=True)
    draw_rank(curves[0], IMAGES / "drop-over-k.png")
    example, record = worked(pairs["cultural-demo"])
    draw_controls(record, IMAGES / "controls.png")
    truth, planted_curves = planted()
    draw_planted(planted_curves, IMAGES / "planted.png")
    ranks = " | ".join(f"k={rank}" for rank in PLANTED_RANKS)
    blocks = {
        "table": head + "\n".join(tables),
        "worked": "| | |\n| --- | --- |\n" + example,
        "planted": f"| fit, then drop % | {ranks} | min k for 99 % | ρ, k=4 |\n"
        + f"|{' --- |' * (len(PLANTED_RANKS) + 3)}\n{truth}",
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, lines in blocks.items():
        page = with_block(page, name, lines)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
