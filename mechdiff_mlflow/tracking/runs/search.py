"""Finding measured runs by pair, site and metric, across experiments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile

from mlflow.entities import Run, ViewType

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.tracking.content.records import check_key
from mechdiff_mlflow.tracking.content.tag_names import PAIR_SITE, SELECTION_LEAK, pair_site
from mechdiff_mlflow.tracking.runs.lookup import MOST_VALUES, can_quote, each_run, quoted
from mechdiff_mlflow.tracking.store.store import Store

_SETTINGS = {
    **dict.fromkeys(("solver", "family"), foreign.word),
    **{"k": foreign.rank, "alpha": foreign.scales, "split": foreign.word, "n": foreign.whole},
}
_LOWER_IS_BETTER = ("KL_", "rho", "noise_floor", "p/", "reverse/", "control/", "time/")
_PATCHES = "tags.`mechdiff.kind` = 'patch'"
_FEW = 20
_MOST_A_PAGE = 1000


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A patch run that measured a map."""

    run_id: str
    experiment: str  # its name
    pair: str
    site: str
    settings: dict[str, str]  # solver, family, k, alpha, split and n as logged
    metric: str  # the one that was asked for
    value: float
    low: float | None  # ends of its 95 % interval, if logged
    high: float | None
    leak: bool | None  # whether something was chosen on prompts that are reported; None: nobody knows
    prompts: tuple[dict[str, str], ...]  # name, digest and split of each set
    started_ms: int  # Unix time


def find_runs(
    store: Store,
    *,
    pair: str | None = None,
    site: Site | None = None,
    metric: str = "drop_pct",
    best: bool = False,
    limit: int | None = None,
) -> list[FoundRun]:
    """Finished patch runs that have `metric`, the best first; the store orders them and sends no others.

    Less is better for KL, rho and p-values, more for everything else. With `best`, only the best of each pair
    and site; `limit` is how many at most.

    Raises:
        MechdiffError: No run is found; says what to try.
    """
    check_key(metric)
    where = ["attributes.status = 'FINISHED'"]
    if pair is not None:
        where.append(f"params.pair = {quoted(pair)}")
    if site is not None:
        where += [f"params.layer = '{site.layer}'", f"params.hook = '{site.hook}'"]
    with store.errors():
        experiments = {e.experiment_id: e.name for e in store.client.search_experiments(ViewType.ACTIVE_ONLY)}
    search = _Search(store, experiments, metric)
    if best:  # only patch runs have the tag that is searched
        found = search.best_of_each_site(where)
    else:
        found = [*islice(search.readable([_PATCHES, *where], limit), limit)]
    if not found:
        known = sorted(
            {k for run in search.first(where) for k in run.data.metrics if not k.startswith(("ci/", "time/"))}
        )
        remedy = f"those runs have {', '.join(known)}" if known else "run mechdiff run or sweep first"
        place = f"{pair or 'any pair'} at {site or 'any site'}"
        if metric in known:
            raise MechdiffError(
                f"Every patch run of {place} with the metric {metric!r} is malformed; correct or delete them."
            )
        raise MechdiffError(f"No patch run of {place} has the metric {metric!r}; {remedy}.")
    found.sort(key=search.rank)
    return found[:limit]


class _Search:
    """Runs of some experiments, given by id and name, by a metric, the best first."""

    def __init__(self, store: Store, experiments: dict[str, str], metric: str) -> None:
        self._sign = 1 if metric.startswith(_LOWER_IS_BETTER) else -1
        by = [f"metrics.`{metric}` {'ASC' if self._sign > 0 else 'DESC'}"]
        self._each = partial(each_run, store, list(experiments), order=by)
        self._experiments, self._metric = experiments, metric

    def first(self, where: Sequence[str]) -> list[Run]:
        """Some runs, with the metric or without."""
        return list(islice(self._each(" and ".join([_PATCHES, *where]), page=_FEW), _FEW))

    def readable(self, where: Sequence[str], limit: int | None = None) -> Iterator[FoundRun]:
        """Runs with the metric whose fields are what they should be; a warning for each other."""
        runs = self._each(" and ".join(where), page=min(limit or _MOST_A_PAGE, _MOST_A_PAGE))
        return filter(None, map(self._read, self._measured(runs)))

    def best_of_each_site(self, where: Sequence[str]) -> list[FoundRun]:
        """The best run at each site of each pair, with no look at most of the others.

        Each search leaves out the pairs and sites that were found, until nothing is left. Of runs without
        their tag, which earlier versions wrote, all are read.
        """
        best: dict[str, FoundRun] = {}
        while True:
            left = [*where, *(f"tags.`{PAIR_SITE}` != {quoted(found)}" for found in best)]
            left += [] if best else [f"tags.`{PAIR_SITE}` IS NOT NULL"]
            n_before = len(best)
            page = list(islice(self.readable(left, _FEW), _FEW))
            best = _first_of_each(page) | best
            if not page:
                break
            if not n_before < len(best) <= MOST_VALUES or not all(map(can_quote, best)):
                best = _first_of_each(self.readable(left)) | best
                break
        untagged = self.readable([_PATCHES, *where, f"tags.`{PAIR_SITE}` IS NULL"])
        return [*_first_of_each(sorted([*best.values(), *untagged], key=self.rank)).values()]

    def rank(self, run: FoundRun) -> tuple[float, int]:
        """Where a run comes in the order of the metric, the newer of two equal ones first."""
        return self._sign * run.value, -run.started_ms

    def _measured(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Those that have the metric; the others come last in the store's order."""
        return takewhile(lambda run: self._metric in run.data.metrics, runs)

    def _read(self, run: Run) -> FoundRun | None:
        try:
            return _found(run, self._experiments, self._metric)
        except foreign.Malformed as error:
            foreign.left_out(f"run {run.info.run_id}", error)
            return None


def _first_of_each(runs: Iterable[FoundRun]) -> dict[str, FoundRun]:
    """The first run at each site of each pair, by both."""
    first: dict[str, FoundRun] = {}
    for run in runs:
        first.setdefault(pair_site(run.pair, run.site), run)
    return first


def _found(run: Run, experiments: dict[str, str], metric: str) -> FoundRun:
    params, metrics = run.data.params, run.data.metrics
    inputs = run.inputs.dataset_inputs if run.inputs else []
    prompts = []
    for item in inputs:
        contexts = [tag.value for tag in item.tags if tag.key == "mlflow.data.context"]
        split = contexts[0] if contexts else ""
        prompts.append({"name": item.dataset.name, "digest": item.dataset.digest, "split": split})
    site = foreign.site(params)
    for key, parse in _SETTINGS.items():
        if key in params:
            parse(params, key)
    ends = [
        foreign.number(metrics, key) if (key := f"ci/{metric}_{end}") in metrics else None
        for end in ("low", "high")
    ]
    return FoundRun(
        run_id=run.info.run_id,
        experiment=experiments.get(run.info.experiment_id, run.info.experiment_id),
        pair=foreign.word(params, "pair"),
        site=str(site),
        settings={k: params[k] for k in _SETTINGS if k in params},
        metric=metric,
        value=foreign.number(metrics, metric),
        low=ends[0],
        high=ends[1],
        leak={"true": True, "false": False}.get(run.data.tags.get(SELECTION_LEAK, "")),
        prompts=tuple(sorted(prompts, key=lambda row: (row["split"], row["name"]))),
        started_ms=run.info.start_time or 0,
    )
