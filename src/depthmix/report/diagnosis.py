"""``report.html`` of one or more diagnoses, a PNG of every figure, and the numbers on top; from saved arrays alone.

:func:`summary` gives the numbers of one model, :func:`print_summary` prints those of several side by side, and
:func:`write_diagnosis` writes the report. Blocks, sublayers, streams, texts and positions count from 0.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..diagnostics.arrays import Diagnosis
from ..errors import RunError, UserError
from . import page
from .diagnosis_canvas import Shown, labels, sublayer_name
from .diagnosis_drawings import closest, massive
from .diagnosis_figures import FIGURES, DiagnosisFigure
from .write import write_atomically


def write_diagnosis(
    folder: str | Path, diagnoses: Sequence[Diagnosis], told: Callable[[str], None] | None = None
) -> Path:
    """Write ``report.html`` and a PNG of every figure into ``folder``; return the page's path.

    All runs are in every figure side by side; a figure that none of them has is not written, and the page says why.
    A report that is there is replaced only when everything is drawn and on the disk, its page last; a PNG of a figure
    that the new report lacks is removed.

    Args:
        folder: made when it is not there.
        diagnoses: one a run.
        told: called with the title of every figure before it is drawn.

    Raises:
        ValueError: there is no diagnosis.
        RunError: the folder cannot be written.
    """
    if not diagnoses:
        raise UserError("there is no diagnosis to report; give at least one run")
    folder = Path(folder)
    runs = [Shown(label, diagnosis) for label, diagnosis in zip(labels(diagnoses), diagnoses, strict=True)]
    files, sections = {}, []
    for figure in FIGURES:
        drawn = [run for run in runs if figure.has(run)]
        if drawn:
            if told is not None:
                told(figure.title)
            files[f"{figure.key}.png"] = figure.png(drawn)
            sections.append(_section(figure, drawn, [run for run in runs if run not in drawn]))
    files["report.html"] = _page(runs, sections).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".report-") as beside:
            for name, data in files.items():
                write_atomically(Path(beside) / name, data)
            for name in files:
                os.replace(Path(beside) / name, folder / name)
        for figure in FIGURES:
            if f"{figure.key}.png" not in files:
                (folder / f"{figure.key}.png").unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot write the report to {folder}: {error.strerror or error}; free space or make the folder writable"
        ) from error
    return folder / "report.html"


# --- the numbers -----------------------------------------------------------------------------------


def summary(diagnosis: Diagnosis) -> dict:
    """The numbers on top of the report, plain; ``None`` where there is nothing.

    ======================================  ===================================================================
    ``name`` ``residual`` ``detail``        of the model; so are ``parameters``, ``n_layer``, ``n_streams``
    ``texts`` ``length`` ``source``         of the text
    ``base_loss``                           mean loss of the whole model, nats
    ``closest_block`` ``closest_distance``  smallest mean angular distance between consecutive depths of the hidden
                                            state (worst angular similarity): between what enters this block and what
                                            leaves it
    ``most_important_block`` ``_delta``     the block whose removal costs most, and the change of the loss in nats,
    ``_error``                              and its standard error; ``least_important_...`` the same
    ``largest_activation``                  largest absolute value of the hidden state; where: ``largest_sublayer``,
                                            ``_text``, ``_position``, ``_channel``, ``_token`` and ``_token_text``;
                                            ``largest_to_median``: as a multiple of that sublayer's median
    ``massive``                             how many of the three largest values behind each sublayer are above 100
                                            and above 1000 times the median; ``massive_sublayers``,
                                            ``massive_channels``: which
    ``gate_mean`` ``gate_largest``          over all gates; ``gate_largest_sublayer``
    ``static_streams``                      numbers of the streams; ``None`` without streams
    ``not_finite``                          sublayers with values that are not finite
    ======================================  ===================================================================
    """
    run = Shown("", diagnosis)
    found = {name: diagnosis.subject.get(name) for name in ("name", "residual", "detail")}
    found |= {name: diagnosis.subject.get(name) for name in ("parameters", "n_layer", "n_streams")}
    found |= {name: diagnosis.text.get(name) for name in ("texts", "length", "source")}
    found["base_loss"] = _number(run["removal_base"]) if run.has("removal_base") else None
    return (
        found | _closest(run) | _importance(run) | _largest(run) | _massive(run) | _gates(run) | _streams(run)
    )


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def _closest(run: Shown) -> dict:
    block = closest(run["angular_distance"][0]) if run.has("angular_distance") else None
    distance = None if block is None else float(run["angular_distance"][0, block, block + 1])
    return {"closest_block": block, "closest_distance": distance}


def _importance(run: Shown) -> dict:
    found = {}
    for name, pick in (("most_important", np.nanargmax), ("least_important", np.nanargmin)):
        block = int(pick(run["removal_delta"])) if run.has("removal_delta") else None
        found[f"{name}_block"] = block
        for part, array in (("delta", "removal_delta"), ("error", "removal_se")):
            known = block is not None and run.has(array)
            found[f"{name}_{part}"] = _number(run[array][block]) if known else None
    return found


def _largest(run: Shown) -> dict:
    parts = "text", "position", "channel", "token"
    found = dict.fromkeys(["largest_activation", "largest_sublayer", *(f"largest_{part}" for part in parts)])
    found |= {"largest_token_text": None, "largest_to_median": None}
    if not run.has("top_hidden"):
        return found
    top = run["top_hidden"]
    place = np.unravel_index(np.nanargmax(top), top.shape)
    found["largest_activation"], found["largest_sublayer"] = float(top[place]), int(place[0])
    for part in parts:
        if f"top_hidden_{part}" in run.diagnosis:
            found[f"largest_{part}"] = int(run.diagnosis[f"top_hidden_{part}"][place])
    tokens = run.diagnosis.text.get("top_tokens") or {}
    found["largest_token_text"] = tokens.get(str(found["largest_token"]))
    if run.has("median_hidden") and run["median_hidden"][place[0]] > 0:
        found["largest_to_median"] = float(top[place] / run["median_hidden"][place[0]])
    return found


def _massive(run: Shown) -> dict:
    if not run.has("top_hidden", "median_hidden"):
        return {"massive": None, "massive_sublayers": None, "massive_channels": None}
    big = massive(run["top_hidden"], run["median_hidden"])
    channels = run.diagnosis["top_hidden_channel"][big] if "top_hidden_channel" in run.diagnosis else []
    return {
        "massive": int(big.sum()),
        "massive_sublayers": [int(s) for s in np.flatnonzero(big.any(1))],
        "massive_channels": sorted({int(channel) for channel in channels}),
    }


def _gates(run: Shown) -> dict:
    found = dict.fromkeys(("gate_mean", "gate_largest", "gate_largest_sublayer"))
    if run.has("gate_mean"):
        means = run["gate_mean"]
        known = np.isfinite(means)
        weights = run["gate_counts"].sum(1)[known] if run.has("gate_counts") else np.ones(known.sum())
        found["gate_mean"] = float(np.average(means[known], weights=weights if weights.sum() > 0 else None))
    if run.has("gate_max"):
        found["gate_largest"] = float(np.nanmax(run["gate_max"]))
        found["gate_largest_sublayer"] = int(np.nanargmax(run["gate_max"]))
    return found


def _streams(run: Shown) -> dict:
    has_streams = "static_streams" in run.diagnosis and run.diagnosis.subject.get("n_streams")
    counts = run["not_finite"] if "not_finite" in run.diagnosis else np.zeros(0)
    return {
        "static_streams": run.static if has_streams else None,
        "not_finite": [int(s) for s in np.flatnonzero(counts > 0)],
    }


Cell = tuple[str, str]
"""A value and, below it, its place."""


def _rows(found: dict) -> dict[str, Cell]:
    """Title -> cell of the table."""
    rows = {
        "residual connection": (found["residual"], found["name"] if found["name"] != found["residual"] else ""),
        "text": (_text_of(found), found["source"] or ""),
        "parameters": (_count(found["parameters"]), _size(found)),
        "mean loss": ("–" if found["base_loss"] is None else f"{found['base_loss']:.4f} nats", found["detail"] or ""),
        "worst angular similarity": ("–", ""),
    }  # fmt: skip
    if found["closest_block"] is not None:
        block = found["closest_block"]
        last = block + 1 == found["n_layer"]
        place = f"input of block {block} and {'output of the last' if last else f'of block {block + 1}'}"
        rows["worst angular similarity"] = f"{found['closest_distance']:.4f}", place
    for name in ("most", "least"):
        block, change, error = (found[f"{name}_important_{part}"] for part in ("block", "delta", "error"))
        rows[f"{name} important block"] = (
            ("–", "")
            if block is None
            else (
                f"block {block}",
                f"{_signed(change)} nats" + ("" if error is None else f" ± {error:.4f}"),
            )
        )
    rows["largest activation"] = _largest_cell(found)
    rows["massive activations"] = ("–", "")
    if found["massive"] is not None:
        places = f"behind {len(found['massive_sublayers'])} of {2 * found['n_layer']} sublayers"
        channels = f", channels {_several(found['massive_channels'])}" if found["massive_channels"] else ""
        rows["massive activations"] = f"{found['massive']}", places + channels if found["massive"] else ""
    rows["mean gate"] = ("–" if found["gate_mean"] is None else f"{found['gate_mean']:.4f}", "")
    rows["largest gate"] = ("–", "")
    if found["gate_largest"] is not None:
        rows["largest gate"] = f"{found['gate_largest']:.4f}", sublayer_name(found["gate_largest_sublayer"])
    static = found["static_streams"]
    rows["static streams"] = ("–", "")
    if static is not None:
        names = f"stream{'s' * (len(static) > 1)} {_several(static)}" if static else ""
        rows["static streams"] = f"{len(static)} of {found['n_streams']}", names
    bad = found["not_finite"]
    rows["not finite"] = (
        f"{len(bad)} sublayers" if bad else "none",
        f"first {sublayer_name(bad[0])}" if bad else "",
    )
    return rows


def _largest_cell(found: dict) -> Cell:
    if found["largest_activation"] is None:
        return "–", ""
    ratio = found["largest_to_median"]
    value = f"{found['largest_activation']:,.4g}" + ("" if ratio is None else f" ({ratio:,.0f} × median)")
    parts = [f"behind {sublayer_name(found['largest_sublayer'])}"]
    for part in ("channel", "text", "position"):
        if found[f"largest_{part}"] is not None:
            parts.append(f"{part} {found[f'largest_{part}']}")
    if found["largest_token"] is not None:
        text = found["largest_token_text"]
        shown = "" if text is None else f" {json.dumps(text[:40], ensure_ascii=False)}"
        parts.append(f"token {found['largest_token']}{shown}")
    return value, ", ".join(parts)


def _text_of(found: dict) -> str:
    if found["texts"] is None or found["length"] is None:
        return "–"
    return f"{found['texts']:,} texts of {found['length']:,} tokens"


def _size(found: dict) -> str:
    streams = found["n_streams"]
    blocks = f"{found['n_layer']} block{'s' * (found['n_layer'] != 1)}"
    return f"{blocks}, {streams} stream{'s' * (streams != 1)}" if streams else blocks


def _count(value) -> str:
    return "–" if value is None else f"{value:,}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _several(numbers: list[int], most: int = 6) -> str:
    """The first few."""
    return ", ".join(map(str, numbers[:most])) + ", …" * (len(numbers) > most)


def print_summary(diagnoses: Sequence[Diagnosis], console=None) -> None:
    """The table on top of the report, on the terminal: a column a run."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    if not console.is_terminal:
        # A file or pipe has no width of its own: nothing needs to be folded.
        console.width = 200
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("")
    for label in labels(diagnoses):
        table.add_column(Text(label), overflow="fold")
    runs = [_rows(summary(diagnosis)) for diagnosis in diagnoses]
    for title in runs[0]:
        cells = [Text("\n".join(part for part in rows[title] if part)) for rows in runs]
        table.add_row(title, *cells)
    console.print(table)


