"""Log-probabilities of given continuations, in batches of unequal length."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, overload

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UserError
from ..model import GPT
from ..ops.reference import compute_dtype

LOGITS_AT_ONCE = 1 << 25
"""Logits that are held at a time: 128 MiB in fp32."""


def score(
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    told: Callable[[int], None] | None = None,
) -> list[tuple[np.ndarray, bool]]:
    """``log p(continuation[i] | context, continuation[:i])`` of every ``(context, continuation)`` of ids.

    Returns for each pair, in their order, the natural logarithms as float64 ``[len(continuation)]``, and whether
    every token of the continuation was the likeliest. ``told`` is given the number of pairs that are done.

    Raises ``UserError`` for an empty context, and for a pair that is longer than the model's context.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    context = model.config.seq_len
    for place, (before, after) in enumerate(pairs):
        if not len(before):
            raise UserError(f"pair {place} has no context; begin with the tokenizer's end token")
        if len(before) + len(after) - 1 > context:
            raise UserError(
                f"pair {place} has {len(before)} + {len(after)} tokens; with the last one not read they must fit the "
                f"model's context of {context}"
            )
    rows = [np.array([*before, *after], dtype=np.int64) for before, after in pairs]
    found: list = [None] * len(pairs)
    done = 0
    for places in longest_first(rows, batch_size):
        first = [len(pairs[place][0]) for place in places]
        logs, likeliest = log_probabilities(model, [rows[place] for place in places], first, likeliest=True)
        ends = np.cumsum([len(pairs[place][1]) for place in places])[:-1]
        for place, own, best in zip(places, np.split(logs, ends), np.split(likeliest, ends), strict=True):
            found[place] = (own, bool(best.all()))
        done += len(places)
        if told is not None:
            told(done)
    return found


def longest_first(rows: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Places of ``rows`` in batches. What does not fit into the memory shows at once, and little is filled up."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


@overload
def log_probabilities(
    model: GPT, rows: Sequence[np.ndarray], first: Sequence[int], *, likeliest: Literal[False] = False
) -> tuple[np.ndarray, None]: ...


@overload
def log_probabilities(
    model: GPT, rows: Sequence[np.ndarray], first: Sequence[int], *, likeliest: Literal[True]
) -> tuple[np.ndarray, np.ndarray]: ...


@torch.inference_mode()
def log_probabilities(
    model: GPT, rows: Sequence[np.ndarray], first: Sequence[int], *, likeliest: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """``ln p(row[i] | row[:i])`` for i from ``first`` on, of one batch: row after row, float64.

    The second is whether each token was the likeliest, where that is asked for. Softmax in fp32, over all rows of the
    embedding, as in training. Shorter rows are filled up at the end, which no earlier position sees; the head is
    applied where something is predicted, and nowhere else.
    """
    device = model.embed.weight.device
    longest = max(1, max(map(len, rows)) - 1)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row) - 1] = row[:-1]
    wanted = np.concatenate([row[begin:] for row, begin in zip(rows, first, strict=True)])
    places = [
        np.arange(begin - 1, len(row) - 1) + place * longest
        for place, (row, begin) in enumerate(zip(rows, first, strict=True))
    ]
    hidden = model.hidden(torch.from_numpy(ids).to(device)).flatten(0, 1)
    hidden = hidden[torch.from_numpy(np.concatenate(places)).to(device)]
    targets = torch.from_numpy(wanted).to(device)
    logs = torch.empty(len(wanted), dtype=torch.float64, device=device)
    best = torch.empty(len(wanted), dtype=torch.bool, device=device) if likeliest else None
    step = max(1, LOGITS_AT_ONCE // model.embed.num_embeddings)
    for begin in range(0, len(wanted), step):
        part = slice(begin, begin + step)
        logits = F.linear(hidden[part], model.embed.weight)
        logits = logits.to(compute_dtype(logits.dtype))
        logs[part] = -F.cross_entropy(logits, targets[part], reduction="none").double()
        if best is not None:
            best[part] = logits.argmax(-1) == targets[part]
    return logs.cpu().numpy(), None if best is None else best.cpu().numpy()


def windows(length: int, context: int, stride: int) -> Iterable[tuple[int, int, int]]:
    """``(begin, scored from, end)`` of windows over ``length`` tokens, each token scored once.

    Tokens ``begin .. end - 2`` are read, ``scored from .. end - 1`` predicted; token 0 is given, so 1 is the first
    that is scored. A window reads at most ``context`` tokens. The first scores all it can; every later one scores
    ``stride`` tokens, with ``context - stride + 1`` or more read before each.
    """
    done = 1
    while done < length:
        end = min(length, context + 1 if done == 1 else done + stride)
        yield max(0, end - 1 - context), done, end
        done = end
