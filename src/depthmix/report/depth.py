"""Tables, figures and page of a depth sweep, from its ``depth.json`` alone.

What is measured of a run, all losses in nats per token:

=====================  ==============================================================================
``initial_loss``       training loss of the first step, before any update
``train_loss``         mean training loss of the last 20 steps
``largest_loss``       largest training loss of any step
``val_loss``           validation loss at the end
``gradient_first``     norm of the gradient of the first sublayer's parameters, before clipping: at the
                       first step, median of all steps, median of the last 20
``unigram_loss``       (of the data) entropy of the training tokens' frequencies: what a model reaches
                       that does not see its input
=====================  ==============================================================================

And what it comes to, ``verdict``, the first that holds:

=============  ======================================================================================
``diverged``   a loss that was not finite ended the run, or the run ended above its initial loss
``stalled``    ``train_loss >= unigram_loss``: nothing of the input has reached the output
``slow``       below that by less than half of what PreNorm is, at the same depth and seed
``learns``     none of these
=============  ======================================================================================

A run that did not get to its end for another reason has no verdict.
"""

import io
import textwrap
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import page, plots, reproduce, table
from .records import read_json
from .write import write_atomically

LAST_STEPS = 20

MARKS = {"slow": "~", "stalled": "=", "diverged": "^"}
"""Behind a loss in the printed table."""
MEANINGS = {
    "slow": "slow: under half of PreNorm's gain on the unigram loss, same depth and seed",
    "stalled": "stalled: not below the unigram loss, which a blind model reaches",
    "diverged": "diverged: loss not finite, or above where it began",
}

# Colours of families (Okabe and Ito's, then Tol's); PreNorm is drawn in ink.
_COLOURS = (*plots.PALETTE, "#882255", "#999933", "#332288", "#44AA99", "#AA4466")
_LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
_FAMILY = {"mhc": "hc"}
"""First word of a name -> family, where they differ."""


def read_depth(folder: str | Path) -> dict:
    """``depth.json`` of ``folder``, judged. ``UserError`` when there is none."""
    data = read_json(Path(folder) / "depth.json")
    if data is None:
        raise UserError(f"{folder} is not a depth sweep: it holds no depth.json")
    judge(data)
    return data


def write_depth_report(folder: str | Path) -> Path:
    """Write ``depth-loss.png``, ``depth-gradient.png`` and ``depth.html``; return the page's path."""
    folder = Path(folder)
    data = read_depth(folder)
    figures = []
    for name, title, caption, draw in _FIGURES:
        png, svg = _draw(data, title, draw)
        write_atomically(folder / name, png)
        figures.append((title, caption, svg))
    return write_atomically(folder / "depth.html", _page(folder, data, figures).encode())


# --- what it comes to ------------------------------------------------------------------------------


def judge(data: dict) -> None:
    """Put ``verdict`` into every cell of ``depth.json`` (see the module's docstring)."""
    prenorm = {
        (cell["sublayers"], cell["seed"]): cell
        for cell in data["cells"]
        if cell["label"] == "prenorm" and cell["status"] == "finished"
    }
    for cell in data["cells"]:
        rival = prenorm.get((cell["sublayers"], cell["seed"]))
        cell["verdict"] = _verdict(cell, rival, data["unigram_loss"])


def _verdict(cell: dict, prenorm: dict | None, unigram: float) -> str | None:
    if cell["status"] == "diverged":
        return "diverged"
    if cell["status"] != "finished":
        return None
    if cell["train_loss"] > cell["initial_loss"]:
        return "diverged"
    gain = unigram - cell["train_loss"]
    if gain <= 0:
        return "stalled"
    if prenorm is not None and gain < (unigram - prenorm["train_loss"]) / 2:
        return "slow"
    return "learns"


def statements(data: dict) -> list[str]:
    """Which connections do not learn at which depths, in whole sentences."""
    sentences = []
    for label in data["residuals"]:
        found = []
        for verdict in ("slow", "stalled", "diverged"):
            depths = []
            for depth in data["sublayers"]:
                cells = _cells(data, label, depth)
                count = sum(cell["verdict"] == verdict for cell in cells)
                if count:
                    depths.append(
                        f"{depth}" if count == len(cells) else f"{depth} ({count} of {len(cells)} seeds)"
                    )
            if depths:
                found.append(f"{verdict} at {', '.join(depths)}")
        if found:
            sentences.append(f"{label}: {'; '.join(found)} sublayers.")
    learn = [
        label
        for label in data["residuals"]
        if all(cell["verdict"] == "learns" for cell in data["cells"] if cell["label"] == label)
    ]
    if learn:
        sentences.append(f"Learn at every depth: {', '.join(learn)}.")
    return sentences


