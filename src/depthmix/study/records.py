"""What is left of a study's runs: one line of JSON each, from which all tables and figures are made.

A line holds ``format``, ``key`` (:func:`depthmix.study.declare.key_of`), ``name``, ``status`` ("finished" or
"diverged"), ``config`` (of the training; paths of its data as the study's file has them), ``data`` (split ->
fingerprint), the measures of :data:`MEASURES`, ``curve`` (``step``, ``train_loss``: means over equal parts of the run;
``val_step``, ``val_loss``), ``depth`` (:func:`depth_of`), ``environment``, ``side_by_side`` (runs that shared the
machine), ``commit`` and ``ended`` (UTC). Losses are in nats a token, and None where a run diverged.
"""

import datetime
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import RunError, UserError
from ..report.records import parse_lines, read_json, read_lines, read_run
from ..source import commit
from .declare import Cell

FORMAT = 1
CURVE_POINTS = 60
IN_DEPTH = ("hidden_rms", "output_rms", "gate_mean", "gate_max", "gradient_rms")
MEASURES = (
    "steps", "tokens", "parameters", "connection_parameters", "train_loss", "val_loss", "best_val_loss", "test_loss",
    "test_tokens", "flops_per_token", "tokens_per_s", "peak_memory_bytes", "saved_bytes_per_token", "wall_seconds",
    "peak_flops",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One ended run."""

    key: str
    values: dict
    file: str
    """Name of the file that it stands in."""

    @property
    def seed(self) -> int:
        return self.values["config"]["seed"]

    @property
    def diverged(self) -> bool:
        return self.values["status"] == "diverged"

    def __getitem__(self, measure: str):
        return self.values.get(measure)


def read_records(folder: Path) -> dict[str, Record]:
    """Key -> record, of all ``.jsonl`` in ``folder``; of two records of one run the first counts.

    Raises ``RunError`` for a line that is no record, ``UserError`` where records are of different texts.
    """
    found: dict[str, Record] = {}
    seen: dict[tuple, str] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            values = next(iter(parse_lines(line)), None)
            if values is None:
                if number == len(lines):
                    continue  # torn: the process was killed while it wrote
                raise RunError(
                    f"{path}: line {number} is damaged; restore it from a copy, or remove the line"
                )
            if values.get("format") != FORMAT:
                raise UserError(
                    f"{path}: line {number} has format {values.get('format')!r}, this depthmix reads {FORMAT}"
                )
            record = Record(values["key"], values, path.name)
            found.setdefault(record.key, record)
            if values.get("data"):
                # One text may serve several tokenizers.
                kind = values["config"]["data"]["tokenizer"], tuple(values["config"]["data"]["data"])
                print_of = json.dumps(values["data"], sort_keys=True)
                if seen.setdefault(kind, print_of) != print_of:
                    raise UserError(
                        f"{path}: line {number} ({values['name']}) was made from other text than earlier lines: its "
                        f"files differ, or were tokenized differently. Remove one side; they cannot be compared"
                    )
    return found


def append_record(path: Path, values: dict) -> None:
    """Add a line, and wait until it is on the disk. A torn last line of an earlier process is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
        file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def record_of(cell: Cell, folder: Path, side_by_side: int) -> dict | None:
    """The line for the run in ``folder``; None where it has not ended."""
    result, test = read_json(folder / "result.json"), read_json(folder / "test.json")
    diverged = read_json(folder / "diverged.json")
    if result is None or test is None:
        if diverged is None:
            return None
        result, test = {"steps": diverged["step"]}, {}
    run = read_run(folder)
    measured = {**result, **test}
    return {
        "format": FORMAT,
        "key": cell.key,
        "name": cell.name,
        "status": "finished" if test else "diverged",
        "config": cell.config.to_dict(),
        "data": test.get("data"),
        **{name: measured.get(name) for name in MEASURES},
        "curve": curve(run.train, run.val),
        "depth": depth_of(folder),
        "environment": run.environment,
        "side_by_side": side_by_side,
        "commit": commit() or "unknown",
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def curve(
    train: dict[str, np.ndarray], val: dict[str, np.ndarray]
) -> dict[str, list[int] | list[float | None]]:
    """The run's course: training loss as means over ``CURVE_POINTS`` equal parts, validation loss as it was."""
    steps, losses = train["step"], train["loss"]
    parts = [part for part in np.array_split(np.arange(losses.size), CURVE_POINTS) if part.size]
    return {
        "step": [int(steps[part[-1]]) for part in parts],
        "train_loss": _rounded(losses[part].mean() for part in parts),
        "val_step": [int(step) for step in val["step"]],
        "val_loss": _rounded(val["loss"]),
    }


def depth_of(folder: Path) -> dict[str, list[float | None]] | None:
    """What the network did in depth at the end of the run in ``folder``; None where it recorded nothing.

    Of the last line of ``depth.jsonl`` (:mod:`depthmix.health`), as far as the connection has them: ``hidden_rms``,
    ``output_rms``, ``gate_mean``, ``gate_max`` by sublayer, ``gradient_rms`` by block, and ``sources`` by sublayer: how
    many streams or sources count in what is read behind it, ``(sum |w|)^2 / sum w^2`` of their mean weights w.
    """
    last = next(reversed(read_lines(folder / "depth.jsonl")), None)
    if last is None:
        return None
    found = {name: last[name] for name in IN_DEPTH if last.get(name) is not None}
    if "pool_mean" in last:
        found["sources"] = [_sources(weights) for weights in last["pool_mean"]]
    return {
        name: [None if value is None else float(f"{value:.4g}") for value in values]
        for name, values in found.items()
    }


def _sources(weights: list[float | None] | None) -> float | None:
    if weights is None or None in weights:
        return None
    w = np.abs(np.array(weights, dtype=float))
    return float(w.sum() ** 2 / (w**2).sum()) if w.any() else None


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]
