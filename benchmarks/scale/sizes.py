"""Bytes and rows of a pair and a sweep, counted as the code keeps and stores them; nothing here is fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.gpu import Shape
from mechdiff_mlflow.controls import CONTROLS
from mechdiff_mlflow.engine.budget import Load, bounds_within
from mechdiff_mlflow.engine.budget import Shape as BudgetShape
from mechdiff_mlflow.engine.elastic import Bounds
from mechdiff_mlflow.sites import Hook, Site

LLAMA_8B = Shape()
LLAMA_70B = Shape(layers=80, width=8192, mlp_width=28672, heads=64)

HALF, DOUBLE = 2, 8
SCORE_BYTES = 32
"""Of each prompt and patched run, as docs/memory.md says."""

MOMENTS_ABOVE = 6
"""Merged second moments are smaller than rows from so many prompts a dimension on: 3·d²·8 < 2·N·d·2 bytes."""

WORKING = 6e9
"""Bytes of a GPU that weights may not take: patched rows, logits, kept keys and values."""

MOST = Bounds(32, 32768, 8192)
"""What the command line lets a GPU take at once."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: its name and bytes."""

    name: str
    n_bytes: float


GPUS = (Gpu("80 GB", 81559 * 2**20), Gpu("141 GB", 143771 * 2**20))


@dataclass(frozen=True, slots=True)
class Workload:
    """A sweep of one pair over all its sites.

    Args:
        shape: Of both models.
        n_train: Prompts fitted on.
        n_val: Prompts chosen on.
        n_test: Prompts reported.
        tokens: Of a prompt.
        ranks: Of the maps; None is full.
        alphas: Scales of the maps.
        hooks: At every layer.
    """

    shape: Shape
    n_train: int
    n_val: int = 1000
    n_test: int = 1000
    tokens: int = 64
    ranks: tuple[int | None, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, None)
    alphas: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0)
    hooks: tuple[Hook, ...] = tuple(Hook)

    @property
    def sites(self) -> list[Site]:
        """Every layer and hook."""
        return [Site(layer, hook) for layer in range(self.shape.layers) for hook in self.hooks]

    @property
    def n_prompts(self) -> int:
        """Of all splits."""
        return self.n_train + self.n_val + self.n_test

    @property
    def cells_per_site(self) -> int:
        """Ranks times scales."""
        return len(self.ranks) * len(self.alphas)

    @property
    def n_cells(self) -> int:
        """MLflow runs below the parent."""
        return len(self.sites) * self.cells_per_site

    @property
    def control_rows(self) -> int:
        """Every control at every scale and unscaled; zero has one."""
        return 1 + (len(CONTROLS) - 1) * len({1.0, *self.alphas})

    @property
    def val_rows(self) -> int:
        """Patched runs of a val prompt at a site: identity, raw, controls; a fixed α leaves no choice."""
        return 2 + self.control_rows

    @property
    def test_rows(self) -> int:
        """Of a test prompt, at most: val may choose the same control for several cells."""
        return 2 + self.cells_per_site + self.control_rows

    @property
    def span(self) -> int:
        """Dimensions that centred train rows span."""
        return min(self.n_train - 1, self.shape.width)


def weights_bytes(shape: Shape) -> float:
    """One model in half precision; embeddings and output layer are two matrices."""
    blocks = shape.layers * (shape.attention_numbers + shape.mlp_numbers)
    return HALF * (blocks + 2 * shape.width * shape.vocabulary)


def gpus_needed(shape: Shape, gpu: Gpu, models: int) -> int:
    """GPUs that hold so many models of a pair and leave `WORKING` on each."""
    n = 1
    while n * (gpu.n_bytes - WORKING) < models * weights_bytes(shape):
        n += 1
    return n


def kept_keys_values(work: Workload) -> float:
    """Keys and values of one prompt's prefix at all layers, for its patched runs."""
    shape = work.shape
    kv_width = shape.key_heads * shape.width // shape.heads
    return 2 * HALF * shape.layers * kv_width * work.tokens


def rows_bytes(work: Workload, n: int) -> float:
    """Activations of n prompts at all sites of both models."""
    return 2.0 * HALF * len(work.sites) * n * work.shape.width


