"""Loss curves and their companions, drawn by matplotlib without a display.

A figure is drawn twice: as PNG on white for print, and as SVG for the page,
where the ink is ``currentColor`` and the ground is empty, so that one drawing
serves a light and a dark page.
"""

import io
import itertools
import re

import numpy as np

from .records import RunRecord, smooth, smoothing_window

# Okabe and Ito's colours, told apart with any colour vision; the baseline is drawn in ink.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", ":")
INK = "#1c1e21"
_SVG_INK = "#0a0b0c"
"""Stands for currentColor while matplotlib draws; no colour of the palette is near it."""

MOST_POINTS = 1200
"""Points of one raw curve; longer ones are drawn by the lowest and highest value of each bin."""

Groups = dict[str, list[RunRecord]]
"""Residual connection -> its runs, one a seed, the baseline's first."""


def _style(names: list[str], baseline: str | None, ink: str) -> dict[str, tuple[str, str]]:
    """Name -> (colour, line style)."""
    styles = {}
    others = [name for name in names if name != baseline]
    for index, name in enumerate(others):
        styles[name] = (PALETTE[index % len(PALETTE)], LINES[index // len(PALETTE) % len(LINES)])
    if baseline is not None:
        styles[baseline] = (ink, "-")
    return styles


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``MOST_POINTS`` points that keep every spike: the extremes of equal bins, in order."""
    if x.size <= MOST_POINTS:
        return x, y
    edges = np.linspace(0, x.size, MOST_POINTS // 2 + 1).astype(int)
    pick = []
    for start, end in itertools.pairwise(edges):
        pick += sorted({start + int(np.argmin(y[start:end])), start + int(np.argmax(y[start:end]))})
    return x[pick], y[pick]


def _unit(largest: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """The largest unit of which the axis shows at least two, else the smallest."""
    return next((unit for unit in units if largest >= 2 * unit[0]), units[-1])


def _token_axis(groups: Groups) -> tuple[float, str]:
    """Tokens in one unit of the axis, and the axis's label."""
    largest = max((run.train["tokens"][-1] for run in _runs(groups) if run.train["tokens"].size), default=0)
    size, name = _unit(largest, ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, "")))
    return size, f"tokens ({name})" if name else "tokens"


def _time_axis(groups: Groups) -> tuple[float, str]:
    """Seconds in one unit of the axis, and the axis's label."""
    longest = 0.0
    for run in _runs(groups):
        times = run.wall_seconds(run.train["step"])
        if times.size and np.isfinite(times[-1]):
            longest = max(longest, float(times[-1]))
    size, name = _unit(longest, ((3600, "h"), (60, "min"), (1, "s")))
    return size, f"training time ({name})"


def _runs(groups: Groups) -> list[RunRecord]:
    return [run for runs in groups.values() for run in runs]


def _longest(runs: list[RunRecord]) -> list[RunRecord]:
    """The runs that got furthest: only those can be averaged over the whole length."""
    most = max((run.steps_done for run in runs), default=0)
    return [run for run in runs if run.steps_done == most and most > 0]


def _x(run: RunRecord, part: dict, axis: str, size: float) -> np.ndarray:
    return (part["tokens"] if axis == "tokens" else run.wall_seconds(part["step"])) / size


def draw_loss(ax, groups: Groups, baseline: str | None, ink: str, axis: str = "tokens") -> None:
    """Training loss (raw faint, smoothed strong, mean over seeds) and validation loss (dots)."""
    size, label = _token_axis(groups) if axis == "tokens" else _time_axis(groups)
    styles = _style(list(groups), baseline, ink)
    low, high = [], []
    for name, runs in groups.items():
        colour, line = styles[name]
        for run in runs:
            x, y = _thin(_x(run, run.train, axis, size), run.train["loss"])
            ax.plot(x, y, color=colour, alpha=0.8 / (2 + len(groups)), linewidth=0.6)
        whole = _longest(runs)
        if not whole:
            continue
        window = smoothing_window(whole[0].train["loss"].size)
        mean = np.mean([smooth(run.train["loss"], window) for run in whole], axis=0)
        x = np.mean([_x(run, run.train, axis, size) for run in whole], axis=0)
        ax.plot(*_thin(x, mean), color=colour, linestyle=line, linewidth=1.5, label=name)
        settled = mean.size // 10
        high.append(float(np.nanmax(mean[settled:])))
        low += [float(np.nanmin(run.train["loss"][settled:])) for run in whole]
        evaluated = _longest_validation(whole)
        if evaluated:
            x = np.mean([_x(run, run.val, axis, size) for run in evaluated], axis=0)
            y = np.mean([run.val["loss"] for run in evaluated], axis=0)
            ax.plot(x, y, "o", color=colour, markersize=4, markeredgecolor=ink, markeredgewidth=0.6)
            low.append(float(np.nanmin(y)))
    if low and np.isfinite(low).all() and np.isfinite(high).all() and max(high) > min(low):
        margin = 0.05 * (max(high) - min(low))
        ax.set_ylim(min(low) - margin, max(high) + margin)
    ax.set_xlabel(label)
    ax.set_ylabel("loss (nats per token)")
    ax.set_xlim(left=0)


