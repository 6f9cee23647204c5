"""The protocol of docs/method.md written out slowly: plain hooks, dense float64, one prompt at a time.

It shares no code with the package: models, tokenizers and prompts are read by their own libraries, and every
choice is made as the page says it. Only the random rotation, whose axes are arbitrary, is given from outside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.dense_reference import dense_weight, power, shrunk_covariance

HOOKS = ("resid_pre", "attn_out", "mlp_out", "resid_post")
SHRINK = 0.05


@dataclass(frozen=True)
class PlainMap:
    """ŷ = α·((x − μ_base)·W + μ_tuned)."""

    weight: Tensor
    mean_base: Tensor
    mean_tuned: Tensor
    alpha: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.alpha * ((x - self.mean_base) @ self.weight + self.mean_tuned)

    def scaled(self, alpha: float) -> PlainMap:
        return PlainMap(self.weight, self.mean_base, self.mean_tuned, alpha)


@contextmanager
def hooked(block: Any, hook: str, act: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While open, `act` sees the activations [1, tokens, d] at a hook of a block, and may give others."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = act(args[0])
        return None if changed is None else (changed, *args[1:])

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        changed = act(first)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    module = {"attn_out": block.self_attn, "mlp_out": block.mlp}.get(hook, block)
    handle = (
        module.register_forward_pre_hook(before)
        if hook == "resid_pre"
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


@dataclass
class PlainPair:
    """Both models of a pair spec, loaded by transformers in float64, and its prompts as token ids."""

    spec: Path
    _activations: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    _log_probs: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)
    _ids: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = yaml.safe_load(self.spec.read_text())
        folder = self.spec.parent
        self.models, self.tokenizers = {}, {}
        for role in ("base", "tuned"):
            place = folder / found[role]["model"]
            self.models[role] = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64).eval()
            self.tokenizers[role] = AutoTokenizer.from_pretrained(place)
        self.texts = {
            split: [json.loads(line)["text"] for line in (folder / name).read_text().splitlines()]
            for split, name in found["prompts"].items()
        }
        self.n_layers = len(self.models["tuned"].model.layers)

    def ids(self, role: str, split: str, n: int | None = None) -> list[Tensor]:
        """Token ids of each prompt, templated, up to where the answer begins."""
        if (role, split) not in self._ids:
            self._ids[role, split] = self._tokenized(role, split)
        return self._ids[role, split][:n]

    def _tokenized(self, role: str, split: str) -> list[Tensor]:
        return [
            torch.tensor(
                [
                    self.tokenizers[role].apply_chat_template(
                        [{"role": "user", "content": text}],
                        add_generation_prompt=True,
                        return_dict=True,
                    )["input_ids"]
                ]
            )
            for text in self.texts[split]
        ]

    def _block(self, role: str, layer: int) -> nn.Module:
        return self.models[role].model.layers[layer]

    def activations(self, role: str, split: str, layer: int, hook: str, n: int | None = None) -> Tensor:
        """At the decision token, [n, d]."""
        key = (role, split, layer, hook, n)
        if key not in self._activations:
            rows: list[Tensor] = []

            def keep(x: Tensor) -> None:
                rows.append(x[0, -1].clone())

            with torch.no_grad(), hooked(self._block(role, layer), hook, keep):
                for ids in self.ids(role, split, n):
                    self.models[role](ids)
            self._activations[key] = torch.stack(rows)
        return self._activations[key]

    def log_probs(self, split: str, n: int | None = None) -> Tensor:
        """Of the tuned model's next token, untouched, [n, vocabulary]."""
        if (split, n) not in self._log_probs:
            with torch.no_grad():
                self._log_probs[split, n] = torch.stack(
                    [
                        self.models["tuned"](ids).logits[0, -1].log_softmax(-1)
                        for ids in self.ids("tuned", split, n)
                    ]
                )
        return self._log_probs[split, n]

    def patched_log_probs(self, split: str, layer: int, hook: str, rows: Tensor) -> Tensor:
        """The same with `rows` [n, d] in place of the site's own activation at the decision token."""
        found = []
        for ids, row in zip(self.ids("tuned", split), rows, strict=True):

            def put(x: Tensor, row: Tensor = row) -> Tensor:
                x = x.clone()
                x[0, -1] = row
                return x

            with torch.no_grad(), hooked(self._block("tuned", layer), hook, put):
                found.append(self.models["tuned"](ids).logits[0, -1].log_softmax(-1))
        return torch.stack(found)


def kl(p: Tensor, q: Tensor) -> np.ndarray:
    """KL(p ‖ q) of each row of log-probabilities, nats [n]."""
    return (p.exp() * (p - q)).sum(-1).numpy()


