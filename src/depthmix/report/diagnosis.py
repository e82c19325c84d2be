"""``report.html`` of one or more diagnoses, a PNG of every figure, and the numbers on top; from saved arrays alone.

:func:`summary` gives the numbers of one model, :func:`print_summary` prints those of several side by side, and
:func:`write_diagnosis` writes the report. Blocks, sublayers, streams, texts and positions count from 0.
"""

import itertools
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
            files[f"{figure.key}.png"], svg, inches = figure.render(drawn)
            sections.append(_section(figure, svg, inches, [run for run in runs if run not in drawn]))
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
    ``base_loss``                           mean loss of the whole model, nats, on the first ``removal_texts``
    ``closest_block`` ``closest_distance``  smallest mean angular distance between consecutive depths of the hidden
                                            state (worst angular similarity): between what enters this block and what
                                            leaves it
    ``most_important_block`` ``_delta``     the block whose removal costs most, and the change of the loss in nats,
    ``_error``                              and its standard error; ``least_important_...`` the same
    ``largest_hidden``                      largest absolute value of the hidden state; where:
                                            ``largest_hidden_sublayer`` (read behind it), ``_text``, ``_position``,
                                            ``_channel``, ``_token``, ``_token_text``; ``largest_hidden_to_median``:
                                            as a multiple of the median there
    ``largest_output``                      the same of what sublayers return
    ``massive``                             how many of the three largest values behind each sublayer are above 100
                                            and above 1000 times the median; ``massive_sublayers``,
                                            ``massive_channels``: which
    ``gate_mean`` ``gate_largest``          over all gates; ``gate_largest_sublayer``
    ``static_streams``                      numbers of the streams; ``None`` without streams; ``static_scores``: largest
                                            angular distance of each of them between two depths
    ``strongest_source``                    the term of the trunk's output with the largest size, coefficient times root
                                            mean square: 0 is the embedding, 1 + s is sublayer s; ``strongest_share``:
                                            its share
    ``not_finite``                          sublayers with values that are not finite
    ======================================  ===================================================================
    """
    run = Shown("", diagnosis)
    found = {name: diagnosis.subject.get(name) for name in ("name", "residual", "detail")}
    found |= {name: diagnosis.subject.get(name) for name in ("parameters", "n_layer", "n_streams")}
    found |= {name: diagnosis.text.get(name) for name in ("texts", "length", "source", "removal_texts")}
    found["base_loss"] = _number(run["removal_base"]) if run.has("removal_base") else None
    return (
        found
        | _closest(run)
        | _importance(run)
        | _largest(run, "hidden")
        | _largest(run, "output")
        | _massive(run)
        | _gates(run)
        | _streams(run)
        | _strongest(run)
    )


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def _closest(run: Shown) -> dict:
    block = closest(run["angular_distance"][0]) if run.has("angular_distance") else None
    distance = None if block is None else float(run["angular_distance"][0, block, block + 1])
    return {"closest_block": block, "closest_distance": distance}


def _importance(run: Shown) -> dict:
    found: dict[str, float | None] = {}
    for name, pick in (("most_important", np.nanargmax), ("least_important", np.nanargmin)):
        block = int(pick(run["removal_delta"])) if run.has("removal_delta") else None
        found[f"{name}_block"] = block
        for part, array in (("delta", "removal_delta"), ("error", "removal_se")):
            known = block is not None and run.has(array)
            found[f"{name}_{part}"] = _number(run[array][block]) if known else None
    return found


def _largest(run: Shown, what: str) -> dict:
    """Of ``what``, ``"hidden"`` or ``"output"``."""
    name = f"largest_{what}"
    parts = "text", "position", "channel", "token"
    found = dict.fromkeys(
        [name, *(f"{name}_{part}" for part in ("sublayer", *parts, "token_text", "to_median"))]
    )
    if not run.has(f"top_{what}"):
        return found
    top = run[f"top_{what}"]
    place = np.unravel_index(np.nanargmax(top), top.shape)
    found[name], found[f"{name}_sublayer"] = float(top[place]), int(place[0])
    for part in parts:
        if f"top_{what}_{part}" in run.diagnosis:
            found[f"{name}_{part}"] = int(run.diagnosis[f"top_{what}_{part}"][place])
    tokens = run.diagnosis.text.get("top_tokens") or {}
    found[f"{name}_token_text"] = tokens.get(str(found[f"{name}_token"]))
    if run.has(f"median_{what}") and run[f"median_{what}"][place[0]] > 0:
        found[f"{name}_to_median"] = float(top[place] / run[f"median_{what}"][place[0]])
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
    static = run.static if has_streams else None
    counts = run["not_finite"] if "not_finite" in run.diagnosis else np.zeros(0)
    scores = [_number(run["static_score"][i]) for i in static] if static and run.has("static_score") else []
    return {
        "static_streams": static,
        "static_scores": scores,
        "not_finite": [int(s) for s in np.flatnonzero(counts > 0)],
    }


def _strongest(run: Shown) -> dict:
    found = dict.fromkeys(("strongest_source", "strongest_share"))
    if run.has("mixing_matrix", "mixing_source_rms"):
        sizes = np.abs(run["mixing_matrix"][-1]) * run["mixing_source_rms"]
        if np.nansum(sizes) > 0:
            found["strongest_source"] = int(np.nanargmax(sizes))
            found["strongest_share"] = float(np.nanmax(sizes) / np.nansum(sizes))
    return found


Cell = tuple[str, str]
"""A value and, below it, its place."""


def _rows(found: dict) -> dict[str, Cell]:
    """Title -> cell of the table."""
    rows = {
        "residual connection": (found["residual"], found["name"] if found["name"] != found["residual"] else ""),
        "text": (_text_of(found), found["source"] or ""),
        "parameters": (_count(found["parameters"]), _size(found)),
        "mean loss": (_loss(found), found["detail"] or ""),
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
    rows["largest activation"] = _largest_cell(found, "hidden", "behind")
    rows["largest output"] = _largest_cell(found, "output", "of")
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
        scores = [f" ({score:.3f})" if score is not None else "" for score in found["static_scores"]]
        names = [f"stream {i}{s}" for i, s in itertools.zip_longest(static, scores, fillvalue="")]
        rows["static streams"] = f"{len(static)} of {found['n_streams']}", ", ".join(names)
    rows["largest part of the output"] = ("–", "")
    if found["strongest_source"] is not None:
        source = found["strongest_source"]
        name = sublayer_name(source - 1) if source else "the embedding"
        rows["largest part of the output"] = f"{found['strongest_share']:.1%}", name
    bad = found["not_finite"]
    rows["not finite"] = (
        f"{len(bad)} sublayers" if bad else "none",
        f"first {sublayer_name(bad[0])}" if bad else "",
    )
    return rows


def _largest_cell(found: dict, what: str, where: str) -> Cell:
    value, ratio, sublayer, token, text = (
        found[f"largest_{what}{part}"] for part in ("", "_to_median", "_sublayer", "_token", "_token_text")
    )
    if value is None:
        return "–", ""
    parts = [f"{where} {sublayer_name(sublayer)}"]
    for part in ("channel", "text", "position"):
        if found[f"largest_{what}_{part}"] is not None:
            parts.append(f"{part} {found[f'largest_{what}_{part}']}")
    if token is not None:
        parts.append(
            f"token {token}" + ("" if text is None else f" {json.dumps(text[:40], ensure_ascii=False)}")
        )
    return f"{value:,.4g}" + ("" if ratio is None else f" ({ratio:,.0f} × median)"), ", ".join(parts)


def _text_of(found: dict) -> str:
    if found["texts"] is None or found["length"] is None:
        return "–"
    return f"{found['texts']:,} texts of {found['length']:,} tokens"


def _loss(found: dict) -> str:
    if found["base_loss"] is None:
        return "–"
    few = found["removal_texts"] not in (None, found["texts"])
    return f"{found['base_loss']:.4f} nats" + (f" ({found['removal_texts']:,} texts)" if few else "")


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


_NOTES = (
    "Blocks, sublayers, streams, texts and positions count from 0, as in the arrays. Worst angular similarity: the "
    "smallest mean distance, arccos(cosine) / π, between the hidden states before and behind a block. Importance: "
    "change of the mean loss when the block writes nothing. Massive activations: those above 100 and above 1000 times "
    "the median, of the three largest of the hidden state behind each sublayer. Static streams: in brackets their "
    "largest angular distance between two depths. Parts of the output: by coefficient times root mean square."
)


def _page(runs: list[Shown], sections: list[str]) -> str:
    tables = [_rows(summary(run.diagnosis)) for run in runs]
    links = "".join(
        f'<li><a href="#{figure.key}">{page._text(figure.title)}</a></li>'
        for figure in FIGURES
        if any(figure.has(run) for run in runs)
    )
    parts = [
        _measures(runs, tables),
        f'<p class="soft">{page._text(_NOTES)}</p>',
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


def _section(figure: DiagnosisFigure, svg: str, inches: float, others: list[Shown]) -> str:
    paper = f"Paper: {figure.paper}. " if figure.paper else ""
    without = f" Not in it: {', '.join(run.label for run in others)}." if others else ""
    return (
        f'<section class="diagnosis" id="{figure.key}">\n<div class="guide">\n<h2>{page._text(figure.title)}</h2>\n'
        f"<p><b>Shown.</b> {page._text(figure.shown)}</p>\n<p><b>Look for.</b> {page._text(figure.look)}</p>\n"
        f'<p class="soft">{page._text(f"{paper}For print: {figure.key}.png.{without}")}</p>\n</div>\n'
        # Letters keep a readable size: on a phone the drawing scrolls, on a wide page it ends.
        f'<figure class="drawing"><div style="min-width: {min(76 * inches, 940):.0f}px; '
        f'max-width: {118 * inches:.0f}px">\n{svg}\n</div></figure>\n</section>'
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
