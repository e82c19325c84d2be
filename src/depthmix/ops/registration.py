"""One function, two ways to call it: as a registered operation under ``torch.compile``, directly everywhere else.

``torch.library`` gives a compiler what it needs of an operation (a schema, fake tensors, a gradient it can trace), and
its wrappers cost some tens of microseconds a call and seconds of imports at the first. A model that runs operation by
operation needs none of that: there an ``autograd.Function`` made of the same functions runs.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


def register(name: str, function: Callable, fake: Callable):
    """``depthmix::name``; its schema is the signature of ``function``."""
    operation = torch.library.custom_op(f"depthmix::{name}", mutates_args=())(function)
    operation.register_fake(fake)
    return operation


def register_differentiable(
    name: str,
    forward: Callable,
    fake: Callable,
    keep: Callable,
    differentiate: Callable,
    backward: Callable,
    registered_backward: Callable,
) -> Callable:
    """``depthmix::name`` with a first-order gradient, as a callable that picks the way.

    Args:
        forward, fake: as for :func:`register`.
        keep: ``setup_context(ctx, inputs, output)``.
        differentiate: ``(run_backward, ctx, *gradients) -> gradients of the inputs``, where ``run_backward`` is one of
            the next two.
        backward, registered_backward: the function that computes gradients, and the operation registered for it.

    The callable's ``operation`` is the registered operation. Every argument is given by position. Tensors in a list
    receive no gradient.
    """
    operation = register(name, forward, fake)
    operation.register_autograd(
        lambda ctx, *gradients: differentiate(registered_backward, ctx, *gradients), setup_context=keep
    )

    class Direct(torch.autograd.Function):
        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            # None for a list as a whole, where a registered operation wants one for each of its tensors.
            found = differentiate(backward, ctx, *gradients)
            return tuple(None if isinstance(x, list) else x for x in found)

    Direct.forward, Direct.setup_context = staticmethod(forward), staticmethod(keep)
    Direct.__name__ = name

    def call(*arguments):
        return operation(*arguments) if torch.compiler.is_compiling() else Direct.apply(*arguments)

    call.operation = operation
    return call