@dataclass
class PlainSite:
    """One site of a pair under one protocol.

    Args:
        pair: The pair.
        layer: Of the site.
        hook: Of the site.
        solver: Of `benchmarks.dense_reference`.
        family: `update` or `content`.
        n_train: Prompts fitted on; None is all.
        random: W of the random rotation [d, d], whose axes are arbitrary.
        settings: Of the solver.
    """

    pair: PlainPair
    layer: int
    hook: str
    solver: str = "procrustes_scaled"
    family: str = "update"
    n_train: int | None = None
    random: Tensor | None = None
    settings: dict[str, object] = field(default_factory=dict)

    def rows(self, role: str, split: str) -> Tensor:
        n = self.n_train if split == "train" else None
        return self.pair.activations(role, split, self.layer, self.hook, n)

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.rows("base", "train"), self.rows("tuned", "train")

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        return self.train[0].mean(0), self.train[1].mean(0)

    def fitted(self, rank: int | None, off_span: str) -> PlainMap:
        weight = dense_weight(self.solver, *self.train, self.family, rank, off_span, **self.settings)
        return PlainMap(weight, *self.means)

    def offers(self, rank: int | None, alphas: Sequence[float]) -> dict[tuple[str, float], PlainMap]:
        """What val chooses among: every α, and for full maps that leave room the rule off the span."""
        own = "nearest_identity" if self.family == "update" else "zero"
        spans_all = torch.linalg.matrix_rank(self.train[0] - self.means[0]) == self.train[0].shape[1]
        rules = [own] if rank is not None or spans_all else ["zero", "nearest_identity"]
        return {(rule, a): self.fitted(rank, rule).scaled(a) for rule in rules for a in alphas}

    def patched(self, split: str, act: Callable[[Tensor], Tensor]) -> np.ndarray:
        """KL(patched ‖ clean) of each prompt."""
        return kl(self.patched_log_probs(split, act), self.pair.log_probs(split))

    def patched_log_probs(self, split: str, act: Callable[[Tensor], Tensor]) -> Tensor:
        rows = act(self.rows("base", split))
        return self.pair.patched_log_probs(split, self.layer, self.hook, rows)

    def chosen(self, rank: int | None, alphas: Sequence[float]) -> tuple[str, float, PlainMap]:
        """The offer with the least mean KL on val."""
        offers = self.offers(rank, alphas)
        if len(offers) == 1:
            ((rule, alpha), only) = next(iter(offers.items()))
            return rule, alpha, only
        scores = {key: self.patched("val", made).mean() for key, made in offers.items()}
        best = min(scores, key=lambda key: scores[key])
        return (*best, offers[best])

    def controls(self) -> dict[str, PlainMap]:
        """Every control, unscaled."""
        x, y = self.train
        (mean_x, mean_y), d = self.means, x.shape[1]
        eye, nothing, origin = torch.eye(d).double(), torch.zeros(d, d).double(), torch.zeros(d).double()
        deviations = torch.where(x.std(0) > 0, y.std(0) / x.std(0), 0.0)
        xc, yc = x - mean_x, y - mean_y
        coral = power(shrunk_covariance(xc, SHRINK), -0.5) @ power(shrunk_covariance(yc, SHRINK), 0.5)
        further = max(1, self.pair.n_layers // 8)
        layer = self.layer + further if self.layer + further < self.pair.n_layers else self.layer - further
        other = PlainSite(
            self.pair, layer, self.hook, self.solver, self.family, self.n_train, None, self.settings
        )
        own = "nearest_identity" if self.family == "update" else "zero"
        found = {
            "zero": PlainMap(nothing, mean_x, origin),
            "mean_only": PlainMap(nothing, mean_x, mean_y),
            "mean_shift": PlainMap(eye, mean_x, mean_y),
            "alpha_only": PlainMap(eye, origin, origin),
            "moment_matched": PlainMap(deviations.diag(), mean_x, mean_y),
            "coral": PlainMap(coral, mean_x, mean_y),
            "wrong_layer": other.fitted(None, own),
        }
        if self.random is not None:
            found["random_orthogonal"] = PlainMap(self.random, mean_x, mean_y)
        return found

    def best_controls(self, alphas: Sequence[float]) -> dict[str, tuple[PlainMap, float]]:
        """Each control at its best scale on val, of the map's own scales and 1, with its KL there."""
        found = {}
        for name, made in self.controls().items():
            scales = (1.0,) if name == "zero" else sorted({1.0, *alphas})
            scores = {alpha: self.patched("val", made.scaled(alpha)).mean() for alpha in scales}
            best = min(scores, key=lambda alpha: scores[alpha])
            found[name] = made.scaled(best), scores[best]
        return found

    def report(self, made: PlainMap, split: str, alphas: Sequence[float]) -> dict[str, Any]:
        """What a patch run logs of one map, and the KL of every control by name."""
        clean = self.pair.log_probs(split)
        base, tuned = self.rows("base", split), self.rows("tuned", split)
        log_probs = self.patched_log_probs(split, made)
        mapped, raw = kl(log_probs, clean), self.patched(split, lambda x: x)
        best = self.best_controls(alphas)
        by_name = {name: self.patched(split, control) for name, (control, _) in best.items()}
        null = min(best, key=lambda name: best[name][1])
        top = clean.argmax(-1)
        a, b = tuned - made.mean_tuned, made(base) - made.mean_tuned
        return {
            "KL_raw": raw.mean(),
            "KL_mapped": mapped.mean(),
            "reverse/KL_mapped": kl(clean, log_probs).mean(),
            "drop_pct": 100 * (1 - mapped.sum() / raw.sum()),
            "skill_pct": 100 * (1 - mapped.sum() / by_name[null].sum()),
            "null": null,
            "controls": {name: found.mean() for name, found in by_name.items()},
            "rho": float((tuned - made(base)).norm() / (tuned - base).norm()),
            "cos_mean": float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()),
            "top1_agreement": float((log_probs.argmax(-1) == top).double().mean()),
            "delta_logprob": float((log_probs - clean).gather(1, top[:, None]).mean()),
            "raw": raw,
            "mapped": mapped,
            "null_rows": by_name[null],
        }


