"""``depthmix watch``: a running or finished training in the terminal, from the files of its folder alone.

Read are ``config.json``, ``metrics.jsonl``, ``timing.jsonl``, ``depth.jsonl`` (:mod:`depthmix.health` says what is in
it), ``result.json`` and ``diverged.json``, as they grow; nothing is written, and the training is not touched. A run may
be stopped and resumed meanwhile, which cuts its files back.

A row of the view is the network's depth from left to right: one column or more for each sublayer, attention and MLP in
turn, as high and as bright as its value over the largest of the row.
"""

import itertools
import json
import math
import statistics
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from rich.text import Text
from tyro.conf import FlagCreatePairsOff, Positional, arg

from . import flags
from .errors import UserError
from .health import colours, sublayer_name

OPEN, SHUT = 0.98, 0.001
"""A gate from 0 to 1 whose mean lies beyond is reported: the sublayer's output replaces everything, or gets nowhere."""
VANISHED = 1e-4
"""A block whose gradient RMS is so small a part of the largest is reported."""
SILENCE = 30.0
"""Seconds without a step, or ten times a step's, after which the view says so."""
MOST_STREAMS = 8
"""Streams, at most, that get a row each."""


@dataclass(frozen=True)
class Watch:
    """Watch a training: loss, speed, gates, norms and gradients over depth, as they are recorded.

    Follows the run until it is finished; Ctrl-C ends the view, not the training. Changes nothing.

    Example: depthmix watch runs/mgr
    """

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """Run folders, running or finished, and folders of comparisons."""
    once: FlagCreatePairsOff[bool] = False
    """Show what is there now and end. Always so where standard output is no terminal."""
    numbers: FlagCreatePairsOff[bool] = False
    """Also a table with the numbers of every sublayer."""
    interval: float = 1.0
    """Seconds between two looks at the files."""


def main(argv: list[str]) -> int:
    """The verb ``watch``; returns its exit status."""
    args = flags.parse(Watch, argv, "watch")
    if not args.runs:
        raise UserError("give the folder of a run: depthmix watch runs/NAME")
    if not args.interval > 0:
        raise UserError(f"--interval must be positive, got {args.interval}")
    runs = [Followed(path) for given in args.runs for path in _expand(Path(given))]

    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    view = View(runs, numbers=args.numbers, live=console.is_terminal and not args.once)
    try:
        if not view.live:
            view.look()
            console.print(view)
            return 0
        with Live(console=console, auto_refresh=False) as live:
            while True:
                view.look()
                live.update(view, refresh=True)
                if all(run.ended for run in runs):
                    return 0
                time.sleep(args.interval)
    except KeyboardInterrupt:
        return 0


def _expand(path: Path) -> list[Path]:
    """``path``, or the run folders of the comparison that it is."""
    from .report.records import read_json

    if not path.is_dir():
        raise UserError(f"{path} is no folder; give a run folder made by `depthmix train` or `compare`")
    if (plan := read_json(path / "compare.json")) is not None:
        return [path / cell["name"] for cell in plan["cells"]]
    # A run that is still preparing its data has a lock alone.
    if not (path / "config.json").exists() and not (path / "lock").exists():
        raise UserError(
            f"{path} is not a run folder: it has no config.json; give a folder made by `depthmix train`"
        )
    return [path]


# --- what is there --------------------------------------------------------------------------------


NEEDED = {
    "metrics": {"split", "loss"},
    "timing": {"seconds", "tokens_per_s"},
    "depth": {"hidden_rms", "output_rms"},
}
"""What a line of each file must have, besides its step."""


