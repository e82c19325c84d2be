"""``depthmix study``: run what a study's file declares, and make its page."""

import importlib.util
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from .. import flags
from ..compare import lock_folder, prepare_data
from ..errors import EXIT_USAGE, UserError, suggest


@dataclass(frozen=True)
class StudyCommand:
    """Run a declared study: every run that has no result yet, over the devices there are; then its tables and page.

    The same command goes on after any end. What is in the results is not run again, on whatever machine it was run.

    Example: depthmix study studies/tiny.toml --jobs 2
    """

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The study (.toml)."""
    tables: tuple[str, ...] = ()
    """Run these tables only, by their names, commas or spaces between. Default: all."""
    jobs: int = 1
    """Runs side by side on the CPU, each with --threads-per-run threads."""
    threads_per_run: int | None = None
    """CPU threads of a run. Default: the cores divided by --jobs."""
    devices: tuple[str, ...] = ()
    """GPUs by their numbers, one run at a time on each (with --processes, on so many of them together)."""
    processes: int = 1
    """Processes of a run, started by torchrun."""
    scheduler: tuple[str, ...] = ()
    """Hand the runs to a scheduler through submitit (extra study): key=value, for example cluster=slurm
    slurm_partition=gpu gpus_per_node=1 timeout_min=600. --jobs is how many are queued or running at a time."""
    out: Path | None = None
    """Folder of the run folders. Default: runs/study-NAME."""
    results_file: str | None = None
    """Name of the .jsonl that this machine adds to. Default: that of its device."""
    keep: FlagCreatePairsOff[bool] = False
    """Keep the checkpoints of finished runs."""
    plan: FlagCreatePairsOff[bool] = False
    """Run nothing: say which runs there are, which are done, and which wait for others."""
    report: FlagCreatePairsOff[bool] = False
    """Run nothing: make tables, figures and page again from the results alone."""


def main(argv: list[str]) -> int:
    """The verb ``study``; returns its exit status."""
    from .declare import load
    from .records import read_records

    args = flags.parse(StudyCommand, argv, "study")
    for name in ("jobs", "threads_per_run", "processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    study = load(args.file)
    names = [table.name for table in study.tables]
    tables = [name for words in args.tables for name in words.split(",") if name] or names
    for name in tables:
        if name not in names:
            raise UserError("--tables: " + suggest(name, names, "table"))
    records = read_records(study.results)
    if args.plan:
        return _say_plan(study, records, tables)
    status = 0 if args.report else _run(args, argv, study, records, tables)
    from .page import print_tables, write_page
    from .tables import tables_of

    try:
        page = write_page(study, records)
    except UserError as error:
        if args.report:
            raise
        # The runs are what took the time: they are kept whatever becomes of the page.
        print(f"depthmix: the results are in {study.results}, but there is no page: {error}", file=sys.stderr)
        return status or EXIT_USAGE
    print_tables(tables_of(study, records))
    print(f"page: {page}")
    return status


def _run(args: StudyCommand, argv: list[str], study, records, tables: list[str]) -> int:
    from .declare import expanded
    from .queue import StudyRunner, scheduler

    if importlib.util.find_spec("scipy") is None:
        print(
            'the page will need scipy, which is not installed: pip install "depthmix[study]"', file=sys.stderr
        )
    out = args.out or Path("runs") / f"study-{study.name}"
    again = "depthmix study " + shlex.join(argv)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    try:
        submit = scheduler(out, list(args.scheduler)) if args.scheduler else None
        places = _places(args)
        file = study.results / (args.results_file or f"{_device_name(args)}.jsonl")
        if not file.name.endswith(".jsonl") or Path(file.name) != Path(args.results_file or file.name):
            raise UserError(
                f"--results-file must be the name of a .jsonl, without a folder; got {args.results_file}"
            )
        runner = StudyRunner(
            out, study, records, again, lock, file=file, places=places, processes=args.processes, tables=tables,
            keep=args.keep, submit=submit,
        )  # fmt: skip
        if not runner.cells:
            print("every run that can begin has its result already")
            return 0
        texts = {cell.config.data: cell.config for cell in runner.known.values()}
        for config in texts.values():
            prepare_data(expanded(config), again)
            _check_test_split(expanded(config))
        return runner.run()
    finally:
        os.close(lock)


def _check_test_split(config) -> None:
    """Refuse a folder that was prepared without a test split, before hours are spent."""
    from ..data import open_dataset, prepare

    folder = prepare(config.data)
    if open_dataset(folder).test is None:
        raise UserError(f"{folder} has no test split; prepare the text again with --test-fraction")


def _places(args: StudyCommand):
    from .queue import Place

    devices = [name for words in args.devices for name in words.split(",") if name]
    if args.scheduler:
        return [Place({}) for _ in range(args.jobs)]
    if devices:
        if args.jobs != 1:
            raise UserError("--jobs is for the CPU; with --devices there is one run a device")
        if not all(name.isdecimal() for name in devices) or len(set(devices)) < len(devices):
            raise UserError(
                f"--devices takes numbers of GPUs, each once, for example 0,1; got {','.join(devices)}"
            )
        if len(devices) % args.processes:
            raise UserError(
                f"{len(devices)} --devices do not divide into groups of --processes {args.processes}"
            )
        groups = [devices[first : first + args.processes] for first in range(0, len(devices), args.processes)]
        return [Place({"CUDA_VISIBLE_DEVICES": ",".join(group)}) for group in groups]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = args.threads_per_run or max(1, cores // (args.jobs * args.processes))
    return [Place({"OMP_NUM_THREADS": str(threads)}) for _ in range(args.jobs)]


def _device_name(args: StudyCommand) -> str:
    """What the runs of this command are on, as the name of a file."""
    import torch

    from ..runs import file_name

    if torch.cuda.is_available():
        return file_name(torch.cuda.get_device_name(0)).lower()
    return "cpu"


def _say_plan(study, records, tables: list[str]) -> int:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from .queue import best_points

    best = best_points(study, records)
    shown = Table("table", "kind", "rows", "seeds", "runs", "done", "waiting for", box=SIMPLE_HEAD)
    for name in tables:
        table = study.table(name)
        uses = [cell for _, cell in study.uses(table, best)]
        waits = sum(cell is None for cell in uses)
        done = sum(cell is not None and cell.key in records for cell in uses)
        shown.add_row(
            name, table.kind, str(len(table.rows)), str(len(table.seeds)), str(len(uses)), str(done),
            f"{table.tuned} ({waits})" if waits else "",
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(shown)
    keys = {c.key for name in tables for _, c in study.uses(study.table(name), best) if c is not None}
    print(
        f"{len(keys)} different runs, {len(keys & set(records))} of them done (runs that tables share count once)"
    )
    return 0
