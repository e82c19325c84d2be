"""The runs of a study as a queue over the devices there are.

    OUT/cells/RUN.json, .log    what a run's process was asked for, and what it printed
    OUT/RUN/                    its run folder; checkpoints are dropped once it is finished
    RESULTS/DEVICE.jsonl        one line for each run that has ended (:mod:`depthmix.study.records`)

What has a line is done, on whatever machine. All else begins, or goes on where it was stopped.
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..compare import Cell as RunningCell
from ..compare import Runner
from ..errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError
from .declare import Cell, Point, Study, expanded
from .records import Record, append_record, record_of


def best_points(study: Study, records: Mapping[str, Record]) -> dict[tuple[str, str], Point]:
    """(``tune`` table, row) -> the point with the lowest mean validation loss, of rows whose runs have all ended.

    A point at which a seed diverged is none. The test split is not looked at.
    """
    best: dict[tuple[str, str], Point] = {}
    for table in study.tables:
        if table.kind != "tune":
            continue
        for row in table.rows:
            losses: dict[str, list[float | None]] = {point.name: [] for point in table.points}
            for use, cell in study.uses(table, best):
                if use.row == row.name:
                    record = None if cell is None else records.get(cell.key)
                    losses[use.point].append(None if record is None else record["val_loss"] or float("inf"))
            known = {name: [x for x in values if x is not None] for name, values in losses.items()}
            if any(len(known[name]) < len(values) for name, values in losses.items()):
                continue
            means = {name: statistics.fmean(values) for name, values in known.items()}
            name = min(means, key=means.__getitem__)
            if means[name] < float("inf"):
                best[table.name, row.name] = next(point for point in table.points if point.name == name)
    return best


@dataclass(frozen=True)
class Place:
    """Where one run at a time can be: variables of its process's environment."""

    variables: dict[str, str]


class StudyRunner(Runner):
    """Runs what has no record yet, table by table; what waits for a ``tune`` table joins when that is settled."""

    def __init__(
        self, out: Path, study: Study, records: dict[str, Record], again: str, lock: int, *, file: Path,
        places: list[Place], processes: int = 1, tables: list[str] | None = None, keep: bool = False, submit=None,
    ):  # fmt: skip
        super().__init__(out, {"cells": [], "failures": {}, "config": {"steps": 0}}, again, lock, len(places))
        self.study, self.records, self.file = study, records, file
        self.places, self.processes, self.keep, self.submit = places, processes, keep, submit
        self.tables = [table for table in study.tables if tables is None or table.name in tables]
        self.known: dict[str, Cell] = {}
        self.at: dict[int, subprocess.Popen | Submitted] = {}
        """Place -> the process that is there."""
        self.extend()

    def save(self) -> None:
        """Nothing: the records are the state."""

    def extend(self) -> None:
        """Add the runs that are settled now and have no record."""
        best = best_points(self.study, self.records)
        for table in self.tables:
            for _, cell in self.study.uses(table, best):
                if cell is None or cell.key in self.records or cell.name in self.known:
                    continue
                self.known[cell.name] = cell
                config = cell.config
                size = config.model.n_layer * config.model.d_model * config.tokens_per_step
                self.cells.append(
                    RunningCell(cell.name, config.model.label, config.seed, config.steps, float(size))
                )

    def _load(self, cell: RunningCell) -> None:
        if not self._record(cell):
            folder = self.out / cell.name
            if folder.exists() and not (folder / "config.json").exists():
                shutil.rmtree(folder)  # killed before it wrote anything

    def _end(self, active) -> None:
        super()._end(active)
        cell = active.cell
        if cell.state in ("finished", "failed"):
            self._record(cell)
        self.extend()

    def _record(self, cell: RunningCell) -> bool:
        """Write the run's line if it has ended."""
        found = record_of(self.known[cell.name], self.out / cell.name, self.jobs)
        if found is None:
            return False
        if found["status"] == "diverged":
            cell.state = "diverged"
        else:
            self._take_result(cell)
        append_record(self.file, found)
        self.records[found["key"]] = Record(found["key"], found, self.file.name)
        self.plan["failures"].pop(cell.name, None)
        if not self.keep:
            shutil.rmtree(self.out / cell.name / "checkpoints", ignore_errors=True)
        return True

    def request(self, cell: RunningCell) -> dict:
        config = expanded(self.known[cell.name].config)
        return {
            "config": config.to_dict(),
            "test_tokens": self.study.test_tokens,
            "processes": self.processes,
        }

    def command(self, config_file: Path, folder: Path) -> list[str]:
        return [sys.executable, "-m", "depthmix.study.cell", str(config_file), str(folder)]

    def launch(self, command: list[str], log):
        place = next(
            number
            for number in range(len(self.places))
            if number not in self.at or self.at[number].poll() is not None
        )
        variables = self.places[place].variables
        if self.submit is not None:
            process = self.submit(command, variables, Path(log.name))
        else:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0, pass_fds=(self.lock,),
                env=os.environ | variables,
            )  # fmt: skip
        self.at[place] = process
        return process

    def _finish(self) -> int:
        failed = [cell for cell in self.cells if cell.state == "failed"]
        self.complain(failed)
        return EXIT_FAILED if failed else 0


class Submitted:
    """A job of a scheduler (submitit) with the face of a process."""

    def __init__(self, job):
        self.job = job
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self.job.done():
            try:
                self.returncode = self.job.result()
            except Exception:
                # Cancelled by the scheduler or by us: what was saved goes on with the next command.
                self.returncode = EXIT_INTERRUPTED
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        import time

        began = time.monotonic()
        while (status := self.poll()) is None:
            if timeout is not None and time.monotonic() - began >= timeout:
                raise subprocess.TimeoutExpired("job", timeout)
            time.sleep(0.05)
        return status

    def send_signal(self, number: int) -> None:
        self.job.cancel(check=False)

    def kill(self) -> None:
        self.job.cancel(check=False)


class Task:
    """What a job runs; when the scheduler takes its machine away, it is put into the queue again and goes on."""

    def __init__(self, command: list[str], variables: dict[str, str], log: Path):
        self.command, self.variables, self.log = command, variables, log

    def __call__(self) -> int:
        with open(self.log, "ab") as log:
            ran = subprocess.run(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.variables,
            )
        return ran.returncode

    def checkpoint(self, *_):
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def scheduler(out: Path, words: list[str]):
    """``launch(command, variables, log)`` through submitit; ``words``: ``key=value`` parameters of its executor.

    ``cluster=slurm`` (the default where there is one) or ``local``; all else goes to the executor as it is
    (``slurm_partition``, ``timeout_min``, ``gpus_per_node`` ...).
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            '--scheduler needs a package that is not installed: pip install "depthmix[study]"'
        ) from error
    parameters: dict = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(
                f"--scheduler takes key=value, for example cluster=slurm timeout_min=600, got {word!r}"
            )
        parameters[key] = int(value) if value.lstrip("-").isdecimal() else value
    try:
        executor = submitit.AutoExecutor(folder=str(out / "jobs"), cluster=parameters.pop("cluster", None))
        executor.update_parameters(**parameters)
    except Exception as error:
        raise UserError(f"--scheduler {' '.join(words)}: {error}") from error
    return lambda command, variables, log: Submitted(executor.submit(Task(command, variables, log)))