class Lines:
    """The lines that have come to a ``.jsonl`` file since the last look."""

    def __init__(self, path: Path):
        self.path = path
        self.needed = NEEDED[path.stem]
        self.offset = 0
        self.last = b""
        self.unreadable = 0
        """Whole lines that are none of a run."""

    def read(self) -> tuple[list[dict], bool]:
        """New whole lines, and whether they replace all that came before: a resumed run has cut the file back.

        A last line without an end is still being written and left for the next look.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset - len(self.last))
                anew = self.offset > 0 and file.read(len(self.last)) != self.last
                if anew:
                    file.seek(0)
                    self.offset, self.last, self.unreadable = 0, b"", 0
                data = file.read()
        except FileNotFoundError:
            return [], False
        data = data[: data.rfind(b"\n") + 1]
        whole = data.splitlines(keepends=True)
        if whole:
            self.offset += len(data)
            self.last = whole[-1]
        values = []
        for line in whole:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict) and isinstance(value.get("step"), int) and value.keys() >= self.needed:
                values.append(value)
            else:
                self.unreadable += 1
        return values, anew


@dataclass
class Followed:
    """One run, as far as it has been recorded."""

    path: Path
    config: dict = field(default_factory=dict)
    """Empty as long as there is none."""
    train: dict[int, dict] = field(default_factory=dict)
    """Step -> line of ``metrics.jsonl``; the next three likewise."""
    val: dict[int, dict] = field(default_factory=dict)
    timing: dict[int, dict] = field(default_factory=dict)
    depth: dict[int, dict] = field(default_factory=dict)
    result: dict | None = None
    diverged: dict | None = None

    def __post_init__(self):
        names = "metrics", "timing", "depth"
        self.files = {name: Lines(self.path / f"{name}.jsonl") for name in names}

    def look(self) -> None:
        """Take in what is new. Raises ``RunError`` for a damaged file of JSON."""
        from .report.records import read_json

        # Before the lines: what is recorded at the end must be read when the end is known.
        self.result, self.diverged = (read_json(self.path / f"{n}.json") for n in ("result", "diverged"))
        self.config = read_json(self.path / "config.json") or self.config
        for name, kept in (("metrics", None), ("timing", self.timing), ("depth", self.depth)):
            lines, anew = self.files[name].read()
            if anew:
                for old in (self.train, self.val) if kept is None else (kept,):
                    old.clear()
            for line in lines:
                into = (
                    kept
                    if kept is not None
                    else {"train": self.train, "val": self.val}.get(line.get("split"))
                )
                if into is not None:
                    into[line["step"]] = line

    @property
    def ended(self) -> bool:
        return self.result is not None or self.diverged is not None

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return max(self.train, default=0)

    @property
    def steps(self) -> int:
        return self.config["steps"]

    def seconds_per_step(self) -> float | None:
        recent = [line["seconds"] for line in [*self.timing.values()][-50:]]
        return statistics.median(recent) if recent else None


# --- what is worth a warning ----------------------------------------------------------------------


def warnings(run: Followed) -> list[str]:
    """What anybody who looks should know, in one line each."""
    found = []
    for name, lines in run.files.items():
        if lines.unreadable:
            found.append(f"{name}.jsonl: {_count(lines.unreadable, 'line')} cannot be read and left out")
    if not run.depth:
        return found
    line = run.depth[max(run.depth)]
    for key, verb in (("hidden_rms", "reads"), ("output_rms", "returns")):
        if places := [i for i, x in enumerate(line.get(key, ())) if x is None]:
            found.append(f"not finite: what {_places(places)} {verb}")
    if gradients := [(x, i) for i, x in enumerate(line.get("gradient_rms") or ()) if x is not None]:
        (least, at), (most, most_at) = min(gradients), max(gradients)
        if least < VANISHED * most:
            found.append(f"gradients hardly reach block {at}: RMS {least:.2g}, in block {most_at} {most:.2g}")
    if line.get("gate_range") == [0.0, 1.0]:
        gates = line["gate_mean"]
        for what, far in (("open", lambda x: x > OPEN), ("shut", lambda x: x < SHUT)):
            if places := [i for i, x in enumerate(gates) if x is not None and far(x)]:
                found.append(f"gates stand {what} at {_places(places)}: mean {gates[places[0]]:.3g}")
        by_stream = [entry for entry in line.get("gate_mean_stream", ()) if entry]
        for stream, values in enumerate(itertools.zip_longest(*by_stream)):
            # None: another stream is written there.
            seen = [x for x in values if x is not None]
            if len(by_stream[0]) > 1 and seen and max(seen) < SHUT:
                found.append(f"stream {stream} takes nothing in: its mean gates are all below {SHUT:g}")
    return found


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _places(sublayers: list[int]) -> str:
    shown = ", ".join(sublayer_name(i) for i in sublayers[:3])
    return shown if len(sublayers) <= 3 else f"{shown} and {len(sublayers) - 3} more sublayers"


# --- the view -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Glyphs:
    """What is drawn with."""

    bars: str
    point: str
    done: str
    left: str
    dots: tuple[int, int]
    """Dots of one character in the curve: across and down."""


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "●", "━", "─", (2, 4))
ASCII = Glyphs(".:-=+*#%@", "o", "=", "-", (1, 1))


class View:
    """All runs, one below the other; a rich renderable that fits the terminal's width, and its height when live."""

    def __init__(self, runs: list[Followed], *, numbers: bool = False, live: bool = False):
        self.runs, self.numbers, self.live = runs, numbers, live

    def look(self) -> None:
        for run in self.runs:
            run.look()

    def __rich_console__(self, console, options):
        glyphs = UNICODE if (console.encoding or "").lower().startswith("utf") else ASCII
        # The last line of a terminal stays free for the cursor.
        height = (console.height - 1) // len(self.runs) if self.live else None
        for number, run in enumerate(self.runs):
            if number:
                yield Text()
            for line in view_of(run, options.max_width, height and height - 1, glyphs, self.numbers):
                line.no_wrap, line.overflow = True, "crop"
                yield line


