"""Residual connections, one file per family; importing this package registers them all."""

from . import (  # noqa: F401, I001 (the order of registration is the order users see)
    prenorm, mgr, attnres, hyper, mhc, highway, review, denseformer, siamese, moda,
)  # fmt: skip
from .base import Residual, Site
from .mgr import MultiGateResidual, gate_bias_init
from .plugins import load as _load_plugins
from .registry import (
    available_residuals,
    build_residual,
    register,
    residual_options,
    residual_summaries,
)

__all__ = [
    "MultiGateResidual",
    "Residual",
    "Site",
    "available_residuals",
    "build_residual",
    "gate_bias_init",
    "register",
    "residual_options",
    "residual_summaries",
]

_load_plugins()
