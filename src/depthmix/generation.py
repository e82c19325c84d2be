"""Sampling from a GPT, one token at a time, with or without the key-value cache.

A residual connection mixes over depth within one token, so Multi-Gate Residuals need no cache
beyond PreNorm's.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .model import GPT, KVCache


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
    if temperature < 0:
        raise UserError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, got {top_p}")
    if compile is not None and not use_cache:
        raise UserError("compile is for tokens read from a cache; leave out use_cache=False")
    if ids.shape[1] + max_new_tokens > model.config.seq_len + 1:
        raise UserError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones do not fit the model's context "
            f"of {model.config.seq_len}; shorten the prompt or generate at most "
            f"{max(0, model.config.seq_len + 1 - ids.shape[1])} tokens"
        )
    return _generate(
        model,
        ids,
        padding,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        seed,
        end_token,
        vocab_size,
        use_cache,
        compile,
    )


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
def _generate(
    model: GPT,
    ids: Tensor,
    padding: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    end_token: int | None,
    vocab_size: int | None,
    use_cache: bool,
    compile: str | None,
) -> Iterator[Tensor]:
    device = model.embed.weight.device
    ids = ids.to(device)
    padding = None if padding is None else padding.to(device)
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    room = ids.shape[0], ids.shape[1] + max_new_tokens, device, model.embed.weight.dtype, padding
    cache = KVCache.empty(model.config, *room, fixed=compile is not None) if use_cache else None
    step: Callable[..., Tensor] = model
    finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=device)
    unread = ids
    for _ in range(max_new_tokens):
        if not use_cache and padding is not None:  # padding is a cache's
            cache = KVCache.empty(model.config, *room)
        logits = step(unread if use_cache else ids, cache=cache)[:, -1]
        if compile is not None and step is model:
            step = torch.compile(model, backend=compile, fullgraph=True)
        if vocab_size is not None:
            logits = logits[:, :vocab_size]
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probability = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
            token = torch.multinomial(probability, 1, generator=generator).squeeze(1)
        if end_token is not None:
            token = torch.where(finished, end_token, token)
            finished |= token == end_token
        yield token
        if end_token is not None and bool(finished.all()):
            return
        unread = token.unsqueeze(1)
        if not use_cache:
            ids = torch.cat([ids, unread], 1)
