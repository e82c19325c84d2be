r"""What a residual connection is: three verbs over a flat tuple of tensors.

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

**Linear mixing.** Most connections are linear in the embedding and in the sublayers' outputs once
their gates are known. They say so by two more methods, which together are the same step written
as its equation::

    gates(y, state)        -> gates         every coefficient of this write and this read
    mix(y, state, gates)   -> h, state      the step with these coefficients: linear in (y, state)

``mix`` is what :func:`depthmix.mixing_map` runs on unit vectors instead of activations, so it takes
any leading dimensions and any width: all its arithmetic broadcasts, and coefficients that a state
carries from one site to the next are taken from ``gates``, never computed in ``mix``.

**Cuts.** A pipeline runs the sublayers up to l in one process and those behind it in another. What crosses such a *cut*
is the state between the write and the read of site l, and no more than its tensors that somebody behind reads::

    send(y, state)      -> crossed    the write, in the process of sublayer l
    receive(crossed)    -> h, state   the read, in the process of sublayer l + 1

The parameters that the read alone needs live with it, behind the cut (:attr:`Site.received`). What a connection keeps
for its backward pass never crosses.

A new connection is one file: subclass :class:`Residual` and :class:`Site`, decorate with
:func:`~depthmix.residuals.registry.register`, import the file in ``residuals/__init__.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError

if TYPE_CHECKING:
    from ..config import GPTConfig

State = tuple[Tensor, ...]
Gates = tuple[Tensor, ...]


class Site(nn.Module):
    """The junction behind one sublayer."""

    per_channel = False
    """Whether a gate has one value per channel (and not one per token)."""

    gate_names: tuple[str | None, ...] = ()
    """What each of :meth:`gates` is to a reader: ``"gate"``, how much of the output each stream (or channel) admits,
    ``"pool"``, how much of each stream or source is read, or ``None``."""

    gate_range = (0.0, 1.0)
    """Where the values of ``"gate"`` lie; the few outside, where there can be any, are outliers."""

    gated_streams: tuple[int, ...] | None = None
    """Which of :meth:`streams`, from 0, the values of ``"gate"`` belong to, the others being left as they are;
    ``None``: all, or there are none."""

    convex = False
    """Whether the gate also says what is forgotten: ``(1 - gate) old + gate new``."""

    fuses_norm = False
    """Whether ``forward`` takes ``norm=``, the RMSNorm of the next sublayer, and returns its input already normed."""

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

    received: tuple[str, ...] = ()
    """Attributes, parameters or modules, that :meth:`receive` reads and :meth:`send` does not."""

    def send(self, layer_output: Tensor, state: State) -> State:
        """The write in front of a cut: what crosses it, each tensor once. Runs without what ``received`` names."""
        return self.write(layer_output, state)

    def receive(self, crossed: State) -> tuple[Tensor, State]:
        """The read behind a cut: the next sublayer's input and the state it comes with, of what :meth:`send` returned.
        Runs with what ``received`` names alone."""
        return self.read(crossed), crossed

    def gates(self, layer_output: Tensor, state: State) -> Gates:
        """The coefficients of this step, each ``[B, T, ...]``, in the compute dtype; none by default."""
        return ()

    def mix(self, layer_output: Tensor, state: State, gates: Gates) -> tuple[Tensor, State]:
        """The step with given coefficients, linear in ``(layer_output, state)``.

        ``layer_output [..., B, T, W]`` and a state of such tensors, W being D or 1. A step without
        gates is its own linear form.
        """
        return Site.forward(self, layer_output, state)

    def depth_memory(self, state: State) -> tuple[Tensor, ...] | None:
        """What the attention before this site reads besides its sequence, at the same token: a memory of
        :func:`depthmix.functional.extend_depth_memory`, perhaps still empty.

        ``None`` where attention reads its sequence alone; then :meth:`remember` is never called.
        """
        return None

    def remember(self, shown: tuple, state: State) -> State:
        """Take into the state, before the write, what later attentions are to read.

        ``shown``: by an attention, the memory as it left it and its keys and values for the new tokens, not
        rotated, each ``[B, H, T, d]``; by an MLP, its normed input ``[B, T, D]``.
        """
        raise NotImplementedError

    def drawn_weights(self) -> tuple[nn.Parameter, ...]:
        """Matrices that start as normal(0, .02): the model draws them from its seed, after all it shares."""
        return ()

    def streams(self, state: State) -> tuple[Tensor, ...] | None:
        """The parallel streams in ``state``, each ``[..., B, T, W]``; ``None`` where there are none."""
        return None

    def optimizer_group(self, name: str, parameter: nn.Parameter) -> str:
        """``"muon"``, ``"adamw"`` or ``"adamw_no_decay"`` for the parameter ``name`` of this module.

        Gates and mixing matrices are AdamW's whatever their shape; vectors and scalars do not decay.
        """
        return "adamw" if parameter.ndim >= 2 else "adamw_no_decay"


def write_nothing(sites: Sequence[Site], state: State, like: Tensor) -> State:
    """``state`` behind ``sites`` that write zeros ``[B, T, D]``, shaped as ``like``."""
    for site in sites:
        state = site.write(torch.zeros_like(like), state)
    return state


@dataclass(frozen=True)
class Scaling:
    """Fixed factors with which a trunk computes PreNorm's function (:meth:`Residual.start_as_prenorm`)."""

    write: float
    """Of every sublayer's output, before it is written."""
    reads: tuple[float, ...]
    """Of what is read behind sublayer 1 .. L; the last is the trunk's output."""

    @property
    def exact(self) -> bool:
        """Whether nothing is scaled: the connection as its equations say is PreNorm."""
        return self.write == 1 and all(factor == 1 for factor in self.reads)


