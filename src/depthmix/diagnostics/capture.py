"""Activations by name: what passes through a model's depth, shown while it runs, by forward hooks.

Names of points, for block N from 0 (those of TransformerLens where it has them), and what they hold:

``hook_embed``                 ``[B, T, D]``: the embedding
``blocks.N.hook_resid_pre``    ``[B, T, D]``: what the block's attention reads, before its norm
``blocks.N.hook_attn_out``     ``[B, T, D]``: what attention returns, before it is joined
``blocks.N.hook_resid_mid``    ``[B, T, D]``: what the MLP reads, before its norm
``blocks.N.hook_mlp_out``      ``[B, T, D]``: what the MLP returns, before it is joined
``blocks.N.hook_resid_post``   ``[B, T, D]``: what the next block reads, or the trunk's output
``blocks.N.hook_streams_mid``  ``[B, T, n, D]``: the parallel streams behind attention
``blocks.N.hook_streams``      ``[B, T, n, D]``: the parallel streams behind the block
``blocks.N.hook_gate_mid``     ``[B, T, n]``: attention's output as each stream admits it; per channel ``[B, T, D]``
``blocks.N.hook_gate``         ``[B, T, n]``: the same for the MLP's output
``blocks.N.hook_pool_mid``     ``[B, T, k]``: weights of the k streams or sources in what the MLP reads
``blocks.N.hook_pool``         ``[B, T, k]``: weights in what the next block reads

A connection shows what it has: PreNorm has no streams, gates or pools, Attention Residuals pool sources and have no
streams, streams that are appended one by one grow in number. Gates and pool weights are computed anew, by the
connection's own equations, for those who ask; nothing is computed, and no hook exists, outside of a capture.

Hooks are on modules, so a block that was compiled runs as it is written while it is watched; and a norm that would be
computed together with the sum before it is computed apart, so that what it reads can be seen.
"""

import contextlib
import fnmatch
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UserError, suggest
from ..model import GPT, Block
from ..residuals import Site

BLOCK_POINTS = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
    "hook_streams_mid",
    "hook_streams",
    "hook_gate_mid",
    "hook_gate",
    "hook_pool_mid",
    "hook_pool",
)
"""Of every block."""


def point_names(n_layer: int) -> list[str]:
    """All names of a model of ``n_layer`` blocks, in the order in which they are reached."""
    return ["hook_embed", *(f"blocks.{i}.{point}" for i in range(n_layer) for point in BLOCK_POINTS)]


