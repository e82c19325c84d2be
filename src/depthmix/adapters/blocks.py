"""Blocks of another package, run by their own code and joined by a connection of ours.

A pre-norm block computes ``z = x + attention(norm(x))`` and returns ``z + mlp(norm(z))``. Its own ``forward`` is run,
on a view of the block in which three children have stand-ins: what attention and MLP return is written to the
connection's state, and the norm before the MLP is given what the connection reads, in place of z. What the block
makes of its sums is never used. So masks, rotary angles, caches and whatever else a block hands to its parts are
its own affair, and no code is copied.

Between blocks goes ``(h, *state)``, a flat tuple of tensors, where the package expects one tensor; it only hands it
on. No state is kept on a module. Names of parameters stay what they were; a block has in addition ``attn_site`` and
``mlp_site`` (one ``block_site`` where attention and MLP are in parallel), and the first has ``connection``.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..anatomy import PartNames, find_parts, same_but_for_rounding, trace_calls
from ..errors import UserError
from ..residuals.base import Residual, Site
from ..wrapping import Start, begin_as, build_connection, scaled

SITES = ("attn_site", "mlp_site", "block_site", "connection")
"""Names of what a block has in addition."""


class View:
    """A block as its own ``forward`` is to see it: some children have stand-ins."""

    forward = None  # transformers asks whether it is the outermost of several

    def __init__(self, block: "nn.Module | MixedBlock", stand_ins: dict[str, Callable[..., Any]]):
        self._block, self._stand_ins = block, stand_ins

    def __getattr__(self, name: str) -> Any:
        stand_ins = self._stand_ins
        return stand_ins[name] if name in stand_ins else getattr(self._block, name)


class MixedBlock:
    """What is put in front of a block's own class; :func:`mixed` makes the two one class."""

    in_trunk = True
    """For :func:`depthmix.optim.parameter_groups`."""

    parts: PartNames
    factors: tuple[float, ...]
    """Of this block's writes, then of its reads."""
    last: bool
    training: bool
    attn_site: Site
    mlp_site: Site
    block_site: Site
    connection: Residual
    """Of the first block only."""
    _end: tuple[Residual]
    """Of the last block only; in a tuple, as it belongs to the first."""
    _original: ClassVar[type[nn.Module]]

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        self._refuse_reentrant(hidden_states)
        if isinstance(hidden_states, tuple):
            h, state = hidden_states[0], hidden_states[1:]
        else:
            h, state = self.connection.begin(hidden_states)
        attention, mlp, middle = self.parts
        write, *reads = self.factors
        written: dict[str, Tensor] = {}
        shape = h.shape

        def writer(name: str) -> Callable[..., Any]:
            module = getattr(self, name)

            def stand_in(*args: Any, **kwargs: Any) -> Any:
                out = module(*args, **kwargs)
                y = out[0] if isinstance(out, tuple) else out
                written[name] = scaled(shaped(y, shape), write)
                return out

            return stand_in

        def between(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal h, state
            h, state = self.attn_site(written.pop(attention), state)
            h = scaled(h, reads[0])
            return following(shaped(h, x.shape), *args, **kwargs)

        stand_ins = {attention: writer(attention), mlp: writer(mlp)}
        if middle is not None:
            following = stand_ins.get(middle) or getattr(self, middle)
            stand_ins[middle] = between
        returned = self._original.forward(View(self, stand_ins), h, *args, **kwargs)
        missing = [name for name in (attention, mlp) if (name in written) != (name == mlp or middle is None)]
        if missing:
            raise RuntimeError(
                f"{type(self).__name__} did not call {missing[0]} where a block of its kind does"
            )
        if middle is None:
            y, site = written[attention] + written[mlp], self.block_site
        else:
            y, site = written[mlp], self.mlp_site
        h, state = site(y, state)
        h = scaled(h, reads[-1])
        carried = self._end[0].finish(h, state) if self.last else (h, *state)
        return (carried, *returned[1:]) if isinstance(returned, tuple) else carried

    def _refuse_reentrant(self, hidden_states: Any) -> None:
        """A checkpoint that is reentrant passes no gradient to the tensors of a tuple."""
        if not self.training or torch.is_grad_enabled() or not isinstance(hidden_states, tuple):
            return
        if any(isinstance(x, Tensor) and x.requires_grad for x in hidden_states):
            raise UserError(
                "gradient checkpointing with use_reentrant=True gives no gradients through a residual connection with "
                "a state; use it with use_reentrant=False"
            )


def shaped(x: Tensor, shape: torch.Size) -> Tensor:
    """``x`` in this shape. Where it has it, itself: one node more would sum its gradient in another order."""
    return x if x.shape == shape else x.view(shape)


@functools.cache
def mixed(block_class: type) -> type:
    """A subclass of ``block_class`` of the same name, whose blocks are joined by a connection."""
    return type(
        block_class.__name__,
        (MixedBlock, block_class),
        {"_original": block_class, "__module__": MixedBlock.__module__},
    )


def sublayers_of(parts: Sequence[PartNames]) -> int:
    """How many sublayers these blocks are."""
    return sum(1 if middle is None else 2 for *_, middle in parts)


def connect(
    parts: Sequence[PartNames], d_model: int, residual: str, **how: Any
) -> tuple[Residual, list[Site]]:
    """The connection of blocks with these parts, and its sites."""
    per_block = max(1 if middle is None else 2 for *_, middle in parts)
    return build_connection(sublayers_of(parts), d_model, residual, sublayers_per_block=per_block, **how)


def install(
    blocks: Sequence[nn.Module],
    parts: Sequence[PartNames],
    d_model: int,
    residual: str,
    *,
    start: Start = "own",
    **how: Any,
) -> None:
    """Join ``blocks``, in place; ``start`` as in :func:`depthmix.wrap`, the rest as in ``build_connection``."""
    for index, block in enumerate(blocks):
        taken = [name for name in (*SITES, "parts", "factors", "last") if hasattr(block, name)]
        if taken:
            raise UserError(f"block {index} ({type(block).__name__}) already has something called {taken[0]}")
    connection, sites = connect(parts, d_model, residual, **how)
    left, joined = list(sites), []
    for block, own in zip(blocks, parts, strict=True):
        block_class: type = type(block)
        block.__class__ = mixed(block_class)
        mixing = cast(MixedBlock, block)  # as its class says from here on
        mixing.parts, mixing.last = own, block is blocks[-1]
        joined.append(mixing)
        like = next((p for p in block.parameters() if p.is_floating_point()), None)
        added: dict[str, nn.Module] = {
            name: left.pop(0) for name in (SITES[2:3] if own[2] is None else SITES[:2])
        }
        if block is blocks[0]:
            added["connection"] = connection
        for name, module in added.items():
            setattr(block, name, module if like is None else module.to(like.device, like.dtype))
    joined[-1]._end = (connection,)
    write, *reads = begin_as(start, connection, sites, residual)
    for mixing in joined:
        count = 1 if mixing.parts[2] is None else 2
        mixing.factors, reads = (write, *reads[:count]), reads[count:]


def uninstall(blocks: Sequence[nn.Module]) -> None:
    """Give the blocks their own connection back, in place."""
    for block in blocks:
        if not isinstance(block, MixedBlock):
            continue
        original: type = block._original
        block.__class__ = original
        for name in (*SITES, "parts", "factors", "last", "_end"):
            if name in block._modules or name in block.__dict__:
                delattr(block, name)


def connection_modules(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Sites and connection, in the order of the blocks."""
    return [getattr(block, name) for block in blocks for name in SITES if name in block._modules]


def find_all_parts(blocks: Sequence[nn.Module], call: Callable[[], object], what: str) -> list[PartNames]:
    """The parts of every block, by a run of the model in training mode, where dropout shows.

    Args:
        call: runs the model on something small.
        what: the model's name, for errors.

    Raises:
        ValueError: a block is something else than ``x + F(norm(x))`` for attention and MLP.
    """
    with contextlib.ExitStack() as stack:
        traces = [stack.enter_context(trace_calls(block)) for block in blocks]
        call()
    found = []
    for index, (block, trace) in enumerate(zip(blocks, traces, strict=True)):

        def refusal(why: str, index: int = index, block: nn.Module = block) -> UserError:
            return UserError(
                f"{what} cannot be given another residual connection: block {index} ({type(block).__name__}) {why}"
            )

        if "" not in trace:
            raise refusal("does not run")
        found.append(find_parts(trace, refusal))
    return found


@contextlib.contextmanager
def undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, ``model`` is in this mode, without gradients. Modes and random states are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            model.train(training)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def adapt_blocks(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    run: Callable[[], Tensor],
    d_model: int,
    residual: str,
    *,
    start: Start = "own",
    **how: Any,
) -> list[PartNames]:
    """Find the parts of ``blocks``, check that ``x + F(x)`` by the same way is what the model does, and join them.

    Args:
        run: the model's output for something small, a tensor.

    Raises:
        ValueError: the blocks are something else, or hand on more than one tensor. The model is then as it was.
    """
    what = type(model).__name__
    if any(isinstance(block, MixedBlock) for block in blocks):
        raise UserError(f"{what} already has another residual connection")
    # Before anything is touched: a wrong request.
    with undisturbed(model, training=False):
        expected = run()
        evaluated = find_all_parts(blocks, run, what)
    begin_as(start, *connect(evaluated, d_model, residual, **how), residual)
    with undisturbed(model, training=True):
        try:
            parts = find_all_parts(blocks, run, what)
        except UserError as error:
            raise UserError(
                f"{error}, in training: where a block applies dropout itself, behind attention or MLP, set it to 0"
            ) from None
    install(blocks, parts, d_model, "prenorm")
    try:
        with undisturbed(model, training=False):
            same = same_but_for_rounding(run(), expected)
    finally:
        uninstall(blocks)
    if not same:
        raise UserError(
            f"{what} cannot be given another residual connection: with its own, run by the parts of its blocks, it "
            f"computes something else"
        )
    install(blocks, parts, d_model, residual, start=start, **how)
    return parts