def _longest_validation(runs: list[RunRecord]) -> list[RunRecord]:
    most = max((run.val["loss"].size for run in runs), default=0)
    return [run for run in runs if run.val["loss"].size == most and most > 0]


def _pairs(groups: Groups, name: str, baseline: str) -> list[tuple[RunRecord, RunRecord]]:
    """Runs of one connection with the baseline's run of the same seed, of equal length."""
    rivals = {run.seed: run for run in groups.get(baseline, [])}
    return [
        (run, rivals[run.seed])
        for run in _longest(groups[name])
        if run.seed in rivals and rivals[run.seed].steps_done > 0
    ]


def beyond(values: dict[str, list[float]], times: float = 5) -> dict[str, float]:
    """Connections more than ``times`` as far from zero as the median one, of at least four: each one's extreme."""
    extremes = {name: max(v, key=abs) for name, v in values.items() if v and np.isfinite(v).all()}
    if len(extremes) < 4:
        return {}
    typical = np.median([abs(v) for v in extremes.values()])
    return {name: float(v) for name, v in extremes.items() if abs(v) > times * typical > 0}


def draw_difference(ax, groups: Groups, baseline: str, ink: str) -> bool:
    """Loss minus the baseline's on the same batches: smoothed line (band: s.e. over seeds), validation dots.

    A connection that failed (:func:`beyond`) would flatten all others: it leaves the axis and is named.
    False when there is nothing to subtract.
    """
    size, label = _token_axis(groups)
    styles = _style(list(groups), baseline, ink)
    values, drawn = {}, False
    for name in groups:
        pairs = _pairs(groups, name, baseline) if name != baseline else []
        if not pairs:
            continue
        colour, line = styles[name]
        length = min(run.train["loss"].size for pair in pairs for run in pair)
        window = smoothing_window(length)
        lines = np.array(
            [smooth(a.train["loss"][:length] - b.train["loss"][:length], window) for a, b in pairs]
        )
        mean = lines.mean(axis=0)
        x = pairs[0][0].train["tokens"][:length] / size
        ax.plot(*_thin(x, mean), color=colour, linestyle=line, linewidth=1.5, label=name)
        drawn = True
        values[name] = list(mean[length // 10 :])
        if len(pairs) > 1:
            error = lines.std(axis=0, ddof=1) / np.sqrt(len(pairs))
            ax.fill_between(x, mean - error, mean + error, color=colour, alpha=0.18, linewidth=0)
        count = min(run.val["loss"].size for pair in pairs for run in pair)
        if count:
            points = np.array([a.val["loss"][:count] - b.val["loss"][:count] for a, b in pairs])
            x = pairs[0][0].val["tokens"][:count] / size
            error = points.std(axis=0, ddof=1) / np.sqrt(len(pairs)) if len(pairs) > 1 else None
            ax.errorbar(
                x, points.mean(axis=0), error, fmt="o", color=colour, markersize=4, markeredgecolor=ink,
                markeredgewidth=0.6, elinewidth=1, capsize=2,
            )  # fmt: skip
            values[name] += list(points.mean(axis=0)[x >= x[-1] / 10])
    ax.axhline(0, color=ink, linewidth=1, alpha=0.7, label=baseline)
    failed = beyond(values)
    seen = np.array([0.0, *(v for name in values if name not in failed for v in values[name])])
    low, high = np.nanmin(seen), np.nanmax(seen)
    if np.isfinite([low, high]).all() and high > low:
        ax.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    if failed:
        named = "\n".join(f"{name}: {extreme:+.2f}" for name, extreme in failed.items())
        ax.text(0.98, 0.97, f"beyond the axis, up to\n{named}", transform=ax.transAxes, ha="right", va="top",
                color=ink, fontsize="small")  # fmt: skip
    ax.set_xlim(left=0)
    ax.set_xlabel(label)
    ax.set_ylabel(f"loss − {baseline}'s (nats)")
    return drawn


def draw_gradient_norm(ax, groups: Groups, baseline: str | None, ink: str) -> None:
    """Global gradient norm before clipping, smoothed, mean over seeds, logarithmic."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    size, label = _token_axis(groups)
    styles = _style(list(groups), baseline, ink)
    for name, runs in groups.items():
        whole = _longest(runs)
        if not whole:
            continue
        colour, line = styles[name]
        x = whole[0].train["tokens"] / size
        raw = np.mean([run.train["grad_norm"] for run in whole], axis=0)
        if len(groups) == 1:
            ax.plot(*_thin(x, raw), color=colour, alpha=0.25, linewidth=0.6)
        ax.plot(*_thin(x, smooth(raw, smoothing_window(raw.size))), color=colour, linestyle=line, label=name)
        if (raw > 0).any():
            ax.set_yscale("log")
            plain = FuncFormatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_major_formatter(plain)
            low, high = ax.get_ylim()
            ax.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
    ax.set_xlim(left=0)
    ax.set_xlabel(label)
    ax.set_ylabel("gradient norm")


def draw_learning_rate(ax, groups: Groups, ink: str) -> None:
    """The two learning rates of the longest run; every run of a comparison has the same ones."""
    size, label = _token_axis(groups)
    run = max(_runs(groups), key=lambda run: run.steps_done)
    x = run.train["tokens"] / size
    ax.plot(*_thin(x, run.train["muon_lr"]), color=PALETTE[0], label="Muon")
    ax.plot(*_thin(x, run.train["lr"]), color=PALETTE[1], linestyle="--", label="AdamW")
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.set_xlabel(label)
    ax.set_ylabel("learning rate")


def _figure(width: float, height: float, panels: int, ink: str, transparent: bool, rows: int = 1):
    """A figure with ``panels`` axes, side by side in ``rows``, and matplotlib's settings for this look."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if transparent:
        figure.patch.set_alpha(0)
    axes = figure.subplots(rows, -(-panels // rows), squeeze=False).ravel()
    for spare in axes[panels:]:
        spare.remove()
    axes = axes[:panels]
    for ax in axes:
        if transparent:
            ax.patch.set_alpha(0)
        ax.grid(color=ink, alpha=0.14, linewidth=0.6)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure, axes


def _settings(ink: str, size: float) -> dict:
    return {
        "font.size": size,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "axes.titlesize": "medium",
        "legend.fontsize": "medium",
        "axes.titlelocation": "left",
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "legend.labelcolor": ink,
        "svg.fonttype": "path",
        "svg.hashsalt": "depthmix",
        "axes.formatter.useoffset": False,
        "axes.unicode_minus": True,
    }


def _legend(figure, axes) -> None:
    """One legend under all panels: there it covers no curve and is never cut off."""
    handles: dict[str, object] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.7)))
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)


