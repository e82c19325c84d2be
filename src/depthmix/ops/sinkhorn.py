r"""Sinkhorn-Knopp: a positive matrix made doubly stochastic by alternate normalisation.

From :math:`M^{(0)} = \exp(\text{logits})`, ``iterations`` times (Xie et al. 2025, Eq. 9)

.. math:: M \leftarrow \mathcal T_r(\mathcal T_c(M))

with :math:`\mathcal T_c` dividing every column by its sum and :math:`\mathcal T_r` every row. Rows are
divided last, so their sums are 1 to rounding after any number of iterations, and ``M @ streams`` has a
forward gain of exactly 1; column sums (the backward gain) only converge to 1.

:func:`sinkhorn_reference` is that, in logarithms. :func:`sinkhorn` is the same function of the logits, and what
runs. It holds the matrices as ``[n, n, N]``, so that every operation runs over the N tokens, and takes
logarithms in the first iteration only: behind that every row and column has an entry of at least
:math:`1/n^2`, so nothing over- or underflows, whatever the logits were. Its gradient goes back through
every iteration (they are computed again, not kept): a division of rows takes the gradient D of log M to
:math:`D - M \cdot \mathrm{rowsum}(D)`, with the M behind the division. That is the gradient of the function that was
computed, and not that of its limit.

On a CPU, in fp32, the iterations behind the first run in :mod:`depthmix.ops.native` where it can be used, all
of them. Where torch operations run on a CPU, iterations are left out once every column of every token sums to 1
to rounding: they would divide by 1. That is so where connections start (equal logits off the diagonal) and for
as long as those stay near; elsewhere a matrix near the identity converges slowly, and all iterations run. In
the gradient none is left out.
"""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import native


def sinkhorn_reference(logits: Tensor, iterations: int) -> Tensor:
    """``logits [..., n, n]`` -> ``[..., n, n]``: rows (last dimension) sum to 1, columns nearly."""
    log = logits
    for _ in range(iterations):
        log = log - torch.logsumexp(log, -2, keepdim=True)
        log = log - torch.logsumexp(log, -1, keepdim=True)
    return log.exp()


