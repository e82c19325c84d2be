"""``depthmix compare``: the same model, data and seeds with several residual connections.

Every (connection, seed) is a *cell*: a process of its own that runs ``depthmix
train``, one after another, so that each has the machine to itself (tokens/s and
peak memory are its own) and a crash stays in its row. Seed k gives every
connection the same sublayer weights and the same batches, so differences are
taken seed by seed.

A connection is named by a spec (:mod:`depthmix.residuals.registry`), so that one
of them may take part several times with different options. Its canonical form is
the *label* that stands in tables and plots.

This process starts the cells, follows their ``metrics.jsonl`` and
``timing.jsonl`` for the display, passes signals on, and makes the table and the
report from the files they leave.

    OUT/compare.json            what was asked for, and which cells failed
    OUT/cells/CELL.json, .log   a cell's configuration and what its process printed
    OUT/CELL/                   its run folder
    OUT/results.json, loss.png, report.html
"""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import FlagCreatePairsOff

from . import flags
from .config import GPTConfig, TrainConfig, folder_name, from_dict
from .errors import EXIT_FAILED, EXIT_INTERRUPTED, Interrupted, UserError
from .report.records import parse_lines, read_json
from .report.write import write_atomically

DEFAULT_RESIDUALS = ("prenorm", "mgr-independent", "mgr-competitive")

ENDED = ("finished", "failed", "diverged")
"""States of a cell that is not run any more by this command."""

POLL_SECONDS = 0.25
"""Between two looks at the running cell."""
PLAIN_SECONDS = 10.0
"""Between two lines where the output is not a terminal."""


@dataclass(frozen=True)
class Compare:
    """Train the same model with several residual connections, one after another, and compare them.

    Ends with a table and a report.html. Ctrl-C saves and leaves with status 75; --resume goes on from there.

    Example: depthmix compare --recipe quick --residuals prenorm,mgr-competitive --seeds 3 --out runs/mine
    """

    training: flags.SharedFlags
    recipe: str = "quick"
    """Preset that all runs start from: quick, depth, xs, S, M or L; the options below change single values."""
    residuals: tuple[str, ...] = DEFAULT_RESIDUALS
    """Residual connections, with commas or spaces between, each with options where wanted:
    name:option=value. all stands for every one; `depthmix info --list` names them."""
    seeds: int = 1
    """Runs of each connection. From 2 on, standard errors and paired differences are printed."""
    match_params: bool = False
    """Widen the smaller models (d_model only) until each has as many parameters as the largest, within 1 %."""
    out: str | None = None
    """Folder for everything. Default: runs/compare-RECIPE."""
    resume: FlagCreatePairsOff[bool] = False
    """Go on with a stopped comparison: finished runs are kept, stopped ones continued, the rest started."""


@dataclass
class Cell:
    """One run of a comparison and what is known of it while it goes."""

    name: str
    residual: str
    """The connection's label."""
    seed: int
    steps: int
    size: float = 1.0
    """What a step of it is expected to cost, relative to the other cells."""
    state: str = "waiting"
    step: int = 0
    train_losses: list[float] = field(default_factory=list)
    val_loss: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    tokens_per_s: float | None = None
    seconds_per_step: float | None = None
    """Of wall time, evaluations and checkpoints included."""
    message: str = ""

    @property
    def train_loss(self) -> float | None:
        """Mean of the last 20 steps."""
        last = self.train_losses[-20:]
        return sum(last) / len(last) if last else None


