"""The device a name stands for."""

import torch

from .errors import UserError, suggest


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: cuda when there is one.

    Raises ``UserError`` for another name or a device that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise UserError(suggest(name, ("auto", "cpu", "cuda", "cuda:N"), "device"))
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} does not exist here: torch finds {torch.cuda.device_count()} CUDA devices; "
            f"use --device cpu"
        )
    return torch.device(name)
