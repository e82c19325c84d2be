"""Draws the figures of a diagnosis; :mod:`~depthmix.report.diagnosis_figures` lists them.

Every function takes the runs that can be drawn and the ink, and returns matplotlib's figure.
"""

import textwrap

import numpy as np

from .diagnosis_canvas import (
    ACROSS,
    GREEN,
    RED,
    WIDTHS,
    Shown,
    block_axis,
    colour_bar,
    density_colours,
    draw_line,
    flat,
    frame,
    grid_of,
    legend,
    log_scale,
    look_of,
    looks_of,
    mark_not_finite,
    new_figure,
    outer_labels,
    places_of,
    power,
    row_of,
    show_legend,
    sublayer_axis,
    ticks_of,
    tidy,
)
from .plots import PALETTE

MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
"""An activation is massive above both: in itself, and as a multiple of the median (Sun et al. 2024)."""


def outputs(runs, ink):
    figure, axes = row_of(3, ink)
    names = "output_rms", "sublayer_output_rms"
    values = [run[name] for run in runs for name in names if run.has(name)]
    for run, look in zip(runs, looks_of(runs, ink), strict=True):
        draw_line(axes[0], np.arange(run.blocks), run["output_rms"], label=run.label, **look)
        for kind in range(2):
            if run.has("sublayer_output_rms"):
                y = run["sublayer_output_rms"][kind::2]
                draw_line(axes[1 + kind], np.arange(len(y)), y, label=run.label, **look)
    for ax, title in zip(
        axes, ("behind each block", "returned by attention", "returned by the MLP"), strict=True
    ):
        ax.set_title(title)
        block_axis(ax, max(run.blocks for run in runs))
    log_scale(axes[0], *values)
    axes[0].set_ylabel("root mean square")
    legend(figure, axes)
    return figure


def gradients(runs, ink):
    figure, axes = row_of(1, ink, 3.0)
    for run, look in zip(runs, looks_of(runs, ink), strict=True):
        draw_line(axes[0], np.arange(run.blocks), run["gradient_rms"], label=run.label, **look)
    block_axis(axes[0], max(run.blocks for run in runs))
    log_scale(axes[0], *(run["gradient_rms"] for run in runs))
    axes[0].set_ylabel("gradient per parameter\n(root mean square)")
    legend(figure, axes)
    return figure


def closest(distance: np.ndarray) -> int | None:
    """The block whose input and output differ least, by the distances ``[from, to]`` of the hidden state."""
    steps = np.diagonal(distance, 1)
    return int(np.nanargmin(steps)) if np.isfinite(steps).any() else None


def distance(runs, ink):
    lines = _distance_lines(runs)
    across = max(map(len, lines))
    width = {1: 3.4, 2: 2.9, 3: 2.5}.get(across, 9.2 / across)
    figure = new_figure(across * width + 0.9, len(lines) * (width + 0.5) + 0.2)
    figure.set_layout_engine("compressed")
    axes = figure.subplots(len(lines), across, squeeze=False)
    largest = max(np.nanmax(run["angular_distance"]) for run in runs)
    for row, line in zip(axes, lines, strict=True):
        for ax in row[len(line) :]:
            ax.set_axis_off()
        # Over streams there is room: all panels of the line are one run's.
        room = int(12 * width) * (len(line) if line[0][0] is line[-1][0] else 1)
        for index, (ax, (run, representation)) in enumerate(zip(row, line, strict=False)):
            stream = representation - 1
            name = "hidden state" if stream < 0 else f"stream {stream}{', static' * (stream in run.static)}"
            label = textwrap.wrap(run.label, room)[:3] if index == 0 or stream < 0 else []
            ax.set_title("\n".join([*label, name]))
            values = run["angular_distance"][representation]
            image = _distance_map(ax, values, max(largest, 0.05), ink)
            place = closest(values) if stream < 0 else None
            if place is not None:
                ax.plot([place], [1], "o", color="none", markeredgecolor=RED, markersize=5, clip_on=False)
            ax.set_xlabel("initial depth ℓ")
            ax.set_ylabel("n blocks later" if index == 0 else "")
            ax.tick_params(labelleft=index == 0 or line[index - 1][0].blocks != run.blocks)
    look = {"shrink": min(1.0, 0.4 + 0.5 / len(lines)), "aspect": 25}
    colour_bar(figure, image, list(axes.flat), "angular distance", ink, **look)
    return figure