def main(argv: list[str]) -> int:
    """The verb ``compare``; returns its exit status."""
    recipe = flags.given(argv, "--recipe")
    out = Path(flags.given(argv, "--out") or f"runs/compare-{recipe or 'quick'}")
    saved = read_json(out / "compare.json") if "--resume" in argv else None
    args = flags.parse(Compare, argv, "compare", _defaults(recipe, saved))
    plan = make_plan(args)
    if saved is not None:
        refuse_if_changed(saved, plan, out)
        plan["matched"], plan["target"] = saved.get("matched", {}), saved.get("target")
    else:
        refuse_if_taken(out, "comparison")
    again = "depthmix compare --out " + shlex.quote(str(out)) + " --resume"
    if plan["match_params"]:
        # Before anything is written: whether widths can be found depends on the request.
        match_widths(plan, prepare_data(from_dict(plan["config"]), again))
    (out / "cells").mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    try:
        runner = Runner(out, plan, again, lock)
        runner.save()
        prepare_data(from_dict(plan["config"]), again)
        return runner.run()
    finally:
        os.close(lock)


def _defaults(recipe: str | None, saved: dict | None) -> Compare:
    """What the options are compared with: the saved comparison when it goes on, else the preset."""
    if saved is not None:
        return Compare(
            training=flags.to_flags(from_dict(saved["config"]), flags.SharedFlags),
            recipe=saved["recipe"],
            residuals=tuple(saved["residuals"]),
            seeds=saved["seeds"],
            match_params=saved.get("match_params", False),
        )
    from .presets import preset

    return Compare(training=flags.to_flags(preset(recipe or "quick"), flags.SharedFlags))


def make_plan(args: Compare) -> dict:
    """``compare.json``: recipe, residuals, seeds, the shared configuration, and the cells in their order."""
    config = shared_config(args)
    residuals = labels(args.residuals, config.model)
    cells = [
        {"name": f"{folder_name(residual)}-s{seed}", "residual": residual, "seed": seed}
        for seed in range(config.seed, config.seed + args.seeds)
        for residual in residuals
    ]
    plan = {
        "recipe": args.recipe,
        "residuals": residuals,
        "seeds": args.seeds,
        "match_params": args.match_params,
        "target": None,
        "matched": {},
        "config": config.to_dict(),
        "cells": cells,
        "failures": {},
    }
    return json.loads(json.dumps(plan))


def shared_config(args) -> TrainConfig:
    """What all cells have in common; its own residual connection, PreNorm, is replaced in each."""
    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    return from_dict(dataclasses.asdict(args.training))


def labels(words: Sequence[str], shared: GPTConfig) -> list[str]:
    """The labels of the connections that ``--residuals`` names, in its order.

    ``all`` stands for every registered connection that is not named as well. A label is the spec with its
    options in the connection's order, without those that are in ``shared`` anyway.

    Raises ``UserError`` for an unknown name or option, and for two specs that mean the same.
    """
    from .residuals import available_residuals

    specs = [spec for word in words for spec in word.split(",") if spec]
    if not specs:
        raise UserError("--residuals names no residual connection; `depthmix info --list` names them all")
    if specs.count("all") > 1:
        raise UserError("--residuals names all more than once")
    named: dict[tuple, str] = {}
    for spec in specs:
        meaning = _label(spec, shared)[1] if spec != "all" else ("all",)
        if meaning in named:
            same = "" if named[meaning] == spec else f" ({named[meaning]} and {spec} mean the same)"
            raise UserError(f"--residuals names {spec} more than once{same}")
        named[meaning] = spec
    result = []
    for spec in specs:
        if spec == "all":
            every = [_label(name, shared) for name in available_residuals()]
            result += [label for label, meaning in every if meaning not in named]
        else:
            result.append(_label(spec, shared)[0])
    return result


def _label(spec: str, shared: GPTConfig) -> tuple[str, tuple]:
    """The label of ``spec``, and a value that is equal for specs that mean the same."""
    from .residuals import registry

    name, values = registry.parse_spec(spec)
    fields, own = registry.split_values(name, values)
    # Through the configuration, which refuses what no model could have.
    dataclasses.replace(shared, residual=spec, residual_options={})
    other = {key: value for key, value in fields.items() if value != getattr(shared, key)}
    given = {**other, **own}
    order = [key for key in registry.find(name).choices() if key in given]
    label = registry.format_spec(name, {key: given[key] for key in order})
    return label, (name, repr(registry.make_options(name, own)), *sorted(other.items()))


