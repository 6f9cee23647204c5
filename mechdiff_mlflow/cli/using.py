"""Commands that put a map to use: steer, adapter."""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mechdiff_mlflow.cli import show
from mechdiff_mlflow.cli.options import command
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol
from mechdiff_mlflow.experiments.adapting import make_adapter
from mechdiff_mlflow.experiments.options import (
    MapOptions,
    MismatchOptions,
    ModelOptions,
    ReportedOptions,
    TrackingOptions,
)
from mechdiff_mlflow.experiments.preflight import check_map, check_pair
from mechdiff_mlflow.experiments.steering import prompt_set, site_of, steer
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models.attach import Tokens
from mechdiff_mlflow.models.map_adapters import Form
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.report.adapter import adapter_card
from mechdiff_mlflow.spec.options import FLAG, PATH, TEXT, Kind, option, whole
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.text import text_of
from mechdiff_mlflow.tracking.commands.computing import load_as_asked
from mechdiff_mlflow.tracking.content.overview import models_of
from mechdiff_mlflow.tracking.content.parents import adapter_run, steer_run
from mechdiff_mlflow.tracking.content.records import ParamValue, RunRecord
from mechdiff_mlflow.tracking.registry.fetch import load_map
from mechdiff_mlflow.tracking.runs.mlflow_run import experiment_of
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import open_store


@dataclass(frozen=True, kw_only=True)
class UseRequest(MapOptions, MismatchOptions, ModelOptions, TrackingOptions):
    """A map and the pair that it is used on."""

    pair: str | None = option(
        None, TEXT, "A shipped pair or the path of a pair spec; default the map's own pair."
    )


@dataclass(frozen=True, kw_only=True)
class SteerRequest(UseRequest):
    """Continue prompts with a map at work: base, tuned (clean), tuned patched raw, and tuned patched mapped.

    Greedy. A patch puts the base's activation at the map's site into tuned: raw as it is, or mapped.

    \b
    Example:
      mechdiff steer --map cultural-demo-L26-attn_out@champion --prompt "Which fruit belongs to Heron Day?"
    """

    prompts: tuple[str, ...] = option(
        ..., TEXT, "What the user says; repeatable.", flag="--prompt", is_repeated=True
    )
    tokens: Tokens = option(
        "new",
        Kind("tokens", Tokens.parse),
        "Whose activations are replaced: new, the decision token and every generated one; decision; all.",
    )
    max_new_tokens: int = option(
        "32",
        whole("--max-new-tokens", 32, least=1, most=100_000),
        "Maximum new tokens of each continuation.",
    )
    json: bool = option(False, FLAG, "Print JSON instead of a table.")


@command(SteerRequest)
def _steer(request: SteerRequest) -> None:
    def check(spec: PairSpec, pair: Pair) -> None:
        said = prompt_set(request.prompts, spec.system)
        for role in ("base", "tuned"):
            pair.tokens(role, said, Position.DECISION)

    the_map, pair = _loaded(request, check)
    found = steer(
        pair, the_map, request.prompts, tokens=request.tokens, max_new_tokens=request.max_new_tokens
    )
    params = _params(request, pair, the_map)
    params |= {"tokens": str(request.tokens), "max_new_tokens": request.max_new_tokens}
    _logged(request, pair, steer_run(found, pair, params))
    if request.json:
        about = {"map": request.map, "site": the_map.meta["site"], "alpha": the_map.alpha}
        about |= {"pair": pair.name, "tokens": str(request.tokens)}
        rows = [dataclasses.asdict(row) for row in found]
        show.lines([json.dumps({**about, "continuations": rows}, ensure_ascii=False, indent=2)])
        return
    at = f"{the_map.meta['site']}, α = {text_of(the_map.alpha)}"
    show.continuations(found, f"{request.map} at {at}, {pair.name}")


@dataclass(frozen=True, kw_only=True)
class AdapterRequest(ReportedOptions, UseRequest):
    """Write a map as an adapter of the base model that makes base act as tuned at the map's site.

    Measures KL(base with the adapter ‖ tuned) by loading what it wrote; its README says that and how to load.

    \b
    Example:
      mechdiff adapter --map cultural-demo-L26-attn_out@champion --to adapter --alpha 1
    """

    to: Path = option(..., PATH, "Directory to make; new or empty.")
    form: Form = option(
        "auto",
        Kind("form", Form.parse),
        "peft, a LoRA; hook, the map and a loader; auto: peft where a linear layer gives the activation.",
    )


@command(AdapterRequest)
def _adapter(request: AdapterRequest) -> None:
    folder = request.to
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MechdiffError(f"{folder} exists and is not an empty directory; name another with --to.")
    if not folder.absolute().parent.is_dir():
        raise MechdiffError(f"The directory {folder.absolute().parent} does not exist; create it first.")
    protocol = Protocol(split=request.split, n=request.n)
    the_map, pair = _loaded(request, lambda spec, pair: check_pair(protocol, pair))
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".mechdiff-") as temporary:
        part = Path(temporary, "adapter")
        part.mkdir()
        record = make_adapter(pair, the_map, part, form=request.form, split=request.split, n=request.n)
        (part / "README.md").write_text(adapter_card(record, the_map, pair), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    show.adapter(record, folder)
    _logged(request, pair, adapter_run(record, folder, pair, _params(request, pair, the_map)))


def _params(request: UseRequest, pair: Pair, the_map: AffineMap) -> dict[str, ParamValue]:
    site = str(the_map.meta["site"])
    return {"pair": pair.name, "map": request.map, "site": site, "alpha": the_map.alpha}


def _logged(request: UseRequest, pair: Pair, record: RunRecord) -> None:
    """Keep what was done as a run of the pair's experiment."""
    store = open_store(request.tracking_uri)
    experiment = experiment_of(store, request.experiment, pair.name)
    Tracker(store, experiment, about=models_of(pair.spec)).log(record)


def _loaded(request: UseRequest, check: Callable[[PairSpec, Pair], None]) -> tuple[AffineMap, Pair]:
    """The map and its pair, which `check` sees before its weights are loaded."""
    the_map = load_map(request.map, store=open_store(request.tracking_uri))
    the_map = the_map if request.alpha is None else the_map.with_alpha(request.alpha)
    if "site" not in the_map.meta:
        raise MechdiffError(f"Map {request.map} does not say its site; fit it again with mechdiff fit.")
    name = request.pair or the_map.meta.get("pair")
    if name is None:
        raise MechdiffError(f"Map {request.map} does not say its pair; name it with --pair.")
    try:
        spec = PairSpec.load(str(name))
    except MechdiffError:
        if request.pair:
            raise
        raise MechdiffError(
            f"The pair {name} of map {request.map} does not ship; name its spec with "
            f"--pair {shlex.quote(f'{name}.yaml')}."
        ) from None
    if request.sequential == "yes":
        raise MechdiffError("This command needs both models at once; leave out --sequential.")

    def check_both(pair: Pair) -> None:
        check(spec, pair)
        allowed = request.allow_pair_mismatch
        check_map(the_map, request.map, site_of(the_map), pair, allow_pair_mismatch=allowed)

    with show.bars() as stage, stage("loading both models", 1):
        both_held = dataclasses.replace(request, sequential="no")
        return the_map, load_as_asked(spec, both_held, check=check_both)
