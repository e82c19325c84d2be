"""A study's file: which runs there are, and which tables they fill.

::

    title = "..."
    [train]                     # fields of the training configuration by their names; preset is where it starts
    preset = "quick"
    data = ["$TEXT/prose-*.txt.xz"]
    test_fraction = 0.05
    [test]
    tokens = 262144             # how much of the test split is read, once, by a finished run

    [[table]]
    name = "rates"
    kind = "tune"
    rows = ["prenorm"]
    seeds = 2
    points = [{lr = 1e-3, muon_lr = 3e-3}, {lr = 3e-3, muon_lr = 1e-2}]

    [[table]]
    name = "main"
    rows = ["prenorm", "mgr-competitive:n_streams=8", {name = "wide", residual = "prenorm", d_model = 96}]
    seeds = 5
    error = "pooled"            # of differences: each row's own ("paired", unless said), or one for all rows
    tuned = "rates"             # each row takes its own best point of that table,
    tuned_row = "prenorm"       # or all take that of one row

A table is of one ``kind``: ``compare`` (rows against a baseline row, seed by seed), ``tune`` (rows at several
points, of which the one with the lowest validation loss is a row's best) or ``scaling`` (rows at several sizes).
Runs that two tables have in common are done once.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig, GPTConfig, OptimConfig, TrainConfig, residual_label
from ..errors import UserError, suggest
from ..presets import preset
from ..residuals import registry
from ..train import MAY_CHANGE_ON_RESUME

KINDS = ("compare", "tune", "scaling")
ERRORS = ("paired", "pooled")
# Fields that came after the first records. At these values a run is what it was without them, and keeps its key:
# whoever adds a field to OptimConfig or an option to a connection enters it here, and never changes an entry.
SINCE_THE_FIRST_RECORDS: dict[str, dict[str, Any]] = {
    "optim": {"connection_lr": 1.0},
    "model.residual_options": {"stream_dtype": "model", "last_read": "pool", "separate_streams": False},
}
"""Part of the configuration -> field -> the value at which it is no part of a run's key."""
NO_PART_OF_A_RUN = (*MAY_CHANGE_ON_RESUME, "eval_interval", "record_depth", "seed")
"""Fields that change no result, and the seed, which has a place of its own."""

_PARTS = {"model": GPTConfig, "data": DataConfig, "optim": OptimConfig}
_WHERE = {f.name: None for f in dataclasses.fields(TrainConfig) if f.name not in (*_PARTS, "seed")} | {
    f.name: part
    for part, cls in _PARTS.items()
    for f in dataclasses.fields(cls)
    if f.name not in ("vocab_size", "residual_options")
}
"""Field -> the part of ``TrainConfig`` that it is in."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    changes: dict[str, Any]
    """Fields of the training configuration, ``residual`` among them."""


@dataclass(frozen=True)
class Point:
    """One of the values that a ``tune`` table tries, or one size of a ``scaling`` table."""

    name: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    kind: str
    text: str
    """What the table is for: a paragraph of the page, Markdown."""
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    baseline: str
    """Name of the row that others are compared with."""
    error: str
    """What differences are held against: one of ``ERRORS`` (:mod:`depthmix.study.statistics`)."""
    changes: dict[str, Any]
    points: tuple[Point, ...]
    """Of a ``compare`` table: one, without changes."""
    tuned: str | None
    """The ``tune`` table that settles some of the rows' fields."""
    tuned_row: str | None
    """The row of it whose best point all rows take; None: each its own."""


@dataclass(frozen=True)
class Use:
    """A run's place: table, row, point and seed."""

    table: str
    row: str
    point: str
    seed: int


@dataclass(frozen=True)
class Cell:
    """One run."""

    key: str
    """Sixteen hexadecimal digits of all that decides its result."""
    config: TrainConfig

    @property
    def name(self) -> str:
        """Name of its folder."""
        from ..config import folder_name

        return f"{folder_name(self.config.model.label)}-{self.key[:8]}-s{self.config.seed}"


@dataclass(frozen=True)
class Study:
    path: Path
    name: str
    title: str
    text: str
    base: TrainConfig
    """``data.data`` as written: neither ``~`` nor ``$NAME`` is replaced."""
    test_tokens: int
    results: Path
    """Folder of ``.jsonl``, one line a run."""
    page: Path
    """The Markdown that is made from them."""
    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        return next(table for table in self.tables if table.name == name)

    def uses(
        self, table: Table, best: Mapping[tuple[str, str], Point] = {}
    ) -> Iterable[tuple[Use, Cell | None]]:
        """The table's runs in the order of their seeds; None for one that waits for a ``tune`` table.

        ``best``: (``tune`` table, row) -> its best point, of those that are settled.
        """
        for seed in table.seeds:
            for point in table.points:
                for row in table.rows:
                    yield (
                        Use(table.name, row.name, point.name, seed),
                        self._cell(table, row, point, seed, best),
                    )

    def _cell(self, table, row, point, seed, best) -> Cell | None:
        settled: dict[str, Any] = {}
        if table.tuned is not None:
            found = best.get((table.tuned, table.tuned_row or row.name))
            if found is None:
                return None
            settled = found.changes
        where = f"{self.path}: table {table.name}, row {row.name}"
        config = changed(self.base, {**table.changes, **settled, **row.changes, **point.changes}, where)
        config = dataclasses.replace(config, seed=seed)
        return Cell(key_of(config, self.test_tokens), config)


