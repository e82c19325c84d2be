"""Loss of a text under a sliding window, a token, a byte and a word.

With ``N`` the text's total ``-sum ln p(token | up to context tokens before it)``: ``N / tokens`` nats a token,
``N / (bytes ln 2)`` bits a byte, ``exp(N / words)`` perplexity a word. Bytes (of UTF-8) and words (between white space)
do not depend on the tokenizer, so the last two compare models of different vocabularies. The first token of a document
is predicted from the end token alone, as in training; the end token behind a document is not scored.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..data.tokenizers import Tokenizer, to_utf8
from ..errors import UserError
from ..model import GPT
from .score import log_probabilities, longest_first, windows

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
    limit: int | None = None
    """Tokens asked for at most."""

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
    model: GPT,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    batch_size: int = 16,
    told: Callable[[int, float], None] | None = None,
) -> Perplexity:
    """Score every token of ``documents`` once.

    ``context``: tokens that a window reads, at most and by default the model's. ``stride``: tokens by which it moves
    on, by default half of it: every token but a document's first ones is then predicted from at least
    ``context - stride`` before it. A smaller stride costs more and lowers the loss. ``tokens``: the first so many of
    all documents alone, as if the text ended there. ``told`` is given the tokens scored so far, and the bytes of text
    that they are.

    Raises ``UserError`` for a window that does not fit the model, a stride that leaves tokens out, no text.
    """
    most = model.config.seq_len
    context = most if context is None else context
    if not 1 <= context <= most:
        raise UserError(f"context must be from 1 to the model's {most} tokens, got {context}")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"stride must be from 1 to the window's {context} tokens, got {stride}")
    if tokens is not None and tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    text = _Text(tokenizer, documents, context, stride, tokens)
    stream, nats, scored, scored_bytes = text.windows(), 0.0, 0, 0.0
    while part := list(islice(stream, WINDOWS_AT_ONCE)):
        for places in longest_first([window.ids for window in part], batch_size):
            batch = [part[place] for place in places]
            logs, _ = log_probabilities(model, [w.ids for w in batch], [w.first for w in batch])
            nats -= float(logs.sum())
            scored += len(logs)
            scored_bytes += sum(window.bytes for window in batch)
            if told is not None:
                told(scored, scored_bytes)
    if not scored:
        raise UserError("there is no text to score: every document is empty")
    return Perplexity(
        nats, text.documents, scored, text.bytes, text.words, context=context, stride=stride, limit=tokens
    )


class _Window(NamedTuple):
    ids: np.ndarray
    first: int
    """Place in ``ids`` of the first that is scored."""
    bytes: float
    """Of text that is scored, by its share of the document's tokens."""


class _Text:
    """Windows over documents, and what was read for them."""

    def __init__(self, tokenizer, documents, context, stride, tokens):
        self.tokenizer, self.given, self.left = tokenizer, documents, tokens
        self.context, self.stride = context, stride
        self.documents = self.bytes = self.words = 0

    def windows(self) -> Iterator[_Window]:
        """``bytes``, ``words`` and ``documents`` count what was read for the windows so far."""
        for text in filter(None, self.given):
            ids = self.tokenizer.encode_array(text)
            raw = to_utf8(text)
            if self.left is not None:
                if len(ids) > self.left:
                    ids = ids[: self.left]
                    raw = self.tokenizer.decode_bytes(ids.tolist())
                    text = raw.decode(errors="replace")
                self.left -= len(ids)
            self.documents += 1
            self.bytes += len(raw)
            self.words += len(text.split())
            each = len(raw) / max(1, len(ids))
            ids = np.concatenate([[self.tokenizer.end_token], ids.astype(np.int64)])
            for begin, first, end in windows(len(ids), self.context, self.stride):
                yield _Window(ids[begin:end], first - begin, (end - first) * each)
            if self.left == 0:
                return