# --- the page --------------------------------------------------------------------------------------

_STYLE = """
body { max-width: 84rem; }
.measures th, .measures td { text-align: left; vertical-align: top; white-space: normal; min-width: 11rem; }
.measures th:first-child { min-width: 7.5rem; color: var(--soft); font-weight: 400; position: sticky; left: 0;
  background: var(--ground); }
.measures tbody td:first-child { font-weight: 400; }
.contents { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; list-style: none; max-width: none; }
a { color: var(--blue); }
.diagnosis { display: grid; grid-template-columns: 15.5rem minmax(0, 1fr); gap: 1.25rem; margin: 2rem 0;
  align-items: start; }
.diagnosis h2 { margin: 0 0 .5rem; }
.guide p { font-size: .9rem; }
.guide b { font-weight: 600; }
.drawing { overflow-x: auto; }
@media (max-width: 62rem) { .diagnosis { grid-template-columns: minmax(0, 1fr); gap: .5rem; } }
@media (max-width: 46rem) {
  .measures { display: table; width: auto; }
  .measures thead { display: table-header-group; }
  .measures tbody { display: table-row-group; }
  .measures tr { display: table-row; background: none; }
  .measures td, .measures th { display: table-cell; padding: .4rem .6rem; }
  .measures tr td:last-child { border-bottom: 1px solid var(--line); }
  .measures td::before { content: none; }
  .measures th, .measures td { min-width: 9.5rem; }
}
@media print { .diagnosis { display: block; } }
"""


