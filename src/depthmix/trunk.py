"""What a mixing map (:mod:`depthmix.mixing`) asks of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .residuals.base import Residual, Site


@dataclass
class Trunk:
    """A model's connection and sites, and how to run the model and see what its sublayers read."""

    residual: str
    """Name of the connection."""
    connection: Residual
    sites: list[Site]
    labels: tuple[str, ...]
    """Of the sublayers."""
    d_model: int
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    run: Callable[[Tensor], object]
    """The trunk on ids ``[B, T]``."""
    watch: Callable[[Callable[[Tensor], None], Callable[[Tensor], None] | None], list[Any]]
    """``watch(embedded, read)``: hooks that give the embedding to the first, and to the second what sublayers 1 .. L
    and the final norm read, each ``[B, T, D]``."""
    write: float = 1.0
    """Constant by which outputs are multiplied before they are written."""
    reads: tuple[float, ...] | None = None
    """Constants by which what is read behind sublayers 1 .. L is multiplied."""

    @property
    def gate_width(self) -> int:
        """W: one coefficient a token will do unless a gate has one per channel."""
        return self.d_model if any(site.per_channel for site in self.sites) else 1
