"""A study's page: Markdown with tables and figures, and the same tables on the terminal.

Everything in it comes from the study's file and its records. Figures lie in ``img`` beside the page, as
``STUDY-TABLE.png``, those of what rows do in depth as ``STUDY-TABLE-depth.png``.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..report.table import signed
from ..report.write import write_atomically
from .declare import Study, Table
from .figures import draw, draw_depth
from .records import Record
from .statistics import LEVEL, UNEVEN
from .tables import RowResult, TableResult, spread_between_seeds, tables_of


def write_page(study: Study, records: Mapping[str, Record]) -> Path:
    """Write page and figures; return the page's path."""
    results = tables_of(study, records)
    images = study.page.parent / "img"
    images.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, drawn in drawings(results):
        image = images / f"{study.name}-{name}.png"
        if drawn is None:
            image.unlink(missing_ok=True)
        else:
            write_atomically(image, drawn)
            figures[name] = f"img/{image.name}"
    return write_atomically(study.page, page(study, records, results, figures).encode())


def drawings(results: list[TableResult]) -> Iterator[tuple[str, bytes | None]]:
    """Name and PNG of every figure; None of one that has nothing to show yet."""
    waiting = _waiting(results)
    for result in results:
        name = result.table.name
        yield name, None if name in waiting else draw(result)
        yield f"{name}-depth", None if name in waiting else draw_depth(result)


def _waiting(results: list[TableResult]) -> set[str]:
    """Unfinished tables without a run of their own: nothing of what they ask is known.

    A run belongs to the finished tables that use it, or else to the first of the unfinished.
    """
    runs = {
        result.table.name: {run.key for row in result.rows for run in row.runs.values()} for result in results
    }
    unfinished = [result.table.name for result in results if result.done < result.wanted]
    taken = set().union(*(keys for name, keys in runs.items() if name not in unfinished))
    waiting: set[str] = set()
    for name in unfinished:
        if runs[name] <= taken:
            waiting.add(name)
        taken |= runs[name]
    return waiting


def page(
    study: Study, records: Mapping[str, Record], results: list[TableResult], figures: dict[str, str]
) -> str:
    """The Markdown. ``figures``: name as in :func:`drawings` -> path of the figure from the page."""
    used = {run.key: run for result in results for row in result.rows for run in row.runs.values()}
    parts = [f"# {study.title}", study.text, _made(study, used), _how(study, used)]
    waiting = _waiting(results)
    for result in results:
        parts += _section(result, figures, result.table.name in waiting)
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(study: Study, used: Mapping[str, Record]) -> str:
    here = study.page.parent

    def link(path: Path) -> str:
        return Path(os.path.relpath(path, here)).as_posix()

    files = sorted({run.file for run in used.values()})
    named = ", ".join(f"[{name}]({link(study.results / name)})" for name in files) or "no file yet"
    commits = sorted({run["commit"] for run in used.values()})
    return (
        f"Made by `depthmix study {link_name(study)} --report` from {named}, one line for each of {len(used)} runs; "
        f"run by the same command without `--report`. Declared in [{study.path.name}]({link(study.path.resolve())}). "
        f"Source: {', '.join(commits) if commits else '–'}."
    )


def link_name(study: Study) -> str:
    """The study's file as a command line has it: from the folder above its own."""
    return f"{study.path.resolve().parent.name}/{study.path.name}"


