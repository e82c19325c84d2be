"""Vision transformers of timm with another residual connection; any module with a list ``blocks`` of pre-norm blocks.

The model's own code runs around its blocks and inside of them (:mod:`depthmix.adapters.blocks`): patches, positions,
class token, dropped paths, layer scales, head. ``state_dict`` keeps every name and has the connection's in addition.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import forward_replaced
from ..errors import UserError
from ..wrapping import Start
from .blocks import adapt_blocks


def adapt_vision_model(
    model: nn.Module,
    residual: str = "mgr-competitive",
    *,
    n_streams: int = 4,
    start: Start = "own",
    example: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """:func:`depthmix.adapt` for a module with ``blocks``.

    Args:
        example: an input that the model is run on, to see what its blocks do. ``None``: two random images, as the
            model's ``patch_embed`` says.
    """
    name = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) == 0:
        raise UserError(
            f"{name} has no list of blocks named 'blocks'; join its sublayers with depthmix.wrap, or its language "
            f"model with depthmix.adapt"
        )
    width = getattr(model, "embed_dim", None) or getattr(model, "num_features", None)
    if not isinstance(width, int):
        raise UserError(f"{name} does not say its width, as embed_dim or num_features")
    if example is None:
        example = _images(model, name)

    def run():
        return model(example)

    how: dict[str, Any] = {"n_streams": n_streams, "start": start, "options": options}
    adapt_blocks(model, list(blocks), run, width, residual, **how)
    if hasattr(model, "forward_intermediates"):
        own: type = type(model)
        model.__class__ = _looked_into(own)
    return model


class LookedInto:
    """What is put in front of the class of a model that takes what its blocks return, one by one."""

    def forward_intermediates(self, *args, **kwargs):
        """As timm's own; an intermediate is what a block hands to the next, without the connection's state."""
        if getattr(self, "grad_checkpointing", False) and torch.is_grad_enabled():
            raise UserError(
                "forward_intermediates of an adapted model has no gradient checkpointing; call "
                "set_grad_checkpointing(False), or run it under torch.no_grad()"
            )
        with _handing_on_tensors(self.blocks):
            return super().forward_intermediates(*args, **kwargs)


@functools.cache
def _looked_into(model_class: type) -> type:
    return type(model_class.__name__, (LookedInto, model_class), {"__module__": __name__})


@contextlib.contextmanager
def _handing_on_tensors(blocks: Sequence[nn.Module]):
    """Inside, the blocks, run once each and in order, take and return one tensor; the state goes beside it."""
    state = ()

    def alone(block):
        def forward(x, *args, **kwargs):
            nonlocal state
            given = x if block is blocks[0] else (x, *state)
            out = type(block).forward(block, given, *args, **kwargs)
            h, *state = out if isinstance(out, tuple) else (out,)
            return h

        return forward

    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_replaced(block, alone(block)))
        yield


def _images(model: nn.Module, name: str) -> Tensor:
    patches = getattr(model, "patch_embed", None)
    size, project = getattr(patches, "img_size", None), getattr(patches, "proj", None)
    if size is None or not isinstance(project, nn.Conv2d):
        raise UserError(f"{name} does not say what images it takes; give adapt(..., example=images)")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, project.in_channels, *size, generator=generator)
    return images.to(project.weight.device, project.weight.dtype)
