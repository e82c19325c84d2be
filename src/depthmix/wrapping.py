r"""A residual connection for any list of modules.

``wrap`` joins sublayers F_1 .. F_L that map ``[*, D]`` to ``[*, D]`` and know nothing of it::

    before:  for sublayer in sublayers:          after:  trunk = depthmix.wrap(sublayers, "mgr-competitive")
                 x = x + sublayer(x)                     x = trunk(x)

A sublayer holds its own norm and returns what is to be added, not the sum.
"""

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import GPTConfig
from .errors import UserError, suggest
from .residuals import build_residual
from .residuals.base import Residual, Scaling, Site, State
from .residuals.registry import parse_spec, split_values

Start = Literal["own", "prenorm", "prenorm-scaled"]
STARTS: tuple[str, ...] = ("own", "prenorm", "prenorm-scaled")


@dataclass(frozen=True)
class TrunkConfig(GPTConfig):
    """What a connection must know of any trunk: a ``GPTConfig`` of which it reads no attention and no vocabulary."""

    length: int = 0
    """L, the number of sublayers."""

    @property
    def n_sublayers(self) -> int:
        return self.length


def build_connection(
    length: int,
    d_model: int,
    residual: str,
    *,
    n_streams: int = 4,
    sublayers_per_block: int = 2,
    options: Mapping[str, Any] | None = None,
) -> tuple[Residual, list[Site]]:
    """The connection and its sites 1 .. L, as its equations start them, on the CPU in torch's default dtype.

    Raises:
        ValueError: an option that the connection does not have, or one it cannot take.
    """
    if length < 1:
        raise UserError("there are no sublayers to join; give at least one")
    if sublayers_per_block < 1:
        raise UserError(f"sublayers_per_block must be at least 1, got {sublayers_per_block}")
    name, values = parse_spec(residual)
    both = [key for key in values if key in (options or {})]
    if both:
        raise UserError(f"residual {residual!r} and the option {both[0]} both set it; leave one out")
    shared, own = split_values(name, values | dict(options or {}))
    config = TrunkConfig(
        vocab_size=1,
        n_layer=-(-length // sublayers_per_block),
        d_model=d_model,
        n_head=1,
        head_size=2,
        seq_len=1,
        residual=name,
        residual_options=own,
        length=length,
        **{"n_streams": n_streams} | shared,
    )
    connection = build_residual(config)
    if connection.not_wrapped is not None:
        raise UserError(
            f"residual {name} cannot join modules that know nothing of it: {connection.not_wrapped}"
        )
    if length % sublayers_per_block and connection.counts_blocks:
        raise UserError(
            f"residual {name} counts blocks of sublayers_per_block = {sublayers_per_block}, and {length} sublayers are "
            f"no whole blocks; set sublayers_per_block to a divisor of {length}"
        )
    return connection, [connection.site(index) for index in range(1, length + 1)]


def begin_as(start: Start, connection: Residual, sites: Sequence[Site], residual: str) -> tuple[float, ...]:
    """Set the parameters to ``start``; the factors ``(of writes, of read 1, .. of read L)`` that it takes.

    Raises:
        ValueError: the connection has no such start.
    """
    if start not in STARTS:
        raise UserError(suggest(str(start), STARTS, "start"))
    if start == "own":
        return (1.0,) * (len(sites) + 1)
    name, _ = parse_spec(residual)
    if connection.not_prenorm is not None:
        raise UserError(f"residual {name} cannot start as PreNorm: {connection.not_prenorm}")
    scaling = connection.start_as_prenorm(sites)
    if start == "prenorm" and not scaling.exact:
        raise UserError(_not_exact(name, scaling))
    return (scaling.write, *scaling.reads)


def _not_exact(name: str, scaling: Scaling) -> str:
    if scaling.write != 1:
        why = f"its gate admits less than a whole output: outputs would have to be multiplied by {scaling.write:g}"
    elif any(factor != 1 for factor in scaling.reads[:-1]):
        why = (
            "what a sublayer reads is a mean of the embedding and earlier outputs, whose weights sum to 1, where "
            "PreNorm's sum to their number: every read would have to be multiplied by it"
        )
    else:
        why = f"its streams are summed in the end, to {1 / scaling.reads[-1]:g} times PreNorm's output: set merge=mean"
    return (
        f"residual {name} cannot start as PreNorm: {why}. With start='prenorm-scaled' these factors are kept as "
        f"constants beside the connection"
    )


def scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


class Wrapped(nn.Module):
    """``[*, D] -> [*, D]`` through all sublayers; made by :func:`wrap`.

    Attributes:
        sublayers: the modules as they were given, in a ``ModuleList``.
        sites: the junction behind each, with the connection's parameters.
        connection: what begins and ends the trunk.
        checkpointing: keep what enters every ``sublayers_per_block`` sublayers and run them again in the backward pass.
        blocks_apart: set it where parameters of a later sublayer's site cannot be read from the start, as they are
            sharded then.
    """

    sublayers: Sequence[nn.Module]
    sites: Sequence[Site]
    connection: Residual
    checkpointing = False
    blocks_apart = False

    def __init__(
        self,
        sublayers: Iterable[nn.Module],
        connection: Residual,
        sites: Iterable[Site],
        factors: Sequence[float],
        d_model: int,
        channel_dim: int,
        takes: Sequence[Collection[str] | None],
        per_block: int,
    ):
        super().__init__()
        trunk: Any = nn.ModuleList(sublayers)
        trunk.in_trunk = True  # for depthmix.optim
        joints: Any = nn.ModuleList(sites)
        self.sublayers, self.sites = trunk, joints
        self.connection = connection
        self.d_model, self.channel_dim = d_model, channel_dim
        self.takes, self.sublayers_per_block = takes, per_block
        self.write_factor, *self.read_factors = factors

    def forward(
        self, x: Tensor, /, *, each: Sequence[Mapping[str, Any] | None] | None = None, **shared: Any
    ) -> Tensor:
        """``x [*, D]``, D being dimension ``channel_dim``, to the trunk's output of the same shape and dtype.

        Args:
            each: for every sublayer its own keyword arguments, or ``None``.
            shared: keyword arguments for every sublayer that takes them (``takes`` of :func:`wrap`).

        Raises:
            ValueError: ``x`` or what a sublayer returns has another shape or dtype than it should (the message has
                the sublayer's index, counted from 0), or nobody takes an argument.
        """
        dim = self.channel_dim
        if not x.dtype.is_floating_point:
            raise UserError(f"the trunk takes floating point, got {x.dtype}")
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != self.d_model:
            raise UserError(
                f"the trunk takes D = {self.d_model} features in dimension {dim}, got shape {list(x.shape)}; if they "
                f"are in another dimension, wrap(..., channel_dim=...) says so"
            )
        arguments = self._arguments(each, shared)
        # Sites have features last. Of [B, C, H, W] that is the memory format channels_last.
        h, state = self.connection.begin(x.movedim(dim, -1).contiguous())
        if not self.blocks_apart:
            state = self.connection.foresee(state, list(self.sites))
        step = self.sublayers_per_block if self.checkpointing and torch.is_grad_enabled() else len(self.sites)
        for first in range(0, len(self.sites), step):
            part = arguments[first : first + step]
            if self.checkpointing and torch.is_grad_enabled():
                h, state = checkpoint(self._run, first, h, state, part, use_reentrant=False)
            else:
                h, state = self._run(first, h, state, part)
        return self.connection.finish(h, state).movedim(-1, dim)

    if TYPE_CHECKING:
        __call__ = forward

    def _run(
        self, first: int, h: Tensor, state: State, arguments: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, State]:
        for index, keywords in enumerate(arguments, start=first):
            x = h.movedim(-1, self.channel_dim)
            y = self._checked(index, x, self._called(index, x, keywords))
            y = scaled(y.movedim(self.channel_dim, -1), self.write_factor)
            h, state = self.sites[index](y.contiguous(), state)
            h = scaled(h, self.read_factors[index])
        return h, state

    def _called(self, index: int, x: Tensor, keywords: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return self.sublayers[index](x, **keywords)
        try:
            return self.sublayers[index](x, **keywords)
        except Exception as error:
            error.add_note(f"in {self._named(index)}, given {x.dtype} {list(x.shape)}")
            raise

    def _named(self, index: int) -> str:
        return f"sublayer {index} ({type(self.sublayers[index]).__name__})"

    def _checked(self, index: int, x: Tensor, y: Any) -> Tensor:
        if not isinstance(y, Tensor):
            raise UserError(
                f"{self._named(index)} returned a {type(y).__name__}, where a tensor is wanted; wrap it in a module "
                f"that returns the tensor alone"
            )
        if y.shape != x.shape:
            raise UserError(
                f"{self._named(index)} turned shape {list(x.shape)} into {list(y.shape)}; it must keep it"
            )
        if y.dtype != x.dtype and not (y.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise UserError(
                f"{self._named(index)} turned {x.dtype} into {y.dtype}; convert the module or what it returns, or run "
                f"under torch.autocast"
            )
        return y

    def _arguments(
        self, each: Sequence[Mapping[str, Any] | None] | None, shared: dict[str, Any]
    ) -> list[dict[str, Any]]:
        for key in shared:
            if not any(names is None or key in names for names in self.takes):
                raise UserError(
                    f"no sublayer takes the argument {key!r}: their forward functions do not name it. "
                    f"wrap(..., takes=[...]) says which arguments each takes"
                )
        found = [
            {key: value for key, value in shared.items() if names is None or key in names}
            for names in self.takes
        ]
        if each is None:
            return found
        if len(each) != len(found):
            raise UserError(f"each must have one entry for each of {len(found)} sublayers, got {len(each)}")
        return [one | dict(own or {}) for one, own in zip(found, each, strict=True)]

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, channel_dim={self.channel_dim}"


def wrap(
    sublayers: Iterable[nn.Module],
    residual: str = "mgr-competitive",
    *,
    n_streams: int = 4,
    d_model: int | None = None,
    channel_dim: int = -1,
    sublayers_per_block: int = 2,
    takes: Sequence[Iterable[str]] | None = None,
    start: Start = "own",
    checkpointing: bool = False,
    **options: Any,
) -> Wrapped:
    """Join ``sublayers`` by a residual connection: one module ``[*, D] -> [*, D]``.

    Args:
        sublayers: modules that keep the shape of what they are given. Each holds its own norm, and returns what is to
            be added, without the addition. No module twice: a site's parameters are of its place.
        residual: a name of :func:`depthmix.available_residuals`, with options where wanted (``name:option=value``).
        n_streams: n, where the connection has streams.
        d_model: D. ``None``: as the norms of the sublayers say, or their first matrices.
        channel_dim: the dimension of D: -1 for ``[B, T, D]``, 1 for ``[B, D, H, W]``.
        sublayers_per_block: sublayers of one block, for connections that count blocks and for checkpointing.
        takes: for each sublayer the names of the shared arguments it takes. ``None``: those that its ``forward`` names,
            and all where that has ``**keywords``.
        start: ``"own"``: parameters as the connection's equations start them. ``"prenorm"``: where the trunk computes
            ``x + F(x)``, for pretrained sublayers; refused where no parameters do. ``"prenorm-scaled"``: the same with
            constant factors where that is what is lacking.
        checkpointing: keep what enters a block and run it again in the backward pass.
        options: every other option of the connection, ``stream_memory="store"`` for one.

    Raises:
        ValueError: an unknown name or option, a connection that cannot be had, a D that cannot be told.
    """
    sublayers = list(sublayers)
    for index, sublayer in enumerate(sublayers):
        if not isinstance(sublayer, nn.Module):
            raise UserError(f"sublayer {index} is a {type(sublayer).__name__}, not a torch.nn.Module")
    seen: dict[int, int] = {}
    for index, sublayer in enumerate(sublayers):
        if seen.setdefault(id(sublayer), index) != index:
            raise UserError(
                f"sublayers {seen[id(sublayer)]} and {index} are one module; give each place its own, or a module that "
                f"calls the shared one"
            )
    if d_model is None:
        d_model = _find_width(sublayers)
    taken: list[frozenset[str] | None]
    if takes is None:
        taken = [_named_by(sublayer) for sublayer in sublayers]
    elif len(takes) != len(sublayers):
        raise UserError(f"takes must have one entry for each of {len(sublayers)} sublayers, got {len(takes)}")
    else:
        taken = [frozenset(names) for names in takes]
    connection, sites = build_connection(
        len(sublayers),
        d_model,
        residual,
        n_streams=n_streams,
        sublayers_per_block=sublayers_per_block,
        options=options,
    )
    like = next((p for s in sublayers for p in s.parameters() if p.is_floating_point()), None)
    if like is not None:
        for module in (connection, *sites):
            module.to(like.device, like.dtype)
    factors = begin_as(start, connection, sites, residual)
    wrapped = Wrapped(sublayers, connection, sites, factors, d_model, channel_dim, taken, sublayers_per_block)
    wrapped.checkpointing = checkpointing
    return wrapped


def _named_by(sublayer: nn.Module) -> frozenset[str] | None:
    """The keyword arguments of its ``forward`` behind the first; ``None`` where it takes any."""
    parameters = list(inspect.signature(sublayer.forward).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    first = parameters[0].name if parameters else None
    return frozenset(p.name for p in parameters if p.kind in kinds and p.name != first)


_NORMS = (
    (nn.LayerNorm, lambda m: m.normalized_shape[-1]),
    (nn.RMSNorm, lambda m: m.normalized_shape[-1]),
    (nn.GroupNorm, lambda m: m.num_channels),
    (nn.modules.batchnorm._BatchNorm, lambda m: m.num_features),
)
_MATRICES = (
    (nn.Linear, lambda m: m.in_features),
    (nn.modules.conv._ConvNd, lambda m: m.in_channels),
    (nn.MultiheadAttention, lambda m: m.embed_dim),
)


def _find_width(sublayers: Sequence[nn.Module]) -> int:
    """D, which every sublayer that says anything must say."""
    found = [_width(sublayer) for sublayer in sublayers]
    said = {width for width in found if width is not None}
    if len(said) == 1:
        return said.pop()
    raise UserError(
        "the width D of the trunk cannot be told from the sublayers"
        + (f", which begin with {', '.join(map(str, sorted(said)))} features" if said else "")
        + "; give d_model"
    )


def _width(sublayer: nn.Module) -> int | None:
    """The features that its first norm takes, or without norms its first matrix."""
    for kinds in (_NORMS, _MATRICES):
        for module in sublayer.modules():
            for kind, width in kinds:
                if isinstance(module, kind):
                    return width(module)
    return None