def view_of(
    run: Followed, width: int, height: int | None, glyphs: Glyphs, numbers: bool = False
) -> list[Text]:
    """The lines that show ``run``, none wider than ``width``; where ``height`` is given, the curve gives way to it."""
    if not run.config:
        return [Text(f"{run.path.name}: not begun yet", "yellow")]
    head, below = _head(run, width, glyphs), []
    if run.depth:
        below = [Text(), *_depth(run, width, glyphs)]
        if numbers:
            below += [Text(), *_numbers(run, width)]
    elif run.config.get("record_depth", False):
        below = [Text("nothing recorded of the depth yet: that is done at evaluations", "dim")]
    else:
        below = [Text("no record of the depth: the run was made without one", "dim")]
    for text in warnings(run):
        below += _wrapped(f"warning: {text}", width, "yellow")
    if run.diverged:
        below += _wrapped(f"stopped: {run.diverged.get('message', '')}", width, "red")
    rows = 10 if height is None else min(10, height - len(head) - len(below) - 2)
    curve = _curve(run, width, rows, glyphs) if run.train and rows >= 3 else []
    return [*head, *curve, *below]


def _wrapped(text: str, width: int, style: str) -> list[Text]:
    return [Text(line, style) for line in textwrap.wrap(text, width)]


def _flow(parts: list[Text], width: int) -> list[Text]:
    """``parts`` side by side, as many lines as they need."""
    lines: list[Text] = []
    for part in parts:
        part.truncate(width)
        if lines and lines[-1].cell_len + 3 + part.cell_len <= width:
            lines[-1] = Text("   ").join([lines[-1], part])
        else:
            lines.append(part)
    return lines


