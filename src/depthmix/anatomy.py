"""What the blocks of another package's model are made of, read off one small run.

A block's attention and its MLP are children with one of the usual names, and the norm before the MLP is the child
whose output the MLP reads. What attention or MLP writes is the output of the first child from there on that is added
to the residual stream as it is: in Gemma 2, that of the norm behind it. Nothing here knows a model by its name.

:mod:`depthmix.diagnostics.huggingface` watches these parts, :mod:`depthmix.adapters.blocks` joins them otherwise.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import UserError

ATTENTION = "self_attn", "attn", "attention", "self_attention"
"""What attention is called in a block."""
MLP = "mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1"
"""What the MLP is called, or its first half where a block holds both."""
PROBE = 8
"""Tokens of the small run."""

PartNames = tuple[str, str, str | None]
"""Names of the children of a block that return what attention and what the MLP adds, and of the child that reads the
stream between the two, if one does."""

Trace = dict[str, tuple[Any, Any]]
"""By child of a block, in the order in which they ran: first argument and result. ``""`` is the block."""


def find_blocks(decoder: nn.Module, length: int, refusal: Callable[[str], UserError]) -> nn.ModuleList:
    """The one list of ``length`` blocks among the children of ``decoder``.

    Raises what ``refusal`` makes of the reason, where there is none, or more than one.
    """
    lists = [
        child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == length
    ]
    if len(lists) != 1:
        raise refusal(
            f"{type(decoder).__name__} has {len(lists) or 'no'} {'lists' if lists else 'list'} of {length} blocks, "
            f"where one is looked for"
        )
    return lists[0]


def find_parts(trace: Trace, refusal: Callable[[str], UserError]) -> PartNames:
    """The parts of a block, by what :func:`trace_calls` saw of it; the last is ``None`` where attention and MLP are in
    parallel.

    Raises what ``refusal`` makes of the reason, where a block is something else.
    """
    before, after = trace.pop("")
    after = first_returned(after)
    order = list(trace)

    def called(what: str, names: tuple[str, ...]) -> str:
        found = next((name for name in names if name in trace), None)
        if found is None:
            raise refusal(
                f"has no {what}: of its parts ({', '.join(order)}) none is called {', '.join(names)}"
            )
        return found

    attention, mlp = called("attention", ATTENTION), called("MLP", MLP)
    norm = next((n for n in order if _shares(first_returned(trace[n][1]), trace[mlp][0])), mlp)
    between = trace[norm][0]

    def writers(first: str) -> Iterator[tuple[str, Tensor]]:
        for name in order[order.index(first) :]:
            out = first_returned(trace[name][1])
            if isinstance(out, Tensor) and out.numel() == before.numel():
                yield name, out.view_as(before)

    if _shares(between, before):
        for a, x in writers(attention):
            for m, y in writers(mlp):
                if _is_sum(after, before, x, y):
                    return a, m, None
        raise refusal("does not add what its attention and its MLP return to what it reads")
    between = between.view_as(before)
    adds_attention = next((name for name, x in writers(attention) if _is_sum(between, before, x)), None)
    adds_mlp = next((name for name, y in writers(mlp) if _is_sum(after, between, y)), None)
    if adds_attention is None or adds_mlp is None:
        silent = "attention" if adds_attention is None else "MLP"
        raise refusal(f"does not add what its {silent} returns to the residual stream as it is")
    return adds_attention, adds_mlp, norm


# Modules and what passes them


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``module`` runs ``forward`` instead of its own."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextlib.contextmanager
def trace_calls(block: nn.Module) -> Iterator[Trace]:
    """A dict that fills as ``block`` runs."""
    trace: Trace = {}

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            trace.setdefault(name, (first_tensor(args, kwargs), out))

        return module.register_forward_hook(hook, with_kwargs=True)

    handles = [watch("", block), *(watch(name, child) for name, child in block.named_children())]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first tensor of a call, by place or by name; the tuple, where a connection's state goes with it."""
    return args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)


def without_first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call without its :func:`first_tensor`."""
    if args:
        return args[1:], kwargs
    key = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return args, {k: v for k, v in kwargs.items() if k != key}


def first_returned(out: Any) -> Any:
    """What a module returns, without what it returns beside it."""
    return out[0] if isinstance(out, tuple) else out


def _shares(a: Any, b: Any) -> bool:
    """Whether two tensors are the same memory: an argument that was handed on, perhaps in another shape."""
    return (
        all(isinstance(x, Tensor) for x in (a, b)) and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
    )


def _is_sum(total: Tensor, *terms: Tensor) -> bool:
    """Whether ``total`` is the sum of ``terms`` but for rounding. What is not finite counts as it."""
    size = sum(term.abs() for term in (total, *terms))
    near = (total - sum(terms)).abs() <= 4 * torch.finfo(total.dtype).eps * size
    return bool((near | ~total.isfinite()).all())


def same_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal but for rounding in another order."""
    largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0
    return torch.allclose(a, b, rtol=0, atol=256 * torch.finfo(b.dtype).eps * largest, equal_nan=True)
