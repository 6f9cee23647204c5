"""The bounds on bytes from elsewhere, and that what watches over the corpus would notice."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from hostile.audit import Audit
from hostile.corpus import CASES, MARKER, Payload
from hypothesis import given
from hypothesis import strategies as st
from toy import SPEC, write_pair

from mechdiff_mlflow import text as safe
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.tracking.store.store import prepare_process

ROOT = Path(__file__).parents[1]

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(plain)
def test_plain_json_is_read_as_it_is(value: object) -> None:
    assert untrusted.parse_json(json.dumps(value)) == value


@given(st.dictionaries(st.text("abc", min_size=1), st.integers() | st.lists(st.text("xyz"))))
def test_plain_yaml_is_read_as_it_is(value: object) -> None:
    assert untrusted.parse_yaml(yaml.safe_dump(value), "it") == value


@pytest.mark.parametrize("depth", [untrusted.MAX_DEPTH, untrusted.MAX_DEPTH + 1])
def test_yaml_has_a_depth(depth: int) -> None:
    text = "[" * depth + "]" * depth
    if depth <= untrusted.MAX_DEPTH:
        assert untrusted.parse_yaml(text, "it")
        return
    with pytest.raises(MechdiffError, match="it is nested more than 32 deep, write it flatter"):
        untrusted.parse_yaml(text, "it")


def test_a_path_may_turn_but_not_leave(tmp_path: Path) -> None:
    (tmp_path / "root/a").mkdir(parents=True)
    root = tmp_path / "root"
    assert untrusted.inside(root, "a/../b", "File") == (root / "b").resolve()
    assert untrusted.inside(root, str(root / "b"), "File") == (root / "b").resolve()
    for name in ("..", "../root2/b", "/etc", "a/../../x"):
        with pytest.raises(MechdiffError, match="lies outside of"):
            untrusted.inside(root, name, "File")


def test_errors_show_what_a_terminal_would_obey() -> None:
    error = MechdiffError("\x1b[31m \u202e \ud800 \u2028 α τεστ 茶 \x00")
    assert str(error) == "\\x1b[31m \\u202e \\ud800 \\u2028 α τεστ 茶 \\x00"


def test_a_message_of_a_megabyte_keeps_its_start_and_its_remedy() -> None:
    error = MechdiffError(f"Prompt {'x' * 1_000_000} is too long; cut it.")
    assert len(str(error)) <= 2_000
    assert str(error).startswith("Prompt x")
    assert str(error).endswith("x is too long; cut it.")
    assert len(str(MechdiffError("\x1b" * 1_000_000))) <= 2_000


@given(st.text(), st.text(st.sampled_from("`*[](){}<>|\\\n\x1b\u202e&x"), max_size=20))
def test_nothing_in_a_text_is_markup_where_it_is_shown(a: str, b: str) -> None:
    for text in (a + b, b + a, b):
        seen = safe.markdown(text)
        assert "\n" not in seen
        assert not re.search(r"[`<|]|\]\(|\*\*", seen)
        page = safe.html(text)
        assert not re.search(r"<|>|&(?!lt;|gt;|amp;)", page)
        for made in (seen, page, safe.plain(text)):
            assert made.replace("\n", "").isprintable() or (
                not made.isprintable()
                and not re.search(
                    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", made
                )
            )
        assert json.loads(safe.plain(json.dumps({"x": text}, ensure_ascii=False))) == {"x": text}


def test_the_payloads_of_the_corpus_do_run_when_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload(os.system, f"touch {MARKER}")))
    assert (tmp_path / MARKER).exists()


def test_the_audit_notices(tmp_path: Path) -> None:
    audit = Audit(tmp_path)
    audit.on = True
    audit("open", (str(tmp_path / "in"), "w", os.O_WRONLY))
    audit("open", ("/elsewhere/read", "r", os.O_RDONLY))
    assert audit.outside == []
    audit("open", ("/elsewhere/written", "w", os.O_WRONLY))
    audit("shutil.rmtree", (tmp_path.parent,))
    audit("os.rename", (str(tmp_path / "a"), "/elsewhere/b", -1, -1))
    audit("os.system", (b"true",))
    audit("pickle.find_class", ("os", "system"))
    audit("socket.connect", (None, ("127.0.0.1", 9)))
    assert (len(audit.outside), len(audit.executed), len(audit.connections)) == (3, 2, 1)


def test_mlflow_may_not_unpickle_in_our_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION

    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", raising=False)
    assert MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is True
    prepare_process()
    assert MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False
    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION")


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_models_is_off_unless_asked_for_and_then_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """A model whose configuration names a Python file beside it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = write_pair(tmp_path / "pair")
    config = json.loads((path.parent / "base/config.json").read_text())
    config |= {
        "model_type": "owned",
        "auto_map": {"AutoConfig": "owned.C", "AutoModelForCausalLM": "owned.M"},
    }
    (path.parent / "base/config.json").write_text(json.dumps(config))
    (path.parent / "base/owned.py").write_text(f"open({str(tmp_path / MARKER)!r}, 'w')\n")
    path.write_text(SPEC + f"trust_remote_code: {str(trusted).lower()}\n")
    spec = PairSpec.load(str(path))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(MechdiffError, match="cannot be loaded"):
            load_pair(spec)
    warned = [str(w.message) for w in seen if "trust_remote_code is on" in str(w.message)]
    assert bool(warned) is trusted
    assert (tmp_path / MARKER).exists() is trusted


def test_the_threat_model_names_what_there_is() -> None:
    page = (ROOT / "docs/threat-model.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|benchmarks|mechdiff_mlflow|docs)/[\w/.-]+)`", page))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert re.findall(r"(\d+) inputs, ", page) == [str(len(CASES))]
