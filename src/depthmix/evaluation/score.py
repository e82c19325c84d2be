"""Log-probabilities of given continuations, in batches of unequal length."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import nn

from ..errors import UserError


@torch.inference_mode()
def score(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    told: Callable[[int], None] | None = None,
) -> list[tuple[np.ndarray, bool]]:
    """``log p(continuation[i] | context, continuation[:i])`` of every ``(context, continuation)`` of ids.

    Returns for each pair, in their order, the natural logarithms as float64 ``[len(continuation)]``, and whether
    every token of the continuation was the likeliest. Softmax in fp32, over all rows of the embedding, as in
    training. The longest come first, so that what does not fit into the memory shows at once; shorter ones are filled
    up at the end, which no earlier position sees. ``told`` is given the number of pairs that are done.

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
    device = model.embed.weight.device
    found: list = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        rows = [[*pairs[place][0], *pairs[place][1]] for place in places]
        ids = torch.zeros(len(rows), max(map(len, rows)) - 1 or 1, dtype=torch.long)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1], dtype=torch.long)
        logits = model(ids.to(device))
        for row, place in enumerate(places):
            before, after = pairs[place]
            wanted = torch.tensor([*after], dtype=torch.long, device=device)
            part = logits[row, len(before) - 1 : len(before) - 1 + len(after)]
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            logs = part.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
            greedy = bool((part.argmax(-1) == wanted).all())
            found[place] = (logs.double().cpu().numpy(), greedy)
        if told is not None:
            told(min(first + batch_size, len(order)))
    return found


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
