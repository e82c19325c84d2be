"""What the figures of a diagnosis have in common: runs and their names, panels, axes, colours."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..diagnostics.arrays import Diagnosis
from ..runs import distinct_labels
from .plots import LINES, PALETTE, _settings

ACROSS = 4
"""Runs in one line of a figure."""
WIDTHS = {1: 4.8, 2: 3.5, 3: 2.75, 4: 2.25}
"""Inches of a panel, by the number of panels in a line."""
RED, GREEN = "#D55E00", "#009E73"
COLOURS = (*PALETTE, "#9970C1", "#999933")


@dataclass(frozen=True, eq=False)
class Shown:
    """One run in the figures."""

    label: str
    diagnosis: Diagnosis

    def __getitem__(self, name: str) -> np.ndarray:
        """The array as floats, NaN where it is not finite."""
        values = np.asarray(self.diagnosis[name], float)
        return np.where(np.isfinite(values), values, np.nan)

    def has(self, *names: str) -> bool:
        """Whether each of these arrays has something to draw."""
        return all(name in self.diagnosis and np.isfinite(self[name]).any() for name in names)

    @property
    def blocks(self) -> int:
        return self.diagnosis.subject["n_layer"]

    @property
    def static(self) -> list[int]:
        """Streams that stay as they are."""
        if "static_streams" not in self.diagnosis:
            return []
        return [int(i) for i in np.flatnonzero(self.diagnosis["static_streams"])]

    def title(self, width: float) -> str:
        """Label and detail, folded for a panel of ``width`` inches."""
        at_most = int(13 * width)
        # Broken at commas where that is enough.
        detail = (self.diagnosis.subject.get("detail") or "").replace(" ", "\u00a0").replace(",\u00a0", ", ")
        return "\n".join([*textwrap.wrap(self.label, at_most)[:3], *textwrap.wrap(detail, at_most)[:2]])


def labels(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """What names each: its connection, or the model where that says more; of several alike, with the run's name."""
    shown = [d.subject.get("label") or d.subject["residual"] for d in diagnoses]
    return distinct_labels(shown, [d.subject["name"] for d in diagnoses])


def sublayer_name(sublayer: int) -> str:
    return f"{'the MLP' if sublayer % 2 else 'attention'} of block {sublayer // 2}"


# --- how figures look ------------------------------------------------------------------------------


def drawing(ink: str):
    import matplotlib

    # Names come from users: a dollar sign in one is a dollar sign.
    own = {"text.parse_math": False, "lines.linewidth": 1.3, "axes.titlesize": "medium"}
    return matplotlib.rc_context({**_settings(ink, 8.5), **own})


def without_comments(svg: str) -> str:
    """matplotlib repeats every text in a comment before its outlines."""
    return re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)


