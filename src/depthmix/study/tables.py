"""A study's records as its tables: what the page prints and the figures draw."""

import statistics as builtin
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..report.table import mean_and_error
from .declare import Point, Study, Table
from .queue import best_points
from .records import Record
from .statistics import (
    LEVEL,
    Multiplier,
    Paired,
    PowerLaw,
    compute_multiplier,
    fit_power_law,
    holm,
    paired,
    pooled,
)


@dataclass(frozen=True)
class RowResult:
    """A row at one point of its table."""

    name: str
    point: str
    runs: dict[int, Record]
    """Seed -> record, of those that have ended."""
    wanted: int
    """Runs that there shall be."""
    difference: Paired | None = None
    """Of the test loss to the baseline's; none in a ``tune`` table."""
    p: float | None = None
    """Corrected for the number of rows of the table."""

    @property
    def finished(self) -> dict[int, Record]:
        return {seed: run for seed, run in self.runs.items() if not run.diverged}

    @property
    def diverged(self) -> int:
        return len(self.runs) - len(self.finished)

    def mean(self, measure: str) -> tuple[float | None, float | None]:
        """Mean and standard error over the seeds that have finished."""
        return mean_and_error([run[measure] for run in self.finished.values() if run[measure] is not None])

    def depth(self, measure: str) -> np.ndarray | None:
        """A measure of :func:`~depthmix.study.records.depth_of` by sublayer or block: mean over the seeds that have it.

        NaN where no such seed has a number; None where there is no number at all.
        """
        found = [
            run["depth"][measure]
            for run in self.finished.values()
            if run["depth"] is not None and measure in run["depth"]
        ]
        values = np.array(found, dtype=float)
        count = np.isfinite(values).sum(0)
        if not count.any():
            return None
        return np.where(count > 0, np.nansum(values, 0), np.nan) / np.maximum(count, 1)

    @property
    def verdict(self) -> str:
        """``lower`` or ``higher`` than the baseline where the corrected p is below 5 %, else ``none``."""
        if self.difference is None or self.p is None or self.p >= LEVEL:
            return "none"
        return "lower" if self.difference.mean < 0 else "higher"


@dataclass(frozen=True)
class Fit:
    """A row of a ``scaling`` table."""

    name: str
    law: PowerLaw | None
    multiplier: Multiplier | None
    """None for the baseline."""
    points: list[tuple[float, float, str, int]]
    """Compute (FLOPs), test loss, size and seed of each run."""


@dataclass(frozen=True)
class TableResult:
    table: Table
    rows: list[RowResult]
    """For each point all rows, in the file's order."""
    best: dict[str, Point]
    """Of a ``tune`` table: row -> best point, of those that are settled."""
    fits: list[Fit]
    """Of a ``scaling`` table."""
    settled: dict[str, Point]
    """Row -> the point of the ``tune`` table that it takes, where the table names one."""

    @property
    def done(self) -> int:
        return sum(len(row.runs) for row in self.rows)

    @property
    def wanted(self) -> int:
        return sum(row.wanted for row in self.rows)

    def row(self, name: str, point: str = "") -> RowResult:
        return next(row for row in self.rows if (row.name, row.point) == (name, point))


def tables_of(study: Study, records: Mapping[str, Record]) -> list[TableResult]:
    """All tables, as far as their runs have ended."""
    best = best_points(study, records)
    return [_table(study, table, records, best) for table in study.tables]


def _table(study: Study, table: Table, records: Mapping[str, Record], best) -> TableResult:
    runs: dict[tuple[str, str], dict[int, Record]] = {}
    for use, cell in study.uses(table, best):
        found = runs.setdefault((use.row, use.point), {})
        if cell is not None and cell.key in records:
            found[use.seed] = records[cell.key]
    rows = []
    for point in table.points:
        differences = {} if table.kind == "tune" else _differences(table, point, runs)
        group = [
            RowResult(
                row.name, point.name, runs[row.name, point.name], len(table.seeds), differences.get(row.name)
            )
            for row in table.rows
        ]
        rows += _corrected(group)
    settled = {}
    if table.tuned is not None:
        settled = {row.name: best.get((table.tuned, table.tuned_row or row.name)) for row in table.rows}
    return TableResult(
        table,
        rows,
        {row.name: best[table.name, row.name] for row in table.rows if (table.name, row.name) in best},
        _fits(table, rows) if table.kind == "scaling" else [],
        {name: point for name, point in settled.items() if point is not None},
    )


def _differences(table: Table, point: Point, runs) -> dict[str, Paired]:
    """Row -> difference of its test loss to the baseline's, by the error that the table asks for."""
    losses = {
        row.name: {
            seed: run["test_loss"] for seed, run in sorted(_finished(runs[row.name, point.name]).items())
        }
        for row in table.rows
    }
    if table.error == "pooled":
        return pooled(losses, table.baseline)
    base = losses.pop(table.baseline)
    found = {
        name: paired([loss - base[seed] for seed, loss in mine.items() if seed in base])
        for name, mine in losses.items()
    }
    return {name: one for name, one in found.items() if one is not None}


def _finished(runs: Mapping[int, Record]) -> dict[int, Record]:
    return {seed: run for seed, run in runs.items() if not run.diverged}


def _corrected(rows: list[RowResult]) -> list[RowResult]:
    values = holm([None if row.difference is None else row.difference.p for row in rows])
    return [
        RowResult(row.name, row.point, row.runs, row.wanted, row.difference, p)
        for row, p in zip(rows, values, strict=True)
    ]


def compute_of(run: Record) -> float:
    """Training FLOPs of a run: those of the matrix products (:func:`depthmix.info.forward_flops`), three times."""
    return run["flops_per_token"] * run["tokens"]


def _fits(table: Table, rows: list[RowResult]) -> list[Fit]:
    def runs_of(name: str) -> dict[tuple[str, int], Record]:
        return {
            (row.point, seed): run for row in rows if row.name == name for seed, run in row.finished.items()
        }

    def law_of(runs) -> PowerLaw | None:
        return fit_power_law(
            [compute_of(run) for run in runs.values()], [run["test_loss"] for run in runs.values()]
        )

    base = runs_of(table.baseline)
    law = law_of(base)
    fits = []
    for row in table.rows:
        mine = runs_of(row.name)
        multiplier = None
        if row.name != table.baseline and law is not None:
            pairs = [
                (base[at]["test_loss"], compute_of(base[at]), run["test_loss"], compute_of(run))
                for at, run in mine.items()
                if at in base
            ]
            multiplier = compute_multiplier(pairs, law)
        points = [(compute_of(run), run["test_loss"], size, seed) for (size, seed), run in mine.items()]
        fits.append(Fit(row.name, law_of(mine), multiplier, points))
    return fits


def spread_between_seeds(result: TableResult) -> float | None:
    """Median over rows of the standard deviation of the test loss between seeds."""
    found = [
        builtin.stdev([run["test_loss"] for run in row.finished.values()])
        for row in result.rows
        if len(row.finished) > 1
    ]
    return builtin.median(found) if found else None
