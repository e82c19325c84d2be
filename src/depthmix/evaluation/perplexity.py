"""Loss of a text under a sliding window, a token, a byte and a word.

With ``N`` the text's total ``-sum ln p(token | up to context tokens before it)``: ``N / tokens`` nats a token,
``N / (bytes ln 2)`` bits a byte, ``exp(N / words)`` perplexity a word. Bytes (of UTF-8) and words (between white space)
do not depend on the tokenizer, so the last two compare models of different vocabularies. The first token of a document
is predicted from the end token alone, as in training; the end token behind a document is not scored.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
from torch import nn

from ..data.tokenizers import Tokenizer, to_utf8
from ..errors import UserError
from .score import score, windows

WINDOWS_AT_ONCE = 256


@dataclass(frozen=True)
class Perplexity:
    """What was counted."""

    nats: float
    """Total negative log-likelihood."""
    documents: int
    tokens: int
    bytes: int
    words: int
    context: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    @property
    def word_perplexity(self) -> float:
        """Infinite where it is beyond a float."""
        power = self.nats / self.words if self.words else math.inf
        return math.exp(power) if power < 700 else math.inf

    def to_dict(self) -> dict:
        """Counts, and what follows from them: plain JSON types."""
        word = self.word_perplexity
        return {
            **asdict(self),
            "loss": self.loss,
            "token_perplexity": math.exp(min(self.loss, 700)),
            "bits_per_byte": self.bits_per_byte,
            "byte_perplexity": 2**self.bits_per_byte,
            "word_perplexity": word if math.isfinite(word) else None,
        }


def perplexity(
    model: nn.Module,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    told: Callable[[int], None] | None = None,
) -> Perplexity:
    """Score every token of ``documents`` once.

    ``context``: tokens that a window reads, at most and by default the model's. ``stride``: tokens by which it moves
    on, by default half of it: every token but a document's first ones is then predicted from at least
    ``context - stride`` before it. A smaller stride costs more and lowers the loss. ``told`` is given the tokens
    scored so far.

    Raises ``UserError`` for a window that does not fit the model, a stride that leaves tokens out, no text.
    """
    most = model.config.seq_len
    context = most if context is None else context
    if not 1 <= context <= most:
        raise UserError(f"context must be from 1 to the model's {most} tokens, got {context}")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"stride must be from 1 to the window's {context} tokens, got {stride}")
    nats, counts = 0.0, dict.fromkeys(("documents", "tokens", "bytes", "words"), 0)
    held: list[tuple[np.ndarray, np.ndarray]] = []

    def run(keep: int) -> None:
        nonlocal nats
        while len(held) > keep:
            part = held[:WINDOWS_AT_ONCE]
            del held[:WINDOWS_AT_ONCE]
            for logs, _ in score(model, part, batch_size=batch_size):
                nats -= float(logs.sum())
                counts["tokens"] += len(logs)
            if told is not None:
                told(counts["tokens"])

    for text in documents:
        if not text:
            continue
        counts["documents"] += 1
        counts["bytes"] += len(to_utf8(text))
        counts["words"] += len(text.split())
        ids = np.concatenate([[tokenizer.end_token], tokenizer.encode_array(text).astype(np.int64)])
        for begin, first, end in windows(len(ids), context, stride):
            held.append((ids[begin:first], ids[first:end]))
        run(WINDOWS_AT_ONCE)
    run(0)
    if not counts["tokens"]:
        raise UserError("there is no text to score: every document is empty")
    return Perplexity(nats, **counts, context=context, stride=stride)
