"""The record on a terminal, and plots drawn from it alone."""

import io
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..report.plots import INK, PALETTE, _figure, _settings
from ..report.write import write_atomically

MARKS = ("o", "s", "^", "D", "v", "P")


def console():
    from rich.console import Console

    wide = Console(highlight=False)
    # A pipe has no width; tables that are cut off help nobody.
    return wide if wide.is_terminal else Console(highlight=False, width=int(os.environ.get("COLUMNS", 160)))


def title(problem: dict) -> str:
    parts = [f"{problem['case']} {problem['variant']}", problem["dtype"]]
    parts += [f"n = {problem['n']}"] if problem.get("n") else []
    parts += [f"D = {problem['width']}"] if problem.get("width") else []
    parts += [f"{problem['tokens']:,} tokens"] if problem.get("tokens") else []
    parts += [f"preset {problem['preset']}"] if problem.get("preset") else []
    parts += [f"{problem['layers']} blocks"] if problem.get("layers") else []
    parts += [f"{problem['batch']} x 1 token behind {problem['prefix']}"] if problem.get("batch") else []
    return ", ".join(parts)


def print_problem(problem: dict, out) -> None:
    """One table: a line for every candidate and mode that was timed, a line for each that was not."""
    table = _operation_table(problem) if "floor" in problem else _model_table(problem)
    out.print()
    out.print(title(problem), style="bold")
    if "copy" in problem:
        copy = problem["copy"]
        out.print(
            f"copying the streams once: {copy['ms']:.3f} ms for {copy['bytes'] / 1e6:,.1f} MB; bandwidth of a copy "
            f"of {copy['far_bytes'] / 1e6:,.0f} MB, of which shares are taken: "
            f"{copy['bytes_per_second'] / 1e9:,.1f} GB/s"
        )
    out.print(table)
    for row in problem["rows"]:
        if row["status"] != "timed":
            word = "WRONG" if row["status"] == "wrong" else row["status"]
            out.print(f"  {row['candidate']}: {word}" + (f" ({row['reason']})" if row["reason"] else ""))


def _table(columns: list[str]):
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    return table


def _time(figures: dict) -> str:
    low, high = figures["quartiles_ms"]
    return f"{figures['ms']:.4g} ({low:.4g} to {high:.4g})"


def _operation_table(problem: dict):
    timed = [row for row in problem["rows"] if row["status"] == "timed"]
    others = [row["candidate"] for row in timed if row["kind"] != "depthmix"]
    columns = ["candidate", "mode", "ms (quartiles)", "MB at the floor", "of copy bandwidth", "x copy"]
    table = _table(columns + [f"/ {name}" for name in others])
    for row in timed:
        for mode, figures in row["modes"].items():
            ratios = [figures["over"].get(name) for name in others]
            table.add_row(
                row["candidate"] if mode == "forward" else "",
                mode,
                _time(figures),
                f"{problem['floor'][mode]['bytes'] / 1e6:,.1f}",
                f"{100 * figures['share_of_copy_bandwidth']:.1f} %",
                f"{figures['copies']:.2f}",
                *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
            )
    return table


def _model_table(problem: dict):
    training = problem["case"] == "training-step"
    columns = ["model", "mode", "ms (quartiles of a pass)" if training else "ms (quartiles)", "tokens/s"]
    columns += (
        ["MFU", "peak MB", "bytes kept per token", "/ prenorm", "peak / prenorm"]
        if training
        else ["/ prenorm"]
    )
    table = _table(columns)
    for row in problem["rows"]:
        for mode, figures in row.get("modes", {}).items():
            low, high = figures["quartiles_ms"]
            cells = [row["candidate"], mode, f"{figures['ms']:,.4g} ({low:,.4g} to {high:,.4g})"]
            cells.append(f"{figures['tokens_per_second']:,.0f}")
            if training:
                peak = figures["peak_memory_bytes"]
                cells.append(f"{100 * figures['mfu']:.1f} %")
                cells.append("" if peak is None else f"{peak / 1e6:,.0f}")
                cells.append(f"{figures['saved_bytes_per_token']:,}")
            ratio = figures["over"].get("prenorm")
            cells.append("" if ratio is None else f"{ratio:.3f}")
            if training:
                ratio = figures.get("peak_memory_over_prenorm")
                cells.append("" if ratio is None else f"{ratio:.3f}")
            table.add_row(*cells)
    return table


# --- plots --------------------------------------------------------------------------------------


