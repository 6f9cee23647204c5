"""What was chosen for a map, and on which prompts: a record in its meta that goes wherever the map goes.

A number on prompts on which something was chosen flatters the map. Prompts are told by what they say.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence

from mechdiff_mlflow.maps.affine import JSON, AffineMap
from mechdiff_mlflow.spec.prompts import PromptSet

META = "selection"
"""Key in a map's meta: a list of `{"what", "prompts"}`, empty where nothing was chosen."""
CELL = "cell"
"""What may be chosen of several maps that are reported together, the best of which people take."""

_DIGITS = 12  # hexadecimal, of each prompt: among 10⁵ and 10⁵ prompts one collides once in 10⁴ times


def entry(what: str, prompts: PromptSet) -> dict[str, JSON]:
    """The record of choices on some prompts, in words, e.g. `alpha, off_span` or `cell (the best of 49)`."""
    return {"what": what, "prompts": "".join(map(_digest, _texts(prompts)))}


def recorded(the_map: AffineMap, *entries: Mapping[str, JSON]) -> AffineMap:
    """The map with more in its record, which it then has even where nothing was chosen."""
    return the_map.with_meta(**{META: [*(of(the_map) or ()), *entries]})


def of(the_map: AffineMap) -> list[Mapping[str, JSON]] | None:
    """The record of a map; None where there is none that can be read, so that nobody knows."""
    found = the_map.meta.get(META)
    if not isinstance(found, list) or not all(_is_entry(one) for one in found):
        return None
    return [one for one in found if isinstance(one, Mapping)]


def leaks(the_map: AffineMap, reported: PromptSet, *, but: str | None = None) -> tuple[str, ...] | None:
    """What was chosen for a map on some of the prompts reported, with how many; None where nobody knows.

    Choices that start with `but` are passed over.
    """
    record = of(the_map)
    if record is None:
        return None
    texts = [_digest(text) for text in _texts(reported)]
    found = []
    for one in record:
        what, known = str(one["what"]), _prompts_of(one)
        count = sum(text in known for text in texts)
        if count and not (but is not None and what.startswith(but)):
            part = "" if count == len(texts) else f" ({count} of {len(texts)} prompts)"
            found.append(what + part)
    return tuple(found)


def sentence(leak: Sequence[str] | None) -> str:
    """What a reader must know, and what helps; empty where nothing was chosen on the reported prompts."""
    if leak is None:
        return (
            "It is not known on which prompts this map's settings were chosen (it was made elsewhere, or "
            "before that was recorded), so these numbers may flatter it"
        )
    said = f"Leak: {', '.join(leak)} chosen on the reported prompts; these numbers flatter the map"
    return said if leak else ""


REMEDY = (
    "name a file of other prompts as `test` in a copy of the pair's spec, then measure the map with mechdiff "
    "patch (or all winners with report-pass) --pair COPY.yaml --allow-pair-mismatch"
)
"""What gives a number without that choice."""


def n_prompts(one: Mapping[str, JSON]) -> int:
    """How many prompts an entry of a record is of."""
    return len(str(one["prompts"])) // _DIGITS


def _is_entry(one: object) -> bool:
    return (
        isinstance(one, Mapping)
        and isinstance(one.get("what"), str)
        and isinstance(one.get("prompts"), str)
        and re.fullmatch(f"(?:[0-9a-f]{{{_DIGITS}}})*", one["prompts"]) is not None
    )


def _prompts_of(one: Mapping[str, JSON]) -> set[str]:
    text = str(one["prompts"])
    return {text[i : i + _DIGITS] for i in range(0, len(text), _DIGITS)}


def _texts(prompts: PromptSet) -> list[str]:
    """What is said in each prompt but by the system, without case, punctuation and blanks."""
    said = [[m["content"] for m in p.messages if m["role"] != "system"] for p in prompts.prompts]
    folded = [unicodedata.normalize("NFKC", "\n".join(turns)).casefold() for turns in said]
    return [" ".join(re.findall(r"\w+|[^\w\s.,;:!?…\"'«»“”‘’]", text)) or text for text in folded]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
