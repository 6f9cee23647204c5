"""Who may import whom: every room imports only rooms to its left, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mechdiff_mlflow

PACKAGE = Path(mechdiff_mlflow.__file__).parent
ROOMS = (
    "text",
    "errors",
    "spec",
    "measures",
    "maps",
    "solvers",
    "engine",
    "models",
    "experiments",
    "report",
    "tracking",
    "cli",
)
INSIDE = {
    "engine": ("model", "memory", "kernels", "paths", ""),
    "tracking": (
        "store",
        "content",
        "",
        "runs",
        "registry",
        "predecessor",
        "commands",
    ),  # "" is what lies in the room itself
}


def modules() -> dict[str, Path]:
    """The dotted name of every module without the package's, and its file."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, names: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mechdiff_mlflow":
            module = ".".join((node.module or "").split(".")[1:])
            for alias in node.names:
                full = f"{module}.{alias.name}".lstrip(".")
                yield full if full in names else module


def test_imports_go_one_way() -> None:
    names = modules()
    wrong = []
    for name, file in names.items():
        room, *inner = name.split(".")
        for wanted in imports(file, names) if name not in ("", "__main__") else ():
            other, *theirs = wanted.split(".")
            if not other or ROOMS.index(other) > ROOMS.index(room):
                wrong.append(f"{name} imports {wanted or 'the package itself'}")
            elif other == room and room in INSIDE and len(inner) and len(theirs):
                order = INSIDE[room]
                mine, its = (part[0] if len(part) > 1 or part[0] in order else "" for part in (inner, theirs))
                if order.index(its) > order.index(mine):
                    wrong.append(f"{name} imports {wanted}")
    assert not wrong


def test_no_two_modules_import_each_other() -> None:
    names = modules()
    graph = {
        name: {other for other in imports(file, names) if other != name}
        for name, file in names.items()
        if name
    }
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_the_package_has_few_names_and_no_long_files() -> None:
    shown = [
        path for path in PACKAGE.iterdir() if not path.name.startswith("_") and path.suffix in ("", ".py")
    ]
    assert {path.stem for path in shown} == set(ROOMS)
    assert not [name for name, file in modules().items() if len(file.read_text().splitlines()) > 400]
