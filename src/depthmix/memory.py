"""How much a forward pass keeps for the backward pass, counted exactly."""

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, ids: Tensor, targets: Tensor) -> int:
    """Bytes of activations that ``model(ids, targets)`` keeps for its backward pass.

    Every tensor that autograd saves is counted once per storage, whoever saves it; parameters and
    buffers, which exist anyway, are not. Divide by ``ids.numel()`` for bytes per token. Works on any
    device, the meta device included (nothing is computed there).
    """
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            # Holding the storage keeps its address from being used again while we count.
            storages[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, loss = model(ids, targets)
    del loss
    return sum(storage.nbytes() for storage in storages.values())