def moments_bytes(work: Workload) -> float:
    """What the rows of any number of prompts leave behind at all sites: Sxx, Syy and Sxy."""
    return 3.0 * DOUBLE * len(work.sites) * work.shape.width**2


def train_bytes(work: Workload) -> float:
    """What recording the train split returns: rows, or moments where those are smaller."""
    few = work.n_train <= MOMENTS_ABOVE * work.shape.width
    return rows_bytes(work, work.n_train) if few else moments_bytes(work)


def map_bytes(width: int, rank: int) -> int:
    """Tensors of a stored map: float64, factored where that is smaller than dense, and two means."""
    weight = min(rank * 2 * width, width * width)
    return DOUBLE * (weight + 2 * width + 1)


def maps_bytes(work: Workload) -> float:
    """Files of all cells' maps; maps that differ in α alone are stored each."""
    at_a_site = sum(map_bytes(work.shape.width, rank or work.span) for rank in work.ranks)
    return float(len(work.sites) * len(work.alphas) * at_a_site)


def controls_bytes(work: Workload) -> float:
    """Matrices that one site's controls hold of their own: coral and the random rotation."""
    d, r = work.shape.width, work.span
    coral = d * d if 4 * r >= d else 2 * r * 2 * d
    return DOUBLE * (coral + r * d)


def factors_bytes(work: Workload) -> float:
    """The factorisation of one site that is kept, and one solver's factors of every rank."""
    d, r = work.shape.width, work.span
    spectrum = 2 * d * r + 2 * work.n_train * r + r * r
    return DOUBLE * (spectrum + 2 * d * r)


def driver_bytes(work: Workload) -> dict[str, float]:
    """What a driver that fits and reports everything holds at once; a site's cells share its controls."""
    return {
        "captured rows": train_bytes(work) + rows_bytes(work, work.n_val + work.n_test),
        "factorisations and factors": len(work.sites) * factors_bytes(work),
        "controls": len(work.sites) * controls_bytes(work),
        "scores": scores_bytes(work),
    }


def scores_bytes(work: Workload) -> float:
    """Four numbers a prompt and patched run."""
    runs = len(work.sites) * (work.n_val * work.val_rows + work.n_test * work.test_rows)
    return float(SCORE_BYTES * runs)


def journal_bytes(work: Workload) -> float:
    """Finished shards on disk: what recording and scoring returned."""
    return train_bytes(work) + rows_bytes(work, work.n_val + work.n_test) + scores_bytes(work)


def traffic_bytes(work: Workload, nodes: int) -> dict[str, float]:
    """Through the object store, if a tensor travels once a node and maps of all ranks share their factors."""
    d, r = work.shape.width, work.span
    a_site = DOUBLE * 2 * d * r + controls_bytes(work)
    return {
        "recordings to the driver": train_bytes(work) + rows_bytes(work, work.n_val + work.n_test),
        "maps to the nodes": nodes * len(work.sites) * a_site,
        "scores to the driver": scores_bytes(work),
    }


def pickled_maps_bytes(work: Workload) -> float:
    """All cells' maps as pickle writes them: of a map of rank k, a view, the factors of every rank."""
    return float(work.n_cells * DOUBLE * 2 * work.shape.width * work.span)


def sites_that_fit(work: Workload, n_bytes: float) -> int:
    """How many sites one command may have so that its driver stays within so many bytes."""
    total = sum(driver_bytes(work).values())
    return min(len(work.sites), int(n_bytes / (total / len(work.sites))))


def bounds_beside(work: Workload, free_bytes: float, n_columns: int) -> Bounds:
    """What the engine takes at once in the bytes that weights leave on a GPU, by its own memory budget."""
    shape, head = work.shape, work.shape.width // work.shape.heads
    budget = BudgetShape(
        n_layers=shape.layers,
        width=shape.width,
        inner=shape.mlp_width,
        heads_width=shape.width,
        kv_width=shape.key_heads * head,
        n_heads=shape.heads,
        vocabulary=shape.vocabulary,
        number=HALF,
        keeps_scores=False,
    )
    load = Load(work.tokens, n_sites=len(work.sites), n_columns=n_columns)
    return bounds_within(int(free_bytes), MOST, budget, load)


def with_tokens(work: Workload, tokens: int) -> Workload:
    """The same sweep over longer prompts."""
    return replace(work, tokens=tokens)
