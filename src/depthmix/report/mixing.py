"""Mixing maps as heat maps, side by side; see :mod:`depthmix.mixing` for what they hold.

Two views of each. *Coefficients* on one colour scale for all maps, so that sums (PreNorm: all ones) and
means (softmax connections) are seen for what they are; colours follow the signed square root, so that a
twentieth is still visible beside one. *Relative to the row's largest*, which shows the pattern of every
reader whatever its total.
"""

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .plots import _SVG_INK, INK, _settings, svg_element
from .records import RunRecord

RUN_FILE = "mixing-map.npz"
"""In a run folder: the map of its best checkpoint on the first validation tokens."""

COLUMNS = 4
"""Maps in one line."""
COLOURS = "RdBu"
MOST_APART = 4
"""Colours end at this many times the smallest of the maps' largest coefficients in a sublayer, lest one
map bleach the others."""


@dataclass(frozen=True)
class Panel:
    """One map to draw."""

    title: str
    detail: str
    """Second line of the title: validation loss, say."""
    matrix: np.ndarray
    """``[L+1, L+1]``; rows attn 1, mlp 1, ..., output; columns embedding, attn 1, mlp 1, ..."""


def panels_of(records: Iterable[RunRecord]) -> list[Panel]:
    """The maps that lie in the run folders, one a connection: the first run's that has one."""
    panels: dict[str, Panel] = {}
    for record in records:
        if record.residual not in panels:
            try:
                with np.load(record.path / RUN_FILE, allow_pickle=False) as file:
                    matrix = file["matrix"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            if not np.isfinite(matrix).all():
                continue
            best = (record.result or {}).get("best_val_loss")
            detail = f"seed {record.seed}" + ("" if best is None else f", validation loss {best:.3f}")
            panels[record.residual] = Panel(record.residual, detail, matrix)
    return list(panels.values())


def png(panels: list[Panel]) -> bytes:
    """All maps, both views, on white."""
    return _drawn(panels, INK, "png", dpi=150, metadata={"Software": None})


def svg(panels: list[Panel], title: str) -> str:
    """The same as an SVG element for a page; ink is ``currentColor``, the ground is empty."""
    text = _drawn(panels, _SVG_INK, "svg", metadata={"Date": None, "Creator": None}).decode()
    return svg_element(text, title)


def _drawn(panels: list[Panel], ink: str, kind: str, **options) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_settings(ink, 9), "axes.titlelocation": "left"}):
        # A single map has its two views side by side, several have them one below the other.
        across = min(len(panels), COLUMNS)
        lines = [panels[i : i + across] for i in range(0, len(panels), across)]
        shape = (1, 2) if len(panels) == 1 else (2 * len(lines), across)
        figure = Figure(figsize=(3.3 * shape[1] + 0.9, 3.45 * shape[0]), layout="compressed")
        FigureCanvasAgg(figure)
        axes = figure.subplots(*shape, squeeze=False)
        if kind == "svg":  # on a page of any colour
            for ground in (figure.patch, *(ax.patch for ax in axes.flat)):
                ground.set_alpha(0)
        # What sublayers read sets the scale: the output may be a sum over streams, n times as large.
        sizes = [float(np.abs(panel.matrix[:-1]).max()) for panel in panels]
        limit_of_all = min(max(sizes), MOST_APART * min(sizes)) or 1.0
        largest = max(float(np.abs(panel.matrix).max()) for panel in panels)
        signed = any(float(panel.matrix.min()) < 0 for panel in panels)
        for place, line in enumerate(lines):
            pair = ([axes[0, 0]], [axes[0, 1]]) if len(panels) == 1 else axes[2 * place : 2 * place + 2]
            views = (
                ("coefficient", _coefficients, limit_of_all),
                ("relative to the row's largest", _relative, 1.0),
            )
            for row, (label, view, limit) in zip(pair, views, strict=True):
                for ax in row[len(line) :]:
                    ax.set_axis_off()
                for index, (ax, panel) in enumerate(zip(row, line, strict=False)):
                    image = _heat_map(ax, view(panel.matrix), limit, ink)
                    first = len(panels) == 1 or view is _coefficients
                    ax.set_title(f"{panel.title}\n{panel.detail}" if first else "", fontsize=9, color=ink)
                    if index == 0:
                        ax.set_ylabel("read by")
                    ax.set_xlabel("source")
                # Beside the whole line, so that the lines of the figure stay in columns.
                beyond = largest > 1.001 * limit and view is _coefficients
                extend = "neither" if not beyond else "both" if signed else "max"
                bar = figure.colorbar(image, ax=list(row), shrink=0.85, aspect=28, pad=0.015, extend=extend)
                bar.set_label(label, color=ink)
                bar.outline.set_visible(False)
                ticks = _ticks(limit)
                bar.set_ticks([*(-x for x in ticks[:0:-1]), *ticks] if signed else ticks)
                bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
                if not signed:
                    bar.ax.set_ylim(0, limit)
        figure.supxlabel(
            "E embedding, A1 attention of block 1, M1 its MLP, out the trunk's output", fontsize=8
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _coefficients(matrix: np.ndarray) -> np.ndarray:
    return matrix


def _relative(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.maximum(np.abs(matrix).max(1, keepdims=True), np.finfo(matrix.dtype).tiny)


def _heat_map(ax, matrix: np.ndarray, limit: float, ink: str):
    """The lower triangle, zero in the middle of the colours; attention and MLP on both axes."""
    import matplotlib
    from matplotlib.colors import FuncNorm

    size = len(matrix)
    shown = np.ma.masked_where(np.triu(np.ones((size, size), bool), 1), matrix)
    root = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    colours = matplotlib.colormaps[COLOURS].with_extremes(bad=(0, 0, 0, 0))
    image = ax.imshow(
        shown, cmap=colours, norm=FuncNorm(root, -limit, limit), interpolation="nearest", aspect="equal"
    )
    # Zero is white like the ground: a line says where the outputs end that exist when a row is read.
    edge = np.arange(size + 1) - 0.5
    ax.plot(
        [*np.repeat(edge, 2)[1:], -0.5, -0.5],
        [*np.repeat(edge, 2)[:-1], size - 0.5, -0.5],
        color=ink, linewidth=0.6, alpha=0.6, clip_on=False,
    )  # fmt: skip
    # Columns: the embedding, then two a block. Rows: two a block, then the output.
    blocks = (size - 1) // 2
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 50, 100, blocks) if blocks <= 8 * s)
    kinds = "AM" if blocks <= 6 else "A"
    places = {f"{kind}{b + 1}": 2 * b + k for b in range(0, blocks, step) for k, kind in enumerate(kinds)}
    # Neighbours of the embedding and of the output make room for their labels.
    columns = {"E": 0} | {name: place + 1 for name, place in places.items() if step == 1 or place}
    rows = {name: place for name, place in places.items() if place < (size - 1) - size / 20}
    rows["out"] = size - 1
    ax.set_xticks([*columns.values()], [*columns])
    ax.set_yticks([*rows.values()], [*rows])
    if 6 < blocks <= 16:
        ax.set_xticks(range(1, size), minor=True)
        ax.set_yticks(range(size), minor=True)
    ax.tick_params(length=3, labelsize=7.5)
    ax.tick_params(which="minor", length=1.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def _ticks(limit: float) -> list[float]:
    """0, the limit, and round values between that stand apart under the square root."""
    ticks, last = [limit], 1.0
    for power in range(int(np.ceil(np.log10(limit))), -9, -1):
        for value in (3 * 10.0**power, 10.0**power):
            place = np.sqrt(value / limit)
            if 0.1 < place < last - 0.14:
                ticks.append(value)
                last = place
    return [0.0, *ticks[::-1]]