def cell_config(plan: dict, cell: dict) -> TrainConfig:
    """The configuration of one cell: the shared one, its connection and seed, its width where models are
    matched, and the changes of its own in ``cell["model"]``."""
    shared = from_dict(plan["config"])
    changes = {**plan.get("matched", {}).get(cell["residual"], {}), **cell.get("model", {})}
    model = dataclasses.replace(shared.model, residual=cell["residual"], residual_options={}, **changes)
    return dataclasses.replace(shared, model=model, seed=cell["seed"])


def match_widths(plan: dict, vocab_size: int) -> None:
    """Fill ``plan["matched"]``: label -> the fields of ``GPTConfig`` that make the models equally large.

    The target is the largest model's number of parameters. What is matched already stays: a connection
    that joins a comparison later is matched to the same target. One that cannot be built is left alone;
    its run will say why.
    """
    from .match import count_parameters, match_params

    models, counts = {}, {}
    for cell in plan["cells"]:
        label = cell["residual"]
        if label in models or label in plan["matched"]:
            continue
        models[label] = dataclasses.replace(cell_config(plan, cell).model, vocab_size=vocab_size)
        try:
            counts[label] = count_parameters(models[label])["total"]
        except UserError:
            continue
    if plan["target"] is None:
        plan["target"] = max(counts.values(), default=None)
    for label in counts:
        wide = match_params(models[label], plan["target"])
        plan["matched"][label] = {name: getattr(wide, name) for name in ("d_model", "n_head", "head_size")}


def refuse_if_taken(out: Path, what: str) -> None:
    """A new ``what`` needs a folder of its own."""
    # cells/ alone is what is left of one that was killed before it wrote its plan.
    if out.exists() and (not out.is_dir() or any(entry.name != "cells" for entry in out.iterdir())):
        raise UserError(
            f"{out} is there already; --resume goes on with the {what} in it, --out names another folder"
        )


def refuse_if_changed(saved: dict, plan: dict, out: Path, what: str = "comparison") -> None:
    """More seeds or connections may join a comparison; anything else would mix different experiments.

    Fields that alter no result (device, how often to save) may change, as for a single run.
    """
    from .train import MAY_CHANGE_ON_RESUME

    changes = []
    if saved["recipe"] != plan["recipe"]:
        changes.append(f"recipe: {saved['recipe']} there, {plan['recipe']} now")
    gone = [name for name in saved["residuals"] if name not in plan["residuals"]]
    if gone:
        changes.append(f"residuals: {', '.join(gone)} is there, but not asked for now")
    if saved.get("match_params", False) != plan.get("match_params", False):
        changes.append(
            "match_params: " + ("not there, but asked for now" if plan["match_params"] else "there")
        )
    if plan["seeds"] < saved["seeds"]:
        changes.append(f"seeds: {saved['seeds']} there, {plan['seeds']} now")
    # Through the classes, so that a field added since has its default on both sides.
    before, now = (_flat(from_dict(values["config"]).to_dict()) for values in (saved, plan))
    changes += [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and key not in ("model.residual", *MAY_CHANGE_ON_RESUME)
    ]
    if changes:
        raise UserError(
            f"{out} holds a different {what} ({'; '.join(changes)}); "
            f"leave these options out to go on with it, or start another one with --out"
        )


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def lock_folder(out: Path) -> int:
    """Hold ``out`` for this process and the cells it starts (they inherit the open file).

    So a cell that outlives a killed comparison still keeps a second one away.
    """
    descriptor = os.open(out / "cells" / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"a command, or a run it started, is still at work in {out}; wait for it or stop it first"
        ) from None
    except (ImportError, OSError):
        # No such locks on this system or file system: go on without.
        pass
    return descriptor


