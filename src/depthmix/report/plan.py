"""What connections cost over PreNorm on many devices: against depth, and against pipeline stages."""

import io

from .plots import INK, _figure, _legend, _settings

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288")
_LINES = ("-", "--", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

LEAST = 0.1
"""Percent: what is less, or faster than PreNorm, is drawn here."""

Curves = tuple[list[int], dict[str, list[float | None]]]


def png(depth: Curves, stages: Curves, title: str) -> bytes:
    """Two panels as a PNG; a ratio that is ``None`` is left out."""
    import matplotlib

    with matplotlib.rc_context(_settings(INK, 9)):
        figure, axes = _figure(9.6, 4.4, 2, INK, transparent=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize="large")
        _draw(axes[0], *depth, "blocks", "Best plan of each, at other depths")
        _draw(axes[1], *stages, "pipeline processes (pp)", "The same plan for all, more stages")
        axes[0].set_ylabel("step longer than PreNorm's by, %")
        _legend(figure, axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw(ax, xs, lines, label: str, title: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for i, (name, values) in enumerate(lines.items()):
        points = [(x, max(LEAST, 100 * (y - 1))) for x, y in zip(xs, values, strict=True) if y is not None]
        if points:
            ax.plot(
                *zip(*points, strict=True), label=name, color=_COLOURS[i % len(_COLOURS)], linewidth=1.5,
                linestyle=_LINES[i // len(_COLOURS) % len(_LINES)], marker=_MARKERS[i % len(_MARKERS)], markersize=4,
            )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.3, high * 1.3)
    ax.yaxis.set_major_locator(FixedLocator([m * 10**k for k in range(-1, 4) for m in (1, 2, 5)]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(FixedLocator(xs))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([str(x) for x in xs])
    ax.set_xlabel(label)
    ax.set_title(title)
