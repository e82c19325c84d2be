"""Triton kernels: on the GPU if there is one, otherwise in Triton's interpreter. The tests are the same."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a function is decorated, its own library's included.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1"
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