def wanted_points(patterns: str | Sequence[str], names: Sequence[str]) -> set[str]:
    """The ``names`` that match one of ``patterns`` (``*``, ``?`` and ``[...]`` as in a shell).

    Raises:
        ValueError: a pattern matches none of them, or there is no pattern.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise UserError('capture needs the names of points, such as "blocks.*.hook_gate"')
    found: set[str] = set()
    for pattern in patterns:
        matched = set(fnmatch.filter(names, pattern))
        if not matched:
            raise UserError(suggest(pattern, names, "point"))
        found |= matched
    return found


class Captured(Mapping[str, Tensor]):
    """What was captured, by name, in the order of depth: of the newest run, unless runs are kept."""

    def __init__(self, n_layer: int, residual: str):
        self._order = {name: i for i, name in enumerate(point_names(n_layer))}
        self._residual = residual
        self._values: dict[str, Tensor] = {}

    def _take(self, name: str, value: Tensor) -> None:
        self._values[name] = value

    def __getitem__(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name]
        if name not in self._order:
            raise KeyError(suggest(name, [*self._order], "point"))
        raise KeyError(
            f"nothing was captured at {name}: either it was not asked for, or the model has not run, or "
            f"{self._residual} has nothing there"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._values, key=self._order.__getitem__))

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        """Forget what was captured so far."""
        self._values.clear()


@contextlib.contextmanager
def capture(
    model: GPT,
    patterns: str | Sequence[str],
    to: Callable[[str, Tensor], None] | None = None,
    *,
    detach: bool = True,
) -> Iterator[Captured]:
    """Show what passes the points of ``patterns`` whenever ``model`` runs inside the ``with`` block.

    ::

        with depthmix.capture(model, ["blocks.*.hook_gate"]) as c:
            model(ids)
        c["blocks.3.hook_gate"]  # [B, T, n]

    Args:
        model: a :class:`~depthmix.GPT` with any connection; not through a ``torch.compile`` of the whole of it.
        patterns: names, with ``*`` for any part (see this module), or one of them.
        to: called with the name and value of every point as it is reached; then nothing is kept, and a pass over
            any amount of text needs the memory of one batch.
        detach: values without their gradients; ``False`` leaves them in the graph.

    Yields:
        :class:`Captured`, a mapping from names to the values of the newest run. What the connection does not have is
        not in it.

    Raises:
        ValueError: ``model`` is no such model, or a pattern matches no name.
    """
    if not isinstance(model, GPT):
        raise UserError(
            f"capture takes a depthmix.GPT, got {type(model).__name__}"
            + (
                "; give it the model that was compiled, as model._orig_mod"
                if hasattr(model, "_orig_mod")
                else ""
            )
        )
    wanted = wanted_points(patterns, point_names(len(model.blocks)))
    captured = Captured(len(model.blocks), model.config.residual)
    take = to or captured._take

    def give(name: str, value: Tensor | None) -> None:
        if value is not None and name in wanted:
            take(name, value.detach() if detach else value)

    handles = []
    try:
        if "hook_embed" in wanted:
            handles.append(model.embed.register_forward_hook(lambda m, args, x: give("hook_embed", x)))
        for i, block in enumerate(model.blocks):
            following = model.blocks[i + 1].attn.norm if i + 1 < len(model.blocks) else model.norm
            handles += _watch_block(f"blocks.{i}.", block, following, wanted, give)
        with uncompiled():
            yield captured
    finally:
        for handle in handles:
            handle.remove()


def _watch_block(
    prefix: str,
    block: Block,
    following: nn.Module,
    wanted: set[str],
    give: Callable[[str, Tensor | None], None],
) -> list[RemovableHandle]:
    handles: list[RemovableHandle] = []

    def reads(norm: nn.Module, name: str) -> None:
        if prefix + name in wanted:
            # A norm with a hook is not computed together with what is before it.
            handles.append(norm.register_forward_pre_hook(lambda m, args: give(prefix + name, args[0])))

    def writes(module: nn.Module, name: str) -> None:
        if prefix + name in wanted:
            # An attention that reads a depth memory returns it beside its output.
            handles.append(
                module.register_forward_hook(
                    lambda m, args, y: give(prefix + name, y[0] if isinstance(y, tuple) else y)
                )
            )

    reads(block.attn.norm, "hook_resid_pre")
    writes(block.attn, "hook_attn_out")
    handles += watch_site(block.attn_site, prefix, "_mid", wanted, give)
    reads(block.mlp.norm, "hook_resid_mid")
    writes(block.mlp, "hook_mlp_out")
    handles += watch_site(block.mlp_site, prefix, "", wanted, give)
    reads(following, "hook_resid_post")
    return handles


def watch_site(
    site: Site, prefix: str, suffix: str, wanted: set[str], give: Callable[[str, Any], None]
) -> list[Any]:
    """Hooks for the points of one site: ``suffix`` is ``"_mid"`` behind attention. They are the caller's to remove."""
    handles = []
    streams = f"{prefix}hook_streams{suffix}"
    kinds = {kind: f"{prefix}hook_{kind}{suffix}" for kind in ("gate", "pool")}
    if streams in wanted:

        def shown(module: Any, args: Any, result: Any) -> None:
            parallel = site.streams(result[1])
            give(streams, None if parallel is None else torch.stack(tuple(parallel), -2))

        handles.append(site.register_forward_hook(shown))
    if any(name in wanted and kind in site.gate_names for kind, name in kinds.items()):

        def gates(module: Any, args: Any) -> None:
            for kind, value in zip(site.gate_names, site.gates(*args[:2]), strict=False):
                if kind is not None:
                    give(kinds[kind], value)

        handles.append(site.register_forward_pre_hook(gates))
    return handles


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, what was compiled runs as it is written: hooks are not looked for in compiled code."""
    # What has never been imported has compiled nothing, and importing it takes seconds.
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
