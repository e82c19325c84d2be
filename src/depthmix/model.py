r"""A GPT whose residual connection is a choice (paper, Appendix B).

Decoder with RoPE, RMSNorm, a ReLU\ :sup:`2` MLP of width 4D, no biases, tied embeddings. A
*sublayer* is an attention or an MLP with its own pre-norm, ``y = F(norm(h))``; what happens between
sublayers is the business of :mod:`depthmix.residuals` alone::

    h, state = begin(embedding)
    for every sublayer F:   h, state = site(F(norm(h)), state)
    logits = head(norm(finish(h, state)))

Shapes: ``B`` sequences, ``T`` tokens, ``D`` features, ``H`` heads of ``d`` features, ``V`` tokens in
the vocabulary.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import GPTConfig
from .errors import UserError
from .functional import read_depth_memory, relu_squared, rms_norm
from .ops.reference import compute_dtype
from .residuals import build_residual
from .residuals.base import Site, State


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, one pair per block; ``length`` tokens are filled.

    ``keys[b]`` and ``values[b]`` are ``[B, H, capacity, d]``, made once and written in place. Every residual connection
    here mixes over depth within one token, so none of them needs a cache of its own.

    ``padding [B]``, whole numbers: so many tokens at the beginning of each sequence are there only to make all
    sequences equally long. Nobody reads them, and positions are counted from behind them.

    ``place []``, a whole number on the device, stands for ``length`` in a cache whose shapes never change (``fixed``):
    every token reads all of the room there is, through a mask, so that one compiled graph or one CUDA graph serves them
    all. Its room is at most the model's context, so that what fits the one fits the other; how much of it is filled
    only the device knows, and whether a token still fits is for the caller to count.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0
    padding: Tensor | None = None
    place: Tensor | None = None
    _mask: Tensor | None = None

    @classmethod
    def empty(
        cls,
        config: GPTConfig,
        batch: int,
        capacity: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        padding: Tensor | None = None,
        fixed: bool = False,
    ) -> "KVCache":
        """Room for ``capacity`` tokens of ``batch`` sequences: keys and values ``[batch, heads, capacity, head size]``.

        ``padding``: ``[batch]``, ids to the left of each sequence that are none of it. Raises ``UserError`` for a
        ``fixed`` one that has room beyond the model's context.
        """
        if fixed and capacity > config.seq_len:
            raise UserError(
                f"a cache of fixed shapes with room for {capacity} tokens does not fit the model's context of "
                f"{config.seq_len}; make it for at most {config.seq_len}"
            )
        shape = (batch, config.n_head, capacity, config.head_dim)
        keys, values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in range(2)
        )
        place = torch.zeros((), dtype=torch.long, device=device) if fixed else None
        return cls(keys, values, padding=padding, place=place)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.keys[0].shape[2]

    def positions(self, tokens: int) -> Tensor:
        """``[B, T]`` or ``[1, T]``, of the next ``tokens``; 0 for padding."""
        start = self.length if self.place is None else self.place
        place = (torch.arange(tokens, device=self.keys[0].device) + start).unsqueeze(0)
        return place if self.padding is None else (place - self.padding.unsqueeze(1)).clamp_min(0)

    def advance(self, tokens: int) -> None:
        """So many tokens have been written by all blocks."""
        if self.place is None:
            self.length += tokens
        else:
            self.place.add_(tokens)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take ``keys, values [B, H, T, d]`` of the next tokens; all so far, and what of them each token may read.

        The last is bool, ``[T, S]`` or ``[B, 1, T, S]``; ``None`` where the usual causal rule says it.
        """
        tokens = keys.shape[2]
        if self.place is not None:
            return self._write_fixed(layer, keys, values, self.place)
        start, end = self.length, self.length + tokens
        self.keys[layer][:, :, start:end] = keys
        self.values[layer][:, :, start:end] = values
        mask = None
        if self.padding is not None or (start > 0 and tokens > 1):
            mask = self._readable(start, end, keys.device)
        return (
            self.keys[layer][:, :, :end].to(keys.dtype),
            self.values[layer][:, :, :end].to(keys.dtype),
            mask,
        )

    def _write_fixed(
        self, layer: int, keys: Tensor, values: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(keys.shape[2], device=keys.device) + place
        held = self.keys[layer], self.values[layer]
        for buffer, new in zip(held, (keys, values), strict=True):
            buffer.index_copy_(2, index, new.to(buffer.dtype))
        room, index = torch.arange(self.capacity, device=keys.device), index.unsqueeze(1)
        mask = room <= index
        if self.padding is not None:
            mask = mask & (room >= self.padding[:, None, None, None]) | (room == index)
        return held[0].to(keys.dtype), held[1].to(keys.dtype), mask

    def _readable(self, start: int, end: int, device: torch.device) -> Tensor:
        if self._mask is None or self._mask.shape[-2:] != (end - start, end):
            mask = torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start)
            if self.padding is not None:
                place = torch.arange(end, device=device)
                mask = mask & (place >= self.padding[:, None, None, None])
                # Padding reads itself, lest its softmax be over nothing.
                mask |= place == place[start:].unsqueeze(1)
            self._mask = mask
        return self._mask


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, statistics in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        return rms_norm(x, self.weight, self.eps)