def changed(config: TrainConfig, changes: Mapping[str, Any], where: str) -> TrainConfig:
    """``config`` with other values in some fields, each named without its part.

    Raises ``UserError`` for a name that no field has and for a value that none takes.
    """
    parts: dict[str | None, dict[str, Any]] = {None: {}, **{part: {} for part in _PARTS}}
    for name, value in changes.items():
        if name not in _WHERE:
            raise UserError(f"{where}: " + suggest(name, _WHERE, "field of the training configuration"))
        parts[_WHERE[name]][name] = value
    if "residual" in parts["model"]:
        parts["model"] = {"residual_options": {}, **parts["model"]}
    try:
        built = {
            part: dataclasses.replace(getattr(config, part), **values)
            for part, values in parts.items()
            if part is not None and values
        }
        return dataclasses.replace(config, **built, **parts[None])
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def key_of(config: TrainConfig, test_tokens: int) -> str:
    """The key of a run: the same for two configurations that mean the same training, whatever its data's place.

    Connections are taken with all of their options, and without the fields of others that they do not read.
    """
    values = config.to_dict()
    model = values["model"]
    entry = registry.find(config.model.residual)
    options = registry.make_options(config.model.residual, config.model.residual_options)
    model["residual_options"] = dataclasses.asdict(options)
    for name in _fields_of_connections() - set(entry.fields):
        del model[name]
    for part, fields in SINCE_THE_FIRST_RECORDS.items():
        found = functools.reduce(dict.__getitem__, part.split("."), values)
        for name, default in fields.items():
            if found.get(name) == default:
                del found[name]
    # It follows from the data's tokenizer.
    del model["vocab_size"]
    for name in NO_PART_OF_A_RUN:
        part, _, last = name.rpartition(".")
        del (values[part] if part else values)[last]
    decides = {"format": 1, "config": values, "seed": config.seed, "test_tokens": test_tokens}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _fields_of_connections() -> set[str]:
    return {name for known in registry.available_residuals() for name in registry.find(known).fields}


# ---- reading the file ---------------------------------------------------------------------------


