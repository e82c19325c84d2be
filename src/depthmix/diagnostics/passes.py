r"""What takes passes of its own: blocks removed one by one, gradients, the mixing map, and what inversion brings back.

**Removal.** With block l writing nothing, blocks 0 .. l - 1 do what they do in the whole model, so all L losses come
from one walk through the depth: at the entry of block l the rest of the model runs without it, then the walk goes on
through it. That is L (L + 1) / 2 blocks in place of L^2, and at any time two carries, that of the walk and that of the
rest: memory does not grow with depth, and with the texts by one number for each and block. Nothing is approximated.

Each of the L + 1 losses needs the head, which for a large vocabulary costs more than the blocks do
(V D against 6 L D^2 multiplications a token). It takes some hundred positions at a time (``LOGIT_BYTES``).

**Gradients** are those of the mean loss over all texts, added up over batches in fp32 (fp64 for fp64 parameters). Of
the parameters only the blocks' are differentiated. The head's part is done some hundred positions at a time, each
forwards and backwards, so that logits are never there for a whole batch.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..ops.reference import compute_dtype
from .arrays import Array
from .capture import uncompiled
from .subject import Run, Subject

LOGIT_BYTES = 32 * 2**20
"""Of logits, in the compute dtype, at once; 8 times as many where there is no CPU at work.

What glibc allocates beyond this comes from the system every time, with a page fault for every 4 KiB.
"""

Progress = Callable[[float], None]


@torch.no_grad()
def block_removal(
    subject: Subject, texts: Tensor, batch: int, progress: Progress | None = None
) -> dict[str, Array]:
    """The change of the loss when a block writes nothing, for every block.

    Args:
        subject: what is examined; it is left as it was.
        texts: ``[N, T]`` int64, T at least 2.
        batch: texts at a time.
        progress: called with the texts done since it was last called, in fractions; N in the end.

    Returns:
        ``removal_delta [L]``: mean over the texts of the loss without the block less that of the whole model, in nats
        per token; NaN where the block cannot be removed. ``removal_se [L]``: its standard error over texts, each
        compared with itself; NaN for a single text. ``removal_base []``: mean loss of the whole model. All fp64.

    Warns where a loss is not finite; what it was stays in the arrays.
    """
    count, depth = len(texts), subject.n_layer
    losses = np.full((depth + 1, count), np.nan)  # the whole model is the last row
    removable = np.zeros(depth + 1, dtype=bool)
    removable[depth] = True
    with _evaluating(subject):
        rows, head = _head_rows(subject), _head_cost(subject)
        work = np.array([1 + (depth - 1 - l) + head for l in range(depth)] + [head])  # noqa: E741
        for first in range(0, count, batch):
            ids = texts[first : first + batch].to(subject.device)
            here = slice(first, first + len(ids))

            def done(step: int, texts: int) -> None:
                if progress is not None:
                    progress(texts * work[step] / work.sum())

            carry = subject.begin(ids)
            for block in range(depth):
                rest = subject.without(block, carry)
                if rest is not None:
                    for later in range(block + 1, depth):
                        rest = subject.block(later, rest)
                    hidden = subject.end(rest)
                    del rest  # what is not needed makes room for logits
                    losses[block, here] = text_losses(subject, hidden, ids, rows)
                    removable[block] = True
                carry = subject.block(block, carry)
                done(block, len(ids))
            hidden = subject.end(carry)
            del carry
            losses[depth, here] = text_losses(subject, hidden, ids, rows)
            done(depth, len(ids))
    with np.errstate(invalid="ignore"):
        changes = losses[:depth] - losses[depth]
        delta, base = changes.mean(1), losses[depth].mean()
        error = changes.std(1, ddof=1) / np.sqrt(count) if count > 1 else np.full(depth, np.nan)
    _warn_of_losses(losses, removable)
    return {
        "removal_delta": Array(
            delta, ("block",), "nats", "change of the mean loss when the block writes nothing"
        ),
        "removal_se": Array(error, ("block",), "nats", "standard error of removal_delta over texts, paired"),
        "removal_base": Array(np.array(base), (), "nats", "mean loss of the whole model on the same texts"),
    }


def _warn_of_losses(losses: np.ndarray, removable: np.ndarray) -> None:
    bad = ~np.isfinite(losses) & removable[:, None]
    if bad[-1].any():
        warnings.warn(
            f"the loss of the whole model is not finite on {bad[-1].sum()} of {losses.shape[1]} texts",
            stacklevel=4,
        )
    blocks = np.flatnonzero(bad[:-1].any(1))
    if len(blocks):
        warnings.warn(
            f"the loss without block {', '.join(map(str, blocks))} is not finite on some of {losses.shape[1]} texts",
            stacklevel=4,
        )


def text_losses(subject: Subject, hidden: Tensor, ids: Tensor, rows: int) -> np.ndarray:
    """Mean loss of each text in nats, ``[B]`` fp64, given the head's input; ``rows`` positions at a time."""
    found = [F.cross_entropy(*part, reduction="none") for part in _logits(subject, hidden, ids, rows)]
    return torch.cat(found).view(len(ids), -1).double().mean(1).cpu().numpy()