def _distance_lines(runs: list[Shown], most: int = 5) -> list[list[tuple[Shown, int]]]:
    """Panels (run, representation) by line: runs with streams begin their own."""
    plain, lines = [], []
    for run in runs:
        shown = [
            i
            for i, d in enumerate(run["angular_distance"])
            if np.isfinite(d[np.triu_indices(len(d), 1)]).any()
        ]
        if len(shown) <= 1:
            plain += [(run, i) for i in shown]
        else:
            lines.append([(run, i) for i in shown])
    lines = ([plain] if plain else []) + lines
    folded = []
    for line in lines:
        count = -(-len(line) // most)
        size = -(-len(line) // count)
        folded += [line[i : i + size] for i in range(0, len(line), size)]
    return folded


def _distance_map(ax, distance: np.ndarray, limit: float, ink: str):
    blocks = len(distance) - 1
    later = np.full((blocks, blocks), np.nan)
    for n in range(1, blocks + 1):
        later[n - 1, : blocks + 1 - n] = np.diagonal(distance, n)
    image = ax.imshow(
        np.ma.masked_invalid(later),
        cmap="viridis", vmin=0, vmax=limit, origin="lower", interpolation="none", aspect="equal",
        extent=(-0.5, blocks - 0.5, 0.5, blocks + 0.5),
    )  # fmt: skip
    ticks = ticks_of(blocks, 5)
    ax.set_xticks(ticks)
    ax.set_yticks(sorted({1, *(t for t in ticks if t)}))
    ax.tick_params(length=2, labelsize="small")
    for spine in ax.spines.values():
        spine.set_visible(False)
    # Where a stream does not exist yet the ground is empty: a line says how far the map could reach.
    steps = np.arange(blocks)
    x = [-0.5, -0.5, *np.repeat(steps + 0.5, 2), -0.5]
    y = [0.5, blocks + 0.5, *np.repeat(blocks + 0.5 - steps, 2)[1:], 0.5, 0.5]
    ax.plot(x, y, color=ink, linewidth=0.5, alpha=0.6, clip_on=False)
    return image


def kept_because(run: Shown) -> dict[str, list[int]]:
    """Reason -> blocks that cannot be removed."""
    reasons = {int(block): why for block, why in run.diagnosis.subject.get("kept_because", {}).items()}
    found: dict[str, list[int]] = {}
    for block in np.flatnonzero(np.isnan(run["removal_delta"])):
        why = reasons.get(int(block)) or run.diagnosis.missing.get("removal") or "no finite loss without it"
        found.setdefault(why, []).append(int(block))
    return found


def removal(runs, ink):
    from matplotlib.patches import Patch

    figure, axes = grid_of(runs, [2.5], ink)
    reach, handles = [], {}
    for run, (ax,) in zip(runs, axes, strict=True):
        delta = run["removal_delta"]
        x = np.arange(run.blocks)
        colours = [PALETTE[0]] * run.blocks
        known = np.isfinite(delta)
        if known.sum() > 1:
            colours[int(np.nanargmin(delta))], colours[int(np.nanargmax(delta))] = GREEN, RED
        error = run["removal_se"] if run.has("removal_se") else np.zeros(run.blocks)
        ax.bar(x[known], delta[known], 0.75, color=[c for c, k in zip(colours, known, strict=True) if k])
        delta, error = delta[known], np.nan_to_num(error[known])
        reach.append((delta, error))
        ax.errorbar(x[known], delta, error, fmt="none", ecolor=ink, elinewidth=0.8, capsize=1.5)
        for index, (why, blocks) in enumerate(kept_because(run).items()):
            look = {"facecolor": "none", "edgecolor": ink, "hatch": ("////", "\\\\\\\\", "....")[index % 3]}
            for block in blocks:
                ax.axvspan(block - 0.5, block + 0.5, alpha=0.35, linewidth=0, **look)
            handles[f"not removable: {why}"] = Patch(alpha=0.5, **look)
        ax.axhline(0, color=ink, linewidth=0.7)
        if run.has("removal_base"):
            ax.text(
                0.98, 0.98, f"whole model {float(run['removal_base']):.3f} nats",
                transform=ax.transAxes, ha="right", va="top", fontsize="small",
            )  # fmt: skip
        block_axis(ax, run.blocks, "block removed")
        ax.set_ylabel("change of log perplexity (nats)")
    _removal_scale(axes[0][0], *(np.concatenate(part) for part in zip(*reach, strict=True)))
    if any(np.isfinite(run["removal_delta"]).sum() > 1 for run in runs):
        handles = {"most important": Patch(color=RED), "least important": Patch(color=GREEN)} | handles
    show_legend(figure, handles)
    outer_labels(axes)
    return figure


def _removal_scale(ax, values: np.ndarray, errors: np.ndarray) -> None:
    """Linear, or linear around zero and logarithmic beyond where one block outweighs all others."""
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    size = np.abs(values)
    low, high = min(0.0, (values - errors).min()), max(0.0, (values + errors).max())
    if size.max() > 20 * np.median(size) > 0:
        linear = 10.0 ** np.floor(np.log10(max(np.median(size), 1e-3)))
        ax.set_yscale("symlog", linthresh=linear, linscale=0.6)
        ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
        ax.yaxis.set_major_formatter(FuncFormatter(power))
        ax.set_ylim(min(2.5 * low if low < -linear else 1.2 * low, -linear / 4), 3 * max(high, linear))
    elif high > low:
        ax.set_ylim(low - 0.1 * (high - low) * (low < 0), high + 0.18 * (high - low))


def massive(top: np.ndarray, median: np.ndarray) -> np.ndarray:
    """Which of the largest values ``[sublayer, rank]`` are massive, given the medians ``[sublayer]``."""
    with np.errstate(invalid="ignore"):
        return (top > MASSIVE) & (top > MASSIVE_RATIO * median[:, None])


def activations(kind: int):
    def draw(runs, ink):
        figure, axes = grid_of(runs, [1.75, 1.75], ink)
        reads = ("read by the MLP", "read by the next block")[kind]
        returns = ("returned by attention", "returned by the MLP")[kind]
        for row, (name, label) in enumerate((("hidden", reads), ("output", returns))):
            drawn = [run for run in runs if run.has(f"top_{name}", f"median_{name}")]
            for run, ax in zip(runs, (column[row] for column in axes), strict=True):
                if run not in drawn:
                    ax.set_axis_off()
                    continue
                top, median = run[f"top_{name}"][kind::2], run[f"median_{name}"][kind::2]
                x = np.arange(len(top))
                for rank, words in enumerate(("largest", "second", "third")):
                    look = {"color": (RED, PALETTE[4], PALETTE[5])[rank], "linewidth": 1.4 - 0.3 * rank}
                    draw_line(ax, x, top[:, rank], label=words, zorder=3 - rank / 10, **look)
                draw_line(ax, x, median, label="median", color=ink, linestyle="--", linewidth=1, markersize=2)
                big = massive(top, median)
                sublayer, rank = np.nonzero(big)
                if sublayer.size:
                    ax.plot(
                        sublayer, top[big], "o", color="none", markeredgecolor=ink, markeredgewidth=0.7,
                        markersize=6, zorder=4, label="massive",
                    )  # fmt: skip
                mark_not_finite(ax, run, kind)
                block_axis(ax, run.blocks)
                ax.set_ylabel(f"|x| {label}")
            values = [a[kind::2] for run in drawn for a in (run[f"top_{name}"], run[f"median_{name}"])]
            log_scale(axes[0][row], *values, always=True)
        outer_labels(axes)
        legend(figure, flat(axes))
        return figure

    return draw


def streams(runs, ink):
    figure, axes = grid_of(runs, [1.65] * 3, ink)
    for run, column in zip(runs, axes, strict=True):
        largest = run["stream_max"]
        for kind, where in enumerate(("attention", "the MLP")):
            ax = column[kind]
            _by_stream(ax, np.arange(run.blocks), largest[kind::2])
            if run.has("top_hidden"):
                y = run["top_hidden"][kind::2, 0]
                look = {"color": ink, "linewidth": 0.9, "linestyle": (0, (1, 1))}
                ax.plot(np.arange(len(y)), y, label="hidden state", **look)
            ax.set_ylabel(f"largest |x| behind\n{where}")
            mark_not_finite(ax, run, kind)
        if run.has("stream_rms"):
            _by_stream(column[2], np.arange(run.blocks), run["stream_rms"][1::2])
            column[2].set_ylabel("root mean square\nbehind the block")
        else:
            column[2].set_axis_off()
        for ax in column:
            block_axis(ax, run.blocks)
    largest = [run["stream_max"] for run in runs]
    largest += [run["top_hidden"][:, 0] for run in runs if run.has("top_hidden")]
    for kind in range(2):
        log_scale(axes[0][kind], *largest)
    log_scale(axes[0][2], *(run["stream_rms"] for run in runs if run.has("stream_rms")))
    outer_labels(axes)
    legend(figure, flat(axes))
    return figure


def gates(runs, ink):
    by_stream = any(run.has("gate_mean_stream") for run in runs)
    figure, axes = grid_of(runs, [2.1, 2.1, 1.5][: 2 + by_stream], ink)
    low, high = _gate_range(runs)
    to, back = (np.sqrt, np.square) if low >= 0 else (np.asarray, np.asarray)
    for run, column in zip(runs, axes, strict=True):
        _gate_distribution(column[0], run, ink, to, back, low, high)
        _gate_boxes(column[1], run, ink, to)
        if run.has("gate_mean_stream"):
            _by_stream(column[2], places_of(range(2 * run.blocks)), run["gate_mean_stream"])
            column[2].set_ylabel("mean by stream")
        elif by_stream:
            column[2].set_axis_off()
        for ax in column:
            sublayer_axis(ax, run)
            mark_not_finite(ax, run)
    ticks = [t for t in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1, 1.5, 2, 3, 5, 10) if low <= t <= high]
    bottom, top = to(low), to(high)
    for ax in axes[0][:2]:
        if low >= 0:
            ax.set_yticks(to(np.array(ticks)), [f"{t:g}" for t in ticks])
        ax.set_ylim(bottom - 0.02 * (top - bottom), top + 0.03 * (top - bottom))
    if by_stream:
        log_scale(axes[0][2], *(run["gate_mean_stream"] for run in runs if run.has("gate_mean_stream")))
    outer_labels(axes)
    legend(figure, flat(axes))
    return figure


def _gate_range(runs: list[Shown]) -> tuple[float, float]:
    """Of all gates that there are, 0 to 1 at least where they are shares."""
    lows = [np.nanmin(run[name]) for run in runs for name in ("gate_min", "gate_mean") if run.has(name)]
    highs = [np.nanmax(run[name]) for run in runs for name in ("gate_max", "gate_mean") if run.has(name)]
    return min(0.0, *lows), max(1.0, *highs)


def _by_stream(ax, x, values: np.ndarray) -> None:
    """A line for each column of ``values [x, stream]``."""
    for stream in range(values.shape[1]):
        draw_line(ax, x, values[:, stream], label=f"stream {stream}", **look_of(stream))


def _gate_distribution(ax, run, ink, to, back, low, high, rows: int = 90) -> None:
    """Per sublayer the share of gates in rows of equal height, faint to strong, and the mean."""
    from matplotlib.colors import PowerNorm

    sublayers = 2 * run.blocks
    edges = np.linspace(to(low), to(high), rows + 1)
    if "gate_counts" in run.diagnosis:
        shares = np.zeros((rows, sublayers))
        for s, (counts, own) in enumerate(zip(run["gate_counts"], run["gate_edges"], strict=True)):
            if np.nansum(counts) > 0 and np.isfinite(own).all():
                below = np.concatenate([[0], np.cumsum(counts)]) / np.sum(counts)
                shares[:, s] = np.diff(np.interp(back(edges), own, below))
        ax.imshow(
            np.ma.masked_less_equal(shares, 0), cmap=density_colours(), norm=PowerNorm(0.45, 0, shares.max() or 1),
            origin="lower", aspect="auto", interpolation="none",
            extent=(-0.5, run.blocks - 0.5, edges[0], edges[-1]),
        )  # fmt: skip
    draw_line(ax, places_of(range(sublayers)), to(run["gate_mean"]), color=ink, label="mean", linewidth=1)
    ax.set_ylabel("gate values")


def _gate_boxes(ax, run, ink, to) -> None:
    if not run.has("gate_quantiles", "gate_max"):
        ax.set_axis_off()
        return
    boxes, places = [], []
    for s, (q5, q25, q50, q75, q95) in enumerate(to(run["gate_quantiles"])):
        if np.isfinite(q50):
            boxes.append({"whislo": q5, "q1": q25, "med": q50, "q3": q75, "whishi": q95, "fliers": []})
            places.append(s)
    thin = {"linewidth": 0.8, "color": ink}
    ax.bxp(
        boxes, positions=places_of(places), widths=0.36, showfliers=False, manage_ticks=False, patch_artist=True,
        boxprops={"facecolor": PALETTE[5], "edgecolor": ink, "linewidth": 0.6}, medianprops={**thin, "color": ink},
        whiskerprops=thin, capprops=thin,
    )  # fmt: skip
    x = places_of(range(2 * run.blocks))
    rings = {"color": "none", "markeredgecolor": RED, "markeredgewidth": 0.8, "markersize": 3.5}
    ax.plot(x, to(run["gate_max"]), "o", label="largest", **rings)
    if run.has("gate_min"):
        ax.plot(x, to(run["gate_min"]), "_", label="smallest", color=ink, alpha=0.7, markersize=3)
    ax.set_ylabel("gate, box plot")


def _pool_ticks(low: float, high: float) -> list[float]:
    """Round weights that stand apart under the square root; of both signs where there are both."""
    ticks = [t for t in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1, 2, 5) if t <= high]
    ticks = [t for t in ticks if t == 0 or t > 0.01 * high]
    return ticks if low >= 0 else [*(-t for t in ticks[:0:-1]), *ticks]