def prepare_data(config: TrainConfig, again: str) -> int:
    """Make the shards that all cells read, with a progress bar on the terminal; rows of the embedding."""
    from .data import open_dataset, prepare
    from .train import padded_vocabulary

    def stop(signum, frame):
        raise Interrupted(f"stopped while preparing the data\ngo on with: {again}")

    before = {number: signal.signal(number, stop) for number in _signals()}
    try:
        folder = prepare(config.data, progress=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return padded_vocabulary(open_dataset(folder).tokenizer.vocab_size)


def train_command(config_file: Path, folder: Path) -> list[str]:
    """The process of one cell; a run folder that is there already is gone on with."""
    command = [sys.executable, "-m", "depthmix", "train", "--config", str(config_file), "--out", str(folder)]
    return [*command, "--quiet", *(["--resume"] if folder.exists() else [])]


def _signals() -> list[int]:
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Runner:
    """Runs the cells, ``jobs`` at a time; each has ``threads`` threads where that is given."""

    plan_file = "compare.json"

    def __init__(
        self, out: Path, plan: dict, again: str, lock: int, jobs: int = 1, threads: int | None = None
    ):
        self.out = out
        self.plan = plan
        self.again = again
        self.lock = lock
        self.jobs = jobs
        self.threads = threads
        self.cells = [
            Cell(cell["name"], cell["residual"], cell["seed"], plan["config"]["steps"], cell.get("size", 1.0))
            for cell in plan["cells"]
        ]
        self.active: list[_Active] = []
        self.signals = 0

    def save(self) -> None:
        write_atomically(self.out / self.plan_file, (json.dumps(self.plan, indent=2) + "\n").encode())

    def run(self) -> int:
        """Run what is not finished, then print the table and write the report."""
        before = {number: signal.signal(number, self._on_signal) for number in _signals()}
        try:
            for cell in self.cells:
                self._load(cell)
            with _display(self) as show:
                while True:
                    while len(self.active) < self.jobs and not self._stopping() and (new := self._next()):
                        self._start(new)
                    if not self.active:
                        break
                    self._wait()
                    for active in self.active:
                        follow(active.cell, active.tails, active.pace)
                        if self.signals and active.process.poll() is None:
                            active.cell.state = "stopping"
                    show()
                    for active in [a for a in self.active if a.process.poll() is not None]:
                        self._end(active)
                        show()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        waiting = [cell for cell in self.cells if cell.state in ("interrupted", "waiting")]
        if waiting:
            raise Interrupted(
                f"stopped with {len(waiting)} of {len(self.cells)} runs unfinished; all steps so far are saved\n"
                f"go on with: {self.again}"
            )
        return self._finish()

    def _load(self, cell: Cell) -> None:
        """How ``cell`` stands from an earlier command."""
        if (self.out / cell.name / "result.json").exists():
            self._take_result(cell)

    def _next(self) -> Cell | None:
        """The cell to start now; None where none is left."""
        return next((cell for cell in self.cells if cell.state == "waiting"), None)

    def _stopping(self) -> bool:
        return bool(self.signals) or any(cell.state == "interrupted" for cell in self.cells)

    def _on_signal(self, signum, frame) -> None:
        """Pass the signal on: the cells finish their step, save and leave. The third one kills them."""
        self.signals += 1
        for active in self.active:
            if active.process.poll() is None:
                if self.signals >= 3:
                    active.process.kill()
                else:
                    active.process.send_signal(signum)

    def _start(self, cell: Cell) -> None:
        folder = self.out / cell.name
        config_file = self.out / "cells" / f"{cell.name}.json"
        log_file = self.out / "cells" / f"{cell.name}.log"
        write_atomically(config_file, (json.dumps(self.request(cell), indent=2) + "\n").encode())
        command = self.command(config_file, folder)
        tails = Tail(folder / "metrics.jsonl"), Tail(folder / "timing.jsonl")
        self.plan["failures"].pop(cell.name, None)
        cell.state, cell.message = "starting", ""
        with open(log_file, "ab") as log:
            start = log.tell()
            process = self.launch(command, log)
        active = _Active(cell, process, tails, Pace(time.monotonic()), log_file, start)
        self.active.append(active)
        if self.signals:
            process.send_signal(signal.SIGTERM)

    def request(self, cell: Cell) -> dict:
        """What ``cells/CELL.json`` says to the process: the configuration."""
        planned = next(entry for entry in self.plan["cells"] if entry["name"] == cell.name)
        return cell_config(self.plan, planned).to_dict()

    def command(self, config_file: Path, folder: Path) -> list[str]:
        """The process of one cell."""
        return train_command(config_file, folder)

    def launch(self, command: list[str], log) -> subprocess.Popen:
        """Start ``command``, its output into ``log``."""
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        # A process group of its own: Ctrl-C reaches it once, through _on_signal.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
            pass_fds=(self.lock,),
            env=os.environ | threads,
        )

    def _wait(self) -> None:
        """Until a cell is over, but no longer than ``POLL_SECONDS`` (for each that is at work)."""
        for active in self.active:
            try:
                active.process.wait(POLL_SECONDS / len(self.active))
                return
            except subprocess.TimeoutExpired:
                pass

    def _end(self, active: "_Active") -> None:
        self.active.remove(active)
        cell, status = active.cell, active.process.returncode
        follow(cell, active.tails, active.pace)
        if status == 0 and (self.out / cell.name / "result.json").exists():
            self._take_result(cell)
        elif status == EXIT_INTERRUPTED or (self.signals and status != EXIT_FAILED):
            cell.state = "interrupted"
        else:
            cell.state, cell.message = "failed", why_failed(status, active.log_file, active.log_start)
            self.plan["failures"][cell.name] = cell.message
        self.save()

    def _take_result(self, cell: Cell) -> None:
        result = read_json(self.out / cell.name / "result.json") or {}
        cell.state = "finished"
        cell.step = result.get("steps", cell.steps)
        cell.train_losses = [result["train_loss"]] if result.get("train_loss") is not None else []
        cell.val_loss = result.get("val_loss")
        cell.tokens_per_s = result.get("tokens_per_s")
        if result.get("wall_seconds") and cell.step:
            cell.seconds_per_step = result["wall_seconds"] / cell.step

    def _finish(self) -> int:
        from .report import write_compare_report

        self._save_maps()
        page = write_compare_report(self.out)
        results = read_json(self.out / "results.json")
        assert results is not None, "the report writes it"
        print_table(results)
        print(f"report: {page}")
        failed = [cell for cell in self.cells if cell.state == "failed"]
        self.complain(failed)
        return EXIT_FAILED if failed else 0

    def complain(self, failed: list[Cell]) -> None:
        """Say of each failed cell why, where its output is, and how to try it again."""
        for cell in failed:
            print(
                f"depthmix: {cell.name} failed: {cell.message} (all of it: {self.out / 'cells' / cell.name}.log; "
                f"try it again with: {self.again})",
                file=sys.stderr,
            )

    def _save_maps(self) -> None:
        """The mixing map of each connection's first finished run, for the report; it goes without where it must."""
        done = {cell.residual: cell for cell in reversed(self.cells) if cell.state == "finished"}
        for cell in done.values():
            folder = self.out / cell.name
            if not (folder / "checkpoints").is_dir():
                continue
            from .map_command import save_run_map

            try:
                save_run_map(folder)
            except (UserError, OSError, RuntimeError) as error:
                print(f"depthmix: no mixing map of {cell.name}: {error}", file=sys.stderr)

    def seconds_left(self, cell: Cell) -> float | None:
        """Expected seconds until ``cell`` is done, None as long as nothing is known of its speed.

        A cell that waits is taken to be as fast as another of its connection, or else as the mean.
        """
        if cell.state in ENDED:
            return 0.0
        pace = cell.seconds_per_step
        if pace is None:
            known = [
                (c.residual, c.seconds_per_step / c.size)
                for c in self.cells
                if c.seconds_per_step is not None
            ]
            same = [each for residual, each in known if residual == cell.residual] or [
                each for _, each in known
            ]
            if not same:
                return None
            pace = cell.size * sum(same) / len(same)
        return pace * max(0, cell.steps - cell.step)

    def total_left(self) -> float | None:
        """Expected seconds until the last cell is done."""
        parts: list[float] = []
        for cell in self.cells:
            left = self.seconds_left(cell)
            if left is None:
                return None
            parts.append(left)
        return max(sum(parts) / self.jobs, *parts)


