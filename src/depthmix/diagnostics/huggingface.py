"""A Hugging Face causal language model as a subject: Llama, Qwen, SmolLM, Mistral, GPT-2, GPT-NeoX, Phi, OPT, Gemma.

Nothing here knows a model by its name. The model runs its own code around its blocks and its blocks run their own: to
step through them, stand-ins take the place of blocks or decoder, which note how they are called or return what they
are given. So masks, rotary angles, final norm, head, scaled or capped logits are the model's.

What a block has is read off one small run (:mod:`depthmix.anatomy`). A model that is something else (other sums, blocks
that hand on more than one tensor, attention that looks ahead) is refused, for then the figures would not mean what
they say.

Points have the names of :mod:`depthmix.diagnostics.capture`, and hold:

``hook_embed``                what enters block 0: with learnt positions, and scaled, where the model does that
``blocks.N.hook_resid_pre``   what enters block N
``blocks.N.hook_attn_out``    what attention adds
``blocks.N.hook_resid_mid``   what the MLP's norm reads; does not exist where attention and MLP are in parallel
``blocks.N.hook_mlp_out``     what the MLP adds
``blocks.N.hook_resid_post``  what leaves block N
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..anatomy import (
    PROBE,
    Trace,
    find_blocks,
    find_parts,
    first_returned,
    first_tensor,
    forward_replaced,
    same_but_for_rounding,
    trace_calls,
    without_first_tensor,
)
from ..errors import UserError
from .capture import Captured, point_names, wanted_points
from .subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """Children of a block that are watched."""

    attention: nn.Module
    """Returns what attention adds."""
    mlp: nn.Module
    """Returns what the MLP adds."""
    middle: nn.Module | None
    """Its first argument is the residual stream between the two; ``None`` where they are in parallel."""


class HuggingFaceSubject(Subject):
    """A model of transformers, in fp32 whatever its file holds.

    Args:
        model: any ``...ForCausalLM``; it is put into evaluation mode.
        tokenizer: of transformers, or ``None``.
        name: shown in figures.

    Raises:
        ValueError: the model has no blocks that can be told apart and stepped through.
    """

    residual = "prenorm"
    n_streams = 0

    module: "PreTrainedModel"

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        name: str,
    ):
        config = model.config.get_text_config()
        self.module, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.detail = f"Hugging Face {type(model).__name__}"
        self.n_layer, self.d_model = config.num_hidden_layers, config.hidden_size
        self.max_length = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self.decoder = model.get_decoder()
        self.blocks = find_blocks(
            self.decoder, self.n_layer, lambda why: UserError(f"{self.name} cannot be diagnosed: {why}")
        )
        self._stepping = False
        with torch.no_grad():
            self._inspect()

    # Text

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without any that stand for the beginning or end; such a token in the text is only text."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.name} has no tokenizer, so it cannot read text; copy the tokenizer's files into its folder"
            )
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]

    def decode(self, ids):
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    @property
    def end_token(self) -> int | None:
        """The id that ends a document; ``None`` where there is none."""
        if self.tokenizer is not None:
            return self.tokenizer.eos_token_id
        end = self.module.config.get_text_config().eos_token_id
        return end[0] if isinstance(end, Sequence) else end

    @property
    def start_token(self) -> int | None:
        """The id that the tokenizer puts in front of every text, as the model had it in training; ``None`` without."""
        if self.tokenizer is None:
            return None
        first = self.tokenizer("a", verbose=False)["input_ids"][:1]
        return first[0] if first == [self.tokenizer.bos_token_id] else None

    def windows(self, data: Sequence[str], text_field: str, length: int, tokens: int) -> Tensor:
        """``[N, length]`` ids of at most ``tokens`` of the text in ``data``, each beginning as in training."""
        from ..runs import encode, windows_of

        ids = encode(data, text_field, self.encode, self.end_token, tokens)
        start = self.start_token
        if start is None:
            return windows_of(ids, length)
        texts = windows_of(ids, length - 1)
        return torch.cat([torch.full((len(texts), 1), start), texts], 1)

    # Depth

    def hidden(self, ids):
        return self.decoder(input_ids=ids, use_cache=False).last_hidden_state

    def begin(self, ids):
        calls = []
        with self._standing_in(calls):
            self.decoder(input_ids=ids, use_cache=False)
        first = first_tensor(*calls[0])
        # A block's input is put in place when it runs; what else it is called with stays the same.
        return first, tuple(without_first_tensor(*call) for call in calls)

    def block(self, index, carry):
        hidden, calls = carry
        args, kwargs = calls[index]
        out = self.blocks[index](hidden, *args, **kwargs)
        return (out[0] if self._tuples else out), calls

    def without(self, index, carry):
        return carry

    def end(self, carry):
        hidden, _ = carry
        # What the decoder does behind its blocks asks nothing of what went into them.
        width = self.module.get_input_embeddings().weight.shape[1]
        with self._standing_in([], hidden):
            nothing = hidden.new_zeros(*hidden.shape[:2], width)
            return self.decoder(inputs_embeds=nothing, use_cache=False).last_hidden_state

    def head(self, hidden):
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        with forward_replaced(self.decoder, lambda *args, **kwargs: self._returned(last_hidden_state=flat)):
            ids = torch.zeros(1, flat.shape[1], dtype=torch.long, device=flat.device)
            logits = self.module(input_ids=ids, use_cache=False).logits
        return logits.view(*hidden.shape[:-1], -1)

    def block_parameters(self, index):
        return list(self.blocks[index].parameters())

    @property
    def label(self):
        return self.name

    @contextlib.contextmanager
    def capture(self, patterns, to=None) -> Iterator[Captured]:
        wanted = wanted_points(patterns, point_names(self.n_layer))
        captured = Captured(self.n_layer, self.residual)
        take = to or captured._take
        handles: list[RemovableHandle] = []
        shape: list[int] = []

        def show(name: str, value: Tensor | None) -> None:
            # Where a stand-in has the block's place, nothing passes.
            if not self._stepping and value is not None and name in wanted:
                take(name, value.detach())

        def give(name: str, value: Tensor | tuple) -> None:
            while isinstance(value, tuple):  # the state of a connection goes with it
                value = value[0]
            # OPT computes with [B * T, D] inside of its blocks.
            show(name, value.reshape(shape))

        def reads(module, name, made=lambda x: x):
            if name in wanted:
                hook = module.register_forward_pre_hook(
                    lambda m, args, kwargs: give(name, made(first_tensor(args, kwargs))), with_kwargs=True
                )
                handles.append(hook)

        def writes(module, name):
            if name in wanted:
                handles.append(
                    module.register_forward_hook(lambda m, args, out: give(name, first_returned(out)))
                )

        def note(module, args, kwargs):
            shape[:] = first_tensor(args, kwargs).shape

        try:
            handles.append(self.blocks[0].register_forward_pre_hook(note, with_kwargs=True))
            reads(self.blocks[0], "hook_embed")
            for i, (block, parts) in enumerate(zip(self.blocks, self._parts, strict=True)):
                prefix = f"blocks.{i}.hook_"
                reads(block, prefix + "resid_pre", self._read_of_embedding if i == 0 else lambda x: x)
                writes(parts.attention, prefix + "attn_out")
                if parts.middle is not None:
                    reads(parts.middle, prefix + "resid_mid")
                writes(parts.mlp, prefix + "mlp_out")
                writes(block, prefix + "resid_post")
                handles += self._watch(i, wanted, show)
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _read_of_embedding(self, x: Tensor) -> Tensor:
        """What block 0 reads of what enters it."""
        return x

    def _watch(self, index: int, wanted: set[str], take) -> list:
        """Hooks for more points of block ``index``."""
        return []

    @contextlib.contextmanager
    def _standing_in(self, calls: list, result: Tensor | None = None):
        """Inside, no block runs: each call is added to ``calls``, and is answered with ``result``, or what came in."""

        def forward(*args, **kwargs):
            calls.append((args, kwargs))
            out = first_tensor(args, kwargs) if result is None else result
            return (out,) if self._tuples else out

        self._stepping = True
        try:
            with contextlib.ExitStack() as stack:
                for block in self.blocks:
                    stack.enter_context(forward_replaced(block, forward))
                yield
        finally:
            self._stepping = False

    # What the model is made of

    def _inspect(self) -> None:
        """Run a few tokens, see what the blocks are made of, and check that stepping through them is the same."""
        vocabulary = self.module.get_input_embeddings().weight.shape[0]
        tokens = min(PROBE, self.max_length)
        ids = torch.arange(2 * tokens, device=self.device).view(2, tokens) * 7919 % vocabulary
        ids[1, :-1] = ids[0, :-1]
        with contextlib.ExitStack() as stack:
            traces = [stack.enter_context(trace_calls(block)) for block in self.blocks]
            returned = self.decoder(input_ids=ids, use_cache=False)
        self._returned, hidden = type(returned), returned.last_hidden_state
        for i, trace in enumerate(traces):
            if "" not in trace:
                raise self._refusal(i, "does not run")
        # The last one: a connection's state goes between blocks as a tuple.
        self._tuples = isinstance(traces[-1][""][1], tuple)
        self._parts = [self._find_parts(i, trace) for i, trace in enumerate(traces)]
        if any(parts.middle is None for parts in self._parts):
            self.detail += ", attention and MLP in parallel"

        if not same_but_for_rounding(hidden[0, :-1], hidden[1, :-1]):
            raise UserError(
                f"{self.name} ({type(self.module).__name__}) is no causal language model: what it makes of a token "
                f"depends on the tokens behind it"
            )
        logits = self.module(input_ids=ids, use_cache=False).logits
        if not same_but_for_rounding(self.head(super().hidden(ids)), logits):
            raise UserError(
                f"{self.name} cannot be diagnosed: run block by block, {type(self.module).__name__} gives other "
                f"logits than as a whole, so its blocks hand on more than the residual stream"
            )

    def _find_parts(self, index: int, trace: Trace) -> Parts:
        block = self.blocks[index]
        attention, mlp, middle = find_parts(trace, lambda why: self._refusal(index, why))
        return Parts(
            block.get_submodule(attention),
            block.get_submodule(mlp),
            None if middle is None else block.get_submodule(middle),
        )

    def _refusal(self, index: int, why: str) -> UserError:
        return UserError(
            f"{self.name} cannot be diagnosed: block {index} ({type(self.blocks[index]).__name__}) {why}"
        )
