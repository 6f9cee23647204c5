"""Requests as click commands: every field of a request becomes an option."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mechdiff_mlflow.cli.group import cli
from mechdiff_mlflow.spec.options import FLAG, Kind, Option, Request, flag_of, one_of
from mechdiff_mlflow.spec.pair_spec import PairSpec

R = TypeVar("R", bound=Request)


class Typed(click.ParamType[Any]):
    """A kind of value as click has it; what its parser raises is shown as it is."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.name = kind, kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of a text; defaults that are values already pass."""
        return self.kind.read(value) if isinstance(value, str) else value


def command(request: type[R], *, group: click.Group = cli) -> Callable[[Callable[[R], None]], click.Command]:
    """A decorator: a new command, whose request the function gets; the request's docstring is its help."""

    def decorate(function: Callable[[R], None]) -> click.Command:
        def run(**values: Any) -> None:
            function(request(**values))

        made = click.Command(request.command, callback=run, params=params_of(request), help=request.__doc__)
        group.add_command(made)
        return made

    return decorate


def params_of(request: type[Request]) -> list[click.Parameter]:
    """The options and arguments of a request."""
    params = [_param(name, option) for name, option in request.options().items()]
    return [*params, _FORCED] if "force" in request.options() else params


def pair_name(pair: str) -> str:
    """The name in a pair spec, or what is no file as it is: nothing of the pair but its name is needed."""
    return PairSpec.load(pair).name if Path(pair).is_file() else pair


_FORCED = click.Option(  # `mlflow run -P force=yes`: a parameter of MLproject has a value
    ["--forced"],
    type=Typed(one_of("--forced", "no", "yes")),
    default="no",
    hidden=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, param, value: ctx.meta.update(forced=value == "yes"),
    help="yes is --force.",
)


def _param(name: str, option: Option) -> click.Parameter:
    is_required, kind = option.default is ..., Typed(option.kind)
    if option.is_argument:
        n_words, default = -1 if option.is_repeated else 1, None if is_required else option.default
        return click.Argument([name], type=kind, required=is_required, nargs=n_words, default=default)
    flags = [option.flag or flag_of(name, option), *option.short.split(), name]
    if option.kind is FLAG:
        by_value = (
            (lambda ctx, param, value: value or ctx.meta.get("forced", False)) if name == "force" else None
        )
        return click.Option(flags, is_flag=True, default=option.default, callback=by_value, help=option.help)
    text = "" if is_required or option.is_repeated else option.kind.text(option.default)
    more: dict[str, Any] = {"is_flag": False, "flag_value": option.bare} if option.bare else {}
    return click.Option(
        flags,
        type=kind,
        required=is_required,
        default=text or (option.default if option.default == "" else None),
        show_default=bool(text),
        multiple=option.is_repeated,
        metavar=option.metavar or None,
        help=option.help,
        **more,
    )