@dataclass(frozen=True)
class _Active:
    """A cell at work."""

    cell: Cell
    process: subprocess.Popen
    tails: tuple["Tail", "Tail"]
    pace: "Pace"
    log_file: Path
    log_start: int
    """Where its own lines begin in the log."""


class Pace:
    """Wall seconds per step of a running cell, from the moment its first new step was seen."""

    def __init__(self, started: float):
        self.started = started
        self.first: tuple[float, int] | None = None

    def update(self, step: int) -> float | None:
        now = time.monotonic()
        if self.first is None:
            self.first = (now, step)
        since, first_step = self.first
        return (now - since) / (step - first_step) if step > first_step else None


class Tail:
    """The lines that have been added to a .jsonl file since the last look."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0

    def read(self) -> list[dict]:
        """New whole lines. A file that has become shorter (a resumed run cuts it back) is read anew."""
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self.offset:
                    self.offset = 0
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        self.offset += whole
        return parse_lines(data[:whole])


def follow(cell: Cell, tails: tuple[Tail, Tail], pace: Pace) -> None:
    """Bring ``cell`` up to date with what its run has written."""
    metrics, timing = tails
    for line in metrics.read():
        if line.get("split") == "train":
            cell.step = line["step"]
            cell.train_losses.append(line["loss"])
        elif line.get("split") == "val":
            cell.val_loss = line["loss"]
    speeds = [line["tokens_per_s"] for line in timing.read() if line.get("tokens_per_s")]
    if speeds:
        cell.step_seconds = (cell.step_seconds + speeds)[-20:]
        cell.tokens_per_s = sorted(cell.step_seconds)[len(cell.step_seconds) // 2]
    if cell.step and speeds:
        if cell.state == "starting":
            cell.state = "running"
        cell.seconds_per_step = pace.update(cell.step) or cell.seconds_per_step


def why_failed(status: int, log_file: Path, start: int) -> str:
    """The last line that a failed cell has printed, or the signal that ended it."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (often the system, when memory runs out)" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    with open(log_file, "rb") as file:
        file.seek(start)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return (
        lines[-1].strip().removeprefix("depthmix: ") if lines else f"exit status {status} without a message"
    )


