"""The model of a run as transformers has models: its caches, masks, attention functions, generation and Trainer.

Blocks, connections and arithmetic are those of :mod:`depthmix.model`; here is what surrounds them. Padding may be
anywhere: no connection mixes tokens, and attention does not read what ``attention_mask`` leaves out. Positions are
counted over what it does not leave out, and are those of ``position_ids`` where these are given.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from ..errors import UserError
from ..functional import read_depth_memory
from ..model import MLP, Attention, Block, RMSNorm, check_room
from ..residuals import build_residual
from ..residuals.base import Residual, Site, State
from .configuration import DepthmixConfig


@dataclass
class Call:
    """What one forward pass hands to every attention."""

    mask: Tensor | None
    cache: Cache | None
    keywords: dict[str, Any]
    weights: list[Tensor] | None = None
    """Where attentions put their weights, if anybody wants them."""
    hidden: list[Tensor] = field(default_factory=list)
    """What entered each block, if anybody wants it."""

    def to(self, device: torch.device, *_: Any, **__: Any) -> "Call":
        """For a block on another device (accelerate's hooks call it)."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.keywords.items()}
        mask = self.mask.to(device) if isinstance(self.mask, Tensor) else self.mask
        return Call(mask, self.cache, moved, self.weights, self.hidden)


class TrunkNorm(RMSNorm):
    """The norm in front of a sublayer, ``[..., D] -> [..., D]``: a connection may apply it (``fuses_norm``), so nobody
    should replace it."""


class DepthmixAttention(Attention):
    """Attention by the function that ``config._attn_implementation`` names, with a cache of transformers."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: DepthmixConfig, layer_idx: int):
        super().__init__(config)
        self.norm = TrunkNorm(config.d_model, config.norm_eps)
        self.config, self.layer_idx = config, layer_idx
        self.scaling = self.head_dim**-0.5

    def forward(  # type: ignore[override]  # the cache is that of transformers
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Call,
        layer: int = 0,
        memory: tuple[Tensor, ...] | None = None,
    ) -> Any:
        """``x [B, T, D]``, ``cos, sin [B, 1, 1, T, d / 2]``; returns what :class:`depthmix.model.Attention` does."""
        call = cache
        q, k, v, depth_query, depth_key = self.heads(x, cos, sin)
        depth_value = v
        if call.cache is not None:
            k, v = call.cache.update(k, v, self.layer_idx)
        if memory:
            causal = call.mask is None and q.shape[2] > 1
            if causal:  # a cache may have room for more, behind what was read
                k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
            y, memory = read_depth_memory(
                q, k, v, memory, depth_query=depth_query, causal=causal, mask=readable(call.mask, k.shape[2])
            )
            y = y.transpose(1, 2)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
            y, weights = attend(self, q, k, v, call.mask, dropout=0.0, scaling=self.scaling, **call.keywords)
            if call.weights is not None and weights is not None:
                call.weights.append(weights)
        y = self.proj(y.reshape(*y.shape[:2], -1))
        return y if memory is None else (y, (memory, depth_key, depth_value))


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """Every weight written out: ``q [B, H, T, d]`` -> ``[B, T, H, d]`` and the weights ``[B, H, T, S]``."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def readable(mask: Tensor | None, length: int) -> Tensor | None:
    """A mask of transformers, ``[B, 1, T, S]`` bool or added to scores, as bool in which no row is all false."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask == 0
    mask = mask[..., :length]
    return mask | ~mask.any(-1, keepdim=True)


class DepthmixMLP(MLP):
    """:class:`depthmix.model.MLP`, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: DepthmixConfig):
        super().__init__(config)
        self.norm = TrunkNorm(config.d_model, config.norm_eps)


class DepthmixBlock(Block):
    """A block; with ``gradient_checkpointing`` it runs again in the backward pass of a training."""

    gradient_checkpointing = False

    def __init__(self, config: DepthmixConfig, attn_site: Site, mlp_site: Site, layer_idx: int):
        super().__init__(config, attn_site, mlp_site)
        self.attn = DepthmixAttention(config, layer_idx)
        self.mlp = DepthmixMLP(config)

    @property
    def checkpointing(self) -> bool:  # type: ignore[override]  # derived here, a field of Block
        """Whether the pass at hand keeps only what enters the block."""
        return self.gradient_checkpointing and self.training