def pools(runs, ink):
    from matplotlib.colors import FuncNorm

    figure, axes = grid_of(runs, [2.0, 1.3], ink, own=(0,))
    low = min(np.nanmin(run["pool_mean"]) for run in runs)
    high = max(np.nanmax(np.abs(run["pool_mean"])) for run in runs) or 1
    # By the square root: a weight among many sources is seen beside one among few.
    root = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    look = {"cmap": "viridis" if low >= 0 else "RdBu", "norm": FuncNorm(root, 0 if low >= 0 else -high, high)}
    for run, (top, bottom) in zip(runs, axes, strict=True):
        pool = run["pool_mean"]
        image = top.imshow(
            np.ma.masked_invalid(pool.T), origin="lower", aspect="auto", interpolation="none", **look,
            extent=(-0.5, run.blocks - 0.5, -0.5, pool.shape[1] - 0.5),
        )  # fmt: skip
        frame(top, ink)
        top.set_yticks(ticks_of(pool.shape[1], 8))
        top.set_ylabel("stream or source")
        if run.has("pool_entropy"):
            entropy = run["pool_entropy"]
            for kind, words in enumerate(("behind attention", "behind the MLP")):
                x = places_of(range(kind, len(entropy), 2))
                draw_line(bottom, x, entropy[kind::2], label=words, **look_of(kind))
            bottom.set_ylabel("entropy")
        else:
            bottom.set_axis_off()
        for ax in (top, bottom):
            sublayer_axis(ax, run)
    axes[0][1].set_ylim(-0.04, 1.06)
    outer_labels(axes, own=(0,))
    colour_bar(
        figure,
        image,
        [column[0] for column in axes],
        "mean weight",
        ink,
        aspect=18,
        ticks=_pool_ticks(low, high),
    )
    legend(figure, flat(axes))
    return figure


