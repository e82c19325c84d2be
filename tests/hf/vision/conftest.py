"""What transformers and timm import of torchvision, where there is only torch's CPU build."""

import importlib.util

import torch

if importlib.util.find_spec("torchvision") is not None and not hasattr(torch.ops.torchvision, "nms"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # Its wheel is made for CUDA, and its operators do not load. None of them is used here: that their names exist
        # is enough for the import. The library is kept, as it takes the names away with it.
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