def _cells(data: dict, label: str, depth: int) -> list[dict]:
    return [cell for cell in data["cells"] if cell["label"] == label and cell["sublayers"] == depth]


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _value(cells: list[dict], measure: str) -> float | None:
    """Mean over seeds; of ``gradient_first``'s parts the name is ``gradient_first.median``, say."""
    key, _, part = measure.partition(".")
    return _mean(cell[key][part] if part else cell[key] for cell in cells)


def _worst(cells: list[dict]) -> str | None:
    """The verdict that stands for several seeds; what has none counts most."""
    order = ("learns", "slow", "stalled", "diverged")
    verdicts = [cell["verdict"] for cell in cells]
    if not verdicts or None in verdicts:
        return None
    return max(verdicts, key=order.index)


def _state(cells: list[dict]) -> str:
    """Why a place in the table has no number."""
    states = {cell["status"] for cell in cells}
    return next((state for state in ("failed", "diverged", "unfinished", "not begun") if state in states), "")


# --- tables ----------------------------------------------------------------------------------------


def _sizes(data: dict, label: str) -> tuple[str, str]:
    """Parameters, and the connection's share of them in per cent, of the deepest model that is known."""
    for depth in reversed(data["sublayers"]):
        cells = _cells(data, label, depth)
        row = {name: _value(cells, name) for name in ("parameters", "connection_parameters")}
        share = table.connection_share(row)
        if share is not None:
            return f"{row['parameters']:,.0f}", f"{100 * share:.2f}"
    return "–", "–"