def amplification(runs, ink):
    figure, axes = grid_of(runs, [2.5], ink)
    largest = max(np.nanmax(run["amplification_max"]) for run in runs)
    for run, (ax,) in zip(runs, axes, strict=True):
        x = places_of(range(2 * run.blocks))
        _by_stream(ax, x, run["amplification_max"])
        if run.has("amplification_mean"):
            for stream, mean in enumerate(run["amplification_mean"].T):
                ax.plot(x, mean, **look_of(stream) | {"linewidth": 0.8, "alpha": 0.55})
        for bits, name in ((8, "bf16"), (24, "fp32")):
            digits = bits * np.log10(2)
            if digits < 1.6 * largest:
                ax.axhline(digits, color=ink, linewidth=0.8, linestyle=(0, (4, 2)), alpha=0.7)
                place = {"transform": ax.get_yaxis_transform(), "va": "bottom", "fontsize": "small"}
                ax.text(0.01, digits, f"all digits of {name}", **place)
        sublayer_axis(ax, run)
        ax.set_ylabel("log₁₀ ∏ 1 / (1 − β)")
    axes[0][0].set_ylim(bottom=0)
    outer_labels(axes)
    legend(figure, flat(axes))
    return figure


def reconstruction(runs, ink):
    figure, axes = grid_of(runs, [2.1, 1.2], ink)
    for run, (top, bottom) in zip(runs, axes, strict=True):
        x = places_of(range(2 * run.blocks))
        exact = run["reconstruction_measured"] == 0  # as at anchors: no place on a logarithmic scale
        measured = np.where(exact, np.nan, run["reconstruction_measured"])
        draw_line(top, x, measured, color=PALETTE[0], label="measured")
        if run.has("reconstruction_predicted"):
            look = {"color": PALETTE[1], "linestyle": "--", "label": "bound"}
            draw_line(top, x, np.where(exact, np.nan, run["reconstruction_predicted"]), **look)
        if run.has("reconstruction_anchor"):
            anchors = np.flatnonzero(np.nan_to_num(run["reconstruction_anchor"]) > 0)
            for ax in (top, bottom):
                for i in anchors:
                    ax.axvline(x[i], color=ink, linewidth=0.7, linestyle=":", alpha=0.6, label="anchor")
        if run.has("reconstruction_kept"):
            bottom.bar(x, 100 * np.nan_to_num(run["reconstruction_kept"]), 0.4, color=GREEN)
            bottom.set_ylabel("rows kept (%)")
        else:
            bottom.set_axis_off()
        top.set_ylabel("relative error")
        for ax in (top, bottom):
            sublayer_axis(ax, run)
    names = "reconstruction_measured", "reconstruction_predicted"
    log_scale(axes[0][0], *(run[name] for run in runs for name in names if run.has(name)), always=True)
    outer_labels(axes)
    legend(figure, flat(axes))
    return figure