def _number(label: str, value: str) -> Text:
    return Text.assemble((f"{label} ", "dim"), value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _head(run: Followed, width: int, glyphs: Glyphs) -> list[Text]:
    from .config import residual_label

    model = run.config["model"]
    what = f"{residual_label(model)}, {model['n_layer']} blocks, D = {model['d_model']}"
    title = [Text(run.path.resolve().name, "bold"), Text(what)]
    pace = run.seconds_per_step()
    share = run.step / run.steps
    bar = max(4, min(40, width - 32))
    done = round(bar * share)
    progress = [
        Text.assemble(
            (glyphs.done * done, "cyan"),
            (glyphs.left * (bar - done), "dim"),
            f" step {run.step:,}/{run.steps:,}",
        )
    ]
    if run.result:
        progress.append(Text(f"finished in {_clock(run.result['wall_seconds'])}", "green"))
    elif run.diverged:
        progress.append(Text(f"stopped at step {run.diverged.get('step')}", "red"))
    elif not run.train:
        progress.append(Text("nothing recorded yet", "yellow"))
    elif pace is not None:
        progress.append(Text(f"{_clock(pace * (run.steps - run.step))} left"))
        silent = time.time() - run.timing[max(run.timing)].get("time", math.inf)
        if silent > max(SILENCE, 10 * pace):
            progress.append(Text(f"no step for {_clock(silent)}", "yellow"))
    facts = []
    if run.train:
        line = run.train[run.step]
        facts.append(_number("loss", f"{line['loss']:.4f}"))
    if run.val:
        newest, best = run.val[max(run.val)], min(run.val.values(), key=lambda line: line["loss"])
        facts.append(_number("validation", f"{newest['loss']:.4f} at {newest['step']:,}"))
        facts.append(_number("best", f"{best['loss']:.4f} at {best['step']:,}"))
    if run.timing:
        speeds = [line["tokens_per_s"] for line in [*run.timing.values()][-50:]]
        facts.append(_number("tokens/s", f"{statistics.median(speeds):,.0f}"))
    if run.train:
        for key, name, form in (
            ("lr", "lr", ".2e"),
            ("muon_lr", "muon lr", ".2e"),
            ("connection_lr", "connection lr", ".2e"),
            ("grad_norm", "gradient norm", ".3g"),
        ):
            if key in line:
                facts.append(_number(name, f"{line[key]:{form}}"))
    return [*_flow(title, width), *_flow(progress, width), *_flow(facts, width)]


# --- the loss curve -------------------------------------------------------------------------------


def _curve(run: Followed, width: int, rows: int, glyphs: Glyphs) -> list[Text]:
    """The training loss as dots and the validation loss as points over all steps of the run."""
    steps = np.array(sorted(run.train))
    losses = np.array([run.train[step]["loss"] for step in steps])
    val = {step: line["loss"] for step, line in run.val.items()}
    # The first steps fall from so high that nothing else would be seen.
    late = losses[steps >= 0.05 * steps[-1]]
    low, high = min(late.min(), *val.values(), math.inf), max(late.max(), *val.values(), -math.inf)
    high = high if high > low else low + 1e-3
    label = max(len(f"{low:.2f}"), len(f"{high:.2f}"))
    columns = max(8, width - label - 1)
    across, down = glyphs.dots
    dots = columns * across
    place = (steps - 1) * (dots - 1) // max(1, run.steps - 1)

    def height(loss):
        """Dots from the top, inside."""
        return np.clip((high - loss) / (high - low), 0, 1) * (rows * down - 1)

    total = np.bincount(place, losses, dots)[: place[-1] + 1]
    count = np.bincount(place, minlength=dots)[: place[-1] + 1]
    filled = np.flatnonzero(count)
    y = (
        height(np.interp(np.arange(filled[-1] + 1), filled, total[filled] / count[filled]))
        .round()
        .astype(int)
    )
    grid = [[0] * columns for _ in range(rows)]
    for x in range(filled[0], filled[-1] + 1):
        # A steep piece is a vertical line from the dot before.
        before = y[max(x - 1, filled[0])]
        step = 1 if y[x] >= before else -1
        for dot in [*range(before + step, y[x] + step, step)] or [y[x]]:
            grid[dot // down][x // across] |= _braille(x % across, dot % down)
    shape = (lambda bits: chr(0x2800 + bits)) if across == 2 else (lambda bits: "*")
    lines = []
    for row, cells in enumerate(grid):
        name = f"{high:.2f}" if row == 0 else f"{low:.2f}" if row == rows - 1 else ""
        lines.append(
            Text.assemble(
                (f"{name:>{label}} ", "dim"),
                ("".join(shape(bits) if bits else " " for bits in cells), "cyan"),
            )
        )
    for step, loss in val.items():
        row = int(height(loss).round()) // down
        column = (step - 1) * (columns - 1) // max(1, run.steps - 1)
        line = lines[row].plain
        at = label + 1 + column
        lines[row] = Text.assemble(
            lines[row][:at], (glyphs.point, "bold yellow"), lines[row][at + 1 :]
        ) if at < len(line) else lines[row]  # fmt: skip
    legend = Text.assemble(
        " " * (label + 1), ("loss in training", "cyan"), "   ", (f"{glyphs.point} validation", "bold yellow"),
    )  # fmt: skip
    return [*lines, legend]


def _braille(x: int, y: int) -> int:
    return ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))[x][y]


# --- rows over depth ------------------------------------------------------------------------------

_LABEL = 13


def _depth(run: Followed, width: int, glyphs: Glyphs) -> list[Text]:
    steps = sorted(run.depth)
    first, line = run.depth[steps[0]], run.depth[steps[-1]]
    blocks = run.config["model"]["n_layer"]
    columns = Columns(2 * blocks, max(8, width - _LABEL - 19))
    title = [f"depth at step {line['step']:,}", f"{_count(blocks, 'block')}, attention and MLP of each"]
    if first is not line:
        title.append(f"change since step {first['step']:,}")
    found = _flow([Text(part, "bold") for part in title], width)

    def bars(label, values, largest=None):
        found.append(columns.bars(label, values, glyphs, largest))

    if "gate_mean" in line:
        bars("gate mean", line["gate_mean"])
        if first is not line and "gate_mean" in first:
            found.append(columns.signs("  change", _difference(line["gate_mean"], first["gate_mean"])))
        bars("gate largest", line["gate_max"])
    if "stream_rms" in line:
        streams = [*itertools.zip_longest(*(entry or () for entry in line["stream_rms"]))]
        largest = max((x for values in streams for x in values if x is not None), default=None)
        if len(streams) <= MOST_STREAMS:
            for number, values in enumerate(streams):
                bars(f"stream {number} RMS", values, largest)
        else:
            for what, of in (("least", min), ("most", max)):
                extremes = [
                    of((x for x in entry or () if x is not None), default=None)
                    for entry in line["stream_rms"]
                ]
                bars(f"streams {what}", extremes, largest)
    bars("read RMS", line["hidden_rms"])
    bars("output RMS", line["output_rms"])
    if line.get("gradient_rms"):
        bars("gradient RMS", [x for x in line["gradient_rms"] for _ in range(2)])
    found.append(columns.axis("block"))
    return found


