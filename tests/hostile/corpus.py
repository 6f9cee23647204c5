"""Hostile inputs, each of which must be refused in one sentence: how to write them, and who reads them."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.spec.pair_spec import Alpha, PairSpec, Rank
from mechdiff_mlflow.spec.plant import Plant
from mechdiff_mlflow.spec.prompts import read_prompts
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.tracking.content.names import check_alias, check_name
from mechdiff_mlflow.tracking.flavour import load_verified, save_model
from mechdiff_mlflow.tracking.predecessor.bundles import Manifest, bundle_file, read_bundle
from mechdiff_mlflow.tracking.registry.fetch import Resolved
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.runs.results import _table

MARKER = "executed"
"""The file in the working directory that every payload would make."""

D, K = 8, 2
BIDI, ESCAPE = "\u202e", "\x1b]0;owned\x07"


@dataclass(frozen=True)
class Case:
    """One input.

    Args:
        reader: Key of `READERS`.
        name: What is wrong with it.
        write: Makes it in an empty folder; what the reader gets.
    """

    reader: str
    name: str
    write: Callable[[Path], Any]

    def __str__(self) -> str:
        return f"{self.reader}: {self.name}"


def a_map() -> AffineMap:
    """A rank-2 update of the identity."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return AffineMap(normal(D), normal(D), Weight.low_rank(normal(D, K), normal(K, D), 1.0), 0.3, {"k": 2})


def read_spec(path: str) -> None:
    """As far as `load_pair` goes before it loads weights."""
    spec = PairSpec.load(path)
    for split in ("train", "val"):
        read_prompts(spec.prompt_path(split), split)
    spec.locate(spec.base.model)
    spec.locate(spec.tuned.model or spec.tuned.adapter or "")
    assert spec.tuned.plant is None


def read_a_bundle(path: Path) -> None:
    """As a manifest would name it."""
    name = path.relative_to(path.parent) if path.parent.name else path
    read_bundle(bundle_file(path.parent, str(name)), key="L1_attn_out", alpha=0.3)


READERS: dict[str, Callable[[Any], object]] = {
    "map": AffineMap.load,
    "spec": read_spec,
    "prompts": lambda path: read_prompts(path, "val"),
    "model": load_verified,
    "table": _table,
    "manifest": Manifest.load,
    "bundle": read_a_bundle,
    "bundle's path": lambda name: bundle_file(Path(), name),
    "policy": PromotionPolicy.load,
    "site": Site.parse,
    "hook": Hook.parse,
    "rank": Rank.parse,
    "alpha": Alpha.parse,
    "plant": Plant.parse,
    "name": check_name,
    "alias": check_alias,
    "digest": lambda text: Resolved("file:///nowhere", text, "demo version 1"),
    "pair": PairSpec.load,
}


def file(name: str, content: bytes | str) -> Callable[[Path], Path]:
    """Writes one file."""

    def write(folder: Path) -> Path:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return folder / name

    return write


# Maps


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def saved(content: object, protocol: int = 2) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def parts(**changes: Any) -> dict[str, Any]:
    """The content of a good map, changed; None leaves a part out."""
    content = {**torch.load(io.BytesIO(a_map().to_bytes()), weights_only=True), **changes}
    return {name: value for name, value in content.items() if value is not None}


def header(**changes: Any) -> str:
    return json.dumps({"format": "mechdiff-map", "version": 1, "alpha": 0.3, "meta": {}, **changes})