def _loss_text(cells: list[dict], measure: str, words: bool) -> str:
    value, verdict = _value([c for c in cells if c["status"] == "finished"], measure), _worst(cells)
    if value is None:
        return _state(cells)
    text = f"{value:.3f}"
    if any(cell["status"] != "finished" for cell in cells):
        return f"{text} ({_state(cells)})" if words else f"{text}?"
    if words:
        return text if verdict == "learns" else f"{text} {verdict}"
    return text + (" " if verdict is None else MARKS.get(verdict, " "))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def print_tables(data: dict, console=None) -> None:
    """Final loss by depth with its marks, then the gradient at the first sublayer by depth."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    if not console.is_terminal:
        # A file or pipe has no width of its own: nothing needs to be folded.
        console.width = 200
    depths = data["sublayers"]

    def show(title: str, sizes: bool, text) -> None:
        console.print(title, highlight=False)
        drawn = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
        drawn.add_column("residual connection", overflow="fold")
        if sizes:
            drawn.add_column(f"parameters\nat {depths[-1]}", justify="right")
            drawn.add_column("of which\nconnection %", justify="right")
        for depth in depths:
            drawn.add_column(f"{depth}", justify="right", no_wrap=True)
        for label in data["residuals"]:
            texts = [text(_cells(data, label, depth)) for depth in depths]
            drawn.add_row(label, *(_sizes(data, label) if sizes else ()), *texts)
        console.print(drawn)

    show(
        f"Training loss (last {LAST_STEPS} steps, nats) by sublayers; unigram loss {data['unigram_loss']:.3f}",
        True,
        lambda cells: _loss_text(cells, "train_loss", words=False),
    )
    for verdict, mark in MARKS.items():
        console.print(f"{mark} {MEANINGS[verdict]}", highlight=False, markup=False)
    console.print()
    show(
        "Gradient norm at the first sublayer (median over steps) by sublayers",
        False,
        lambda cells: _number(_value(cells, "gradient_first.median")),
    )
    for sentence in statements(data):
        console.print(sentence, highlight=False, markup=False)


def _page(folder: Path, data: dict, figures: page.Figures) -> str:
    depths = data["sublayers"]

    def by_depth(title: str, caption: str, text, sizes: bool = False) -> str:
        head = [("residual connection", "")]
        if sizes:
            head += [("parameters", f"at {depths[-1]} sublayers"), ("of which connection", "%")]
        head += [(f"{depth}", "sublayers") for depth in depths]
        rows = [
            [label, *(_sizes(data, label) if sizes else ()), *(text(_cells(data, label, d)) for d in depths)]
            for label in data["residuals"]
        ]
        rows = [[page._text(cell) for cell in row] for row in rows]
        return f"<h2>{page._text(title)}</h2>\n<p>{page._text(caption)}</p>\n" + page._table(head, rows)

    unigram = f"The unigram loss is {data['unigram_loss']:.4f} nats. "
    meanings = "; ".join(MEANINGS.values()).capitalize() + "."
    parts = [
        by_depth(
            "Training loss",
            f"Mean of the last {LAST_STEPS} steps, nats per token. {unigram}{meanings}",
            lambda cells: _loss_text(cells, "train_loss", words=True),
            sizes=True,
        )
    ]
    said = "".join(f"<li>{page._text(sentence)}</li>" for sentence in statements(data))
    if said:
        parts.append(f"<h2>What this shows</h2>\n<ul>{said}</ul>")
    failed = "".join(
        f"<li>{page._text(_run_name(cell))}: {page._text(cell.get('error') or cell['status'])}</li>"
        for cell in data["cells"]
        if cell["status"] in ("failed", "diverged")
    )
    if failed:
        parts.append(f"<h2>Failed or diverged</h2>\n<ul>{failed}</ul>")
    parts += [
        page._figures(figures),
        by_depth(
            "Validation loss", "Nats per token.", lambda cells: _loss_text(cells, "val_loss", words=True)
        ),
        by_depth(
            "Gradient norm at the first sublayer",
            "Of its own parameters, before clipping; median over all steps.",
            lambda cells: _number(_value(cells, "gradient_first.median")),
        ),
        "<h2>Every run</h2>\n" + _runs_table(data),
        "<h2>Configuration, the same in every run</h2>\n" + page._definitions("training", _shared(data)),
        page._environment(data["environment"]),
        page._command(reproduce.depth_sweep_command(data)),
    ]
    seeds = data["seeds"]
    return page._page(
        f"depthmix: {len(data['residuals'])} residual connections by depth",
        f"{folder.resolve().name}: {', '.join(map(str, depths))} sublayers, {seeds} seed{'s' * (seeds != 1)}. "
        f"Same batches for every run at one seed. Page written {page._now()}.",
        parts,
    )


def _shared(data: dict) -> dict:
    config = {key: value for key, value in data["config"].items() if key != "seed"}
    hidden = ("residual", "residual_options", "n_layer")
    return config | {"model": {k: v for k, v in config["model"].items() if k not in hidden}}


def _run_name(cell: dict) -> str:
    return f"{cell['label']}, {cell['sublayers']} sublayers, seed {cell['seed']}"


def _runs_table(data: dict) -> str:
    head = [
        ("run", ""), ("verdict", ""), ("parameters", ""), ("of which connection", "%"), ("initial bias", ""),
        ("initial loss", "nats"), ("train loss", "nats"), ("validation loss", "nats"), ("largest loss", "nats"),
        ("gradient at the first sublayer", "first step"), ("", "median"), ("", f"last {LAST_STEPS}"),
    ]  # fmt: skip
    rows = []
    for cell in data["cells"]:
        share = table.connection_share(cell)
        biases = ", ".join(
            f"{name} {low:.3g}" if low == high else f"{name} {low:.3g} to {high:.3g}"
            for name, (low, high) in cell.get("initial_bias", {}).items()
        )
        losses = (cell[name] for name in ("initial_loss", "train_loss", "val_loss", "largest_loss"))
        rows.append(
            [
                _run_name(cell),
                cell["verdict"] or cell["status"],
                "–" if cell["parameters"] is None else f"{cell['parameters']:,}",
                "–" if share is None else f"{100 * share:.2f}",
                biases or "–",
                *("–" if value is None else f"{value:.4f}" for value in losses),
                *(_number(cell["gradient_first"][name]) for name in ("initial", "median", "final")),
            ]
        )
    return page._table(head, [[page._text(text) for text in row] for row in rows])


# --- figures ---------------------------------------------------------------------------------------


def looks(labels: list[str], ink: str) -> dict[str, tuple]:
    """Label -> (colour, line style, marker): a colour for a family, a line and a marker for each member."""
    families: dict[str, list[str]] = {}
    for label in labels:
        first = label.partition(":")[0].partition("-")[0]
        families.setdefault(_FAMILY.get(first, first), []).append(label)
    result, colours = {}, 0
    for family, members in families.items():
        if family == "prenorm":
            colour = ink
        else:
            colour, colours = _COLOURS[colours % len(_COLOURS)], colours + 1
        for index, label in enumerate(members):
            result[label] = (colour, _LINES[index % len(_LINES)], _MARKERS[index % len(_MARKERS)])
    return {label: result[label] for label in labels}


def _lines(ax, data: dict, measure: str, ink: str, logarithmic: bool) -> None:
    """One line a connection over depth: mean over seeds, every seed a faint dot."""
    for label, (colour, line, marker) in looks(data["residuals"], ink).items():
        x, y = [], []
        for depth in data["sublayers"]:
            cells = [c for c in _cells(data, label, depth) if c["status"] in ("finished", "diverged")]
            values = [v for v in (_value([cell], measure) for cell in cells) if v is not None]
            values = [v for v in values if v > 0] if logarithmic else values
            if values:
                x.append(depth)
                y.append(float(np.exp(np.mean(np.log(values))) if logarithmic else np.mean(values)))
            if len(values) > 1:
                ax.plot([depth] * len(values), values, marker, color=colour, markersize=3, alpha=0.35)
            if values and any(cell["verdict"] == "diverged" for cell in cells):
                ax.plot([depth], y[-1:], "x", color=ink, markersize=9, zorder=3)
        ax.plot(x, y, color=colour, linestyle=line, marker=marker, markersize=5, linewidth=1.4, label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(data["sublayers"], [str(depth) for depth in data["sublayers"]])
    ax.minorticks_off()
    ax.set_xlabel("sublayers")


def _draw_loss(ax, data: dict, ink: str) -> None:
    _lines(ax, data, "train_loss", ink, logarithmic=False)
    ax.axhline(
        data["unigram_loss"], color=ink, linewidth=1, linestyle=(0, (2, 2)), alpha=0.7, label="unigram loss"
    )
    ax.set_ylabel(f"training loss, last {LAST_STEPS} steps (nats per token)")
    # One run that diverged must not press all others into a line.
    most = max(
        (cell["initial_loss"] for cell in data["cells"] if cell["initial_loss"] is not None), default=1.0
    )
    if ax.get_ylim()[1] > 1.3 * most:
        ax.set_ylim(top=1.1 * most)


def _draw_gradient(ax, data: dict, ink: str) -> None:
    _lines(ax, data, "gradient_first.median", ink, logarithmic=True)
    ax.set_yscale("log")
    ax.set_ylabel("gradient norm at the first sublayer (median over steps)")


_FIGURES = (
    (
        "depth-loss.png",
        "Training loss by depth",
        "Mean of the last 20 steps. On or above the dotted line nothing of the input has reached the output. "
        "Colours are families, lines and markers their members; a cross marks a run that diverged.",
        _draw_loss,
    ),
    (
        "depth-gradient.png",
        "Gradient at the first sublayer by depth",
        "Norm of the gradient of the first attention's parameters, before clipping; median over all steps.",
        _draw_gradient,
    ),
)


def _draw(data: dict, title: str, draw) -> tuple[bytes, str]:
    """The figure as PNG, and as SVG for the page."""
    import matplotlib

    entries = len(data["residuals"]) + 1
    height = max(5.0, 0.23 * entries + 0.8)
    longest = max(map(len, data["residuals"]))
    width = 6.4 + 0.085 * min(longest, 34) + 0.8

    def figure_in(ink: str, transparent: bool):
        figure, axes = plots._figure(width, height, 1, ink, transparent)
        draw(axes[0], data, ink)
        handles, names = axes[0].get_legend_handles_labels()
        folded = ["\n".join(textwrap.wrap(name, 34)) for name in names]
        # Outside, where it covers no line; long lines show what kind they are.
        figure.legend(handles, folded, loc="outside right upper", handlelength=4, fontsize="small")
        return figure

    with matplotlib.rc_context(plots._settings(plots.INK, 9)):
        figure = figure_in(plots.INK, transparent=False)
        figure.axes[0].set_title(title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    with matplotlib.rc_context(plots._settings(plots._SVG_INK, 9)):
        svg = plots.inline_svg(figure_in(plots._SVG_INK, transparent=True), title)
    return buffer.getvalue(), svg
