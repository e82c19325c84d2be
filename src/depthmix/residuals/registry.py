"""The residual connections by name, and the options each of them has.

A *spec* names a connection and, where wanted, some of its options::

    mgr-competitive
    attnres-block:blocks=8
    mgr-independent:n_streams=8:score_scale=unit

An option is either a field of the connection's own options dataclass or a field of
:class:`~depthmix.config.GPTConfig` that the connection reads (``n_streams``, say). Every
other key is refused with the valid ones.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import UserError, suggest

if TYPE_CHECKING:
    from ..config import GPTConfig
    from .base import Residual


Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class NoOptions:
    """A connection that leaves nothing to choose."""


@dataclass(frozen=True)
class Entry:
    """One registered connection."""

    name: str
    summary: str
    factory: "Callable[[GPTConfig, Any], Residual]"
    options: type
    """Frozen dataclass; its instance is the factory's second argument."""
    fields: tuple[str, ...]
    """Fields of ``GPTConfig`` that the connection reads."""

    def choices(self) -> dict[str, Any]:
        """Name -> type of everything that a spec of this connection may set."""
        from ..config import GPTConfig

        shared = typing.get_type_hints(GPTConfig)
        return {name: shared[name] for name in self.fields} | typing.get_type_hints(self.options)


_REGISTRY: dict[str, Entry] = {}


def register(
    name: str, summary: str, *, options: type = NoOptions, fields: tuple[str, ...] = ()
) -> Callable[[Factory], Factory]:
    """Class or function decorator: ``factory(config, options) -> Residual`` becomes available as ``name``.

    Args:
        name: lower case, words joined by hyphens.
        summary: one line that says what it computes.
        options: a frozen dataclass of the connection's own options, each field with a default and of type
            bool, int, float or Literal, or one of these or None. Impossible values raise ``UserError`` in
            its ``__post_init__``.
        fields: the fields of ``GPTConfig`` that the connection reads and a spec may set.
    """

    def add(factory: Factory) -> Factory:
        assert name not in _REGISTRY, f"residual {name!r} registered twice"
        _REGISTRY[name] = Entry(name, summary, factory, options, fields)
        return factory

    return add


def available_residuals() -> list[str]:
    """Names of the residual connections, in the order in which they were registered."""
    return list(_REGISTRY)


def residual_summaries() -> dict[str, str]:
    """Name -> one line that says what it computes."""
    return {name: entry.summary for name, entry in _REGISTRY.items()}


def residual_options(name: str) -> dict[str, Any]:
    """Option -> default of everything that a spec of this connection may set (see the module's docstring).

    Defaults of ``GPTConfig`` fields are those of ``GPTConfig``, which a preset may have changed.
    """
    from ..config import GPTConfig

    entry = find(name)
    shared = {f.name: f.default for f in dataclasses.fields(GPTConfig)}
    own = dataclasses.asdict(entry.options())
    return {key: shared[key] for key in entry.fields} | own


def find(name: str) -> Entry:
    """The entry of that name. Raises ``ValueError`` with the nearest name otherwise."""
    if name not in _REGISTRY:
        raise UserError(suggest(str(name), _REGISTRY, "residual"))
    return _REGISTRY[name]


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """``name:key=value:key=value`` -> the name and the values in their types.

    Raises ``ValueError`` for an unknown name or option, and for a value of the wrong type.
    """
    name, *words = str(spec).split(":")
    entry = find(name)
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(
                f"residual {spec!r}: {word!r} is no option; write them as {name}:option=value. "
                + _valid(entry)
            )
        key = key.strip().replace("-", "_")
        if key in values:
            raise UserError(f"residual {spec!r} sets {key} more than once")
        values[key] = _parse(entry, key, text.strip())
    return name, values


def split_values(name: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``values`` of a spec as those of ``GPTConfig`` fields and those of the connection's own options.

    Raises ``ValueError`` for an option that the connection does not have.
    """
    entry = find(name)
    own = {f.name for f in dataclasses.fields(entry.options)}
    for key in values:
        if key not in own and key not in entry.fields:
            raise UserError(f"residual {name} has no option {key!r}. " + _valid(entry))
    return (
        {key: value for key, value in values.items() if key not in own},
        {key: value for key, value in values.items() if key in own},
    )


def make_options(name: str, values: Mapping[str, Any]) -> Any:
    """The options of connection ``name`` with ``values`` set; ``ValueError`` for what it cannot take."""
    entry = find(name)
    _, own = split_values(name, values)
    for key, value in own.items():
        hint = entry.choices()[key]
        if not _fits(value, hint):
            raise UserError(f"residual {name}: {key} must be {_say(hint)}, got {value!r}")
    return entry.options(**own)


def format_spec(name: str, values: Mapping[str, Any]) -> str:
    """The spec that :func:`parse_spec` reads back."""
    words = [f"{key}={_text(value)}" for key, value in values.items()]
    return ":".join([name, *words])


def build_residual(config: "GPTConfig") -> "Residual":
    """The connection ``config.residual`` with ``config.residual_options``. Raises ``ValueError`` for an
    unknown name (the nearest is suggested) or for a configuration that the connection cannot have."""
    entry = find(config.residual)
    return entry.factory(config, make_options(config.residual, config.residual_options))


def _valid(entry: Entry) -> str:
    choices = entry.choices()
    if not choices:
        return f"{entry.name} has no options"
    return "Valid: " + ", ".join(f"{key} ({_say(hint)})" for key, hint in choices.items())


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _say(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    parts: list[str] = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is Literal:
            parts += map(str, typing.get_args(kind))
        else:
            parts.append(names[kind])
    return " or ".join(parts)


def _fits(value: Any, hint: Any) -> bool:
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is Literal:
            fits = value in typing.get_args(kind)
        elif kind is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        elif kind is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, kind)
        if fits:
            return True
    return False


def _parse(entry: Entry, key: str, text: str) -> Any:
    choices = entry.choices()
    if key not in choices:
        raise UserError(f"residual {entry.name} has no option {key!r}. " + _valid(entry))
    words = {"true": True, "yes": True, "false": False, "no": False, "none": None}
    for kind in _alternatives(choices[key]):
        if kind in (bool, type(None)):
            value = words.get(text.lower(), text)
        elif kind in (int, float):
            try:
                value = kind(text)
            except ValueError:
                value = text
        else:
            value = text
        if _fits(value, kind):
            return value
    raise UserError(f"residual {entry.name}: {key} must be {_say(choices[key])}, got {text!r}")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