def draw(record: dict, folder: Path) -> list[Path]:
    """Write ``NAME.png`` for all that the record allows to draw; return their paths.

    Raises ``UserError`` where it holds nothing of the kind.
    """
    problems = [p for p in record["problems"] if "floor" in p and _own(p) is not None]
    # Records of earlier versions do not say how wide their models were.
    steps = [p for p in record["problems"] if p["case"] == "training-step" and "d_model" in p]
    steps = [p for p in steps if _ratios_of_models(p, "ms")]
    pictures: dict[str, bytes] = {}
    if problems:
        pictures |= {"bandwidth.png": _bandwidth(problems), "ratios.png": _ratios(problems)}
    if steps:
        pictures |= {"overhead.png": _overhead(steps), "memory.png": _memory(steps)}
    if not pictures:
        raise UserError(
            "the record holds no timed operation of depthmix and no training step beside PreNorm's, so there is "
            "nothing to draw"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return [write_atomically(folder / name, data) for name, data in pictures.items()]


def _own(problem: dict) -> dict | None:
    """The row of depthmix as it is used; else the fastest of its backends."""
    rows = [r for r in problem["rows"] if r["kind"] == "depthmix" and r["status"] == "timed"]
    return min(rows, key=lambda r: (r["candidate"] != "depthmix", r["modes"]["both"]["ms"]), default=None)


def _picture(width: float, height: float, panels: int, paint, rows: int = 1) -> bytes:
    import matplotlib

    with matplotlib.rc_context(_settings(INK, 9)):
        figure, axes = _figure(width, height, panels, INK, transparent=False, rows=rows)
        paint(axes)
        handles: dict[str, Any] = {}
        for ax in axes:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        columns = max(1, min(len(handles), int(width / 3)))
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _label(problem: dict) -> str:
    parts = [f"{problem['case']} {problem['variant']}"]
    parts += [f"n = {problem['n']}"] if problem["n"] else []
    return ", ".join([*parts, problem["dtype"]])


def _bandwidth(problems: list[dict]) -> bytes:
    """Share of the copy bandwidth at the floor against D, forward and backward."""
    lines: dict[str, list[dict]] = {}
    for problem in problems:
        if problem["width"]:
            lines.setdefault(_label(problem), []).append(problem)

    widths = sorted({problem["width"] for line in lines.values() for problem in line})

    def paint(axes):
        axes[0].sharey(axes[1])
        for ax, mode in zip(axes, ("forward", "backward"), strict=True):
            for index, (label, line) in enumerate(lines.items()):
                line = sorted(line, key=lambda p: p["width"])
                shares = [100 * _own(p)["modes"][mode]["share_of_copy_bandwidth"] for p in line]
                mark = MARKS[index // len(PALETTE) % len(MARKS)]
                colour = PALETTE[index % len(PALETTE)]
                ax.plot([p["width"] for p in line], shares, marker=mark, color=colour, label=label)
            ax.set_title(mode)
            ax.set_xscale("log")
            ax.set_xticks(widths, map(str, widths))
            ax.set_xticks([], minor=True)
            ax.set_xlabel("D")
            ax.set_ylabel("share of copy bandwidth at the floor (%)")
            ax.set_ylim(bottom=0)

    rows = -(-len(lines) // 3)
    return _picture(10, 4 + 0.2 * rows, 2, paint)


def _ratios(problems: list[dict]) -> bytes:
    """Forward and backward of depthmix over every other candidate, a line for each problem."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = [f"{_label(p)}" + (f", D = {p['width']}" if p["width"] else "") for p in problems]
    others: dict[str, list[tuple[int, float]]] = {}
    for index, problem in enumerate(problems):
        kinds = {row["candidate"]: row["kind"] for row in problem["rows"]}
        own = _own(problem)
        assert own is not None  # draw() leaves the others out
        for name, ratio in own["modes"]["both"]["over"].items():
            if kinds[name] != "depthmix":
                others.setdefault(name, []).append((index, ratio))

    def paint(axes):
        (ax,) = axes
        for index, (name, points) in enumerate(others.items()):
            where, ratios = zip(*points, strict=True)
            mark = MARKS[index // len(PALETTE) % len(MARKS)]
            ax.plot(ratios, where, mark, color=PALETTE[index % len(PALETTE)], label=f"over {name}")
        ax.axvline(1, color=INK, linewidth=1, alpha=0.7)
        ax.set_xscale("log")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_major_formatter(plain)
        low, high = ax.get_xlim()
        ax.xaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlabel("time of depthmix over another's, forward and backward (below 1: faster)")

    return _picture(8, 1.8 + 0.25 * len(names), 1, paint)


# Training steps: what differs from PreNorm at the same width, depth and tokens.


def _ratios_of_models(problem: dict, measure: str) -> dict[str, tuple[dict, float]]:
    """Candidate -> its row, and ``measure`` over PreNorm's: ``ms`` turn by turn, others as they are."""
    timed = {row["candidate"]: row for row in problem["rows"] if row["status"] == "timed"}
    if "prenorm" not in timed:
        return {}
    base = timed.pop("prenorm")["modes"]["step"]
    found = {}
    for name, row in timed.items():
        figures = row["modes"]["step"]
        ratio = figures["over"].get("prenorm") if measure == "ms" else figures[measure] / base[measure]
        if ratio is not None:  # PreNorm was measured once, and could not be built again for this one's turns
            found[name] = (row, ratio)
    return found


def _look(index: int) -> dict:
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKS[index // len(PALETTE) % len(MARKS)]}


def _overhead(problems: list[dict]) -> bytes:
    """Time of a step over PreNorm's against D, a line for each model.

    A panel for each depth that has several widths, and one for what differs in both.
    """
    depths: dict[int, list[dict]] = {}
    for problem in problems:
        depths.setdefault(problem["n_layer"], []).append(problem)
    panels, others = {}, []
    for depth, group in depths.items():
        if len({problem["d_model"] for problem in group}) > 1:
            panels[f"{depth} blocks"] = group
        else:
            others += group
    if others:
        panels[", ".join(f"{problem['n_layer']}" for problem in others) + " blocks"] = others
    names = dict.fromkeys(name for problem in problems for name in _ratios_of_models(problem, "ms"))
    looks = {name: _look(index) for index, name in enumerate(names)}

    def paint(axes):
        for ax, (title, group) in zip(axes, panels.items(), strict=True):
            lines: dict[str, list[tuple[int, float]]] = {}
            for problem in group:
                for name, (_, ratio) in _ratios_of_models(problem, "ms").items():
                    lines.setdefault(name, []).append((problem["d_model"], ratio))
            for name, points in lines.items():
                ax.plot(*zip(*sorted(points), strict=True), label=name, **looks[name])
            widths = sorted({problem["d_model"] for problem in group})
            ax.axhline(1, color=INK, linewidth=1, alpha=0.7)
            ax.set_xscale("log")
            ax.set_xticks(widths, map(str, widths))
            ax.set_xticks([], minor=True)
            ax.set_xlabel("D")
            ax.set_title(title)
        axes[0].set_ylabel("time of a training step over PreNorm's")

    width = max(8.0, 5.0 * len(panels))
    return _picture(width, 4 + 0.2 * -(-len(names) // 2), len(panels), paint)


def _memory(problems: list[dict]) -> bytes:
    """Memory over PreNorm's against n, a panel for each problem; without a count of peaks, what a token leaves."""
    peaks = all(row["modes"]["step"]["peak_memory_bytes"] for p in problems for row in _timed(p))
    measure = "peak_memory_bytes" if peaks else "saved_bytes_per_token"
    found = [_ratios_of_models(problem, measure) for problem in problems]
    lines = {_without_n(row) for each in found for row, _ in each.values()}
    looks = {name: _look(index) for index, name in enumerate(sorted(lines))}

    def paint(axes):
        for ax, problem, each in zip(axes, problems, found, strict=True):
            points: dict[str, list[tuple[int, float]]] = {}
            streams = set()
            for row, ratio in each.values():
                if "n_streams" in row:
                    points.setdefault(_without_n(row), []).append((row["n_streams"], ratio))
                    streams.add(row["n_streams"])
                else:
                    name = _without_n(row)
                    ax.axhline(ratio, color=looks[name]["color"], linestyle="--", linewidth=1, label=name)
            for name, line in points.items():
                ax.plot(*zip(*sorted(line), strict=True), label=name, **looks[name])
            ax.axhline(1, color=INK, linewidth=1, alpha=0.7)
            ax.set_xticks(sorted(streams))
            ax.set_xlabel("streams n")
            ax.set_title(f"D = {problem['d_model']}, {problem['n_layer']} blocks")
        what = "peak memory of a step" if peaks else "bytes kept per token"
        axes[0].set_ylabel(f"{what}, over PreNorm's")

    rows = -(-len(problems) // 4)
    width = max(6.0, 3.6 * -(-len(problems) // rows))
    return _picture(width, 3.5 * rows + 0.2 * (len(lines) + 2), len(problems), paint, rows)


def _timed(problem: dict) -> list[dict]:
    return [row for row in problem["rows"] if row["status"] == "timed"]


def _without_n(row: dict) -> str:
    return ", ".join([row["residual"], *([row["stream_memory"]] if "stream_memory" in row else [])])
