r"""What a residual connection is: three verbs over a flat tuple of tensors, and a registry of names.

::

    begin(x)          -> h, state     the embedding enters; h is the first sublayer's input
    step(y, state)    -> h, state     a sublayer's output is written, the next sublayer's input read
    finish(h, state)  -> h            the trunk's output leaves

``step`` belongs to a *site*: the module that stands behind sublayer l (l = 1 .. L) and owns the
parameters of that write and of the read that follows. The read behind the last sublayer is the
trunk's output. A site's step is a ``write`` followed by a ``read``; a connection may fuse the
two, and a pipeline may cut between them.

State is explicit: no tensor is ever kept on a module, so that two forward passes, micro-batches
or pipeline stages cannot mix. What is known when the model is built (how many streams there are
at a site, which site is the last) is decided then.

A new connection is one file: subclass :class:`Residual` and :class:`Site`, decorate with
:func:`register`, import the file in ``residuals/__init__.py``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import UserError, suggest

if TYPE_CHECKING:
    from ..config import GPTConfig

State = tuple[Tensor, ...]


class Site(nn.Module):
    """The junction behind one sublayer."""

    def write(self, layer_output: Tensor, state: State) -> State:
        """Take the sublayer's output ``[B, T, D]`` into the state."""
        raise NotImplementedError

    def read(self, state: State) -> Tensor:
        """The next sublayer's input ``[B, T, D]``."""
        raise NotImplementedError

    def forward(self, layer_output: Tensor, state: State) -> tuple[Tensor, State]:
        """The verb ``step``: write, then read."""
        state = self.write(layer_output, state)
        return self.read(state), state


class Residual(nn.Module):
    """A connection for a whole trunk: where it begins and ends, and the sites it is made of."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()

    def begin(self, x: Tensor) -> tuple[Tensor, State]:
        """The embedding ``x [B, T, D]`` -> the first sublayer's input and the first state."""
        return x, (x,)

    def site(self, index: int) -> Site:
        """A new site for sublayer ``index`` (1 .. L); the caller owns it."""
        raise NotImplementedError

    def finish(self, h: Tensor, state: State) -> Tensor:
        """The trunk's output, given what the last site read."""
        return h


_REGISTRY: dict[str, tuple[Callable[["GPTConfig"], Residual], str]] = {}


def register(name: str, summary: str):
    """Class or function decorator: ``factory(config) -> Residual`` becomes available as ``name``."""

    def add(factory):
        assert name not in _REGISTRY, f"residual {name!r} registered twice"
        _REGISTRY[name] = (factory, summary)
        return factory

    return add


def available_residuals() -> list[str]:
    """Names of the residual connections, in the order in which they were registered."""
    return list(_REGISTRY)


def residual_summaries() -> dict[str, str]:
    """Name -> one line that says what it computes."""
    return {name: summary for name, (_, summary) in _REGISTRY.items()}


def build_residual(config: "GPTConfig") -> Residual:
    """The connection ``config.residual``. Raises ``ValueError`` for an unknown name (the nearest is
    suggested) or for a configuration that the connection cannot have."""
    if config.residual not in _REGISTRY:
        raise UserError(suggest(config.residual, _REGISTRY, "residual"))
    return _REGISTRY[config.residual][0](config)