def _difference(now: list, before: list) -> list:
    return [None if a is None or b is None else a - b for a, b in zip(now, before, strict=True)]


class Columns:
    """Where sublayers stand: several columns for each, or several sublayers in one column, of ``width`` at most."""

    def __init__(self, sublayers: int, width: int):
        self.sublayers = sublayers
        self.together = -(-sublayers // width)
        self.each = min(4, max(1, width // sublayers))

    def _means(self, values) -> list[float | None]:
        k = self.together
        groups = [values[i : i + k] for i in range(0, len(values), k)]
        there = [[x for x in group if x is not None] for group in groups]
        return [statistics.fmean(group) if group else None for group in there]

    def _row(self, label: str, values, cell, shown: str) -> Text:
        row = Text(f"{label:<{_LABEL}}")
        for value in self._means(list(values)):
            row.append(*((" " * self.each, "") if value is None else cell(value)))
        return row.append(f" {shown}", "default")

    def bars(self, label: str, values, glyphs: Glyphs, largest: float | None = None) -> Text:
        """As high as the value over the largest: of the row, or given."""
        there = [x for x in values if x is not None]
        if not there:
            return Text(f"{label:<{_LABEL}}not finite", "red")
        top = max(there) if largest is None else largest

        def cell(value):
            share = min(1.0, max(0.0, value / top)) if top > 0 else 0.0
            r, g, b = colours(np.array([0.25 + 0.75 * share]))[
                0
            ]  # the darkest colours are none on a dark ground
            glyph = glyphs.bars[min(len(glyphs.bars) - 1, int(share * len(glyphs.bars)))]
            return glyph * self.each, f"rgb({r},{g},{b})"

        return self._row(label, values, cell, f"{min(there):.3g} to {max(there):.3g}")

    def signs(self, label: str, values) -> Text:
        """Which way each value points; a dot is less than a tenth of the largest."""
        there = [x for x in values if x is not None]
        if not there:
            return Text(f"{label:<{_LABEL}}")
        top = max(map(abs, there))

        def cell(value):
            if abs(value) <= 0.1 * top:
                return "." * self.each, "dim"
            return ("+" * self.each, "red") if value > 0 else ("-" * self.each, "blue")

        return self._row(label, values, cell, f"{min(there):+.2g} to {max(there):+.2g}")

    def axis(self, label: str) -> Text:
        """Numbers of blocks below their first column."""
        row = f"{label:<{_LABEL}}"
        for block in range(self.sublayers // 2):
            at = _LABEL + 2 * block // self.together * self.each
            if len(row) < at or at == _LABEL == len(row):
                row = f"{row:<{at}}{block}"
        return Text(row, "dim")


def _numbers(run: Followed, width: int) -> list[Text]:
    """One line a sublayer; columns that do not fit are left out from the right."""
    steps = sorted(run.depth)
    first, line = run.depth[steps[0]], run.depth[steps[-1]]
    count = len(line["hidden_rms"])
    nothing = [None] * count
    gates, before = line.get("gate_mean", nothing), first.get("gate_mean", nothing)
    gradients = [x for x in line.get("gradient_rms") or nothing[: count // 2] for _ in range(2)]

    def streams(i):
        there = [x for x in (line.get("stream_rms", nothing)[i] or ()) if x is not None]
        return f"{min(there):.3g} to {max(there):.3g}" if there else ""

    def plain(values, form=".3g"):
        return ["" if x is None else f"{x:{form}}" for x in values]

    columns = {
        "sublayer": [sublayer_name(i) for i in range(count)],
        "gate": plain(gates),
        "change": plain(_difference(gates, before), "+.2g"),
        "gradient": plain(gradients, ".2e"),
        "read": plain(line["hidden_rms"]),
        "output": plain(line["output_rms"]),
        "streams": [streams(i) for i in range(count)],
        "largest gate": plain(line.get("gate_max", nothing)),
    }
    rows = [""] * (count + 1)
    for title, cells in columns.items():
        if not any(cells):
            continue
        size = max(map(len, (title, *cells)))
        if len(rows[0]) + 2 + size > width:
            break
        gap = "  " if rows[0] else ""
        rows = [f"{row}{gap}{cell:>{size}}" for row, cell in zip(rows, [title, *cells], strict=True)]
    return [Text(rows[0], "dim"), *map(Text, rows[1:])]
