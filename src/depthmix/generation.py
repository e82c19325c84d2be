"""Sampling from a GPT, one token at a time, with or without the key-value cache.

A residual connection mixes over depth within one token, so Multi-Gate Residuals need no cache
beyond PreNorm's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .model import GPT, KVCache, check_room


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits ``[B, V]`` of the distribution to sample from: divided by ``temperature``, all but the
    ``top_k`` largest removed, then all but the smallest set of tokens whose probabilities sum to
    ``top_p`` or more. Removed entries are -inf."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        # By rank, not by value: of equal logits only as many stay as asked for.
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1.0:
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = values.softmax(-1)
        before = probability.cumsum(-1) - probability
        values = values.masked_fill(before >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter(-1, order, values)
    return logits


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; fields as the arguments of :func:`generate`.

    Raises ``UserError`` for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """``[B, V]`` logits -> ``[B]`` ids."""
        logits = logits[:, : self.vocab_size]
        if self.temperature == 0:
            return logits.argmax(-1)
        probability = filter_logits(logits, self.temperature, self.top_k, self.top_p).softmax(-1)
        return torch.multinomial(probability, 1, generator=generator).squeeze(1)


class _Reader:
    """The model behind prompts: takes tokens, gives logits of the next.

    Args:
        ids: prompts, ``[B, T]``.
        padding: ``[B]``, tokens in front of each that are none; or ``None``.
        room: tokens of a sequence that are read, at most.
        use_cache, compile: as in :func:`generate`.
    """

    def __init__(
        self,
        model: GPT,
        ids: Tensor,
        padding: Tensor | None,
        room: int,
        *,
        use_cache: bool = True,
        compile: str | None = None,
    ):
        device = model.embed.weight.device
        self.model, self.use_cache, self.compile, self.room = model, use_cache, compile, room
        self.unread = ids.to(device)
        self.padding = None if padding is None else padding.to(device)
        self.cache = self._empty_cache() if use_cache else None
        self._step = self._last

    def _empty_cache(self) -> KVCache:
        weight, fixed = self.model.embed.weight, self.compile is not None
        return KVCache.empty(
            self.model.config, len(self.unread), self.room, weight.device, weight.dtype, self.padding, fixed
        )

    def logits(self) -> Tensor:
        """``[B, V]`` behind all tokens taken so far."""
        if not self.use_cache:
            self.cache = None if self.padding is None else self._empty_cache()  # padding is a cache's
        logits = self._step(self.unread, self.cache)
        if self.compile is not None and self._step == self._last:  # what follows is one token at a time
            compiled = torch.compile(self.model, backend=self.compile, fullgraph=True)
            self._step = lambda ids, cache: compiled(ids, cache=cache)[:, -1]
        return logits

    def _last(self, ids: Tensor, cache: KVCache | None) -> Tensor:
        return F.linear(self.model.hidden(ids, cache)[:, -1], self.model.embed.weight)

    def take(self, token: Tensor) -> None:
        """``[B]``: what comes next."""
        token = token.unsqueeze(1)
        self.unread = token if self.use_cache else torch.cat([self.unread, token], 1)


@torch.inference_mode()
def generate(
    model: GPT,
    ids: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    end_token: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    compile: str | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, ``[B]``, up to ``max_new_tokens`` times.

    Args:
        ids: prompts of one length, ``[B, T]`` with T >= 1, or a sequence of B prompts ``[T_b]`` of any lengths, which
            give the tokens that each gives alone; ``T + max_new_tokens`` must not exceed ``seq_len + 1`` (the last
            token is not read again).
        temperature: 0 takes the most likely token; 1 samples from the model's distribution.
        top_k: keep this many tokens. ``None``: all.
        top_p: keep the most likely tokens up to this probability, (0, 1]. ``None``: all.
        seed: of the sampling; the same seed gives the same text. ``None``: a fresh one.
        end_token: stop when every sequence has produced it; a sequence that has repeats it.
        vocab_size: ids from here on are padding rows of the embedding and never sampled.
        use_cache: keep keys and values. Without, every token is computed from the whole prefix.
        compile: a backend of ``torch.compile`` (``"inductor"``): every token behind the prompts goes through one graph,
            over a cache whose shapes do not change.

    Raises:
        ValueError: an argument is out of range or the text would not fit.
    """
    padding = None
    if not isinstance(ids, Tensor):
        ids, padding = side_by_side(ids)
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise UserError(f"ids must have shape [B, T] with T >= 1, got {list(ids.shape)}")
    sampling = Sampling(temperature, top_k, top_p, vocab_size)
    if compile is not None and not use_cache:
        raise UserError("compile is for tokens read from a cache; leave out use_cache=False")
    check_room(ids.shape[1], max_new_tokens, model.config.seq_len)
    room = ids.shape[1] + max(1, max_new_tokens) - 1  # the last token is not read again
    reader = _Reader(model, ids, padding, room, use_cache=use_cache, compile=compile)
    return _tokens(reader, sampling, max_new_tokens, seed, end_token)


def side_by_side(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """``(ids [B, T], padding [B])`` of prompts ``[T_b]``: zeros in front of the shorter ones, and how many.

    ``padding`` is ``None`` where all are equally long.

    Raises:
        ValueError: there is no prompt, or one is empty or has another shape.
    """
    prompts = [torch.as_tensor(prompt) for prompt in prompts]
    if not prompts or any(prompt.dim() != 1 or len(prompt) < 1 for prompt in prompts):
        raise UserError(
            f"prompts must be one or more tensors of shape [T] with T >= 1, got shapes "
            f"{[list(prompt.shape) for prompt in prompts]}"
        )
    longest = max(map(len, prompts))
    ids = torch.stack([F.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=ids.device)
    return ids, padding if padding.any() else None


@torch.inference_mode()
def _tokens(
    reader: _Reader, sampling: Sampling, count: int, seed: int | None, end_token: int | None
) -> Iterator[Tensor]:
    device = reader.unread.device
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    finished = torch.zeros(len(reader.unread), dtype=torch.bool, device=device)
    for _ in range(count):
        token = sampling.draw(reader.logits(), generator)
        if end_token is not None:
            token = torch.where(finished, end_token, token)
            finished |= token == end_token
        yield token
        if end_token is not None and bool(finished.all()):
            return
        reader.take(token)