def rank(runs, ink):
    similar = [run for run in runs if run.has("stream_similarity")]
    across, below = min(len(runs), ACROSS), min(2 * len(similar), ACROSS)
    lines, lines_below = -(-len(runs) // across), -(-2 * len(similar) // max(below, 1))
    heights = [2.6 * lines + 0.4, 2.4 * lines_below + 0.4][: 1 + bool(similar)]
    figure = new_figure(max(across * WIDTHS[across] + 0.5, 2 * WIDTHS[2] * bool(similar)), sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _, axes = grid_of(runs, [2.0], ink, figure=parts[0])
    for run, (ax,) in zip(runs, axes, strict=True):
        found = run["effective_rank"]
        _by_stream(ax, np.arange(len(found)), found[:, 1:])
        draw_line(ax, np.arange(len(found)), found[:, 0], color=ink, label="hidden state", linewidth=1.6)
        ax.set_ylabel("effective rank")
        block_axis(ax, len(found), "depth")
    log_scale(axes[0][0], *(run["effective_rank"] for run in runs))
    outer_labels(axes)
    legend(parts[0], flat(axes))
    if similar:
        _similarity(parts[1], parts[1].subplots(lines_below, below, squeeze=False), similar, ink)
    return figure


def _similarity(figure, axes, runs, ink) -> None:
    """Two panels a run: cosines between its streams by depth, and of each pair at the end."""
    cells = list(axes.flat)
    for ax in cells[2 * len(runs) :]:
        ax.set_axis_off()
    for i, run in enumerate(runs):
        ax, last = cells[2 * i : 2 * i + 2]
        values = run["stream_similarity"]
        streams = values.shape[1]
        pairs = values[:, ~np.eye(streams, dtype=bool)]
        known = np.isfinite(pairs).any(1)
        x, pairs = np.flatnonzero(known), pairs[known]
        tidy(ax, ink)
        if x.size:
            low, high = np.nanmin(pairs, 1), np.nanmax(pairs, 1)
            ax.fill_between(
                x, low, high, color=PALETTE[5], alpha=0.35, linewidth=0, label="all pairs of streams"
            )
            draw_line(ax, x, np.nanmean(pairs, 1), color=PALETTE[0], label="their mean")
        block_axis(ax, len(values), "depth")
        ax.set_ylim(-1.05, 1.05)
        ax.set_ylabel("cosine")
        ax.set_title("\n".join(textwrap.wrap(run.label, 30)[:3]))
        image = last.imshow(
            np.ma.masked_invalid(values[-1]), cmap="RdBu", vmin=-1, vmax=1, origin="lower", aspect="auto",
            interpolation="none", extent=(-0.5, streams - 0.5, -0.5, streams - 0.5),
        )  # fmt: skip
        frame(last, ink)
        last.set_xticks(ticks_of(streams, 8))
        last.set_yticks(ticks_of(streams, 8))
        last.set_xlabel("stream")
        last.set_ylabel("stream")
        last.set_title("each pair at the end")
    colour_bar(figure, image, cells, "cosine", ink, aspect=16)
    legend(figure, cells)
