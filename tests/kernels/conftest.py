"""Triton kernels: on the GPU if there is one, otherwise in Triton's interpreter. The tests are the same."""

import os
import sys

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a function is decorated, its own library's included.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1"
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(x, source, target, mode):
        """A GPU rounds to the nearest bfloat16, ties to even; the interpreter cuts off."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        bits = torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16).reshape(x.shape)

    interpreter._convert_float = rounding


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
