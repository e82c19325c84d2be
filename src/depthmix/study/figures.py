"""A study's figures, as PNG: differences with their intervals and courses, tuned points, loss against compute."""

import io
from pathlib import Path

import numpy as np

from ..report import plots
from ..report.records import RunRecord
from .records import Record
from .tables import TableResult

WIDTH = 9.0
"""Inches."""


def draw(result: TableResult) -> bytes | None:
    """The table's figure; None where too few runs have ended."""
    import matplotlib

    drawing = {"compare": _compare, "tune": _tune, "scaling": _scaling}[result.table.kind]
    with matplotlib.rc_context(plots._settings(plots.INK, 9)):
        return drawing(result)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    # Without dates and versions, so that the same results give the same bytes.
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _figure(panels: int, height: float):
    return plots._figure(
        WIDTH if panels < 3 else WIDTH * panels / 2, height, panels, plots.INK, transparent=False
    )


def _compare(result: TableResult) -> bytes | None:
    """Difference of the test loss to the baseline with its 95 % interval; its course in training; the loss curves."""
    rows = [(row, row.difference) for row in result.rows if row.difference is not None]
    if not rows:
        return None
    names = [row.name for row, _ in rows]
    styles = plots._style([*names, result.table.baseline], result.table.baseline, plots.INK)
    from matplotlib.ticker import MaxNLocator

    figure, (left, right, curves) = _figure(3, max(3.4, 1.6 + 0.3 * len(rows)))
    base = result.row(result.table.baseline).finished
    reach = [0.0]
    failed = plots.beyond({row.name: [found.mean] for row, found in rows}, times=20)
    for place, (row, found) in enumerate(reversed(rows)):
        colour = styles[row.name][0]
        if row.name in failed:
            # It would flatten all others: its number at the end of the axis to which it leaves.
            text, end, side = (
                (f"{found.mean:+.3f} ▶", 0.99, "right")
                if found.mean > 0
                else (f"◀ {found.mean:+.3f}", 0.01, "left")
            )
            at = left.get_yaxis_transform()
            left.text(end, place, text, transform=at, ha=side, va="center", color=colour)
            continue
        points = [
            run["test_loss"] - base[seed]["test_loss"] for seed, run in row.finished.items() if seed in base
        ]
        reach += map(abs, points)
        if found.interval is not None and found.pairs > 2:
            reach += map(abs, found.interval)
        left.plot(points, [place] * len(points), "|", color=colour, alpha=0.7, markersize=9)
        if found.interval is not None:
            left.plot(found.interval, [place, place], color=colour, linewidth=1.6)
        left.plot([found.mean], [place], "o", color=colour, markersize=6, markeredgecolor=plots.INK)
    left.axvline(0, color=plots.INK, linewidth=1)
    left.set_yticks(range(len(rows)), [row.name for row, _ in reversed(rows)])
    left.set_xlabel(f"test loss minus that of {result.table.baseline} (nats)")
    left.set_ylim(-0.7, len(rows) - 0.3)
    left.xaxis.set_major_locator(MaxNLocator(5))
    # Intervals of two pairs are ten times wider than anything seen: they may leave the axis.
    low, high = left.get_xlim()
    left.set_xlim(max(low, -1.15 * max(reach)), min(high, 1.15 * max(reach)))
    groups = {
        row.name: [_run(run) for run in row.finished.values()]
        for row in result.rows
        if row.name in (*names, result.table.baseline)
    }
    plots.draw_difference(right, groups, result.table.baseline, plots.INK)
    right.set_ylabel("loss minus the baseline's (nats)")
    plots.draw_loss(curves, groups, result.table.baseline, plots.INK)
    curves.legend(fontsize=7)
    return _png(figure)


IN_DEPTH = (
    ("hidden_rms", "RMS of what a sublayer reads"),
    ("gate_mean", "share of its output that is admitted"),
    ("sources", "streams or sources that count in a read"),
    ("gradient_rms", "RMS of a block's gradient"),
)
"""Measure -> its axis."""


def draw_depth(result: TableResult) -> bytes | None:
    """What the rows do in depth, one panel a measure; None where nothing is to be compared or recorded.

    Rows of several sizes have several depths, and are not drawn.
    """
    import matplotlib
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    panels = [
        (measure, label, [(row, line) for row in result.rows if (line := row.depth(measure)) is not None])
        for measure, label in IN_DEPTH
    ]
    panels = [panel for panel in panels if panel[2]]
    compared = result.table.kind == "compare" and any(row.difference is not None for row in result.rows)
    if not panels or not compared:
        return None
    with matplotlib.rc_context(plots._settings(plots.INK, 9)):
        styles = plots._style([row.name for row in result.rows], result.table.baseline, plots.INK)
        rows = 1 if len(panels) < 3 else 2
        figure, axes = plots._figure(
            1.2 * WIDTH, 3.2 * rows, len(panels), plots.INK, transparent=False, rows=rows
        )
        for (measure, label, lines), ax in zip(panels, axes, strict=True):
            for row, line in lines:
                colour, style = styles[row.name]
                places = np.arange(1, line.size + 1)
                known, alone = np.isfinite(line), isolated(line)
                ax.plot(
                    places[known], line[known], color=colour, linestyle=style, linewidth=1.4, label=row.name
                )
                ax.plot(places[alone], line[alone], "o", color=colour, markersize=4)
            if measure != "sources":
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter(NullFormatter())
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            ax.set_xlabel("block" if measure == "gradient_rms" else "sublayer")
            ax.set_title(label, fontsize=9)
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8
        )
        return _png(figure)