def _page(runs: list[Shown], sections: list[str]) -> str:
    tables = [_rows(summary(run.diagnosis)) for run in runs]
    links = "".join(
        f'<li><a href="#{figure.key}">{page._text(figure.title)}</a></li>'
        for figure in FIGURES
        if any(figure.has(run) for run in runs)
    )
    parts = [
        _measures(runs, tables),
        '<p class="soft">Blocks, sublayers, streams, texts and positions count from 0, as in the arrays. Worst angular '
        "similarity: the smallest mean distance (arccos(cosine) / π) between the hidden states before and behind a "
        "block. Importance: change of the mean loss when the block writes nothing. Activations: of the hidden state, "
        "three largest behind each sublayer; massive: above 100 and above 1000 times the median.</p>",
        _not_finite(runs),
        _list("Warnings", [(run.label, line) for run in runs for line in run.diagnosis.warnings]),
        f'<ul class="contents">{links}</ul>',
        *sections,
        _list(
            "Figures that could not be made",
            [
                (f"{figure.title}, {run.label}", figure.reason(run))
                for figure in FIGURES
                for run in runs
                if not figure.has(run)
            ],
        ),
        _seconds(runs),
    ]
    html = page._page(
        f"depthmix diagnose: {', '.join(run.label for run in runs)}",
        f"What {'a network does' if len(runs) == 1 else f'{len(runs)} networks do'} in depth. "
        f"Page written {page._now()}.",
        [part for part in parts if part],
    )
    return html.replace("</style>", f"{_STYLE}</style>", 1)


