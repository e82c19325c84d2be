"""The picture of ``depthmix comm``: what crosses a pipeline's cuts, against depth and against stages, by formula."""

import io
import warnings

from ..config import GPTConfig
from ..parallel.plan import ParallelPlan
from ..parallel.volume import boundary_numbers
from .plots import INK, PALETTE, _figure, _settings

WIDTH, HEADS, TOKENS, ROWS = 1024, 8, 1024, 32
DEPTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
STAGES = (2, 4, 8, 16, 32)
STEP_DEPTH = 128
"""Sublayers of the models of the second panel."""

LINES = (
    # label, residual, n, colour, line, marker
    ("PreNorm", "prenorm", 4, INK, "-", "o"),
    ("MGR, HC, mHC, n = 4", "mgr-competitive", 4, PALETTE[0], "-", "o"),
    ("MGR, HC, mHC, n = 8", "mgr-competitive", 8, PALETTE[0], "--", "o"),
    ("AttnRes, 8 blocks", "attnres-block:blocks=8", 4, PALETTE[4], "--", "s"),
    ("AttnRes, blocks of 8 sublayers", "attnres-block:block_size=8", 4, PALETTE[4], "-", "s"),
    ("AttnRes, full", "attnres", 4, PALETTE[1], "-", "s"),
    ("DenseFormer", "denseformer", 4, PALETTE[2], "-", "^"),
    ("MoDA", "moda", 4, PALETTE[3], "-", "v"),
)
CACHED = ("attnres", "attnres-block:block_size=8", "attnres-block:blocks=8", "denseformer", "moda")


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
        ParallelPlan(pp=stages // 2, stages=stages, schedule="interleaved")
        if interleaved
        else ParallelPlan(pp=stages)
    )
    model = _model(residual, n, STEP_DEPTH)
    return sum(2 * boundary_numbers(model, plan, cut, cache) for cut in range(stages - 1)) / WIDTH


def png() -> bytes:
    """Two panels: one cut against depth, a step's cuts against the number of stages."""
    import matplotlib

    with matplotlib.rc_context(_settings(INK, 9)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models that never leave the ramp
        figure, axes = _figure(11, 4.9, 2, INK, transparent=False)
        _against_depth(axes[0])
        _against_stages(axes[1])
        handles = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
        figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _against_depth(ax) -> None:
    for label, residual, n, colour, line, marker in LINES:
        values = [at_depth(residual, n, depth) for depth in DEPTHS]
        ax.plot(
            DEPTHS,
            values,
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=4,
            linewidth=1.5,
            label=label,
        )
    ax.set_title("One boundary, behind 3/4 of the sublayers, one way")
    ax.set_xlabel("depth (sublayers)")
    ax.set_ylabel("numbers per token in units of D")
    _logarithmic(ax, (8, 16, 32, 64, 128, 192), (1, 2, 4, 8, 16, 32, 64, 128, 256))


def _against_stages(ax) -> None:
    for _, residual, n, colour, line, marker in LINES:
        values = [of_step(residual, n, stages, False, False) for stages in STAGES]
        ax.plot(STAGES, values, color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.5)
        if residual in CACHED:
            # Two stages a process: the receiver has what it was sent for its earlier stage.
            stages = [s for s in STAGES if s >= 4]
            values = [of_step(residual, n, s, True, True) for s in stages]
            ax.plot(
                stages, values, color=colour, linestyle=(0, (1, 1)), marker=marker, markersize=4, linewidth=1.2,
                markerfacecolor="white",
            )  # fmt: skip
    ax.plot([], [], color=INK, alpha=0.6, linestyle=(0, (1, 1)), marker="s", markersize=4, markerfacecolor="white",
            label="two stages a process, cached")  # fmt: skip
    ax.set_title(f"A whole step: {STEP_DEPTH} sublayers, all boundaries, both ways")
    ax.set_xlabel("pipeline stages")
    ax.set_ylabel("numbers per token in units of D")
    _logarithmic(ax, STAGES, (1, 4, 16, 64, 256, 1024, 4096, 16384))


def _logarithmic(ax, x_ticks, y_ticks) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:,.0f}")
    for axis, set_scale, ticks in ((ax.xaxis, ax.set_xscale, x_ticks), (ax.yaxis, ax.set_yscale, y_ticks)):
        set_scale("log", base=2)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(plain)