def isolated(line: np.ndarray) -> list[int]:
    """Places of values with none beside them: marked, as the line there crosses what was not recorded."""
    known = np.pad(np.isfinite(line), 1)
    return np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:]).tolist()


def _run(record: Record) -> RunRecord:
    """A record's curve as a run, for the drawings of comparisons."""
    curve, config = record["curve"], record["config"]
    tokens = config["batch_size"] * config["model"]["seq_len"]

    def part(steps: str, losses: str) -> dict[str, np.ndarray]:
        step = np.array(curve[steps], dtype=float)
        values = [np.nan if value is None else value for value in curve[losses]]
        return {"step": step, "tokens": step * tokens, "loss": np.array(values, dtype=float)}

    return RunRecord(
        Path(record["name"]), config, part("step", "train_loss"), part("val_step", "val_loss"), {}, {}, None
    )


def _tune(result: TableResult) -> bytes | None:
    """Validation loss at each point, one line a row, the best one ringed."""
    table = result.table
    places = {point.name: place for place, point in enumerate(table.points)}
    figure, (axes,) = _figure(1, 3.4)
    styles = plots._style([row.name for row in table.rows], table.baseline, plots.INK)
    drawn: list[float] = []
    for row in table.rows:
        found = [(places[r.point], *r.mean("val_loss")) for r in result.rows if r.name == row.name]
        found = [(x, y, error) for x, y, error in found if y is not None]
        if not found:
            continue
        colour, line = styles[row.name]
        x, y, errors = zip(*found, strict=True)
        axes.errorbar(
            x, y, [error or 0 for error in errors], color=colour, linestyle=line, marker="o", markersize=4, capsize=2,
            label=row.name,
        )  # fmt: skip
        drawn += y
        best = result.best.get(row.name)
        if best is not None:
            at = x.index(places[best.name])
            axes.plot([x[at]], [y[at]], "o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
    if not drawn:
        return None
    low, high = min(drawn), max(drawn)
    # A point where training broke would flatten all others.
    if len(drawn) > 3 and high > low + 4 * (np.median(drawn) - low):
        axes.set_ylim(low - 0.02, low + 4 * (np.median(drawn) - low) + 0.02)
    axes.set_xticks(range(len(places)), list(places))
    axes.set_ylabel("validation loss (nats)")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _scaling(result: TableResult) -> bytes | None:
    """Left: loss against compute with each row's law. Right: over the baseline's law, which shows the differences."""
    fits = [(fit, fit.law) for fit in result.fits if fit.law is not None]
    base, law_of_base = next(
        ((fit, law) for fit, law in fits if fit.name == result.table.baseline), (None, None)
    )
    if base is None or law_of_base is None:
        return None
    figure, (left, right) = _figure(2, 3.6)
    styles = plots._style([fit.name for fit, _ in fits], result.table.baseline, plots.INK)
    every = [x for fit, _ in fits for x, *_ in fit.points]
    grid = np.geomspace(min(every) / 1.2, max(every) * 1.2, 50)
    for fit, law in fits:
        colour, line = styles[fit.name]
        x, y = np.array([point[0] for point in fit.points]), np.array([point[1] for point in fit.points])
        left.loglog(x, y, "o", color=colour, markersize=3, alpha=0.7)
        left.loglog(grid, law.loss(grid), color=colour, linestyle=line, linewidth=1.3, label=fit.name)
        right.semilogx(x, y / law_of_base.loss(x) - 1, "o", color=colour, markersize=3, alpha=0.7)
        right.semilogx(
            grid, law.loss(grid) / law_of_base.loss(grid) - 1, color=colour, linestyle=line, linewidth=1.3
        )
    left.yaxis.set_major_formatter("{x:.2g}")
    left.yaxis.set_minor_formatter("{x:.3g}")
    for axes in (left, right):
        axes.set_xlabel("training compute (FLOPs)")
    left.set_ylabel("test loss (nats)")
    right.set_ylabel(f"test loss over the law of {base.name}, minus 1")
    left.legend(frameon=False, fontsize=8)
    return _png(figure)