def new_figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(ax, ink: str, grid: bool = True) -> None:
    if grid:
        ax.grid(color=ink, alpha=0.14, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(length=3)


def row_of(panels: int, ink: str, height: float = 2.7):
    """A figure with axes that share the vertical scale, for runs drawn over each other."""
    width = WIDTHS[min(panels, ACROSS)]
    figure = new_figure(panels * width + 0.4, height)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for ax in axes:
        tidy(ax, ink)
    return figure, axes


def grid_of(runs: list[Shown], heights: list[float], ink: str, own: tuple[int, ...] = (), figure=None):
    """Runs side by side, a panel of each of ``heights`` (inches) below one another; a full line of runs is followed by
    the next.

    Returns the figure (or part of one, ``figure``) and ``axes[run][kind]``. Panels of one kind share their vertical
    scale, but for the kinds ``own``.
    """
    across, kinds = min(len(runs), ACROSS), len(heights)
    lines = -(-len(runs) // across)
    width = WIDTHS[across]
    figure = figure or new_figure(across * width + 0.5, lines * (sum(heights) + 0.5) + 0.3)
    grid = figure.add_gridspec(lines * kinds, across, height_ratios=heights * lines)
    axes: list[list] = [[] for _ in runs]
    for i, run in enumerate(runs):
        for k in range(kinds):
            cell = grid[i // across * kinds + k, i % across]
            axes[i].append(figure.add_subplot(cell, sharey=axes[0][k] if i and k not in own else None))
            tidy(axes[i][k], ink)
        axes[i][0].set_title(run.title(width))
    return figure, axes


def outer_labels(axes, own: tuple[int, ...] = ()) -> None:
    """Vertical labels stand at the first panel of each line, horizontal ones below the last of each run."""
    for run in axes:
        for ax in [ax for ax in run if ax.axison][:-1]:
            ax.set_xlabel("")
    for line in (axes[i : i + ACROSS] for i in range(0, len(axes), ACROSS)):
        for k, kind in enumerate(zip(*line, strict=True)):
            for ax in [ax for ax in kind if ax.axison][1:]:
                ax.set_ylabel("")
                ax.tick_params(labelleft=k in own)


def looks_of(runs: list[Shown], ink: str) -> list[dict]:
    """Colour and line of each run; the first is drawn in ink where it is the plain sum."""
    plain = [run.diagnosis.subject["residual"] == "prenorm" for run in runs]
    found, others = [], 0
    for is_plain in plain:
        if is_plain and plain.count(True) == 1:
            found.append({"color": ink, "linestyle": "-"})
        else:
            found.append(look_of(others))
            others += 1
    return found


def look_of(index: int) -> dict:
    """Colour and line of stream or run ``index``."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def ticks_of(count: int, most: int = 7) -> list[int]:
    """Places for at most ``most`` labels among 0 .. count - 1."""
    step = next((s for s in (1, 2, 4, 5, 10, 20, 25, 50, 100, 200) if count <= s * most), count)
    return list(range(0, count, step))


def block_axis(ax, blocks: int, label: str = "block", margin: float = 0.2) -> None:
    ax.set_xticks(ticks_of(blocks))
    ax.set_xlim(-0.5 - margin, blocks - 0.5 + margin)
    ax.set_xlabel(label)


def sublayer_axis(ax, run: Shown) -> None:
    """Sublayers of all blocks: attention in the first half of its block's place, the MLP in the second."""
    block_axis(ax, run.blocks, "block (attention, then MLP)", margin=0.0)


def places_of(sublayers) -> np.ndarray:
    """Of sublayers on the axis of blocks."""
    return np.asarray(sublayers) / 2 - 0.25


def mark_not_finite(ax, run: Shown, kind: int | None = None) -> None:
    """Shade sublayers that had values that are not finite; ``kind`` 0 is attention alone, 1 the MLP alone."""
    if "not_finite" not in run.diagnosis:
        return
    for s in np.flatnonzero(run["not_finite"] > 0):
        if kind is None:
            ax.axvspan(s / 2 - 0.5, s / 2, color=RED, alpha=0.15, linewidth=0, label="not finite")
        elif s % 2 == kind:
            ax.axvspan(s // 2 - 0.5, s // 2 + 0.5, color=RED, alpha=0.15, linewidth=0, label="not finite")


def power(value: float, _=None) -> str:
    """``value`` on a logarithmic axis."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:,g}".replace("-", "−")
    power = int(np.floor(np.log10(abs(value)) + 1e-9))
    lead = f"{value / 10.0**power:g}"
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    sign = "−" if value < 0 else ""
    return f"{sign}10{raised}" if lead in ("1", "-1") else f"{lead.replace('-', '−')}·10{raised}"


def log_scale(ax, *arrays: np.ndarray, always: bool = False) -> None:
    """A logarithmic vertical axis where the positive values of ``arrays`` are far apart (or ``always``)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    values = np.concatenate([np.ravel(a) for a in arrays]) if arrays else np.array([])
    values = values[values > 0]
    formatter = FuncFormatter(power)
    if not values.size:
        return
    low, high = values.min(), values.max()
    if high <= (3 if always else 12) * low:
        ax.set_ylim(0, 1.08 * high)
        if high < 1e-3 or high >= 1e5:
            ax.yaxis.set_major_formatter(formatter)
        return
    ax.set_yscale("log")
    ax.set_ylim(low / 1.35, high * 1.35)
    few = high < 60 * low
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
    ax.yaxis.set_major_formatter(formatter)
    ax.yaxis.set_minor_formatter(NullFormatter())
    if high > 100 * low:
        ax.yaxis.set_minor_locator(NullLocator())


def draw_line(ax, x, y, **look) -> None:
    """A line whose single points are seen too."""
    look = {
        "marker": "o",
        "markersize": 4 if len(x) <= 4 else 3 if len(x) <= 20 else 2,
        "markeredgewidth": 0,
    } | look
    ax.plot(x, y, **look)


def frame(ax, ink: str) -> None:
    """Heat maps have no grid, and thin lines around them."""
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.5)
        spine.set_color(ink)
        spine.set_alpha(0.5)


def colour_bar(figure, image, axes, label: str, ink: str, **options) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.015, **options)
    bar.set_label(label, color=ink)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def density_colours():
    """From nothing to blue: reads on a light and on a dark ground."""
    from matplotlib.colors import LinearSegmentedColormap

    red, green, blue = 0.16, 0.50, 0.80
    return LinearSegmentedColormap.from_list(
        "density", [(red, green, blue, 0.0), (red, green, blue, 0.55), (0.10, 0.38, 0.68, 1.0)]
    )


def legend(figure, axes) -> None:
    """One legend under all panels, streams by their numbers, read line by line."""
    handles: dict[str, object] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    show_legend(figure, dict(sorted(handles.items(), key=lambda item: _stream_number(item[0]))))


def _stream_number(label: str) -> int:
    """Sorts the streams among each other before all else, which stays in its order."""
    found = re.fullmatch(r"stream (\d+)", label)
    return int(found[1]) if found else 10**9


def show_legend(figure, handles: dict) -> None:
    if not handles:
        return
    width = figure.bbox.width / figure.dpi
    at_most = int(12 * width)
    labels = {name: textwrap.wrap(name, at_most) for name in handles}
    longest = max(len(line) for lines in labels.values() for line in lines)
    columns = min(len(handles), max(1, int((width - 0.2) / (0.55 + 0.078 * longest))))
    # matplotlib fills columns first.
    order = [name for column in range(columns) for name in list(handles)[column::columns]]
    figure.legend(
        [handles[name] for name in order], ["\n".join(labels[name]) for name in order],
        loc="outside lower center", ncols=columns, handlelength=1.7, columnspacing=1.4,
    )  # fmt: skip


def flat(axes) -> list:
    return [ax for column in axes for ax in column if ax.axison]
