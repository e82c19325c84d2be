"""A model that :func:`depthmix.adapt` made, as diagnostics see it: points, gates and streams of its connection too.

Points are those of :mod:`depthmix.diagnostics.huggingface`, and in addition ``hook_streams``, ``hook_gate``,
``hook_pool`` (and ``..._mid`` behind attention) of :mod:`depthmix.diagnostics.capture`. What attention and MLP return
is shown as they return it; what is read, with the factor that ``start="prenorm-scaled"`` gave it.
"""

from typing import Any

import torch

from ..adapters.blocks import SITES, MixedBlock
from ..residuals.registry import format_spec, parse_spec
from ..trunk import Trunk
from ..wrapping import scaled
from .capture import watch_site
from .huggingface import HuggingFaceSubject, Parts


class AdaptedSubject(HuggingFaceSubject):
    """As its base; ``model`` is one of :func:`depthmix.adapt`."""

    def __init__(self, model, tokenizer=None, *, name: str):
        how = model.config.depthmix
        residual, values = parse_spec(how["residual"])
        self.residual = format_spec(residual, values | how["options"])
        super().__init__(model, tokenizer, name=name)
        self.detail = f"{self.detail}, {self.residual}"
        self.n_streams = self._count_streams()

    @staticmethod
    def fits(model) -> bool:
        return any(isinstance(module, MixedBlock) for module in model.modules())

    def sites(self, index: int) -> list:
        """Of block ``index``: behind attention and MLP, or one where these are in parallel."""
        block = self.blocks[index]
        return [getattr(block, name) for name in SITES[:3] if name in block._modules]

    @property
    def connection(self):
        return self.blocks[0].connection

    @torch.no_grad()
    def _count_streams(self) -> int:
        with self.capture(f"blocks.{self.n_layer - 1}.hook_streams") as captured:
            self.hidden(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        return next((value.shape[-2] for value in captured.values()), 0)

    def trunk(self) -> Trunk:
        """For :func:`depthmix.mixing_map`."""
        model: Any = self.module
        blocks: Any = self.blocks
        sites = [site for index in range(self.n_layer) for site in self.sites(index)]
        kinds = ["attn", "mlp"] if len(sites) == 2 * self.n_layer else ["block"]
        return Trunk(
            residual=parse_spec(self.residual)[0],
            connection=self.connection,
            sites=sites,
            labels=tuple(f"{kind} {block}" for block in range(1, self.n_layer + 1) for kind in kinds),
            d_model=self.d_model,
            dtype=next(blocks.parameters()).dtype,
            device=self.device,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            run=self.hidden,
            watch=self._watch_reads,
            write=blocks[0].factors[0],
            reads=tuple(factor for block in blocks for factor in block.factors[1:]),
        )

    def _watch_reads(self, embedded, read) -> list:
        shape: list[int] = []
        handles: list[Any] = []

        def entered(module, args, kwargs):
            shape[:] = args[0].shape
            embedded(args[0])

        handles.append(self.blocks[0].register_forward_pre_hook(entered, with_kwargs=True))
        if read is None:
            return handles

        def reads(module, args, kwargs):
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
            x = self._read_of_embedding(x) if module is self.blocks[0] else x
            read((x[0] if isinstance(x, tuple) else x).view(shape))

        for block, parts in zip(self.blocks, self._parts, strict=True):
            for module in filter(None, (block, parts.middle)):
                handles.append(module.register_forward_pre_hook(reads, with_kwargs=True))
        last = self.blocks[-1]
        handles.append(
            last.register_forward_hook(
                lambda module, args, out: read(out[0] if isinstance(out, tuple) else out)
            )
        )
        return handles

    def without(self, index, carry):
        hidden, calls = carry
        first = 1 + sum(len(self.sites(i)) for i in range(index))
        state = tuple(hidden[1:]) if isinstance(hidden, tuple) else self.connection.begin(hidden)[1]
        sites, block = self.sites(index), self.blocks[index]
        state = self.connection.without(state, sites, first)
        if state is None:
            return None
        h = scaled(sites[-1].read(state), block.factors[-1])
        return (self.connection.finish(h, state) if block.last else (h, *state)), calls

    def kept_because(self, index):
        return self._appends_streams(index)

    def convex_gates(self, sublayer):
        site = self._site(sublayer)
        return site is not None and site.convex

    def gate_range(self, sublayer):
        site = self._site(sublayer)
        return super().gate_range(sublayer) if site is None else site.gate_range

    def _site(self, sublayer: int):
        """Behind attention (even) or MLP (odd); where they are in parallel, behind both, which is odd."""
        sites = self.sites(sublayer // 2)
        return sites[-1] if sublayer % 2 else sites[0] if len(sites) == 2 else None

    def _read_of_embedding(self, x):
        return self.connection.begin(x)[0]

    def _watch(self, index, wanted, take):
        handles = []
        for site, suffix in zip(reversed(self.sites(index)), ("", "_mid"), strict=False):
            handles += watch_site(site, f"blocks.{index}.", suffix, wanted, take)
        return handles

    def _find_parts(self, index, trace):
        block = self.blocks[index]
        return Parts(*(None if name is None else getattr(block, name) for name in block.parts))
