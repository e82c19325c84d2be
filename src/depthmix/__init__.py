"""depthmix: how a deep network carries information from layer to layer.

Multi-Gate Residuals and the connections they are compared with, behind one interface
(:mod:`depthmix.residuals`), with a GPT (:mod:`depthmix.model`) and a trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import functional
    from .adapters import adapt
    from .config import GPTConfig
    from .diagnostics.capture import capture
    from .match import match_params
    from .mixing import MixingMap, mixing_error, mixing_map
    from .model import GPT, KVCache
    from .residuals import MultiGateResidual, available_residuals, gate_bias_init
    from .wrapping import wrap

__version__ = "0.1.0.dev0"

# Looked up on first use: preparing data and asking for help need no torch.
_HOMES = {
    "GPT": "model",
    "GPTConfig": "config",
    "KVCache": "model",
    "MixingMap": "mixing",
    "MultiGateResidual": "residuals",
    "adapt": "adapters",
    "available_residuals": "residuals",
    "capture": "diagnostics.capture",
    "gate_bias_init": "residuals",
    "match_params": "match",
    "mixing_error": "mixing",
    "mixing_map": "mixing",
    "wrap": "wrapping",
}
__all__ = [
    "GPT",
    "GPTConfig",
    "KVCache",
    "MixingMap",
    "MultiGateResidual",
    "adapt",
    "available_residuals",
    "capture",
    "functional",
    "gate_bias_init",
    "match_params",
    "mixing_error",
    "mixing_map",
    "wrap",
]


if not TYPE_CHECKING:  # a checker would take any name for one of the package

    def __getattr__(name: str):
        if name == "functional":
            return import_module(".functional", __name__)
        if name in _HOMES:
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