def _logits(subject: Subject, hidden: Tensor, ids: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits in the compute dtype and the ids they are of, ``rows`` positions at a time."""
    positions, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    for x, target in zip(positions.split(rows), targets.split(rows), strict=True):
        logits = subject.head(x)
        yield logits.to(compute_dtype(logits.dtype)), target


def gradient_rms(
    subject: Subject, texts: Tensor, batch: int, progress: Progress | None = None
) -> dict[str, Array]:
    """Root mean square of the gradient of the mean loss over all these texts, of every block's parameters.

    Arguments as for :func:`block_removal`. Gradients that parameters have, which of them are differentiated and
    whether modules are in training are as before afterwards.

    Returns:
        ``gradient_rms [L]`` fp64. A parameter that several blocks share counts in each of them, one that has no part
        in the loss as zero.

    Warns where it is not finite.
    """
    depth, count = subject.n_layer, len(texts)
    by_block = [list(dict.fromkeys(subject.block_parameters(block))) for block in range(depth)]
    wanted = list(dict.fromkeys(p for parameters in by_block for p in parameters))
    total = {p: torch.zeros_like(p, dtype=compute_dtype(p.dtype)) for p in wanted}
    with _evaluating(subject), _differentiating(subject, wanted):
        with torch.no_grad():
            rows = _head_rows(subject)
        for first in range(0, count, batch):
            ids = texts[first : first + batch].to(subject.device)
            hidden = subject.hidden(ids)
            leaf = hidden.detach().requires_grad_()
            for logits, target in _logits(subject, leaf, ids, rows):
                (F.cross_entropy(logits, target, reduction="sum") / ids[:, 1:].numel()).backward()
                del logits
            hidden.backward(leaf.grad)
            del hidden, leaf
            for parameter, gradient in total.items():
                if parameter.grad is not None:
                    gradient.add_(parameter.grad, alpha=len(ids) / count)
                    parameter.grad = None
            if progress is not None:
                progress(len(ids))
    squares = {p: gradient.double().square().sum().item() for p, gradient in total.items()}
    values = np.array(
        [
            np.sqrt(sum(squares[p] for p in parameters) / max(1, sum(p.numel() for p in parameters)))
            for parameters in by_block
        ]
    )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        warnings.warn(f"the gradient of block {', '.join(map(str, bad))} is not finite", stacklevel=2)
    about = "root mean square of d loss / d parameter over the block's parameters"
    return {"gradient_rms": Array(values, ("block",), "nats per unit of parameter", about)}


def mixing(subject: Subject, texts: Tensor, tokens: int = 2048) -> dict[str, Array]:
    """:func:`depthmix.mixing_map` on the first texts, about ``tokens`` tokens together.

    Returns ``mixing_matrix [2L + 1, 2L + 1]`` and ``mixing_source_rms [2L + 1]``. Raises ``ValueError`` with the
    reason where the connection has no such map.
    """
    from ..mixing import mixing_map

    found = mixing_map(_depthmix_model(subject, "mixing map"), _some(texts, tokens))
    about = "coefficient of every source in what each sublayer, and in the end the trunk's output, reads"
    return {
        "mixing_matrix": Array(found.matrix.numpy(), ("reader", "source"), "", about),
        "mixing_source_rms": Array(
            found.source_rms.numpy(), ("source",), "", "root mean square of each source"
        ),
    }


def reconstruction(subject: Subject, texts: Tensor, tokens: int = 1024) -> dict[str, Array]:
    """:func:`depthmix.memory.reconstruction_error` on the first texts, about ``tokens`` tokens together.

    Holds the streams of all these tokens behind every sublayer. Returns ``reconstruction_measured``, ``_predicted``,
    ``_kept`` and ``_anchor``, each ``[2L]`` fp64, NaN where the sublayer does not lerp. Raises ``ValueError``
    with the reason where none does.
    """
    from ..memory import reconstruction_error

    model = _depthmix_model(subject, "reconstruction error")
    about = {
        "measured": ("share", "largest relative error of a stream's row that inversion brings back"),
        "predicted": ("share", "bound that inversion held its error to"),
        "kept": ("share", "rows that inversion keeps"),
        "anchor": ("", "1 where inversion keeps all rows, else 0"),
    }
    values = {key: np.full(2 * subject.n_layer, np.nan) for key in about}
    with _evaluating(subject):
        for row in reconstruction_error(model, _some(texts, tokens).to(subject.device)):
            for key in about:
                values[key][row["sublayer"] - 1] = row[key]
    return {
        f"reconstruction_{key}": Array(values[key], ("sublayer",), unit, text)
        for key, (unit, text) in about.items()
    }


def _depthmix_model(subject: Subject, what: str):
    if not isinstance(subject, Run):
        raise UserError(f"{subject.name} is no model of depthmix, whose connections have a {what}")
    return subject.module


def _some(texts: Tensor, tokens: int) -> Tensor:
    return texts[: max(1, tokens // texts.shape[1]), :tokens]


def _head_rows(subject: Subject) -> int:
    """Positions whose logits are ``LOGIT_BYTES``."""
    logits = _one_position(subject)
    room = LOGIT_BYTES * (1 if subject.device.type == "cpu" else 8)
    return max(1, room // (logits.numel() * compute_dtype(logits.dtype).itemsize))


def _head_cost(subject: Subject) -> float:
    """Of one position, in blocks."""
    block = sum(p.numel() for p in subject.block_parameters(0))
    return _one_position(subject).numel() * subject.d_model / max(1, block)


def _one_position(subject: Subject) -> Tensor:
    """Logits of one position."""
    like = next(subject.module.parameters())
    return subject.head(like.new_zeros(1, 1, subject.d_model))


@contextlib.contextmanager
def _evaluating(subject: Subject) -> Iterator[None]:
    """Evaluation mode, as the code is written and in the parameters' precision."""
    training = {module: module.training for module in subject.module.modules()}
    subject.module.eval()
    try:
        with uncompiled(), torch.autocast(subject.device.type, enabled=False):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextlib.contextmanager
def _differentiating(subject: Subject, wanted: list) -> Iterator[None]:
    """Gradients of ``wanted`` alone, which begin as none; afterwards all is as it was."""
    everything = list(dict.fromkeys((*subject.module.parameters(), *wanted)))
    before = [(p, p.requires_grad, p.grad) for p in everything]
    try:
        for p in everything:
            p.grad = None
            p.requires_grad_(False)
        for p in wanted:
            p.requires_grad_()
        with torch.enable_grad():
            yield
    finally:
        for p, flag, gradient in before:
            p.grad = gradient
            p.requires_grad_(flag)