class _display:
    """Context manager: a function that shows where the runs stand.

    A live table on a terminal; elsewhere a line when a state changes and every ``PLAIN_SECONDS``.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self.last = float("-inf")
        self.states: dict[str, str] = {}

    def __enter__(self):
        from rich.console import Console
        from rich.live import Live

        self.console = Console()
        self.live = None
        if self.console.is_terminal:
            self.live = Live(self._table(), console=self.console, auto_refresh=False)
            self.live.__enter__()
        return self._show

    def __exit__(self, *exception):
        if self.live is not None:
            self.live.update(self._table(), refresh=True)
            self.live.__exit__(*exception)

    def _show(self) -> None:
        if self.live is not None:
            self.live.update(self._table(), refresh=True)
            return
        states = {cell.name: cell.state for cell in self.runner.cells}
        now = time.monotonic()
        changed = [cell for cell in self.runner.cells if states[cell.name] != self.states.get(cell.name)]
        if not changed and now - self.last >= PLAIN_SECONDS:
            changed = [active.cell for active in self.runner.active]
        for cell in changed:
            # How it stood before this process began is no news.
            if self.states or cell.state not in ("waiting", "finished", "diverged"):
                print(self._line(cell), flush=True)
        if changed:
            self.last, self.states = now, states

    def _line(self, cell: Cell) -> str:
        parts = [f"{cell.name}: {cell.state}", f"step {cell.step}/{cell.steps}"]
        if cell.train_loss is not None:
            parts.append(f"train loss {cell.train_loss:.3f}")
        if cell.val_loss is not None:
            parts.append(f"validation loss {cell.val_loss:.3f}")
        if cell.tokens_per_s is not None:
            parts.append(f"{cell.tokens_per_s:,.0f} tokens/s")
        if cell.state == "failed":
            parts.append(cell.message)
        else:
            parts.append(f"left {_clock(self.runner.seconds_left(cell))}")
        return ", ".join(parts) + f" (all runs: {_clock(self.runner.total_left())})"

    def _table(self):
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        colours = {"finished": "green", "failed": "red", "running": "bold", "waiting": "dim"}
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
        for title, justify in (
            ("run", "left"), ("state", "left"), ("step", "right"), ("train loss", "right"),
            ("validation loss", "right"), ("tokens/s", "right"), ("time left", "right"),
        ):  # fmt: skip
            table.add_column(title, justify=justify)
        for cell in self._visible():
            left = self.runner.seconds_left(cell)
            table.add_row(
                cell.name,
                Text(cell.state, style=colours.get(cell.state, "")),
                f"{cell.step}/{cell.steps}",
                "" if cell.train_loss is None else f"{cell.train_loss:.3f}",
                "" if cell.val_loss is None else f"{cell.val_loss:.3f}",
                "" if cell.tokens_per_s is None else f"{cell.tokens_per_s:,.0f}",
                "" if cell.state in ENDED else _clock(left),
            )
        if self.runner.active:
            table.caption = (
                f"time left for all runs: {_clock(self.runner.total_left())}; Ctrl-C saves and stops"
            )
            table.caption_justify = "left"
        return table

    def _visible(self) -> list[Cell]:
        """As many cells as the terminal has lines for, the active one among them; all of them at the end."""
        cells, lines = self.runner.cells, max(3, self.console.height - 7)
        if not self.runner.active or len(cells) <= lines:
            return cells
        active = max(index for index, cell in enumerate(cells) if cell.state != "waiting")
        start = max(0, min(active - lines // 2, len(cells) - lines))
        return cells[start : start + lines]


def _clock(seconds: float | None) -> str:
    """h:mm:ss or m:ss, rounded up."""
    if seconds is None:
        return "…"
    whole = int(-(-seconds // 1))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def print_table(results: dict, console=None) -> None:
    """The table of ``results.json`` and what it allows to say.

    One row a connection where that fits the terminal, otherwise one column a connection.
    """
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        # A file or pipe has no width of its own: nothing needs to be folded.
        console.width = 200
    table = _rows_table(results)
    if console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width:
        table = _columns_table(results)
    console.print(table)
    for sentence in results["statements"]:
        console.print(sentence, highlight=False)


def _rows_table(results: dict):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .report.table import columns

    shown = columns(results["baseline"])
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("residual connection")
    for column in shown:
        title = "\n".join([*textwrap.wrap(column.title, 11), column.unit]).rstrip()
        table.add_column(title, justify="right", no_wrap=True)
    for entry in results["residuals"]:
        table.add_row(_name(entry, results), *(column.text(entry) for column in shown))
    return table


def _columns_table(results: dict):
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .report.table import columns

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("")
    for entry in results["residuals"]:
        table.add_column(_name(entry, results), justify="right")
    for column in columns(results["baseline"]):
        title = f"{column.title} ({column.unit})" if column.unit else column.title
        table.add_row(title, *(column.text(entry) for entry in results["residuals"]))
    return table


def _name(entry: dict, results: dict) -> str:
    done, wanted = len(entry["seeds"]), results["seeds"]
    return entry["residual"] if done == wanted else f"{entry['residual']} ({done} of {wanted} finished)"