def _first_iteration(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``T_c(exp(logits))`` and ``T_r`` of that, both ``[n, n, N]``."""
    log = logits - logits.amax(0)
    log -= log.exp().sum(0).log_()
    by_rows = log - log.amax(1, keepdim=True)
    by_rows.exp_()
    by_rows /= by_rows.sum(1, keepdim=True)
    return log.exp_(), by_rows


def _column_sums(matrix: Tensor, ones: Tensor) -> Tensor:
    """``[n, n, N] -> [n, N]``, over the first dimension; ``ones [n, 1, n]``."""
    if not matrix.is_cpu:  # where a product with ones might be taken in a format of fewer digits
        return matrix.sum(0)
    n = matrix.shape[0]
    return torch.mm(ones[0], matrix.view(n, -1)).view(n, -1)


def _row_sums(matrix: Tensor, ones: Tensor) -> Tensor:
    """``[n, n, N] -> [n, 1, N]``, over the second dimension; ``ones [n, 1, n]``."""
    return torch.bmm(ones, matrix) if matrix.is_cpu else matrix.sum(1, keepdim=True)


def _settled(column_sums: Tensor, done: int) -> bool:
    """Whether columns that sum to this leave nothing to divide but rounding, for any token.

    Looked at behind 1, 2, 4, 8, ... iterations, and only where there are numbers to look at without waiting for a
    device.
    """
    if not column_sums.is_cpu or isinstance(column_sums, FakeTensor) or done & (done - 1):
        return False
    if column_sums.numel() == 0:
        return True
    least, most = torch.aminmax(column_sums)
    within = 4 * torch.finfo(column_sums.dtype).eps
    return 1 - within <= least.item() and most.item() <= 1 + within


def _ones(like: Tensor) -> Tensor:
    n = like.shape[0]
    return like.new_ones(n, 1, n)


def sinkhorn_forward(logits: Tensor, iterations: int) -> Tensor:
    """:func:`sinkhorn_reference` for matrices ``[n, n, N]`` in a compute dtype; ``iterations`` >= 1."""
    n, _, N = logits.shape
    if native.usable(logits, n=n):
        matrix = _first_iteration(logits)[1].contiguous()
        native.call("sinkhorn_iterate", N, n, iterations - 1, torch.get_num_threads(), matrix)
        return matrix
    return _iterate(logits, iterations)[1]


def _iterate(logits: Tensor, iterations: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """``T_c`` of the first iteration, the last matrix, and the sums each further iteration divided by.

    The list is shorter than ``iterations - 1`` where the rest would have divided by 1 to rounding.
    """
    first, matrix = _first_iteration(logits)
    ones = _ones(logits)
    divided = []
    for done in range(1, iterations):
        columns = _column_sums(matrix, ones)
        if _settled(columns, done):
            break
        matrix.mul_(columns.reciprocal())
        rows = _row_sums(matrix, ones)
        matrix.mul_(rows.reciprocal())
        divided.append((columns, rows))
    return first, matrix, divided


def sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    """Gradient of the logits ``[n, n, N]`` given that of the matrices."""
    n, _, N = logits.shape
    if native.usable(logits, grad, n=n):
        first, matrix = (x.contiguous() for x in _first_iteration(logits))
        d_log, grad = torch.empty_like(matrix), grad.contiguous()
        native.call(
            "sinkhorn_gradient", N, n, iterations - 1, torch.get_num_threads(), first, matrix, grad, d_log
        )
        return d_log
    first, matrix, divided = _iterate(logits, iterations)
    ones = _ones(logits)
    d_log = matrix * grad
    for _ in range(iterations - 1 - len(divided)):  # divisions by 1, whose gradient is not the identity
        d_log.addcmul_(matrix, _row_sums(d_log, ones), value=-1)
        d_log.addcmul_(matrix, _column_sums(d_log, ones), value=-1)
    for columns, rows in reversed(divided):
        # Multiplied back, the matrices stay in the processor's cache, where forty of them would not.
        d_log.addcmul_(matrix, _row_sums(d_log, ones), value=-1)
        matrix.mul_(rows)
        d_log.addcmul_(matrix, _column_sums(d_log, ones), value=-1)
        matrix.mul_(columns)
    d_log.addcmul_(matrix, _row_sums(d_log, ones), value=-1)
    d_log.addcmul_(first, _column_sums(d_log, ones), value=-1)
    return d_log


@torch.library.custom_op("depthmix::sinkhorn", mutates_args=())
def _sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    return sinkhorn_forward(logits, iterations)


@torch.library.custom_op("depthmix::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(grad: Tensor, logits: Tensor, iterations: int) -> Tensor:
    return sinkhorn_backward(grad, logits, iterations)


@_sinkhorn.register_fake
def _(logits, iterations):
    return torch.empty_like(logits)


@_sinkhorn_backward.register_fake
def _(grad, logits, iterations):
    return torch.empty_like(logits)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.iterations = inputs[1]


def _differentiate(ctx, grad):
    return _sinkhorn_backward(grad.contiguous(), *ctx.saved_tensors, ctx.iterations), None


_sinkhorn.register_autograd(_differentiate, setup_context=_keep)


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """``logits [..., n, n]`` in a compute dtype -> the matrices, differentiable once; keeps the logits alone.

    Inside ``torch.compile`` this is one operation, where forty unrolled normalisations would take
    minutes to compile.
    """
    *leading, n, _ = logits.shape
    by_token = logits.reshape(-1, n, n).permute(1, 2, 0).contiguous()
    return _sinkhorn(by_token, iterations).permute(2, 0, 1).reshape(*leading, n, n)
