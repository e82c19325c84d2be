"""depthmix: how a deep network carries information from layer to layer.

Multi-Gate Residuals and the connections they are compared with, behind one interface
(:mod:`depthmix.residuals`), with a GPT (:mod:`depthmix.model`) and a trainer.
"""

from . import functional
from .config import GPTConfig
from .model import GPT, KVCache
from .residuals import MultiGateResidual, available_residuals, gate_bias_init

__version__ = "0.1.0.dev0"

__all__ = [
    "GPT",
    "GPTConfig",
    "KVCache",
    "MultiGateResidual",
    "available_residuals",
    "functional",
    "gate_bias_init",
]
