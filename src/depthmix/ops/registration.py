"""One function, two ways to call it: as a registered operation under ``torch.compile``, directly everywhere else.

``torch.library`` gives a compiler what it needs of an operation (a schema, fake tensors, a gradient it can trace), and
its wrappers cost more than many a small operation itself, at every call, and seconds of imports at the first. A model
that runs operation by operation needs none of that: there an ``autograd.Function`` made of the same functions runs.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable


class TwoWays(Protocol):
    """An operation that is called the way that suits its arguments."""

    operation: Callable
    direct: Callable

    def __call__(self, *arguments: Any) -> Any: ...


def register(name: str, function: Callable, fake: Callable):
    """``depthmix::name``; its schema is the signature of ``function``."""
    operation = torch.library.custom_op(f"depthmix::{name}", mutates_args=())(function)
    operation.register_fake(fake)
    return operation


def runs_directly(x: Tensor) -> bool:
    """Whether operations on ``x`` need not be registered ones: nobody compiles, and there are numbers."""
    return not (torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor))


def register_differentiable(
    name: str,
    forward: Callable,
    fake: Callable,
    keep: Callable,
    differentiate: Callable,
    backward: Callable,
    registered_backward: Callable,
) -> TwoWays:
    """``depthmix::name`` with a first-order gradient, as a callable that picks the way.

    Args:
        forward, fake: as for :func:`register`. Arguments are tensors, lists of tensors and constants, given by
            position; the first is a tensor or a list.
        keep: ``setup_context(ctx, inputs, output)``.
        differentiate: ``(run_backward, ctx, *gradients) -> gradients of the inputs``, a list for a list, where
            ``run_backward`` is one of the next two.
        backward, registered_backward: the function that computes gradients, and the operation registered for it.

    The callable's ``operation`` is the registered operation, its ``direct`` the other way.
    """
    operation = register(name, forward, fake)
    operation.register_autograd(
        lambda ctx, *gradients: differentiate(registered_backward, ctx, *gradients), setup_context=keep
    )

    class Direct(torch.autograd.Function):
        """Lists come flattened, with their lengths first: autograd sees no tensor inside of a list."""

        @staticmethod
        def forward(ctx, lengths, *flat):
            arguments = _nested(lengths, flat)
            output = forward(*arguments)
            keep(ctx, arguments, output)
            ctx.lengths = lengths
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            return None, *_flattened(differentiate(backward, ctx, *gradients))

    Direct.__name__ = Direct.__qualname__ = name

    def direct(*arguments):
        lengths = tuple(len(x) if isinstance(x, list) else None for x in arguments)
        return Direct.apply(lengths, *_flattened(arguments))

    def call(*arguments):
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        return direct(*arguments) if runs_directly(first) else operation(*arguments)

    # A plain function, for a compiler traces that, with attributes beside.
    both = cast(TwoWays, call)
    both.operation, both.direct = operation, direct
    return both


def _flattened(values) -> list:
    flat = []
    for value in values:
        if isinstance(value, list):
            flat += value
        else:
            flat.append(value)
    return flat


def _nested(lengths: tuple[int | None, ...], flat: tuple) -> list:
    values, rest = [], iter(flat)
    for length in lengths:
        values.append(next(rest) if length is None else [next(rest) for _ in range(length)])
    return values