def _measures(runs: list[Shown], tables: list[dict[str, Cell]]) -> str:
    """A column a run."""
    head = "".join(f'<th scope="col">{page._text(run.label)}</th>' for run in runs)
    body = ""
    for title in tables[0]:
        cells = ""
        for rows in tables:
            value, place = rows[title]
            below = f'<span class="state">{page._text(place)}</span>' if place else ""
            cells += f"<td>{page._text(value)}{below}</td>"
        body += f'<tr><th scope="row">{page._text(title)}</th>{cells}</tr>\n'
    return (
        f'<div class="wide"><table class="measures">\n<thead><tr><th></th>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def _section(figure: DiagnosisFigure, drawn: list[Shown], others: list[Shown]) -> str:
    svg, inches = figure.svg(drawn)
    paper = f"Paper: {figure.paper}. " if figure.paper else ""
    without = f" Not in it: {', '.join(run.label for run in others)}." if others else ""
    return (
        f'<section class="diagnosis" id="{figure.key}">\n<div class="guide">\n<h2>{page._text(figure.title)}</h2>\n'
        f"<p><b>Shown.</b> {page._text(figure.shown)}</p>\n<p><b>Look for.</b> {page._text(figure.look)}</p>\n"
        f'<p class="soft">{page._text(f"{paper}For print: {figure.key}.png.{without}")}</p>\n</div>\n'
        # Letters keep a readable size: on a phone the drawing scrolls, on a wide page it ends.
        f'<figure class="drawing"><div style="min-width: {min(76 * inches, 940):.0f}px; '
        f'max-width: {118 * inches:.0f}px">\n'
        f"{svg}\n</div></figure>\n</section>"
    )


def _not_finite(runs: list[Shown]) -> str:
    lines = []
    for run in runs:
        counts = run["not_finite"] if "not_finite" in run.diagnosis else np.zeros(0)
        lines += [
            (run.label, f"{sublayer_name(int(s))}: {counts[s]:,.0f} tokens")
            for s in np.flatnonzero(counts > 0)
        ]
    return _list("Values that are not finite", lines)


def _list(title: str, lines: list[tuple[str, str]]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{page._text(name)}: {page._text(line)}</li>" for name, line in lines)
    return f"<h2>{page._text(title)}</h2>\n<ul>{items}</ul>"


def _seconds(runs: list[Shown]) -> str:
    timed = {
        run.label: {part: f"{seconds:,.1f} s" for part, seconds in run.diagnosis.seconds.items()}
        for run in runs
        if run.diagnosis.seconds
    }
    return "<h2>Time taken</h2>\n" + page._definitions("", timed) if timed else ""
