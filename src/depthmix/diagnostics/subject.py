"""What diagnostics need of a model: its points, its blocks one by one, its head. They ask for nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import GPT
from ..ops.reference import compute_dtype
from .capture import Captured, capture

Carry = Any
"""Whatever a model hands from block to block."""


class Subject(ABC):
    """A model in evaluation mode with what is known of it."""

    name: str
    """Shown in figures; of the run, of the folder."""
    residual: str
    """The connection and those of its options that are its own: ``attnres-block:blocks=4``."""
    detail: str
    """One line: loss and step, or where it comes from."""
    n_layer: int
    d_model: int
    n_streams: int
    """Parallel streams at the end of the trunk; 0 where there are none."""
    max_length: int
    """Tokens, at most, of one sequence."""
    module: nn.Module

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def label(self) -> str:
        """What it is called in a figure, where no other has the same."""
        return self.residual

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.module.parameters())

    def describe(self) -> dict:
        """The ``subject`` of a :class:`~depthmix.diagnostics.arrays.Diagnosis`."""
        names = "name", "label", "residual", "detail", "n_layer", "d_model", "n_streams", "parameters"
        return {name: getattr(self, name) for name in names}

    @abstractmethod
    def capture(
        self, patterns: str | Sequence[str], to: Callable[[str, Tensor], None] | None = None
    ) -> AbstractContextManager[Captured]:
        """As :func:`depthmix.capture`, under the same names."""

    @abstractmethod
    def begin(self, ids: Tensor) -> Carry:
        """``ids [B, T]`` -> what enters block 0."""

    @abstractmethod
    def block(self, index: int, carry: Carry) -> Carry:
        """Run one block."""

    @abstractmethod
    def without(self, index: int, carry: Carry) -> Carry | None:
        """What enters the next block when this one writes nothing; ``None`` where there is no such thing."""

    def kept_because(self, index: int) -> str | None:
        """Why block ``index`` cannot be removed; ``None`` where it can."""
        return None

    def _appends_streams(self, index: int) -> str | None:
        """:meth:`kept_because` of subjects whose :meth:`without` answers ``None``."""
        with torch.no_grad():
            carry = self.begin(torch.zeros(1, 1, dtype=torch.long, device=self.device))
            for i in range(index):
                carry = self.block(i, carry)
            if self.without(index, carry) is None:
                return "it appends streams that later blocks read"
        return None

    @abstractmethod
    def end(self, carry: Carry) -> Tensor:
        """What left the last block -> the head's input ``[B, T, D]``."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """``[..., D] -> [..., V]`` logits."""

    def hidden(self, ids: Tensor) -> Tensor:
        """The head's input for ``ids [B, T]``, ``[B, T, D]``."""
        carry = self.begin(ids)
        for index in range(self.n_layer):
            carry = self.block(index, carry)
        return self.end(carry)

    def losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Cross entropy in nats of ``ids[:, 1:]``, ``[B, T - 1]``, fp32 (fp64 for fp64), given the head's input."""
        logits = self.head(hidden[:, :-1])
        logits = logits.to(compute_dtype(logits.dtype)).flatten(0, 1)
        return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)

    @abstractmethod
    def block_parameters(self, index: int) -> list[nn.Parameter]:
        """Of block ``index``, with its connection's."""

    def decode(self, ids: Sequence[int]) -> str | None:
        """Text of ``ids``; ``None`` without a tokenizer."""
        return None

    def convex_gates(self, sublayer: int) -> bool:
        """Whether the gate of sublayer ``sublayer`` (from 0) is that of ``(1 - gate) old + gate new``."""
        return False

    def gated_streams(self, sublayer: int) -> tuple[int, ...] | None:
        """Which streams the gate of this sublayer writes; ``None``: all."""
        return None

    def gate_range(self, sublayer: int) -> tuple[float, float]:
        """Where the gate of this sublayer lies."""
        return 0.0, 1.0


class Run(Subject):
    """A model of depthmix."""

    module: GPT

    def __init__(self, model: GPT, *, name: str, detail: str = "", tokenizer=None):
        from ..runs import spec

        self.module, self.name, self.detail, self.tokenizer = model, name, detail, tokenizer
        self.residual = spec(model.config)
        self.n_layer, self.d_model = model.config.n_layer, model.config.d_model
        self.max_length = model.config.seq_len
        self.n_streams = self._count_streams()

    @torch.no_grad()
    def _count_streams(self) -> int:
        found: dict[str, int] = {}
        last = f"blocks.{self.n_layer - 1}.hook_streams"
        with capture(self.module, last, lambda name, value: found.update(n=value.shape[-2])):
            self.module.hidden(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        return found.get("n", 0)

    @property
    def sites(self) -> list:
        """Of all sublayers."""
        return [site for block in self.module.blocks for site in (block.attn_site, block.mlp_site)]

    def capture(self, patterns, to=None):
        return capture(self.module, patterns, to)

    def hidden(self, ids):
        return self.module.hidden(ids)

    def begin(self, ids):
        model = self.module
        h, state = model.residual.begin(model.embed(ids))
        cos, sin = model.rotary(ids)
        return h, model.residual.foresee(state, self.sites), cos, sin

    def block(self, index, carry):
        h, state, cos, sin = carry
        return *self.module.blocks[index](h, state, cos, sin), cos, sin

    def without(self, index, carry):
        _, state, cos, sin = carry
        sites = self.sites[2 * index : 2 * index + 2]
        state = self.module.residual.without(state, sites, 2 * index + 1)
        return None if state is None else (sites[-1].read(state), state, cos, sin)

    def kept_because(self, index):
        return self._appends_streams(index)

    def end(self, carry):
        h, state, *_ = carry
        return self.module.norm(self.module.residual.finish(h, state))

    def head(self, hidden):
        return F.linear(hidden, self.module.embed.weight)

    def block_parameters(self, index):
        return list(self.module.blocks[index].parameters())

    def decode(self, ids):
        return None if self.tokenizer is None else self.tokenizer.decode(list(ids))

    def convex_gates(self, sublayer):
        return self.sites[sublayer].convex

    def gated_streams(self, sublayer):
        return self.sites[sublayer].gated_streams

    def gate_range(self, sublayer):
        return self.sites[sublayer].gate_range