def rotary_tables(head_dim: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, head_dim / 2]`` of ``position * theta^(-2i / head_dim)``, fp32."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64).unsqueeze(1) * frequency
    return angle.cos().float(), angle.sin().float()


def rotary_part(cos: Tensor, sin: Tensor, start: int, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both tables for positions ``start`` to ``end``, in the dtype in which queries and keys come for ``like``."""
    dtype, device = like.dtype, like.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return cos[start:end].to(dtype), sin[start:end].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs ``(x[i], x[i + d/2])`` of ``x [..., T, d]`` by the angles of ``cos, sin [T, d/2]``."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    """Causal self-attention, ``[B, T, D] -> [B, T, D]``, on input that went through its ``norm``.

    Under tensor parallelism ``qkv`` returns the heads of this process for all T tokens, and ``proj`` takes them; what
    goes in and out is then this process's part of the sequence (:mod:`depthmix.parallel.shard`).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        # Rows are ordered head by head, each with its query, key and value: a split by rows is a
        # split by heads.
        self.qkv = nn.Linear(config.d_model, 3 * config.attention_width, bias=False)
        self.proj = nn.Linear(config.attention_width, config.d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        memory: tuple[Tensor, ...] | None = None,
    ) -> Any:
        """With a depth ``memory`` (:meth:`Site.depth_memory`), ``(output, (memory, keys, values))``."""
        B, T = x.shape[0], cos.shape[-2]
        q, k, v, depth_query, depth_key = self.heads(x, cos, sin)
        depth_value, mask = v, None
        if cache is not None:
            k, v, mask = cache.write(layer, k, v)
        causal = mask is None and k.shape[2] == T and T > 1
        if memory:
            y, memory = read_depth_memory(q, k, v, memory, depth_query=depth_query, causal=causal, mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y = self.proj(y.transpose(1, 2).reshape(B, T, -1))
        return y if memory is None else (y, (memory, depth_key, depth_value))

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """``(q, k, v, depth_query, depth_key)``, each ``[B, H, T, d]``, of ``x [B, T, D]``; cos, sin ``[..., T, d/2]``.

        One token's query and key are turned by the same angle, so what meets at one token needs no rotation: the last
        two have none.
        """
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim))  # [B, T, H, 3, d]
        qk, v = qkv.permute(0, 2, 3, 1, 4).split([2, 1], 2)  # [B, H, 2, T, d], [B, H, 1, T, d]
        return *rotate(qk, cos, sin).unbind(2), v.squeeze(2), *qk.unbind(2)