class Residual(nn.Module):
    """A connection for a whole trunk: where it begins and ends, and the sites it is made of."""

    cuts: tuple[int, ...] = ()
    """Sublayers (1 .. L - 1) behind which a pipeline cuts; known before the first :meth:`site` is made."""

    crosses_by_head = False
    """Whether tensors of four dimensions that cross a cut are ``[B, H, T, d]``, divided by heads under tensor
    parallelism (everything else is divided by tokens)."""

    counts_blocks = False
    """Whether something depends on which sublayers are one block: their number must then be whole blocks."""

    not_wrapped: str | None = None
    """Why sublayers that know nothing of the connection cannot be joined by it; ``None`` where they can."""

    not_prenorm: str | None = "nobody has said where in its parameters PreNorm is"
    """Why no parameters make it PreNorm, whatever is scaled; ``None`` where some do."""

    not_linear: str | None = None
    """Why inputs of sublayers are no linear mixture of earlier outputs; ``None`` where they are."""

    def __init__(self, config: "GPTConfig", options=None):
        super().__init__()

    def begin(self, x: Tensor) -> tuple[Tensor, State]:
        """The embedding ``x [B, T, D]`` -> the first sublayer's input and the first state."""
        return x, (x,)

    def begin_gates(self, x: Tensor) -> Gates:
        """The coefficients of :meth:`begin`; none by default."""
        return ()

    def begin_mix(self, x: Tensor, gates: Gates) -> tuple[Tensor, State]:
        """:meth:`begin` with given coefficients, linear in ``x [..., B, T, W]``."""
        return self.begin(x)

    def foresee(self, state: State, sites: Sequence[Site]) -> State:
        """What :meth:`begin` returned, with what it helps to know of all ``sites`` from the start.

        A site's parameters are its own; where others need something of them sooner, it travels in the state.
        The model calls this; where nobody does, every step works without.
        """
        return state

    def unchanged(self, earlier: int, later: int) -> int:
        """How many of the tensors that cross the cut ``later`` are those that crossed the cut ``earlier``, in the same
        order at the front of both: a process that saw the earlier ones need not be sent them again."""
        return 0

    def without(self, state: State, sites: Sequence[Site], first: int) -> State | None:
        """The state behind ``sites`` had they been given nothing to write; ``None`` where there is no such state.

        ``state`` enters sublayer ``first`` (1 .. L), and ``sites`` stand behind it and those that follow. The last of
        them can read what is returned, and later sites can write to it. For a state that was made without gradients.

        Sublayers are taken away, their connection is not: its norms, averages and matrices between streams stand. What
        is part of a write is not done: nothing is forgotten for what does not come, and no source is appended.

        By default every site writes zeros, which is that where a write adds. ``state[0]`` is taken to be ``[B, T, D]``.
        """
        return write_nothing(sites, state, state[0])

    def start_as_prenorm(self, sites: Sequence[Site]) -> Scaling:
        """Set all parameters, those of ``sites`` 1 .. L too, to where every read is PreNorm's but for a fixed factor.

        With outputs multiplied by ``write`` before they are written, and reads by ``reads``, the trunk then computes
        what PreNorm does, to rounding. No gradient is zero for ever there. Raises ``UserError`` where
        :attr:`not_prenorm` says why.
        """
        if self.not_prenorm is not None:
            raise UserError(f"no PreNorm can be continued with this connection: {self.not_prenorm}")
        return Scaling(1.0, (1.0,) * len(sites))

    def site(self, index: int) -> Site:
        """A new site for sublayer ``index`` (1 .. L); the caller owns it."""
        raise NotImplementedError

    def finish(self, h: Tensor, state: State) -> Tensor:
        """The trunk's output, given what the last site read."""
        return h

    def optimizer_group(self, name: str, parameter: nn.Parameter) -> str:
        """As :meth:`Site.optimizer_group`, for what belongs to no site."""
        return "adamw" if parameter.ndim >= 2 else "adamw_no_decay"
