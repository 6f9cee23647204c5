"""Revisions: commits on the hub, and digests of local checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import huggingface_hub

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.digests import file_sha256

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_JSON = 64 << 20


def commit_of(repository: str, revision: str | None, file: str) -> str:
    """The commit that a branch, tag or (short) commit of a hub repository means now.

    The hub is asked as for any download of `file`, so the cache answers where the hub does not.

    Raises:
        MechdiffError: It cannot be found out; or as `huggingface_hub.hf_hub_download`.
    """
    asked = revision or "main"
    try:
        # Not named after its blob, which is a link's target, but by its place: snapshots/COMMIT/file.
        found = Path(huggingface_hub.hf_hub_download(repository, file, revision=asked))
        commit = found.parents[len(Path(file).parts) - 1].name
    except huggingface_hub.errors.LocalEntryNotFoundError:
        kept = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
        fits = [path.name for path in kept.glob("snapshots/*") if path.name.startswith(asked)]
        if len(fits) != 1 or not re.fullmatch("[0-9a-f]{7,40}", asked):
            raise
        commit = fits[0]
    if not _COMMIT.fullmatch(commit):
        raise MechdiffError(
            f"Revision {asked[:80]!r} of {repository} is of no known commit ({commit[:80]!r} is none); "
            "download it again with huggingface_hub, or give the path of a folder."
        )
    return commit


def folder_digest(folder: Path, *, code: bool = False) -> str:
    """`sha256:` and 16 hex digits over configurations and weights, and with `code` the Python files.

    Tokenizers and templates are left out: the tokens that they make are in the pair's fingerprint.
    """
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or re.fullmatch(
            r"config\.json|adapter_config\.json|.*\.safetensors\.index\.json", path.name
        ):
            total.update(f"{path.name} {file_sha256(path)}\n".encode())
    for path in sorted(folder.rglob("*.py")) if code else ():
        total.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def code_commit(files: list[Path]) -> str | None:
    """Commit of the other repository that configurations take code from; None where there is none.

    Raises:
        MechdiffError: A configuration is malformed, or they name several repositories; or as `commit_of`.
    """
    named = {}
    for file in files:
        content = json.loads(untrusted.read_text(file, _MAX_JSON, "Model file"))
        classes = content.get("auto_map") if isinstance(content, dict) else None
        for entry in classes.values() if isinstance(classes, dict) else classes or ():
            for name in entry if isinstance(entry, list) else [entry]:
                if isinstance(name, str) and "--" in name:
                    repository, _, module = name.partition("--")
                    named[repository] = module.partition(".")[0] + ".py"
    if len(named) > 1:
        raise MechdiffError(
            f"{files[0].parent} takes code from several repositories ({', '.join(sorted(named))[:200]}), of "
            "which the commits cannot all be pinned; put the code into a local copy of the model."
        )
    return next((commit_of(repository, None, module) for repository, module in named.items()), None)
