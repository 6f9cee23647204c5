"""Nowhere in our code is a shell, an unpickler or an evaluator of text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path for part in ("mechdiff_mlflow", "scripts", "benchmarks") for path in (ROOT / part).rglob("*.py")
]
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "commands.getoutput", "subprocess.getoutput"}
FORBIDDEN |= {"subprocess.getstatusoutput", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"}
FORBIDDEN |= {
    "dill.load",
    "cloudpickle.load",
    "cloudpickle.loads",
    "numpy.load",
    "np.load",
    "yaml.unsafe_load",
}
FORBIDDEN |= {"yaml.full_load", "yaml.load_all", "pandas.read_pickle", "pd.read_pickle", "marshal.loads"}


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN or given.get("shell", "False") != "False":
            yield f"line {node.lineno}: {name}"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if name == "yaml.load" and given.get("Loader") not in ("_PlainLoader", "yaml.SafeLoader"):
            yield f"line {node.lineno}: yaml.load without a safe loader"
        if given.get("trust_remote_code") == "True":
            yield f"line {node.lineno}: trust_remote_code=True"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_no_pickle_no_eval(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "yaml.load(x, Loader=yaml.Loader)",
        "eval(x)",
        "model(x, trust_remote_code=True)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert list(offences(line))
