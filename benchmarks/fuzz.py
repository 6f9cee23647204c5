"""Any bytes give a value or a MechdiffError: the readers of bytes from elsewhere, as fuzz targets.

    python -m benchmarks.fuzz map-pickle --seconds 60

tests/hostile/test_fuzz.py runs the same targets by hypothesis. Here coverage chooses the bytes, with atheris
(`pip install atheris`), which is no dependency of ours. What it finds is written to ./crash-….
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import torch_zip
from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.pair_spec import Alpha, PairSpec, Rank
from mechdiff_mlflow.spec.plant import Plant
from mechdiff_mlflow.spec.prompts import read_prompts
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.tracking.content.names import check_alias, check_name
from mechdiff_mlflow.tracking.flavour import _flavour_conf
from mechdiff_mlflow.tracking.predecessor.bundles import Manifest
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy

_FOLDER = Path(tempfile.gettempdir())


def good_map() -> AffineMap:
    """What is mutated."""
    ones = torch.ones(4, dtype=torch.float64)
    return AffineMap(ones, ones, Weight.low_rank(ones[:, None], ones[None], 1.0), 0.3, {"k": 1})


def _written(name: str, content: bytes) -> Path:
    (_FOLDER / name).write_bytes(content)
    return _FOLDER / name


def map_pt(data: bytes) -> None:
    """A `.pt` file."""
    AffineMap.load(_written("fuzz.pt", data))


def map_pickle(data: bytes) -> None:
    """The pickle inside a `.pt` file that is right otherwise."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good_map().to_bytes())) as good, zipfile.ZipFile(buffer, "w") as archive:
        for name in good.namelist():
            archive.writestr(name, data if name.endswith("data.pkl") else good.read(name))
    map_pt(buffer.getvalue())


def map_walk(data: bytes) -> None:
    """The walk over a pickle, which may raise what it likes for the caller to explain, but must end."""
    with contextlib.suppress(Exception):
        torch_zip.value_of(data, lambda key, dtype, n_items: torch.zeros(8, dtype=dtype))


def map_safetensors(data: bytes) -> None:
    """A `.safetensors` file."""
    AffineMap.load(_written("fuzz.safetensors", data))


def map_header(data: bytes) -> None:
    """The header of a `.safetensors` file, its length right and data behind it."""
    map_safetensors(len(data).to_bytes(8, "little") + data + bytes(136))


def spec(data: bytes) -> None:
    """A pair spec, and the files that it names."""
    parsed = PairSpec.load(str(_written("fuzz.yaml", data)))
    PairSpec.parse(parsed.to_yaml(), root=parsed.root)
    for reference in (parsed.base.model, parsed.tuned.model or ""):
        parsed.locate(reference)
    parsed.prompt_path("train")


def prompts(data: bytes) -> None:
    """A file of prompts."""
    found = read_prompts(_written("fuzz.jsonl", data), "val")
    assert len(found.digest) == 32


def mlmodel(data: bytes) -> None:
    """MLflow's description of a saved map."""
    _written("MLmodel", data)
    _flavour_conf(_FOLDER)


def manifest(data: bytes) -> None:
    """The predecessor's list of winners."""
    Manifest.load(_written("fuzz.json", data))


def policy(data: bytes) -> None:
    """Rules of promotion."""
    PromotionPolicy.load(_written("policy.yaml", data))


def words(data: bytes) -> None:
    """What users type."""
    text = data.decode("utf-8", "replace")
    for read in (Site.parse, Rank.parse, Alpha.parse, Plant.parse, check_name, check_alias, PairSpec.load):
        with contextlib.suppress(MechdiffError):
            read(text)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__.replace("_", "-"): target
    for target in (
        map_pt,
        map_pickle,
        map_walk,
        map_safetensors,
        map_header,
        spec,
        prompts,
        mlmodel,
        manifest,
        policy,
        words,
    )
}


def refuses_or_reads(target: str, data: bytes) -> bool:
    """Whether the target read the bytes; False when it refused them, and any other exception is raised."""
    try:
        TARGETS[target](data)
    except MechdiffError:
        return False
    return True


def seeds(target: str) -> list[bytes]:
    """Bytes that the target reads, to start from."""
    archive = zipfile.ZipFile(io.BytesIO(good_map().to_bytes()))
    pickle, safe = archive.read("archive/data.pkl"), good_map().to_bytes(".safetensors")
    n_header = int.from_bytes(safe[:8], "little")
    a_spec = b"name: toy\nbase: {model: a/b}\ntuned: {model: a/c}\n"
    a_spec += b"prompts: {train: fuzz.jsonl, val: fuzz.jsonl}\n"
    return {
        "map-pt": [good_map().to_bytes()],
        "map-pickle": [pickle],
        "map-walk": [pickle],
        "map-safetensors": [safe],
        "map-header": [safe[8 : 8 + n_header]],
        "spec": [a_spec],
        "prompts": [b'{"text": "tea"}\n', b'{"messages": [{"role": "user", "content": "tea"}]}\n'],
        "mlmodel": [
            b"flavors:\n  mechdiff: {sha256: " + b"a" * 64 + b", probe_sha256: " + b"a" * 64 + b"}\n"
        ],
        "manifest": [b'{"pair": "toy", "winners": {"L1_attn_out": {"path": "a.pt", "alpha": 0.3}}}'],
        "policy": [b"min_drop_pct: 30\nci_above_zero: true\n"],
        "words": [b"L3/attn_out", b"full", b"0.3,0.7", b"attn_out:L1:r2:alpha0.7", b"champion"],
    }[target]


def _instrument(module: ModuleType, instrument: Callable[[Any], Any]) -> None:
    """Have coverage counted in the functions of one of our modules."""
    for name, value in list(vars(module).items()):
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            setattr(module, name, instrument(value))


def main() -> None:
    """Fuzz one target with atheris."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed; pip install atheris (Linux and macOS).")
    global _FOLDER
    with tempfile.TemporaryDirectory(prefix="mechdiff-fuzz-") as folder:
        _FOLDER, corpus = Path(folder), Path(folder, "corpus")
        corpus.mkdir()
        for number, seed in enumerate(seeds(arguments.target)):
            (corpus / str(number)).write_bytes(seed)
        for module in (torch_zip, untrusted):
            _instrument(module, atheris.instrument_func)
        limits = [
            f"-max_total_time={arguments.seconds}",
            "-rss_limit_mb=2048",
            "-timeout=20",
            "-max_len=8192",
        ]

        def target(data: bytes) -> None:
            refuses_or_reads(arguments.target, data)

        atheris.Setup([sys.argv[0], *limits, str(corpus)], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
