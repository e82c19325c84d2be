"""The picture of ``depthmix comm``: what crosses a pipeline's cuts, against depth and against stages, by formula."""

import io
import warnings

from ..config import GPTConfig, TrainConfig
from ..parallel.plan import ParallelPlan
from ..parallel.volume import boundary_numbers, crossing_numbers, step_volume
from .plots import INK, PALETTE, _figure, _legend, _settings

WIDTH, HEADS, TOKENS, ROWS = 1024, 8, 1024, 32
DEPTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
STAGES = (2, 4, 8, 16, 32)
STEP_DEPTH = 128
"""Sublayers of the models of the second panel."""

LINES = (
    # label, residual, n, colour, line, marker
    ("PreNorm", "prenorm", 4, INK, "-", "o"),
    ("MGR, n = 4", "mgr-competitive", 4, PALETTE[0], "-", "o"),
    ("MGR, n = 8", "mgr-competitive", 8, PALETTE[0], "--", "o"),
    ("HC, mHC, n = 4", "mhc", 4, PALETTE[5], ":", None),
    ("AttnRes, blocks of 8", "attnres-block:block_size=8", 4, PALETTE[4], "-", "s"),
    ("AttnRes, every output", "attnres", 4, PALETTE[1], "-", "s"),
    ("DenseFormer", "denseformer", 4, PALETTE[2], "-", "^"),
    ("MoDA", "moda", 4, PALETTE[3], "-", "v"),
)
CACHED = ("attnres", "attnres-block:block_size=8", "denseformer", "moda")


def _model(residual: str, n: int, sublayers: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=50304, n_layer=sublayers // 2, d_model=WIDTH, n_head=HEADS, seq_len=TOKENS, residual=residual,
        n_streams=n,
    )  # fmt: skip


def at_depth(residual: str, n: int, sublayers: int) -> float:
    """Numbers per token, in units of D, that cross the last cut of four equal stages, one way."""
    model = _model(residual, n, sublayers)
    plan = ParallelPlan(pp=4)
    return boundary_numbers(model, plan, 2, cache=False) / WIDTH


def of_step(residual: str, n: int, stages: int, interleaved: bool, cache: bool) -> float:
    """Numbers per token, in units of D, that cross all cuts both ways in one step."""
    plan = (
        ParallelPlan(pp=stages // 2, stages=stages, schedule="interleaved") if interleaved else ParallelPlan(pp=stages)
    )
    model = _model(residual, n, STEP_DEPTH)
    return sum(2 * boundary_numbers(model, plan, cut, cache) for cut in range(stages - 1)) / WIDTH