class MLP(nn.Module):
    """ReLU\\ :sup:`2` MLP, ``[B, T, D] -> [B, T, D]``, on input that went through its ``norm``."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.fc = nn.Linear(config.d_model, 4 * config.d_model, bias=False)
        self.proj = nn.Linear(4 * config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, show: bool = False) -> Any:
        """``x [B, T, D]``, normed, to the output; with ``show`` to ``(output, (x,))``."""
        y = self.proj(relu_squared(self.fc(x)))
        return (y, (x,)) if show else y


class Block(nn.Module):
    """Attention, MLP, and the site behind each.

    ``checkpointing``: keep what enters and run the block again in the backward pass.
    """

    checkpointing = False

    def __init__(self, config: GPTConfig, attn_site: Site, mlp_site: Site):
        super().__init__()
        self.attn = Attention(config)
        self.attn_site = attn_site
        self.mlp = MLP(config)
        self.mlp_site = mlp_site

    def forward(
        self,
        h: Tensor,
        state: State,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        *,
        normed: bool = False,
        next_norm: RMSNorm | None = None,
        cut: bool = False,
    ) -> Any:
        """``h [B, T, D]``, state -> ``(h, state)``; with ``cut``, what crosses a cut behind it (:meth:`Site.send`).

        ``normed``: ``h`` has been through the attention's norm. ``next_norm``: the norm that what is returned is
        to go through; a site may apply it while it has h at hand. Neither given, a block needs no parameter
        but its own.
        """
        arguments = h, state, cos, sin, cache, layer, normed, next_norm, cut
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self._run(*arguments)

    def _run(
        self,
        h: Tensor,
        state: State,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        layer: int,
        normed: bool,
        next_norm: RMSNorm | None,
        cut: bool,
    ) -> Any:
        x = h if normed else self.attn.norm(h)
        memory = self.attn_site.depth_memory(state)
        if memory is None:
            x, state = step_and_norm(
                self.attn_site, self.attn(x, cos, sin, cache, layer), state, self.mlp.norm
            )
            return self._behind_mlp(self.mlp(x), state, next_norm, cut)
        y, shown = self.attn(x, cos, sin, cache, layer, memory)
        state = self.attn_site.remember(shown, state)
        x, state = step_and_norm(self.attn_site, y, state, self.mlp.norm)
        y, shown = self.mlp(x, show=True)
        return self._behind_mlp(y, self.mlp_site.remember(shown, state), next_norm, cut)

    def _behind_mlp(self, y: Tensor, state: State, next_norm: RMSNorm | None, cut: bool) -> Any:
        return self.mlp_site.send(y, state) if cut else step_and_norm(self.mlp_site, y, state, next_norm)


def step_and_norm(site: Site, y: Tensor, state: State, norm: RMSNorm | None) -> tuple[Tensor, State]:
    """The step of ``site``, then the next sublayer's norm: as one, unless the site cannot or the norm is watched.

    A norm with a forward of its own, put there by something that fetches its weight when it is called, is watched too.
    """
    watched = norm is not None and (
        norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__
    )
    if norm is not None and site.fuses_norm and not watched:
        return site(y, state, norm=norm)
    h, state = site(y, state)
    return h if norm is None else norm(h), state


class GPT(nn.Module):
    """``model(ids) -> logits``; ``model(ids, targets) -> (None, loss)``.

    Args:
        config: what to build.
        seed: of the initial weights. Embedding and sublayers are drawn in one fixed order from a
            generator of their own, so that the same seed gives the same ones whatever the residual
            connection. ``None`` draws a fresh seed from torch's global generator.
        cuts: sublayers behind which a pipeline will cut (:attr:`Residual.cuts`).
    """

    blocks: Sequence[Block]
    rope_cos: Tensor
    rope_sin: Tensor

    sequence_part = (0, 1)
    """``(i, k)``: of every sequence the i-th of k equal parts is this process's; its trunk sees no other."""

    blocks_apart = False
    """Whether a block's parameters can be read by nobody while it does not run, as they are sharded then."""

    def __init__(self, config: GPTConfig, *, seed: int | None = None, cuts: tuple[int, ...] = ()):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.residual = build_residual(config)
        self.residual.cuts = cuts
        blocks: Any = nn.ModuleList(
            Block(config, self.residual.site(2 * i + 1), self.residual.site(2 * i + 2))
            for i in range(config.n_layer)
        )
        self.blocks = blocks
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        for name in ("rope_cos", "rope_sin"):
            table = torch.empty(config.seq_len, config.head_dim // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        if not self.embed.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Fill every parameter and buffer.

        nanoGPT's initialisation: matrices normal(0, .02), projections into the trunk divided by
        sqrt(L); norms 1; connections as their own equations say.
        """
        if hollow := [name for name, p in self.named_parameters() if p.numel() == 0]:
            # Something like deepspeed.zero.Init takes parameters apart while the model is being made.
            warnings.warn(
                f"weights are not initialised: {hollow[0]} and {len(hollow) - 1} others have no elements in this "
                f"process. Call init_weights(seed) where they are whole",
                stacklevel=2,
            )
            return
        if seed is None:
            seed = int(torch.randint(2**31, ()).item())
        generator = torch.Generator().manual_seed(seed)

        def normal_(weight: Tensor, std: float) -> None:
            # Drawn on the CPU in fp32: the same numbers on every device and in every precision.
            drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
            weight.copy_(drawn.normal_(0.0, std, generator=generator))

        config = self.config
        tables = rotary_tables(config.head_dim, config.seq_len, config.rope_theta)
        for buffer, table in zip((self.rope_cos, self.rope_sin), tables, strict=True):
            buffer.copy_(table)
        into_trunk = 0.02 / math.sqrt(config.n_sublayers)
        normal_(self.embed.weight, 0.02)
        for block in self.blocks:
            normal_(block.attn.qkv.weight, 0.02)
            normal_(block.attn.proj.weight, into_trunk)
            normal_(block.mlp.fc.weight, 0.02)
            normal_(block.mlp.proj.weight, into_trunk)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif not isinstance(module, nn.Linear | nn.Embedding):
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
        # Last of all, so that the draws above are the same whatever the connection.
        for block in self.blocks:
            for site in (block.attn_site, block.mlp_site):
                for weight in site.drawn_weights():
                    normal_(weight, 0.02)

    def whole_blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return list(self.blocks)

    def rotary(self, ids: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[T, d / 2]`` for ``ids [B, T]`` at positions from ``start`` on."""
        return rotary_part(self.rope_cos, self.rope_sin, start, start + ids.shape[1], self.embed.weight)

    def _tables(self) -> tuple[Tensor, Tensor]:
        return rotary_part(self.rope_cos, self.rope_sin, 0, self.config.seq_len, self.embed.weight)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normed output of the trunk, ``[B, T, D]``, for ``ids [B, T]``."""
        if ids.dim() != 2 or ids.dtype.is_floating_point:
            raise UserError(f"ids must be whole numbers of shape [B, T], got {ids.dtype} {list(ids.shape)}")
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        limit = self.config.seq_len if cache is None else min(self.config.seq_len, cache.capacity)
        if end > limit and (cache is None or cache.place is None):
            raise UserError(
                f"{end} tokens do not fit: the model was built for seq_len = {self.config.seq_len}"
                + ("" if cache is None else f" and the cache holds {cache.capacity}")
            )
        if cache is None or (cache.padding is None and cache.place is None):
            cos, sin = self.rotary(ids, start)
        else:
            cos, sin = (table[cache.positions(ids.shape[1])][:, None, None] for table in self._tables())
        h, state = self.residual.begin(self.embed(own_part(ids, self.sequence_part)))
        normed = False
        following: list[RMSNorm | None] = [None] * len(self.blocks)
        if not self.blocks_apart:
            state = self.residual.foresee(state, [s for b in self.blocks for s in (b.attn_site, b.mlp_site)])
            following = [*(block.attn.norm for block in self.blocks[1:]), None]
        for layer, (block, norm) in enumerate(zip(self.blocks, following, strict=True)):
            h, state = block(h, state, cos, sin, cache, layer, normed=normed, next_norm=norm)
            normed = norm is not None
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(self.residual.finish(h, state))

    @overload
    def forward(self, ids: Tensor, targets: None = None, *, cache: KVCache | None = None) -> Tensor: ...

    @overload
    def forward(
        self, ids: Tensor, targets: Tensor, *, cache: KVCache | None = None
    ) -> tuple[None, Tensor]: ...

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None
    ) -> Tensor | tuple[None, Tensor]:
        """``ids [B, T]`` -> ``logits [B, T, V]``; with ``targets [B, T]`` -> ``(None, loss)``.

        ``loss`` is the mean cross entropy in nats over all tokens whose target is not -100, fp32 (fp64 for an
        fp64 model).
        With a ``cache``, ``ids`` continue the tokens already in it. Raises ``ValueError`` when
        ``ids`` are not whole numbers or exceed ``seq_len``.
        """
        logits = F.linear(self.hidden(ids, cache), self.embed.weight)
        if targets is None:
            return logits
        return None, mean_loss(logits, own_part(targets, self.sequence_part))

    if TYPE_CHECKING:
        __call__ = forward


def check_room(prompt: int, new: int, context: int) -> None:
    """Raise ``UserError`` where ``new`` tokens behind ``prompt`` others are more than a context has room for.

    The last new token is not read again, hence one more than the context.
    """
    if prompt + new > context + 1:
        raise UserError(
            f"a prompt of {prompt} tokens and {new} new ones do not fit the model's context of {context}; shorten the "
            f"prompt, or generate at most {max(0, context + 1 - prompt)} tokens"
        )


def own_part(ids: Tensor, part: tuple[int, int]) -> Tensor:
    """``[B, T] -> [B, T / k]``: the i-th of k parts of every row, for ``part = (i, k)``."""
    i, k = part
    return ids if k == 1 else ids.unflatten(1, (k, -1))[:, i]


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats over the tokens of ``targets [B, T]`` that are not -100, of ``logits [B, T, V]``."""
    return F.cross_entropy(
        logits.to(compute_dtype(logits.dtype)).view(-1, logits.shape[-1]), targets.reshape(-1)
    )