def png(groups: Groups, baseline: str | None) -> bytes:
    """``loss.png``: the loss curves and, where there is a baseline to subtract, the difference to it."""
    import matplotlib

    subtracted = baseline if len(groups) > 1 else None
    two = subtracted is not None
    with matplotlib.rc_context(_settings(INK, 9)):
        figure, axes = _figure(10 if two else 6.4, 4.2, 2 if two else 1, INK, transparent=False)
        draw_loss(axes[0], groups, baseline, INK)
        if subtracted is not None:
            draw_difference(axes[1], groups, subtracted, INK)
            axes[0].set_title("Training loss (lines), validation loss (dots)")
            axes[1].set_title(f"Difference to {subtracted}, same batches")
        else:
            axes[0].set_title("Training loss (line), validation loss (dots)")
        _legend(figure, axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def svgs(groups: Groups, baseline: str | None) -> list[tuple[str, str, str]]:
    """The page's figures as (title, caption, inline SVG); those without data are left out."""
    ink = _SVG_INK
    figures = []

    def add(title, caption, draw):
        drawing = _svg(draw, title)
        if drawing:
            figures.append((title, caption, drawing))

    seeds = max((len(runs) for runs in groups.values()), default=0) > 1
    mean = " Mean over seeds." if seeds else ""
    add(
        "Loss against tokens",
        "Training loss, smoothed (lines) and raw (faint); validation loss (dots). "
        f"The first, steep part may lie above the axis.{mean}",
        lambda ax: draw_loss(ax, groups, baseline, ink),
    )
    if baseline is not None and len(groups) > 1:
        add(
            f"Difference to {baseline}",
            f"Below zero: lower loss than {baseline} on the same batches (line) and on the same validation "
            f"tokens (dots).{' Band and bars: standard error over seeds.' if seeds else ''}",
            lambda ax: draw_difference(ax, groups, baseline, ink),
        )
    if any(run.seconds for run in _runs(groups)):
        add(
            "Loss against training time",
            f"The same losses by wall-clock time of the optimiser steps, evaluations left out.{mean}",
            lambda ax: draw_loss(ax, groups, baseline, ink, axis="seconds"),
        )
    add(
        "Gradient norm",
        f"Global norm before clipping, smoothed, logarithmic.{mean}",
        lambda ax: draw_gradient_norm(ax, groups, baseline, ink),
    )
    add("Learning rate", "Warm-up, then a cosine.", lambda ax: draw_learning_rate(ax, groups, ink))
    return figures


def _svg(draw, title: str) -> str:
    """One panel as an SVG element for inlining; empty when ``draw`` returns False."""
    import matplotlib

    with matplotlib.rc_context(_settings(_SVG_INK, 10.5)):
        figure, axes = _figure(5.6, 3.7, 1, _SVG_INK, transparent=True)
        if draw(axes[0]) is False:
            return ""
        _legend(figure, axes)
        return inline_svg(figure, title)


def inline_svg(figure, title: str) -> str:
    """``figure``, drawn in ``_SVG_INK``, as :func:`svg_element`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return svg_element(buffer.getvalue(), title)


def svg_element(text: str, title: str) -> str:
    """matplotlib's SVG as an element for the page, which takes the page's ink and width."""
    import html

    text = text[text.index("<svg") :].replace(_SVG_INK, "currentColor")
    # The palette's blue is too dark for a dark page; the page's style sets it.
    text = text.replace(PALETTE[0].lower(), "var(--blue)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Size comes from the page's style; the viewBox keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
