"""Which implementation of an operation runs: Triton on a GPU, C++ on a CPU, torch operations anywhere.

``DEPTHMIX_KERNELS`` forces one: ``torch``, ``native`` or ``triton`` (the last also on CPU tensors, under
``TRITON_INTERPRET=1``). Its default, ``auto``, takes what the tensor's device has. An implementation that does not take
an argument (a dtype, say) leaves it to torch operations.
"""

import os

from torch import Tensor

from ..errors import UserError, suggest
from . import native

CHOICES = ("auto", "torch", "native", "triton")


def choose(x: Tensor) -> str:
    """``"torch"``, ``"native"`` or ``"triton"`` for operations on ``x`` and what lies beside it.

    Raises:
        ValueError: ``DEPTHMIX_KERNELS`` is none of the choices, or forces kernels that cannot run here.
    """
    wanted = os.environ.get("DEPTHMIX_KERNELS") or "auto"
    if wanted not in CHOICES:
        raise UserError(suggest(wanted, CHOICES, "DEPTHMIX_KERNELS"))
    if wanted == "torch":
        return wanted
    if wanted == "triton" or (wanted == "auto" and x.is_cuda):
        from . import triton

        if triton.available():
            return "triton"
        if wanted == "triton":
            raise UserError(
                "DEPTHMIX_KERNELS=triton: Triton kernels need the package triton and a CUDA device, or "
                "TRITON_INTERPRET=1; unset DEPTHMIX_KERNELS"
            )
        return "torch"
    if x.is_cpu and native.available():
        return "native"
    if wanted == "native":
        raise UserError(
            f"DEPTHMIX_KERNELS=native: compiled kernels are for CPU tensors and here {native.status()}; "
            f"unset DEPTHMIX_KERNELS"
        )
    return "torch"
