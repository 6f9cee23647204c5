"""What a map's file may say of where the map comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.pair_spec import Rank
from mechdiff_mlflow.spec.sites import Position, Site
from mechdiff_mlflow.spec.untrusted import explain

_Word: TypeAlias = Annotated[str, Field(pattern=r"^[\w .:+@/-]+$", max_length=300)]
_Setting: TypeAlias = Annotated[float, Field(ge=0, le=1e300, allow_inf_nan=False)] | _Word
_Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 31)]


def _named(parse: Callable[[str], object]) -> AfterValidator:
    """Validates by `parse`, whose sentence becomes pydantic's."""

    def check(value: object) -> object:
        try:
            parse(str(value))
        except MechdiffError as error:
            raise ValueError(str(error).rstrip(".")) from None
        return value

    return AfterValidator(check)


class _Meta(BaseModel):
    """What a map's meta may say of where it comes from; each may be missing, others stay as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    site: Annotated[str, _named(Site.parse)] = ""
    position: Annotated[str, _named(Position.parse)] = ""
    k: Annotated[str | int, _named(Rank.parse)] = ""
    family: Literal["update", "content"] = "update"
    solver: _Word = ""
    pair: _Word = ""
    fingerprint: _Word = ""
    dtype: _Word = ""
    off_span: _Word = ""
    output_metric: _Word = ""
    unembedding: _Word = ""
    alpha_fit: _Word = ""
    shrink: _Setting = 0.0
    ridge: _Setting = 0.0
    directions: _Count | _Word = 0
    rank: _Count | None = None
    span_rank: _Count = 0
    n_rows: _Count = 0


def check_meta(meta: Mapping[str, Any], source: object) -> None:
    """Refuse a map's meta in which a known field has another type or value; errors call it `source`."""
    try:
        _Meta.model_validate(dict(meta))
    except (ValidationError, TypeError) as error:
        raise MechdiffError(f"The meta of {source} is not valid: {explain(error)}; fit it again.") from None