class DepthmixPreTrainedModel(PreTrainedModel):
    """What both classes below have in common."""

    config_class = DepthmixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DepthmixBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As everywhere, from safetensors: pickles are opened only for ``use_safetensors=False``."""
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights that no file gave: :meth:`depthmix.GPT.init_weights` in distribution."""
        if isinstance(module, nn.Linear | nn.Embedding):
            into_trunk = getattr(module, "into_trunk", False)
            init.normal_(
                module.weight, 0.0, 0.02 / math.sqrt(2 * self.config.n_layer) if into_trunk else 0.02
            )
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif (reset := getattr(module, "reset_parameters", None)) is not None:
            given = [p for p in module.parameters(recurse=False) if getattr(p, "_is_hf_initialized", False)]
            values = [p.clone() for p in given]
            reset()
            for parameter, value in zip(given, values, strict=True):
                parameter.copy_(value)


class DepthmixModel(DepthmixPreTrainedModel):
    """The trunk: ids to the normed output of the last read, ``[B, T] -> [B, T, D]``."""

    blocks: Sequence[DepthmixBlock]

    def __init__(self, config: DepthmixConfig):
        super().__init__(config)
        gpt = config.gpt
        self.embed = nn.Embedding(gpt.vocab_size, gpt.d_model)
        self.residual = build_residual(gpt)
        blocks: Any = nn.ModuleList(
            DepthmixBlock(config, self.residual.site(2 * i + 1), self.residual.site(2 * i + 2), i)
            for i in range(gpt.n_layer)
        )
        for block in blocks:
            block.attn.proj.into_trunk = block.mlp.proj.into_trunk = True
        self.blocks = blocks
        self.norm = RMSNorm(gpt.d_model, gpt.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """One of ``input_ids [B, T]`` and ``inputs_embeds [B, T, D]``; the rest as everywhere in transformers.

        ``hidden_states``: the embedding, what each block hands to the next (before its norm), and last the normed
        output. Raises ``ValueError`` for a text beyond the model's context.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        if self.config.residual == "moda" and self.config._attn_implementation not in ("sdpa", "eager"):
            raise UserError(
                f"moda reads depth beside its sequence, which {self.config._attn_implementation!r} attention cannot; "
                f"load the model with attn_implementation='sdpa'"
            )
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = self.config.output_attentions if output_attentions is None else output_attentions
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        if self.training and any(block.gradient_checkpointing for block in self.blocks):
            use_cache, past_key_values = False, None  # a block that runs again would write a second time
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.shape[1]
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        every_token_counts = position_ids is None and attention_mask is None
        if position_ids is None:
            position_ids = count_positions(attention_mask, before, T, x.device)
        self._check_cache(past_key_values)
        self._check_context(before, T, position_ids, every_token_counts)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        keywords = {"position_ids": position_ids, **kwargs}
        call = Call(mask, past_key_values, keywords, [] if weights else None)
        h, state = self._through_blocks(x, self._rotary(position_ids), call, wanted)
        h = self.norm(self.residual.finish(h, state))
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=past_key_values,
            hidden_states=(*call.hidden, h) if wanted else None,
            attentions=None if call.weights is None else tuple(call.weights),
        )

    def _through_blocks(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], call: Call, wanted: bool | None
    ) -> tuple[Tensor, State]:
        hooked = any(hasattr(block, "_hf_hook") for block in self.blocks)
        if hooked:
            self._check_offloaded()
            x = x.to(next((p.device for p in self.residual.parameters()), x.device))
        h, state = self.residual.begin(x)
        # Blocks on devices of their own, and readers of what is between them, need it as it is.
        apart = bool(wanted) or hooked
        if not apart:
            state = foresee(self.residual, state, self.blocks)
        normed = False
        for i, block in enumerate(self.blocks):
            if wanted:
                call.hidden.append(h)
            last = i + 1 == len(self.blocks)
            norm = None if apart or last else self.blocks[i + 1].attn.norm
            h, state = block(h, state, *rotary, call, i, normed=normed, next_norm=norm)
            normed = norm is not None
        return h, state

    def _check_offloaded(self) -> None:
        """Raise ``ValueError`` where the weights of a connection are elsewhere and nothing would fetch them.

        What device_map puts on disk, or beside a GPU, is fetched for modules that are called: parts of a site are not.
        """
        parts: list[tuple[str, nn.Module]] = [("model.residual", self.residual)]
        parts += [
            (f"model.blocks.{i}", child)
            for i, block in enumerate(self.blocks)
            for site in (block.attn_site, block.mlp_site)
            for child in site.children()
            if not isinstance(child, nn.Linear)
        ]
        for name, part in parts:
            if any(p.is_meta for p in part.parameters()):
                raise UserError(
                    f"device_map has the weights of {name} offloaded, which the connection {self.config.residual} "
                    f"cannot have; give it a device that computes"
                )

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, 1, 1, T, d / 2]``, the numbers of :func:`depthmix.model.rotary_tables`."""
        device, head_dim = position_ids.device, self.config.head_dim
        exact = torch.float32 if device.type == "mps" else torch.float64
        exponent = torch.arange(0, head_dim, 2, dtype=exact, device=device) / -head_dim
        angle = position_ids.to(exact)[:, None, None, :, None] * self.config.rope_theta**exponent
        dtype = self.embed.weight.dtype
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return tuple(table.float().to(dtype) for table in (angle.cos(), angle.sin()))

    def _check_cache(self, cache: Cache | None) -> None:
        """Raise ``ValueError`` for a cache of fixed size with room beyond the context, also before a graph is made.

        What is behind the room of such a cache is refused by itself; within it, a graph could not tell where it is.
        """
        room = -1 if cache is None or not cache.is_compileable else cache.get_max_length()
        if room > self.config.seq_len:
            raise UserError(
                f"a cache with room for {room} tokens does not fit the model's context of {self.config.seq_len}; make "
                f"it with max_cache_len={self.config.seq_len} or less"
            )

    def _check_context(self, before, tokens: int, position_ids: Tensor, every_token_counts: bool) -> None:
        """Raise ``ValueError`` where a token would stand behind the last place that the model was trained for.

        While a graph is made, by what is known without looking at values: lengths, where no padding is left out.
        """
        context = self.config.seq_len
        # The length of a static cache is a tensor, on a device that one would have to wait for.
        if not isinstance(before, Tensor) and before + tokens <= context:
            return
        if torch.compiler.is_compiling() or position_ids.is_meta:
            if isinstance(before, Tensor) or not every_token_counts:
                return
            end = before + tokens
        elif isinstance(before, Tensor) and before.device.type != "cpu" and tokens == 1:
            return
        else:
            end = int(position_ids.max()) + 1
        if end > context:
            raise UserError(
                f"{end} tokens do not fit the model's context of {context}; shorten the text, or let the tokenizer "
                f"cut it (truncation=True)"
            )


def foresee(residual: Residual, state: State, blocks: Iterable[Block]) -> State:
    """What the connection wants to know of all sites from the start; ``state`` is of ``[B, T, D]`` and more tensors."""
    return residual.foresee(state, [site for b in blocks for site in (b.attn_site, b.mlp_site)])


def count_positions(
    attention_mask: Tensor | None, before: int | Tensor, tokens: int, device: torch.device
) -> Tensor:
    """``[B, T]`` or ``[1, T]``: the place of each of the next ``tokens`` among those that are not padding."""
    place = torch.arange(tokens, device=device) + before
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, place]
    return place.unsqueeze(0)


class DepthmixForCausalLM(DepthmixPreTrainedModel, GenerationMixin):
    """A language model: the trunk and a head tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: DepthmixConfig):
        super().__init__(config)
        self.model = DepthmixModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        """The head, whose weight ``[V, D]`` is the embedding's."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """``labels [B, T]``: ids as in ``input_ids``, shifted here; -100 where there is nothing to learn.

        ``logits_to_keep``: logits of the last so many tokens alone, or of those at these places; 0 keeps all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        check_room(input_ids_length, generation_config.max_length - input_ids_length, self.config.seq_len)
