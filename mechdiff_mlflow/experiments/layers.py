"""How alike base and tuned are layer by layer, and from where on swapping one layer's output matters."""

from __future__ import annotations

import pandas as pd

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.rows import Array
from mechdiff_mlflow.experiments.study import Study
from mechdiff_mlflow.experiments.workers.workers import model_sizes
from mechdiff_mlflow.measures import similarity, stats
from mechdiff_mlflow.spec.sites import Hook, Site

DIRECTIONS = {"tuned_from_base": "tuned", "base_from_tuned": "base"}
"""By name the model that is patched with the other's activations."""


def layer_profile(study: Study) -> pd.DataFrame:
    """One row a layer, at resid_post on the reported prompts.

    Columns: layer; cka, debiased, None where either does not vary; for both directions KL_… (mean
    KL(patched ‖ clean) in nats of the unmapped patch), its 95 % interval …_low and …_high, and floor_…,
    the noise floor: the identity patch's, or that of two clean runs of the patched model.

    Raises:
        MechdiffError: The models differ in depth or width.
    """
    prompts, position = study.report_prompts, study.protocol.position
    base, tuned = study.computing.ask(model_sizes)
    if base != tuned:
        raise MechdiffError(
            f"Base has {base.n_layers} layers of width {base.width} and tuned {tuned.n_layers} of "
            f"{tuned.width}; an unmapped patch needs models of one shape."
        )
    sites = [Site(layer, Hook.RESID_POST) for layer in range(base.n_layers)]
    columns: dict[str, list[float | None]] = {"layer": [float(site.layer) for site in sites]}
    swapped, noise = {}, {}
    for name, taker in DIRECTIONS.items():
        swapped[name] = study.computing.swap(taker, prompts, position, sites, study.stage)
        noise[name] = study.computing.clean_noise(taker, prompts, position)
    own = next(iter(swapped.values()))
    columns["cka"] = [
        similarity.debiased_cka(own[f"base/{site}"].double(), own[f"tuned/{site}"].double()) for site in sites
    ]
    for name, found in swapped.items():
        kls: list[Array] = list(found["KL"].numpy().T)
        means = [stats.kl_difference(kl, 0 * kl, bootstrap=study.bootstrap) for kl in kls]
        columns[f"KL_{name}"] = [mean.estimate for mean in means]
        columns[f"KL_{name}_low"] = [mean.low for mean in means]
        columns[f"KL_{name}_high"] = [mean.high for mean in means]
        columns[f"floor_{name}"] = [max(float(floor), noise[name]) for floor in found["floor"].mean(0)]
    table: pd.DataFrame = pd.DataFrame(columns).astype({"layer": int})
    return table