def rezipped(change: Callable[[dict[str, bytes]], object], **options: Any) -> bytes:
    """A good map with its members changed."""
    with zipfile.ZipFile(io.BytesIO(a_map().to_bytes())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def with_pickle(content: bytes) -> bytes:
    return rezipped(lambda members: members.update({"archive/data.pkl": content}))


def pickle_edit(old: bytes, new: bytes) -> bytes:
    """A good map with the first `old` in its pickle replaced."""

    def edit(members: dict[str, bytes]) -> None:
        assert old in members["archive/data.pkl"]
        members["archive/data.pkl"] = members["archive/data.pkl"].replace(old, new, 1)

    return rezipped(edit)


def safetensors_file(header: object, data: bytes = b"", claims: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claims is None else claims) + text + data


def safetensors_edit(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A good map as safetensors with its header changed."""
    content = a_map().to_bytes(".safetensors")
    n = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + n])
    change(fields)
    return safetensors_file(fields, content[8 + n :])


def _maps() -> list[Case]:
    touch = f"touch {MARKER}"
    run = f"open({MARKER!r}, 'w')"
    calls = {
        "os.system": Payload(os.system, touch),
        "eval": Payload(eval, run),
        "exec": Payload(exec, run),
        "popen": Payload(os.popen, touch),
        "mkdir": Payload(os.mkdir, MARKER),
        "open": Payload(open, MARKER, "w"),
        "getattr": Payload(getattr, "x", "upper"),
        "torch.load": Payload(torch.load, "other.pt"),
        "torch.hub": Payload(torch.hub.load, "a/b", "c"),
        "bytearray of a gigabyte": Payload(bytearray, 1 << 30),
        "tensor of a gigabyte": Payload(torch.Tensor, 1 << 28),
        "set": {1, 2},
    }
    pt: dict[str, bytes] = {}
    for name, value in calls.items():
        pt[f"{name} in a part"] = saved(parts(left=value))
        pt[f"{name} as the file's pickle"] = with_pickle(pickle.dumps(value, 2))
    for protocol in (3, 4, 5):
        pt[f"payload of protocol {protocol}"] = saved(parts(left=calls["os.system"]), protocol)
        pt[f"bare pickle of protocol {protocol}"] = pickle.dumps(calls["os.system"], protocol)
    pt |= {
        "old torch format": _legacy(calls["os.system"]),
        "payload beside the metadata": saved(parts(metadata=calls["eval"])),
        "payload as key": with_pickle(b"\x80\x02}(cos\nsystem\nX\x01\x00\x00\x00aRK\x01u."),
        "INST opcode": with_pickle(b"(S'touch executed'\nios\nsystem\n."),
        "STACK_GLOBAL opcode": with_pickle(b"\x80\x04\x8c\x02os\x8c\x06system\x93."),
        "memo beyond reason": with_pickle(b"\x80\x02}r\xff\xff\xff\x7f."),
        "string longer than the file": with_pickle(b"\x80\x02X\xff\xff\xff\x7fabc."),
        "a million instructions": with_pickle(b"\x80\x02" + b"N" * 1_000_000 + b"."),
        "lists in lists": with_pickle(b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."),
        "pickle of nothing": with_pickle(b""),
        "pickle without end": with_pickle(b"\x80\x02}"),
        "tuple of nothing": with_pickle(b"\x80\x02\x87."),
        "deflated": rezipped(lambda m: None, compression=zipfile.ZIP_DEFLATED),
        "zip bomb": rezipped(
            lambda m: m.update({"archive/data/0": bytes(64 << 20)}), compression=zipfile.ZIP_DEFLATED
        ),
        "bzip2 bomb": rezipped(
            lambda m: m.update({"archive/data/0": bytes(8 << 20)}), compression=zipfile.ZIP_BZIP2
        ),
        "lzma bomb": rezipped(
            lambda m: m.update({"archive/data/0": bytes(8 << 20)}), compression=zipfile.ZIP_LZMA
        ),
        "no pickle": rezipped(lambda m: m.pop("archive/data.pkl")),
        "no version": rezipped(lambda m: m.pop("archive/version")),
        "no storage": rezipped(lambda m: m.pop("archive/data/3")),
        "one storage more": rezipped(lambda m: m.update({"archive/data/9": b"12345678"})),
        "member above its root": rezipped(lambda m: m.update({"../escaped": b"x"})),
        "absolute member": rezipped(lambda m: m.update({"/tmp/escaped": b"x"})),
        "code in the zip": rezipped(lambda m: m.update({"archive/code/__torch__.py": b"x"})),
        "two folders": rezipped(lambda m: m.update({"other/data.pkl": b"."})),
        "other byte order": rezipped(lambda m: m.update({"archive/byteorder": b"big"})),
        "ten thousand members": rezipped(
            lambda m: m.update({f"archive/data/{i}": b"" for i in range(10_000)})
        ),
        "storage shorter than claimed": rezipped(lambda m: m.update({"archive/data/3": bytes(8)})),
        "storage longer than claimed": rezipped(lambda m: m.update({"archive/data/3": bytes(800)})),
        "storage claims more": pickle_edit(b"K\x10t", b"M\xff\xfft"),
        "storage claims 2^31": pickle_edit(b"K\x10t", b"J\xff\xff\xff\x7ft"),
        "storage claims 2^62": pickle_edit(b"K\x10t", b"\x8a\x08" + struct.pack("<q", 1 << 62) + b"t"),
        "storage of a negative size": pickle_edit(b"K\x10t", b"J\xf0\xff\xff\xfft"),
        "storage elsewhere": pickle_edit(b"X\x03\x00\x00\x00cpu", b"X\x04\x00\x00\x00meta"),
        "storage of a name": pickle_edit(b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x009q"),
        "offset beyond its storage": pickle_edit(b"QK\x00", b"QK\x63"),
        "shape beyond its storage": pickle_edit(b"K\x08\x85", b"M\xff\xff\x85"),
        "negative shape": pickle_edit(b"K\x08\x85", b"J\xff\xff\xff\xff\x85"),
        "stride of 2^31": pickle_edit(b"K\x08K\x02\x86", b"J\xff\xff\xff\x7fK\x02\x86"),
        "shape of 2^60": saved(parts(left=torch.zeros((), dtype=torch.float64).expand(1 << 30, 1 << 30))),
        "NaN": saved(parts(left=torch.full((D, K), torch.nan).double())),
        "infinite": saved(parts(right=torch.full((K, D), torch.inf).double())),
        "negative infinite mean": saved(parts(mean_in=torch.full((D,), -torch.inf).double())),
        "sparse": saved(parts(left=torch.ones(D, K).double().to_sparse())),
        "transposed": saved(parts(left=torch.ones(K, D).double().T)),
        "parameter": saved(parts(left=torch.nn.Parameter(torch.ones(D, K).double()))),
        "text for a tensor": saved(parts(left="text")),
        "number for a tensor": saved(parts(left=1.5)),
        "two dtypes": saved(parts(left=torch.ones(D, K))),
        "one part more": saved(parts(extra=torch.ones(D).double())),
        "a list": saved([torch.ones(D).double()]),
        "a tensor": saved(torch.ones(D).double()),
        "empty": b"",
        "noise": bytes(range(256)) * 40,
        "text": b"not a map\n",
        "HTML of a login page": b"<!doctype html><title>log in</title>" * 100,
        "control characters in names": rezipped(lambda m: m.update({f"{ESCAPE}{BIDI}": b"x"})),
    }
    for dtype in (torch.int64, torch.int8, torch.float16, torch.bfloat16, torch.bool, torch.complex64):
        pt[f"{dtype}"] = saved(parts(left=torch.ones(D, K).to(dtype)))
    for name, shape in {
        "mean_in": (D + 1,),
        "mean_out": (D, 1),
        "left": (D, K + 1),
        "right": (K, D, 1),
        "diagonal": (3,),
    }.items():
        pt[f"shape of {name}"] = saved(parts(**{name: torch.ones(shape).double()}))
    for name in ("mean_in", "mean_out", "diagonal", "left", "metadata"):
        pt[f"no {name}"] = saved(parts(**{name: None}))
    metadata = {
        "negative alpha": header(alpha=-1),
        "alpha NaN": header(alpha=float("nan")),
        "alpha infinite": header(alpha=float("inf")),
        "alpha text": header(alpha="1"),
        "alpha true": header(alpha=True),
        "alpha null": header(alpha=None),
        "alpha list": header(alpha=[1]),
        "alpha of 400 digits": header(alpha=10**400),
        "alpha of 9000 digits": header().replace("0.3", "9" * 9000),
        "meta list": header(meta=[["a", 1]]),
        "meta text": header(meta="a"),
        "meta null": header(meta=None),
        "version 2": header(version=2),
        "version text": header(version="1"),
        "version of noise": header(version=[ESCAPE] * 1000),
        "other format": header(format=f"tuned-lens{BIDI}{ESCAPE}"),
        "no format": "{}",
        "list": "[]",
        "half": header()[:20],
        "repeated keys": header().replace('"meta"', '"alpha": 1, "meta"'),
        "a hundred thousand brackets": "[" * 100_000,
        "meta a hundred thousand deep": header().replace("{}", '{"a":' * 100_000 + "1" + "}" * 100_000),
    }
    pt |= {f"metadata: {name}": saved(parts(metadata=text)) for name, text in metadata.items()}
    pt |= {f"metadata: {type(v).__name__}": saved(parts(metadata=v)) for v in (1, 1.5, {"a": "b"}, ["a"])}
    good = a_map().to_bytes()
    pt |= {f"truncated at {n}": good[:n] for n in range(1, len(good), len(good) // 20)}
    pt |= {f"flipped at {n}": _flipped(good, n) for n in _inside_records(good)}
    st = _safetensors()
    tables = {"map.pt": pt, "map.safetensors": st}
    cases = [Case("map", f"{name} ({n[4:]})", file(n, c)) for n, t in tables.items() for name, c in t.items()]
    return cases + [Case("map", name, write) for name, write in _places().items()]


def _legacy(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _inside_records(content: bytes) -> list[int]:
    """Offsets in the middle of what torch reads; elsewhere in a zip are dates and the like."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        offsets = []
        for member in archive.infolist():
            if "data" in member.filename and member.file_size > 4:
                start = member.header_offset + 30
                start += sum(struct.unpack("<HH", content[start - 4 : start]))
                offsets += [start + i * member.file_size // 4 for i in range(4)]
    return offsets


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def _safetensors() -> dict[str, bytes]:
    good = a_map().to_bytes(".safetensors")

    def entry(**changes: object) -> bytes:
        return safetensors_edit(lambda fields: fields["left"].update(changes))

    n = int.from_bytes(good[:8], "little")
    text = good[8 : 8 + n].decode()
    found = {
        **{f"header of {c} bytes": safetensors_file(b"{}", claims=c) for c in (3, 5 << 20, 1 << 30, 1 << 40)},
        "header of 2^64 - 1 bytes": safetensors_file(b"{}", claims=(1 << 64) - 1),
        "header of nothing": safetensors_file(b""),
        "header a list": safetensors_file([]),
        "header not JSON": safetensors_file(b"{oops"),
        "header not UTF-8": safetensors_file(b'{"\xff\xfe": 1}'),
        "header a hundred thousand deep": safetensors_file(b"[" * 100_000),
        "empty header": safetensors_file({}),
        "seven bytes": b"\0" * 7,
        "empty": b"",
        "repeated keys": safetensors_file(text.replace('"left"', '"right"').encode(), good[8 + n :]),
        "shape of 2^62": entry(shape=[1 << 62, 4]),
        "shape of 10^30": entry(shape=[10**30]),
        "negative shape": entry(shape=[-D, -K]),
        "fractional shape": entry(shape=[1.5, 2]),
        "shape null": entry(shape=None),
        "other shape": entry(shape=[D + 1, K]),
        "offsets reversed": entry(data_offsets=[64, 0]),
        "offsets beyond the end": entry(data_offsets=[0, 1 << 40]),
        "negative offsets": entry(data_offsets=[-8, 8]),
        "overlapping offsets": entry(data_offsets=[0, 128]),
        "three offsets": entry(data_offsets=[0, 8, 16]),
        "unknown dtype": entry(dtype="Q99"),
        "dtype list": entry(dtype=["F64"]),
        "no dtype": safetensors_edit(lambda f: f["left"].pop("dtype")),
        "no metadata": safetensors_edit(lambda f: f.pop("__metadata__")),
        "metadata a number": safetensors_edit(lambda f: f["__metadata__"].update(metadata=1)),
        "metadata not JSON": safetensors_edit(lambda f: f["__metadata__"].update(metadata="{")),
        "alpha NaN": safetensors_edit(
            lambda f: f["__metadata__"].update(metadata=header(alpha=float("nan")))
        ),
        "negative alpha": safetensors_edit(lambda f: f["__metadata__"].update(metadata=header(alpha=-3))),
        "bytes behind the end": good + b"\0",
        "two hundred thousand tensors": safetensors_file(
            {f"t{i}": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        ),
    }
    for dtype in (torch.float16, torch.int64, torch.bool):
        tensors = {k: v for k, v in parts().items() if k != "metadata"} | {"left": torch.ones(D, K).to(dtype)}
        found[f"{dtype}"] = safetensors.torch.save(tensors, {"metadata": header()})
    nan = {k: v for k, v in parts().items() if k != "metadata"} | {
        "mean_in": torch.full((D,), torch.nan).double()
    }
    found["NaN"] = safetensors.torch.save(nan, {"metadata": header()})
    found |= {f"truncated at {i}": good[:i] for i in range(1, len(good), len(good) // 12)}
    found |= {f"flipped length byte {i}": _flipped(good, i) for i in range(8)}
    return found


def _sparse(folder: Path, name: str, size: int, start: bytes = b"") -> Path:
    with (folder / name).open("wb") as out:
        out.write(start)
        out.truncate(size)
    return folder / name


def _linked(folder: Path, target: str, name: str = "map.pt") -> Path:
    (folder / name).symlink_to(target)
    return folder / name


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "map.pt")
    return folder / "map.pt"


def _places() -> dict[str, Callable[[Path], Path]]:
    def huge_member_list(folder: Path) -> Path:
        path = _sparse(folder, "map.pt", 950 << 20)
        with path.open("ab") as out:
            out.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9999, 9999, 900 << 20, 0, 0))
        return path

    def directory(folder: Path) -> Path:
        (folder / "map.pt").mkdir()
        return folder / "map.pt"

    return {
        "a directory": directory,
        "a pipe": _fifo,
        "a link to endless zeros": lambda f: _linked(f, "/dev/zero"),
        "a link to itself": lambda f: _linked(f, "map.pt"),
        "a link to nothing": lambda f: _linked(f, "/nowhere/at/all.pt"),
        "a link to the password file": lambda f: _linked(f, "/etc/passwd"),
        "16 GiB of zeros (pt)": lambda f: _sparse(f, "map.pt", 16 << 30),
        "3 GiB of zeros (pt)": lambda f: _sparse(f, "map.pt", 3 << 30),
        "3 GiB of zeros (safetensors)": lambda f: _sparse(f, "map.safetensors", 3 << 30),
        "1 GiB header, present": lambda f: _sparse(f, "map.safetensors", 2 << 30, struct.pack("<Q", 1 << 30)),
        "list of members of 900 MB, present": huge_member_list,
        "NUL in the name": lambda f: f / "a\0b.pt",
        "name of 5000 characters": lambda f: f / ("a" * 5000 + ".pt"),
        "control characters in the name": lambda f: f / f"{ESCAPE}{BIDI}.pt",
        "no suffix": file("map", a_map().to_bytes()),
        "pickle suffix": file("map.pkl", a_map().to_bytes()),
    }


# Pair specs

SPEC = {
    "name": "toy",
    "base": {"model": "base"},
    "tuned": {"model": "tuned"},
    "prompts": {"train": "train.jsonl", "val": "val.jsonl"},
}
LINE = '{"text": "is tea good"}\n'


def pair(
    change: Callable[[dict[str, Any]], object] = lambda spec: None, **files: bytes | str
) -> Callable[[Path], str]:
    """Writes a pair without weights, its spec changed, more files beside it; `__` in names is `/`."""

    def write(folder: Path) -> str:
        (folder / "pair").mkdir()
        (folder / "outside.jsonl").write_text(LINE)
        (folder / "outside").mkdir()
        for name in ("train", "val"):
            (folder / "pair" / f"{name}.jsonl").write_text(LINE)
        for name in ("base", "tuned"):
            (folder / "pair" / name).mkdir()
            (folder / "pair" / name / "config.json").write_text("{}")
        for name, content in files.items():
            place = (
                folder
                / "pair"
                / name.replace("__", "/").replace("_json", ".json").replace("_st", ".safetensors")
            )
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content if isinstance(content, bytes) else content.encode())
        spec = json.loads(json.dumps(SPEC))
        change(spec)
        (folder / "pair" / "pair.yaml").write_text(yaml.safe_dump(spec, allow_unicode=True))
        return str(folder / "pair" / "pair.yaml")

    return write


def linked(name: str, target: str) -> Callable[[Path], str]:
    """Writes a pair where `name` is a link."""

    def write(folder: Path) -> str:
        spec = pair()(folder)
        place = folder / "pair" / name
        if place.is_dir():
            (place / "config.json").unlink()
            place.rmdir()
        else:
            place.unlink()
        place.symlink_to(target.replace("OUTSIDE", str(folder / "outside")))
        return spec

    return write


def _specs() -> list[Case]:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    good = yaml.safe_dump(SPEC)
    texts: dict[str, bytes | str] = {
        "billion laughs": bomb,
        "alias of itself": "a: &a [*a]",
        "merged aliases": "a: &a {x: 1}\nb: {<<: *a}",
        "python object": "a: !!python/object/apply:os.system ['touch executed']",
        "python name": "a: !!python/name:os.system",
        "python module": "a: !!python/module:antigravity",
        "python tuple": "a: !!python/tuple [1]",
        "unknown tag": "a: !owned 1",
        "a thousand brackets": "a: " + "[" * 1000,
        "forty thousand brackets": "a: " + "[" * 40_000 + "]" * 40_000,
        "a hundred levels": "a: " + "[" * 100 + "]" * 100,
        "over its size": good + "#" * 70_000,
        "empty": "",
        "a list": "- 1",
        "a word": "word",
        "two documents": good + "---\n" + good,
        "date that is none": good + "description: 2001-99-99\n",
        "timestamp tag": good + "description: !!timestamp x\n",
        "binary tag": good + "description: !!binary '*'\n",
        "integer tag": good + "description: !!int x\n",
        "float tag": good + "description: !!float []\n",
        "integer of 9000 digits": good + "description: " + "9" * 9000 + "\n",
        "list as key": "? [1]\n: 2",
        "mapping as key": "? {a: 1}\n: 2",
        "null as key": good + "null: 1\n",
        "repeated key": good + "name: other\n",
        "repeated inner key": good.replace("model: base", "model: base\n  model: other"),
        "tab": "a:\n\t- 1",
        "unclosed quote": 'a: "b',
        "NUL": good + "description: a\0b\n",
        "escape sequence": good + f"description: {ESCAPE}\n",
        "not UTF-8": b"name: \xff\xfe\n",
        "UTF-16": good.encode("utf-16"),
        "control characters as key": good + f'"\\e]0;x\\a{BIDI}": 1\n',
        "thousand unknown keys": good + "".join(f"k{i}: 1\n" for i in range(1000)),
        "root set": good + "root: /\n",
        "anchor bomb in quotes": good + "description: &a x\nsystem: *a\n",
    }
    cases = [
        Case("spec", name, lambda f, t=text: str(file("pair.yaml", t)(f))) for name, text in texts.items()
    ]
    fields: dict[str, Callable[[dict[str, Any]], object]] = {
        "name with a slash": lambda s: s.update(name="../../etc"),
        "name with bidi": lambda s: s.update(name=f"a{BIDI}b"),
        "name with a newline": lambda s: s.update(name="toy\n"),
        "name with control characters": lambda s: s.update(name=f"a{ESCAPE}"),
        "name of 100 characters": lambda s: s.update(name="a" * 100),
        "empty name": lambda s: s.update(name=""),
        "name a number": lambda s: s.update(name=1),
        "name with a command": lambda s: s.update(name="$(touch executed)"),
        "trust as text": lambda s: s.update(trust_remote_code="perhaps"),
        "unknown dtype": lambda s: s.update(dtype="pickle"),
        "prompts above": lambda s: s["prompts"].update(train="../outside.jsonl"),
        "one prompt file above": lambda s: s.update(prompts="../outside.jsonl"),
        "model above a package": lambda s: s["base"].update(model="package:xml/../os.py"),
        "model of a package that is a path": lambda s: s["base"].update(model="package:../xml/x.gguf"),
        "prompts absolute": lambda s: s["prompts"].update(train="/etc/passwd"),
        "prompts of the home directory": lambda s: s["prompts"].update(train="~/.netrc"),
        "prompts on the network": lambda s: s["prompts"].update(train="https://example.org/x.jsonl"),
        "prompts a directory": lambda s: s["prompts"].update(train="base"),
        "prompts with NUL": lambda s: s["prompts"].update(train="a\0b"),
        "prompts of a long name": lambda s: s["prompts"].update(train="a" * 4000),
        "prompts empty": lambda s: s["prompts"].update(train=""),
        "model above": lambda s: s["base"].update(model="../outside"),
        "model above, roundabout": lambda s: s["base"].update(model="base/../../outside"),
        "model missing": lambda s: s["base"].update(model="./nowhere"),
        "model missing, absolute": lambda s: s["base"].update(model="/nowhere/at/all"),
        "model of nobody": lambda s: s["base"].update(model="~nobody-here/model"),
        "model of a too long name": lambda s: s["base"].update(model="a" * 5000),
        "model of a long path": lambda s: s["base"].update(model="./" + "a" * 4000),
        "model and adapter": lambda s: s["tuned"].update(adapter="x"),
        "plant of another form": lambda s: s.update(tuned={"planted": "resid_post:L1:r2"}),
        "plant beyond reason": lambda s: s.update(tuned={"planted": "attn_out:L1:r2:alpha" + "9" * 400}),
    }
    cases += [Case("spec", name, pair(change)) for name, change in fields.items()]
    weights = safetensors.torch.save({"w": torch.zeros(4, 4)})
    files: dict[str, dict[str, bytes | str]] = {
        "configuration not JSON": {"base__config_json": "{oops"},
        "configuration a list": {"base__config_json": "[]"},
        "configuration a hundred thousand deep": {"base__config_json": "[" * 100_000},
        "configuration not UTF-8": {"base__config_json": b"\xff\xfe"},
        "configuration of 10^9 columns": {
            "base__config_json": json.dumps({"hidden_size": 10**9, "vocab_size": 10**9}),
            "base__model_st": weights,
        },
        "configuration of 10^7 layers": {
            "base__config_json": json.dumps({"hidden_size": 64, "num_hidden_layers": 10**7}),
            "base__model_st": weights,
        },
        "inner configuration of 10^9 columns": {
            "base__config_json": json.dumps({"text_config": {"hidden_size": 10**9, "vocab_size": 10**9}}),
            "base__model_st": weights,
        },
        "weights truncated": {"base__model_st": weights[:-8]},
        "weights empty": {"base__model_st": b""},
        "weights noise": {"base__model_st": bytes(range(256))},
        "weights with a header of 2^40 bytes": {"base__model_st": safetensors_file(b"{}", claims=1 << 40)},
        "weights a web page": {"base__model_st": "<!doctype html>"},
        "index above": {"base__m.index_json": json.dumps({"weight_map": {"a": "../../x.safetensors"}})},
        "index absolute": {"base__m.index_json": json.dumps({"weight_map": {"a": "/etc/passwd"}})},
        "index of numbers": {"base__m.index_json": json.dumps({"weight_map": {"a": 1}})},
        "index of nothing": {"base__m.index_json": "{}"},
        "adapter that is a pickle": {"base__adapter_config_json": "{}", "base__adapter_model.bin": b"x"},
        "adapter that imports": {
            "base__adapter_config_json": json.dumps({"megatron_config": {"a": 1}, "megatron_core": "os"}),
            "base__adapter_model_st": weights,
        },
    }
    cases += [Case("spec", name, pair(**more)) for name, more in files.items()]
    links = {"train.jsonl": "OUTSIDE.jsonl", "val.jsonl": "/etc/passwd", "base": "OUTSIDE", "tuned": "/etc"}
    cases += [Case("spec", f"{name} is a link out", linked(name, target)) for name, target in links.items()]
    cases += [
        Case("spec", f"{name} is a link to itself", linked(name, name)) for name in ("train.jsonl", "base")
    ]
    return cases


# Prompts


def _prompts() -> list[Case]:
    texts: dict[str, bytes | str] = {
        "empty": "",
        "blank lines": "\n \n\t\n",
        "not JSON": "{oops\n",
        "half a line": '{"text": "is tea',
        "not UTF-8": b'{"text": "\xff\xfe"}\n',
        "Latin-1": '{"text": "th\u00e9"}\n'.encode("latin-1"),
        "UTF-16": LINE.encode("utf-16"),
        "UTF-16 without a mark": LINE.encode("utf-16-le"),
        "NUL in the file": LINE + "\0\n",
        "NUL in the text": '{"text": "a\\u0000b"}\n',
        "NUL in a message": '{"messages": [{"role": "user", "content": "a\\u0000b"}]}\n',
        "half a character": '{"text": "\\ud800"}\n',
        "half a character in a message": '{"messages": [{"role": "user", "content": "\\udfff"}]}\n',
        "repeated key": '{"text": "a", "text": "b"}\n',
        "NaN": '{"text": "a", "x": NaN}\n',
        "integer of 9000 digits": '{"text": "a", "x": ' + "9" * 9000 + "}\n",
        "a hundred thousand brackets": "[" * 100_000 + "\n",
        "objects a hundred thousand deep": '{"a":' * 100_000 + "1" + "}" * 100_000 + "\n",
        "a number": "1\n",
        "null": "null\n",
        "a list": '["text"]\n',
        "empty text": '{"text": "  "}\n',
        "text a number": '{"text": 1}\n',
        "text a list": '{"text": ["a"]}\n',
        "no text": '{"question": "a"}\n',
        "text and messages": '{"text": "a", "messages": []}\n',
        "no messages": '{"messages": []}\n',
        "messages an object": '{"messages": {"role": "user"}}\n',
        "unknown role": '{"messages": [{"role": "root", "content": "a"}]}\n',
        "ends with the assistant": '{"messages": [{"role": "assistant", "content": "a"}]}\n',
        "content null": '{"messages": [{"role": "user", "content": null}]}\n',
        "line of 2 MB": '{"text": "' + "a" * (2 << 20) + '"}\n',
        "pickle": pickle.dumps(Payload(os.system, f"touch {MARKER}")),
        "zip": rezipped(lambda members: None),
    }
    cases = [Case("prompts", name, file("val.jsonl", text)) for name, text in texts.items()]
    places: dict[str, Callable[[Path], Path]] = {
        "missing": lambda f: f / "nothing.jsonl",
        "a directory": lambda f: f,
        "endless zeros": lambda f: _linked(f, "/dev/zero", "val.jsonl"),
        "a pipe": _fifo,
        "NUL in the name": lambda f: f / "a\0b",
        "long name": lambda f: f / ("a" * 5000),
        "16 GiB of zeros": lambda f: _sparse(f, "val.jsonl", 16 << 30),
        "200 MiB of zeros": lambda f: _sparse(f, "val.jsonl", 200 << 20),
    }
    return cases + [Case("prompts", name, write) for name, write in places.items()]


# Saved models and what the store says


def saved_model(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """Writes a good model's directory, then changes it."""

    def write(folder: Path) -> Path:
        save_model(a_map(), folder / "model")
        change(folder / "model")
        return folder / "model"

    return write


def flavour(**changes: Any) -> Callable[[Path], Path]:
    """A saved model whose MLmodel says something else."""

    def change(root: Path) -> None:
        fields = yaml.safe_load((root / "MLmodel").read_text())
        fields["flavors"]["mechdiff"].update(changes)
        (root / "MLmodel").write_text(yaml.safe_dump(fields))

    return saved_model(change)


def replaced(name: str, content: bytes, key: str) -> Callable[[Path], Path]:
    """A saved model with another file, and its right digest."""

    def change(root: Path) -> None:
        import hashlib

        (root / name).write_bytes(content)
        fields = yaml.safe_load((root / "MLmodel").read_text())
        fields["flavors"]["mechdiff"][key] = hashlib.sha256(content).hexdigest()
        (root / "MLmodel").write_text(yaml.safe_dump(fields))

    return saved_model(change)


def _link_out(root: Path) -> None:
    (root / "map.pt").rename(root.parent / "elsewhere.pt")
    (root / "map.pt").symlink_to(root.parent / "elsewhere.pt")


def _models() -> list[Case]:
    laughs = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [" + ", ".join([f"*{a}"] * 30) + "]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    laughs += "flavors: {mechdiff: {sha256: *h, probe_sha256: *h}}\n"
    mlmodels: dict[str, bytes] = {
        "MLmodel of laughs": laughs.encode(),
        "MLmodel empty": b"",
        "MLmodel not UTF-8": b"\xff\xfe",
        "MLmodel a list": b"[1]",
        "MLmodel without flavours": b"a: 1",
        "MLmodel of python objects": b"flavors: !!python/object/apply:os.system ['touch executed']",
        "MLmodel of brackets": b"[" * 50_000,
        "MLmodel of 2 MB": b"#" * (2 << 20),
    }
    cases = [
        Case("model", n, saved_model(lambda r, c=c: (r / "MLmodel").write_bytes(c)))
        for n, c in mlmodels.items()
    ]
    probe = safetensors.torch.save
    probes: dict[str, bytes] = {
        "probe of nothing": probe({}),
        "probe without y": probe({"x": torch.zeros(1, D)}),
        "probe without rows": probe({"x": torch.zeros(0, D), "y": torch.zeros(0, D)}),
        "probe of another width": probe({"x": torch.zeros(1, 3), "y": torch.zeros(1, D)}),
        "probe of integers": probe({"x": torch.zeros(1, D).long(), "y": torch.zeros(1, D)}),
        "probe of NaN": probe({"x": torch.full((1, D), torch.nan), "y": torch.full((1, D), torch.nan)}),
        "probe of noise": bytes(range(256)),
        "probe with a header of 2^40 bytes": safetensors_file(b"{}", claims=1 << 40),
        "probe of another map": probe({"x": torch.ones(1, D), "y": torch.ones(1, D)}),
    }
    cases += [Case("model", n, replaced("probe.safetensors", c, "probe_sha256")) for n, c in probes.items()]
    payload = saved(parts(left=Payload(os.system, f"touch {MARKER}")))
    cases += [
        Case("model", "payload with its digest", replaced("map.pt", payload, "sha256")),
        Case("model", "digest a list", flavour(sha256=["a"])),
        Case("model", "digest a path", flavour(sha256="../../etc")),
        Case("model", "digest of another", flavour(sha256="0" * 64)),
        Case("model", "map is a link out", saved_model(_link_out)),
    ]
    tables: dict[str, bytes | str] = {
        "not JSON": "{",
        "a list": "[]",
        "no data": '{"columns": []}',
        "more columns than data": '{"columns": ["a", "b"], "data": [[1]]}',
        "arguments of pandas": '{"columns": ["a"], "index": [1]}',
        "brackets": "[" * 100_000,
        "not UTF-8": b"\xff",
    }
    cases += [Case("table", name, file("table.json", text)) for name, text in tables.items()]
    return cases


def _manifests() -> list[Case]:
    good = {"pair": "toy", "winners": {"L1_attn_out": {"path": "best/a.pt", "alpha": 0.3}}}
    text = json.dumps(good)

    def winner(**changes: object) -> str:
        return json.dumps(
            {**good, "winners": {"L1_attn_out": {"path": "best/a.pt", "alpha": 0.3, **changes}}}
        )

    manifests: dict[str, bytes | str] = {
        "empty": "",
        "a list": "[]",
        "no winners": json.dumps({**good, "winners": {}}),
        "winners a list": json.dumps({**good, "winners": []}),
        "thousands of winners": json.dumps({**good, "winners": {f"L{i}": {} for i in range(5000)}}),
        "negative alpha": winner(alpha=-1),
        "alpha NaN": winner(alpha=float("nan")),
        "alpha of 9000 digits": text.replace("0.3", "9" * 9000),
        "path empty": winner(path=""),
        "path of 5000 characters": winner(path="a" * 5000),
        "path a list": winner(path=["a"]),
        "repeated key": text.replace('"pair"', '"pair": "other", "pair"'),
        "not UTF-8": b"\xff",
        "half": text[:20],
        "brackets": "[" * 100_000,
        "over its size": " " * (2 << 20) + text,
    }
    cases = [Case("manifest", name, file("manifest.json", content)) for name, content in manifests.items()]
    cases += [
        Case("manifest", "a pipe", _fifo),
        Case("manifest", "endless", lambda f: _linked(f, "/dev/zero")),
    ]
    policies: dict[str, bytes | str] = {
        "a list": "- 1",
        "unknown rule": "min_dorp_pct: 3",
        "rule NaN": "min_drop_pct: .nan",
        "rule text": "min_drop_pct: much",
        "repeated rule": "min_drop_pct: 30\nmin_drop_pct: 1",
        "laughs": "a: &a [x]\nb: [*a, *a]",
        "python": "min_drop_pct: !!python/object/apply:os.system ['touch executed']",
        "date that is none": "min_drop_pct: 2001-99-99",
        "brackets": "[" * 1000,
        "not UTF-8": b"\xff",
        "over its size": "#" * 70_000,
    }
    cases += [Case("policy", name, file("policy.yaml", content)) for name, content in policies.items()]
    maps = [case for case in _maps() if case.name.endswith("(pt)") and "metadata" not in case.name]
    places = ("a pipe", "a link to endless zeros", "a link to the password file", "a link to itself")
    maps = maps[:70:2] + [case for case in _maps() if case.name in places]
    return cases + [Case("bundle", case.name, case.write) for case in maps]


def _words() -> list[Case]:
    names = [
        "../x",
        "/x",
        "a/b",
        "a:b",
        "a.b",
        "",
        " ",
        "a\0b",
        f"a{BIDI}",
        f"a{ESCAPE}",
        "a" * 201,
        "a\n",
        "-a",
        "$(id)",
    ]
    words = {
        "name": names,
        "bundle's path": ["../x", "/etc/passwd", "a\0", "a" * 1000, "C:\\x", "nothing", f"{ESCAPE}{BIDI}"],
        "alias": ["../x", "a/b", "", "latest", "v1", "a\0", f"a{BIDI}", "a" * 201, "a\n", "a@b"],
        "digest": ["../../..", "/home", "", "0" * 63, "G" * 64, "0" * 64 + "\n", ".", f"{ESCAPE}"],
        "site": [
            "L-1/attn_out",
            "L1/../x",
            "L" + "9" * 5000 + "/attn_out",
            "",
            "L1/attn_out\n",
            f"L1/{BIDI}",
        ],
        "hook": ["", "__class__", f"{ESCAPE}"],
        "rank": ["-1", "1e3", "9" * 5000, "", "0x10", f"{BIDI}", "nan"],
        "alpha": ["nan", "inf", "-1", "", "1,1", "9" * 400, f"{ESCAPE}", "1;2", "0.3,"],
        "plant": ["", "attn_out", "attn_out:L1:r0", "attn_out:L1:r1:seed" + "9" * 50, "os.system:L1:r1"],
        "pair": [
            "nothing",
            "a" * 5000,
            "a\0b",
            "/dev/zero",
            "..",
            f"{ESCAPE}{BIDI}.yaml",
            "planted:",
            "planted:" + "9" * 5000,
        ],
    }
    return [
        Case(reader, f"{i} {w[:20]!r}", lambda _, w=w: w)
        for reader, all_ in words.items()
        for i, w in enumerate(all_)
    ]


CASES: list[Case] = [*_maps(), *_specs(), *_prompts(), *_models(), *_manifests(), *_words()]