def _how(study: Study, used: Mapping[str, Record]) -> str:
    config = study.base
    model, data = config.model, config.data
    machines = sorted(
        {
            f"{run['environment'].get('device_name')}, torch {run['environment'].get('torch')}"
            for run in used.values()
        }
    )
    rows = [
        (
            "network",
            f"{model.n_layer} blocks, D = {model.d_model}, {model.n_head} heads, {model.seq_len} tokens of context",
        ),
        ("training", f"{config.steps:,} steps of {config.tokens_per_step:,} tokens, {config.precision}"),
        ("text", f"{', '.join(data.data) or 'the standard library of Python'}; tokenizer {data.tokenizer}"),
        (
            "held out",
            f"{data.val_fraction:.1%} of documents for validation, {data.test_fraction:.1%} for the test; "
            f"{config.eval_tokens:,} and {study.test_tokens:,} tokens are read",
        ),
        ("machine", "; ".join(machines) or "–"),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + (
        "\n\nLosses are nats a token. The test split is read once, by the last weights of a finished run; rates are "
        "chosen on the validation split. Runs of one seed start from the same sublayer weights and see the same "
        "batches; differences are taken seed by seed: mean ± standard error, 95 % interval by Student's t. p is "
        "two-sided and corrected for the rows of its table by Holm's method; a row is called lower or higher where it "
        "is below 5 %."
    )


def _section(result: TableResult, figures: dict[str, str], waiting: bool) -> list[str]:
    table = result.table
    if waiting:
        shared = ", all of them those of other tables" if result.done else ""
        return [
            f"## {table.title}", table.text, f"**{result.done} of {result.wanted} runs have ended{shared}.**"
        ]  # fmt: skip
    parts = [f"## {table.title}", table.text, _state(result)]
    if result.done:
        parts.append({"compare": _compare, "tune": _tune, "scaling": _scaling}[table.kind](result))
        parts.append("\n".join(f"- {sentence}" for sentence in statements(result)))
        if table.name in figures:
            parts.append(f"![{table.title}]({figures[table.name]})")
        parts.append(_depth(result))
        if f"{table.name}-depth" in figures:
            parts.append(f"![{table.title}: in depth]({figures[f'{table.name}-depth']})")
    return parts


def _state(result: TableResult) -> str:
    table = result.table
    sentences = []
    if result.done < result.wanted:
        sentences.append(f"**{result.done} of {result.wanted} runs have ended.**")
    if table.changes:
        sentences.append(
            "Here: " + ", ".join(f"{name} {value}" for name, value in table.changes.items()) + "."
        )
    if table.error == "pooled":
        sentences.append(
            "Errors are pooled: one for all rows, from the scatter about the rows' and the seeds' shares."
        )
        uneven = [f"`{row.name}`" for row in result.rows if row.difference and row.difference.uneven]
        if uneven:
            sentences.append(
                f"Not in it, with errors of their own, as they or the baseline scatter more than the other rows (F "
                f"test, p below {UNEVEN:.0%} after correction): {', '.join(uneven)}."
            )
    if table.tuned is not None:
        if table.tuned_row is not None:
            point = result.settled.get(table.rows[0].name)
            where = f" ({point.name})" if point else ""
            sentences.append(f"Rates: the best of `{table.tuned_row}` in the table `{table.tuned}`{where}.")
        else:
            chosen = ", ".join(f"{name}: {point.name}" for name, point in result.settled.items())
            where = f" ({chosen})" if chosen else ""
            sentences.append(f"Rates: each row's own best of the table `{table.tuned}`{where}.")
    return " ".join(sentences)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def _number(found: tuple[float | None, float | None], form: str = ".4f") -> str:
    mean, error = found
    if mean is None:
        return "–"
    return format(mean, form) + (f" ± {format(error, form)}" if error is not None else "")


def _seeds(row: RowResult) -> str:
    count = (
        str(len(row.finished)) if len(row.finished) == row.wanted else f"{len(row.finished)} of {row.wanted}"
    )
    return count + (f", {row.diverged} diverged" if row.diverged else "")


def _p(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _alone(rows: list[RowResult]) -> bool:
    """Whether the runs had their device to themselves, and one kind of device: speeds can be compared."""
    runs = [run for row in rows for run in row.runs.values()]
    machines = {run["environment"].get("device_name") for run in runs}
    return all(run["side_by_side"] == 1 for run in runs) and len(machines) == 1


def _compare(result: TableResult) -> str:
    alone = _alone(result.rows)
    head = ["row", "seeds", "parameters", "train", "validation", "test", f"test minus {result.table.baseline}",
            "95 % interval", "p"]  # fmt: skip
    head += ["tokens/s", "MFU %", "peak memory (MiB)", "saved (bytes/token)"] if alone else []
    lines = []
    for row in result.rows:
        found = row.difference
        parameters, _ = row.mean("parameters")
        cells = [
            f"`{row.name}`", _seeds(row), "–" if parameters is None else f"{parameters:,.0f}",
            _number(row.mean("train_loss")), _number(row.mean("val_loss")), _number(row.mean("test_loss")),
            "–" if found is None else signed(found.mean) + (f" ± {found.error:.4f}" if found.error is not None else ""),
            "–" if found is None or found.interval is None else " to ".join(map(signed, found.interval)),
            _p(row.p),
        ]  # fmt: skip
        if alone:
            speed, memory = row.mean("tokens_per_s")[0], row.mean("peak_memory_bytes")[0]
            peak, saved = row.mean("peak_flops")[0], row.mean("saved_bytes_per_token")[0]
            flops = row.mean("flops_per_token")[0]
            used = None if speed is None or peak is None or flops is None else 100 * speed * flops / peak
            cells += [
                "–" if speed is None else f"{speed:,.0f}",
                "–" if used is None else f"{used:.1f}",
                "–" if memory is None else f"{memory / 2**20:,.0f}",
                "–" if saved is None else f"{saved:,.0f}",
            ]
        lines.append(cells)
    return _markdown(head, lines) + (
        "" if alone else "\n\nNo speeds: the runs shared their machine with each other, or were on several."
    )


def _depth(result: TableResult) -> str:
    """What rows do in depth, where their runs have recorded it."""
    if result.table.kind != "compare":
        return ""
    lines = []
    for row in result.rows:
        read, gate, largest = row.depth("hidden_rms"), row.depth("gate_mean"), row.depth("gate_max")
        sources, gradient = row.depth("sources"), row.depth("gradient_rms")
        if read is None:
            continue
        lines.append(
            [
                f"`{row.name}`",
                f"{read[read.size // 4]:.3g} to {read[-1]:.3g}",
                "–" if gate is None else f"{np.nanmean(gate):.3f}",
                "–" if largest is None else f"{np.nanmax(largest):.3f}",
                "–" if sources is None else f"{np.nanmean(sources):.2f}",
                "–" if gradient is None else f"{gradient[0] / gradient[-1]:.2f}",
            ]
        )
    if not lines:
        return ""
    head = ["in depth", "RMS of what is read", "gate", "largest gate", "sources read", "gradient"]
    return _markdown(head, lines) + (
        "\n\nAt the end of training, means over the seeds that recorded it. RMS of what is read: by the sublayer "
        "after a quarter of the depth and by the last. Gate: share of its output that is admitted, mean over "
        "sublayers, streams and tokens. "
        "Sources read: how many streams (or earlier outputs) count in what a sublayer reads, by the mean weights, mean "
        "over sublayers. Gradient: RMS of the first block's over the last one's."
    )


def _tune(result: TableResult) -> str:
    table = result.table
    head = ["validation loss", *(point.name for point in table.points)]
    lines = []
    for row in table.rows:
        best, cells = result.best.get(row.name), []
        for point in table.points:
            found = result.row(row.name, point.name)
            text = f"{found.diverged} diverged" if found.diverged else _number(found.mean("val_loss"))
            cells.append(f"**{text}**" if best is not None and best.name == point.name else text)
        lines.append([f"`{row.name}`", *cells])
    return _markdown(head, lines)


def _scaling(result: TableResult) -> str:
    table = result.table
    head = ["test loss", *(point.name for point in table.points), "A", "k", "compute multiplier"]
    lines = []
    for fit in result.fits:
        cells = [_number(result.row(fit.name, point.name).mean("test_loss")) for point in table.points]
        law, more = fit.law, fit.multiplier
        cells += (
            ["–", "–"]
            if law is None
            else [
                f"{law.A:.3f} ({law.A_low:.3f} to {law.A_high:.3f})",
                f"{law.k:.4f} ({law.k_low:.4f} to {law.k_high:.4f})",
            ]
        )
        if fit.name == table.baseline:
            cells.append("1")
        elif more is None:
            cells.append("–")
        else:
            interval = "" if more.interval is None else " ({:.3f} to {:.3f})".format(*more.interval)
            cells.append(f"{more.value:.3f}{interval}")
        lines.append([f"`{fit.name}`", *cells])
    return _markdown(head, lines) + (
        "\n\n`L = A C^-k`, least squares over the logarithms of all runs, C the training FLOPs of matrix products; in "
        "brackets 95 % intervals. Compute multiplier: how much more compute the baseline needs for the row's loss."
    )


def statements(result: TableResult) -> list[str]:
    """What the table allows to say, in whole sentences."""
    return {"compare": _say_compare, "tune": _say_tune, "scaling": _say_scaling}[result.table.kind](result)


def _say_compare(result: TableResult) -> list[str]:
    base = result.table.baseline
    sentences = []
    spread = spread_between_seeds(result)
    if spread is not None:
        sentences.append(
            f"Seeds alone move the test loss by {spread:.4f} (median standard deviation of a row)."
        )
    for verdict in ("lower", "higher"):
        names = [
            f"`{row.name}` ({signed(row.difference.mean)})"
            for row in result.rows
            if row.difference is not None and row.verdict == verdict
        ]
        if names:
            sentences.append(
                f"{verdict.capitalize()} than `{base}` at this size and length: {', '.join(names)}."
            )
    open_rows = [
        f"`{row.name}`"
        for row in result.rows
        if row.difference is not None and row.p is not None and row.verdict == "none"
    ]
    if open_rows:
        sentences.append(
            f"No difference shown by these seeds (p of {LEVEL:.0%} or more): {', '.join(open_rows)}."
        )
    single = [f"`{row.name}`" for row in result.rows if row.difference is not None and row.p is None]
    if single:
        sentences.append(f"One pair only, no statement: {', '.join(single)}.")
    broken = [f"`{row.name}`" for row in result.rows if row.diverged]
    if broken:
        sentences.append(f"Diverged in at least one run: {', '.join(broken)}.")
    return sentences


def _say_tune(result: TableResult) -> list[str]:
    table = result.table
    sentences = []
    edges = {table.points[0].name, table.points[-1].name}
    at_edge = [f"`{name}`" for name, point in result.best.items() if point.name in edges]
    if at_edge:
        sentences.append(
            f"The best point is at the edge of what was tried, so the best may lie beyond: {', '.join(at_edge)}."
        )
    return sentences


def _say_scaling(result: TableResult) -> list[str]:
    sentences = []
    for fit in result.fits:
        more = fit.multiplier
        if more is None or more.interval is None:
            continue
        low, high = more.interval
        inside = low <= 1 <= high
        verdict = "which contains 1: no difference shown" if inside else "which does not contain 1"
        sentences.append(
            f"`{fit.name}`: `{result.table.baseline}` would need {more.value:.2f} times the compute for the same loss, "
            f"interval {low:.2f} to {high:.2f}, {verdict}."
        )
    return sentences


def print_tables(results: list[TableResult]) -> None:
    """The tables on the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Shown

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    for result in results:
        if not result.done:
            continue
        text = {"compare": _compare, "tune": _tune, "scaling": _scaling}[result.table.kind](result)
        grid = [
            [cell.strip().replace("`", "").replace("**", "") for cell in line.strip("|").split("|")]
            for line in text.splitlines()
            if line.startswith("|")
        ]
        shown = Shown(box=SIMPLE_HEAD, title=_title(result.table), title_justify="left", padding=(0, 1))
        for place, title in enumerate(grid[0]):
            shown.add_column(title, justify="right" if place else "left")
        for cells in grid[2:]:
            shown.add_row(*cells)
        console.print(shown)
        for sentence in statements(result):
            console.print(sentence.replace("`", ""), markup=False)
        if result.done < result.wanted:
            console.print(f"{result.done} of {result.wanted} runs have ended")


def _title(table: Table) -> str:
    return f"{table.name}: {table.title}"
