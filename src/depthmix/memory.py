"""How much a forward pass keeps for the backward pass, counted exactly, and how well inversion brings back the rest."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import UserError
from .ops import inversion

if TYPE_CHECKING:
    from .model import GPT


def saved_bytes(model: nn.Module, ids: Tensor, targets: Tensor) -> int:
    """Bytes of activations that ``model(ids, targets)`` keeps for its backward pass.

    Every tensor that autograd saves is counted once per storage, whoever saves it; parameters and
    buffers, which exist anyway, are not. Divide by ``ids.numel()`` for bytes per token. Works on any
    device, the meta device included (nothing is computed there).
    """
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            # Holding the storage keeps its address from being used again while we count.
            storages[storage._cdata] = storage

    # Nothing is unpacked. What a hook returns for an output of the node that saves it must not be that output: the two
    # would hold each other for ever.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        _, loss = model(ids, targets)
    del loss
    return sum(storage.nbytes() for storage in storages.values())


@torch.no_grad()
def reconstruction_error(model: "GPT", ids: Tensor) -> list[dict]:
    """How far the streams that ``stream_memory="inversion"`` would reconstruct are from those there were.

    Args:
        model: a :class:`~depthmix.GPT` with a connection of the mgr names, with any ``stream_memory``; what inversion
            keeps is as its configuration says (``inversion``, ``inversion_top_p``, ``inversion_tolerance``).
        ids: ``[B, T]`` whole numbers. All streams of this batch are held at once.

    Returns:
        A dict for every lerping sublayer, from the first: ``sublayer`` (1 .. L), ``measured``: the largest
        ``|found - true| / |true|`` over the rows (tokens and streams) that enter it, ``predicted``: the bound on the
        error of all rows below a row entering it that inversion had let grow so far, ``anchor``: whether all rows were
        kept, ``kept``: share of rows kept, ``amplification``: largest ``prod 1 / (1 - beta)`` of a row from the first
        lerp to this one.

    Raises:
        ValueError: the model has no lerping sublayer.
    """
    from .residuals.mgr import LerpSite, MultiGateResiduals

    steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def record(site, args, result):
        layer_output, (streams,) = args
        n, width = streams.shape[-2:]
        flat = layer_output.reshape(-1, width), streams.reshape(-1, n, width)
        steps.append((*flat, result[1][0].reshape(-1, n, width), site.gate_values(*flat)))

    sites = [site for block in model.blocks for site in (block.attn_site, block.mlp_site)]
    lerps = [(i, site) for i, site in enumerate(sites, start=1) if isinstance(site, LerpSite)]
    if not lerps:
        raise UserError(
            f"residual {model.config.label!r} has no lerping sublayers to invert; use one of the mgr names, without "
            f"separate_streams"
        )
    handles = [site.register_forward_hook(record) for _, site in lerps]
    try:
        model.hidden(ids)
    finally:
        for handle in handles:
            handle.remove()

    assert isinstance(model.residual, MultiGateResiduals)  # whose sites these are
    fallback, rows = model.residual.fallback, steps[0][3].numel()
    budget, kept, report = inversion.first_budget(steps[0][1]), [], []
    amplification = torch.ones_like(steps[0][3])
    for step, ((sublayer, _), (_, streams, new_streams, beta)) in enumerate(zip(lerps, steps, strict=True)):
        anchored = step in (0, len(steps) - 1)
        found, budget = inversion.choose(streams, new_streams, beta, budget, fallback, anchored)
        kept.append(found)
        amplification /= 1 - beta
        report.append(
            {
                "sublayer": sublayer,
                "predicted": budget[2].max().item(),
                "anchor": found.anchor is not None,
                "kept": 1.0 if found.anchor is not None else found.index.numel() / rows,
                "amplification": amplification.max().item(),
            }
        )
    current = steps[-1][2]
    for i in reversed(range(len(steps))):
        layer_output, streams, _, beta = steps[i]
        current = inversion.undo(current, layer_output, beta, kept[i])
        error = torch.linalg.vector_norm(current - streams, dim=-1) / inversion.row_norms(streams)
        report[i]["measured"] = error.max().item()
    return report