def draws(groups: Sequence[int], *, seed: int, n_resamples: int) -> list[np.ndarray]:
    """Which prompts each resample has: groups are drawn with replacement, each with all its prompts."""
    members = [np.flatnonzero(np.asarray(groups) == group) for group in sorted({*groups})]
    drawn = np.random.default_rng(seed).integers(0, len(members), (n_resamples, len(members)))
    return [np.concatenate([members[group] for group in some]) for some in drawn]


def drop(raw: np.ndarray, mapped: np.ndarray) -> float:
    """How much less KL the mapped patch has than the raw one, in percent of the raw one's."""
    return float(100 * (1 - mapped.sum() / raw.sum()))


def ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Σa/Σb of independent units, and its standard error by the delta method."""
    estimate = a.sum() / b.sum()
    return float(estimate), float(np.sqrt(((a - estimate * b) ** 2).sum()) / b.sum())


class Resamples(NamedTuple):
    """A ratio with its standard error, how far each resample is off with its own, and the number of units."""

    estimate: float
    error: float
    shifts: np.ndarray
    errors: np.ndarray
    n: int


def resampled(
    a: np.ndarray, b: np.ndarray, *, seed: int, n_resamples: int, groups: Sequence[int] = ()
) -> Resamples:
    """Resamples of Σa/Σb.

    Units are groups, or prompts without groups; they are drawn with replacement, a and b together.
    """
    of = np.asarray(groups or range(len(a)))
    units = [of == group for group in sorted({*of.tolist()})]
    sums = np.array([[a[unit].sum(), b[unit].sum()] for unit in units])
    estimate, error = ratio(*sums.T)
    drawn = np.random.default_rng(seed).integers(0, len(units), (n_resamples, len(units)))
    theirs = np.array([ratio(*sums[some].T) for some in drawn])
    return Resamples(estimate, error, theirs[:, 0] - estimate, theirs[:, 1], len(units))


def bootstrap_drop(
    raw: np.ndarray, mapped: np.ndarray, *, seed: int, n_resamples: int, groups: Sequence[int] = ()
) -> tuple[float, float]:
    """The 95 % studentised interval of drop_pct, stretched towards 0 by what so few units may have missed."""
    found = resampled(mapped, raw, seed=seed, n_resamples=n_resamples, groups=groups)
    with np.errstate(divide="ignore"):  # of one unit again and again
        t = found.shifts / found.errors
    low, high = (100 * (1 - found.estimate + np.quantile(t, tail) * found.error) for tail in (0.025, 0.975))
    missed = (1 - 0.025 ** (1 / found.n)) * drop(raw, mapped)
    return float(low - max(missed, 0)), min(float(high - min(missed, 0)), 100.0)


def p_above_0(differences: np.ndarray, *, seed: int, groups: Sequence[int] = ()) -> float:
    """The one-sided p-value of a mean above 0, by the studentised bootstrap with 9999 resamples."""
    ones = np.ones(len(differences))
    found = resampled(differences, ones, seed=seed, n_resamples=9999, groups=groups)
    with np.errstate(divide="ignore"):
        t = found.shifts / found.errors
    observed = 0.05 ** (1 / found.n) * found.estimate / found.error
    return 1.0 if found.estimate <= 0 else max(float((1 + (t >= observed).sum()) / 10_000), 0.5**found.n)


def min_rank(drops: dict[int, float], target: float) -> int | None:
    """The smallest k from which on every drop reaches the target."""
    ks = sorted(drops)
    return next((k for i, k in enumerate(ks) if all(drops[larger] >= target for larger in ks[i:])), None)
