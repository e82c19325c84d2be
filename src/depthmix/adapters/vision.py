"""Vision transformers of timm with another residual connection; any module with a list ``blocks`` of pre-norm blocks.

The model's own code runs around its blocks and inside of them (:mod:`depthmix.adapters.blocks`): patches, positions,
class token, dropped paths, layer scales, head. ``state_dict`` keeps every name and has the connection's in addition.
"""

import torch
from torch import Tensor, nn

from ..errors import UserError
from .blocks import adapt_blocks


def adapt_vision_model(
    model: nn.Module,
    residual: str = "mgr-competitive",
    *,
    n_streams: int = 4,
    start: str = "own",
    example: Tensor | None = None,
    **options,
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

    how = {"n_streams": n_streams, "start": start, "options": options}
    adapt_blocks(model, list(blocks), run, width, residual, **how)
    return model


def _images(model: nn.Module, name: str) -> Tensor:
    patches = getattr(model, "patch_embed", None)
    size, project = getattr(patches, "img_size", None), getattr(patches, "proj", None)
    if size is None or not isinstance(project, nn.Conv2d):
        raise UserError(f"{name} does not say what images it takes; give adapt(..., example=images)")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, project.in_channels, *size, generator=generator)
    return images.to(project.weight.device, project.weight.dtype)