def load(path: str | Path) -> Study:
    """Read a study's file. ``UserError`` names the table and the field of what is wrong in it."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read study {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"study {path} is not valid TOML: {error}") from error
    take = _Taker(values, str(path))
    title = take("title", str, path.stem)
    text = take("text", str, "").strip()
    folder = path.resolve().parent
    results = folder / take("results", str, f"../results/{path.stem}")
    page = folder / take("page", str, f"../docs/results/{path.stem}.md")
    train = take("train", dict, {})
    test = _Taker(take("test", dict, {}), f"{path}: [test]")
    test_tokens = test("tokens", int, 262144)
    test.end()
    tables = take("table", list)
    take.end()
    if test_tokens < 1:
        raise UserError(f"{path}: [test] tokens must be at least 1, got {test_tokens}")
    try:
        base = preset(train.pop("preset", "quick"))
    except UserError as error:
        raise UserError(f"{path}: [train] {error}") from error
    base = changed(base, {"test_fraction": 0.05, **train}, f"{path}: [train]")
    if not base.data.test_fraction:
        raise UserError(
            f"{path}: [train] test_fraction must be above 0: results are of text that no run has seen"
        )
    found: list[Table] = []
    for place, one in enumerate(tables):
        if not isinstance(one, dict):
            raise UserError(f"{path}: table must be written as [[table]]")
        found.append(_table(one, f"{path}: table {one.get('name', place + 1)}", found))
    study = Study(
        path, path.stem, title, text, base, test_tokens, Path(os.path.normpath(results)),
        Path(os.path.normpath(page)), tuple(found),
    )  # fmt: skip
    _try(study)
    return study


def _table(values: dict, where: str, before: list[Table]) -> Table:
    take = _Taker(values, where)
    name = take("name", str)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise UserError(f"{where}: name must be of lower-case letters, digits and hyphens, got {name!r}")
    if name in [table.name for table in before]:
        raise UserError(f"{where}: there is a table of this name already")
    kind = take("kind", str, "compare")
    if kind not in KINDS:
        raise UserError(f"{where}: " + suggest(kind, KINDS, "kind"))
    rows = tuple(_row(one, where) for one in take("rows", list))
    names = [row.name for row in rows]
    if not rows:
        raise UserError(f"{where}: rows is empty; name at least one residual connection")
    for one in names:
        if names.count(one) > 1:
            raise UserError(f"{where}: two rows are called {one!r}; give one of them another name")
    seeds = take("seeds", int, 1)
    first = take("first_seed", int, 0)
    if seeds < 1 or first < 0:
        raise UserError(f"{where}: seeds must be at least 1 and first_seed 0, got {seeds} and {first}")
    baseline = take("baseline", str, "prenorm" if "prenorm" in names else names[0])
    if baseline not in names:
        raise UserError(f"{where}: baseline: " + suggest(baseline, names, "row"))
    error = take("error", str, "paired")
    if error not in ERRORS:
        raise UserError(f"{where}: error: " + suggest(error, ERRORS, "kind of error"))
    points = _points(take, kind, where)
    tuned, tuned_row = take("tuned", str, None), take("tuned_row", str, None)
    if tuned is None and tuned_row is not None:
        raise UserError(f"{where}: tuned_row {tuned_row!r} needs tuned, the name of a table of kind tune")
    if tuned is not None:
        tables = {table.name: table for table in before if table.kind == "tune"}
        if tuned not in tables:
            raise UserError(f"{where}: tuned: " + suggest(tuned, tables, "table of kind tune before it"))
        there = [row.name for row in tables[tuned].rows]
        for wanted in [tuned_row] if tuned_row else names:
            if wanted not in there:
                raise UserError(f"{where}: table {tuned} tunes no row {wanted!r}; it has {', '.join(there)}")
    table = Table(
        name, take("title", str, name), kind, take("text", str, "").strip(), rows,
        tuple(range(first, first + seeds)), baseline, error, take("train", dict, {}), points, tuned, tuned_row,
    )  # fmt: skip
    take.end()
    return table


def _row(value, where: str) -> Row:
    if isinstance(value, str):
        return Row(value, {"residual": value})
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise UserError(
            f"{where}: a row is a residual connection, or {{name = ..., FIELD = VALUE, ...}}; got {value!r}"
        )
    return Row(value["name"], {key: given for key, given in value.items() if key != "name"})


def _points(take: "_Taker", kind: str, where: str) -> tuple[Point, ...]:
    """``points`` of a tune table, ``sizes`` of a scaling table."""
    if kind == "compare":
        return (Point("", {}),)
    word = "points" if kind == "tune" else "sizes"
    given = take(word, list)
    if len(given) < 2 or not all(isinstance(one, dict) for one in given):
        raise UserError(f"{where}: {word} must be two or more of {{FIELD = VALUE, ...}}, got {given!r}")
    points = [
        Point(
            str(one.get("name", ", ".join(f"{key} {_short(value)}" for key, value in one.items()))),
            {key: value for key, value in one.items() if key != "name"},
        )
        for one in given
    ]
    if len({point.name for point in points}) < len(points):
        raise UserError(f"{where}: two of {word} have the same name")
    return tuple(points)


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _try(study: Study) -> None:
    """Build the configuration of every run, so that what is wrong shows before the first one begins."""
    best = {
        (table.name, row.name): point
        for table in study.tables
        if table.kind == "tune"
        for row in table.rows
        for point in table.points
    }
    for table in study.tables:
        keys: dict[tuple, str] = {}
        for use, cell in study.uses(table, best):
            where = f"{study.path}: table {table.name}, row {use.row}"
            if table.seeds[0] == use.seed and cell is not None:
                other = keys.setdefault((use.point, cell.key), use.row)
                if other != use.row:
                    raise UserError(f"{where} is the same run as row {other}; leave one of them out")


class _Taker:
    """Takes the fields of a TOML table one by one, each of its type; at the end nothing must be left."""

    def __init__(self, values: dict, where: str):
        self.left, self.where = dict(values), where
        self.known: list[str] = []

    def __call__(self, name: str, kind: type, *default):
        self.known.append(name)
        if name not in self.left:
            if not default:
                raise UserError(f"{self.where}: {name} is missing")
            return default[0]
        value = self.left.pop(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            words = {str: "text", int: "a whole number", dict: "a table", list: "a list"}
            raise UserError(f"{self.where}: {name} must be {words[kind]}, got {value!r}")
        return value

    def end(self) -> None:
        for name in self.left:
            raise UserError(f"{self.where}: " + suggest(name, self.known, "field"))


def expanded(config: TrainConfig) -> TrainConfig:
    """``config`` with ``$NAME`` and ``~`` in the paths of its data replaced.

    Raises ``UserError`` for a variable that is not set.
    """
    paths = []
    for path in config.data.data:
        whole = os.path.expanduser(os.path.expandvars(path))
        missing = re.search(r"\$\{?(\w+)", whole)
        if missing:
            raise UserError(
                f"data {path}: the environment variable {missing[1]} is not set; set it to the text's folder"
            )
        paths.append(whole)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data=tuple(paths)))


def label(config: TrainConfig) -> str:
    """The connection with its own options."""
    return residual_label(dataclasses.asdict(config.model))
