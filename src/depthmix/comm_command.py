"""``depthmix comm``: bytes that cross between processes, counted in real runs on this machine, beside the formulas."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tyro.conf import FlagCreatePairsOff

from . import flags
from .compare import labels
from .config import GPTConfig, Precision, TrainConfig
from .depth_sweep import parse_depths
from .errors import EXIT_FAILED, RunError, UserError
from .parallel.plan import ParallelPlan, cuts

MICRO_BATCHES = 4
HEADS, TOKENS, VOCABULARY = 4, 16, 64


@dataclass(frozen=True)
class Comm:
    """Count the bytes that cross between processes in one optimiser step, beside what the formulas say.

    Small models run on CPU processes of this machine, four micro-batches a step. A cell is counted = formula, in bytes
    of the process that has the most. Exits with 1 where one differs, for any process.

    Example: depthmix comm --residuals prenorm,mgr-competitive --sublayers 8,16 --stages 2,4 --out comm.json
    """

    residuals: tuple[str, ...] = ("all",)
    """Residual connections, with commas or spaces between, each with options where wanted:
    name:option=value. all stands for every one; `depthmix info --list` names them."""
    sublayers: tuple[str, ...] = ("8",)
    """Depths, in sublayers (attentions plus MLPs, so even numbers), with commas or spaces between."""
    n_streams: tuple[str, ...] = ("4",)
    """Numbers of streams n, with commas or spaces between, for the connections that have streams."""
    stages: tuple[str, ...] = ("2", "4")
    """Pipelines of so many stages, one a process; 4 and more also with two a process, interleaved. 0: no pipelines."""
    parallel: tuple[str, ...] = ("dp=2", "fsdp=2,unit=0", "tp=2", "dp=2,fsdp=2,unit=0", "fsdp=2,tp=2,unit=0")
    """Further plans, with spaces between, each as in `depthmix train --parallel`. unit=0 shards these small models as
    large ones are, block by block."""
    d_model: int = 16
    """Width D of the models, in features; a multiple of 8."""
    precision: str = "fp32"
    """fp32, autocast or bf16, as in `depthmix train`."""
    timeout: float = 1800.0
    """Seconds after which a group of processes that is not done is ended."""
    out: str | None = None
    """Write every number to this JSON file."""
    plot: str | None = None
    """Draw communication against depth and against stages, from the formulas, as this PNG."""
    formulas: FlagCreatePairsOff[bool] = False
    """Run nothing: print and draw what the formulas say."""


def main(argv: list[str]) -> int:
    """The verb ``comm``; returns its exit status."""
    args = flags.parse(Comm, argv, "comm")
    for name, suffix in (("out", ".json"), ("plot", ".png")):
        path = getattr(args, name)
        if path is not None and Path(path).suffix.lower() != suffix:
            raise UserError(f"--{name} must end in {suffix}, got {path!r}")
    if args.timeout <= 0:
        raise UserError(f"--timeout must be above 0 seconds, got {args.timeout:g}")
    cases = make_cases(args)
    from .report.write import write_atomically

    # Written at the end: that they cannot be is found out before.
    for path in filter(None, (args.out, args.plot)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if args.plot is not None:
        from .report.communication import png

        print(f"written: {write_atomically(Path(args.plot), png())}")
    records = predicted(cases) if args.formulas else counted(cases, args.timeout)
    print_tables(records)
    if args.out is not None:
        print(f"written: {write_atomically(Path(args.out), _json(records, args))}")
    wrong = [record for record in records if not record["equal"]]
    if wrong:
        names = ", ".join(sorted({f"{record['residual']} ({record['parallel']})" for record in wrong}))
        print(f"depthmix: counted is not what the formulas say: {names}", file=sys.stderr)
    return EXIT_FAILED if wrong else 0


# --- cases ----------------------------------------------------------------------------------------


def make_cases(args: Comm) -> list[TrainConfig]:
    """One for each connection, depth, number of streams and plan that go together."""
    depths = parse_depths(args.sublayers)
    streams = _numbers(args.n_streams, "--n-streams", 1)
    plans = pipelines(_numbers(args.stages, "--stages", 0))
    plans += [str(ParallelPlan.parse(word)) for word in args.parallel if word]
    if not plans:
        raise UserError("no plan is left: give --stages or --parallel")
    names = labels(args.residuals, model_config("prenorm", depths[0], 4, args.d_model))
    cases = []
    for plan in dict.fromkeys(plans):
        for depth in depths:
            if ParallelPlan.parse(plan).stages > depth // 2:
                continue  # as many blocks as stages are needed
            for name in names:
                for n in streams if _has_streams(name) else streams[:1]:
                    cases.append(make_case(name, depth, n, plan, args.precision, args.d_model))
    if not cases:
        raise UserError(
            f"--sublayers {', '.join(map(str, depths))} have fewer blocks than there are stages; give at least two "
            f"sublayers for each stage"
        )
    return cases


def model_config(residual: str, sublayers: int, n_streams: int, d_model: int = 16) -> GPTConfig:
    """A small model."""
    return GPTConfig(
        vocab_size=VOCABULARY, n_layer=sublayers // 2, d_model=d_model, n_head=HEADS, seq_len=TOKENS, residual=residual,
        n_streams=n_streams,
    )  # fmt: skip


def make_case(
    residual: str,
    sublayers: int,
    n_streams: int,
    plan: str,
    precision: str = "fp32",
    d_model: int = 16,
) -> TrainConfig:
    """A run whose processes each have ``MICRO_BATCHES`` micro-batches of one sequence."""
    parsed = ParallelPlan.parse(plan)
    if parsed.processes == 1:
        raise UserError(
            f"--parallel {plan!r} is one process, which sends nothing; give dp=2 or another plan of several"
        )
    return TrainConfig(
        model=model_config(residual, sublayers, n_streams, d_model),
        batch_size=MICRO_BATCHES * parsed.data_ways, micro_batch=1,
        device="cpu", parallel=plan, precision=cast(Precision, precision),  # a configuration checks it
    )  # fmt: skip


def pipelines(stages: list[int]) -> list[str]:
    """Plans with so many stages: one a process, and two where that leaves two processes or more."""
    plans = []
    for count in stages:
        if count == 1:
            raise UserError("--stages 1 is no pipeline; give 2 or more, or 0 for none")
        if count > 1:
            plans.append(f"pp={count},schedule=1f1b")
        if count >= 4 and count % 2 == 0:
            plans.append(f"pp={count // 2},schedule=interleaved,stages={count}")
    return plans


def _has_streams(spec: str) -> bool:
    from .residuals.registry import find, parse_spec

    name, values = parse_spec(spec)
    return "n_streams" in find(name).fields and "n_streams" not in values


def _numbers(words: tuple[str, ...], flag: str, least: int) -> list[int]:
    found = [word for given in words for word in given.split(",") if word]
    for word in found:
        if not word.isdecimal() or int(word) < least:
            raise UserError(f"{flag} takes whole numbers of at least {least}, got {word!r}")
    if not found:
        raise UserError(f"{flag} names no number; give one or more, with commas between")
    return sorted({int(word) for word in found})


# --- numbers --------------------------------------------------------------------------------------


def predicted(cases: list[TrainConfig]) -> list[dict]:
    """A record of each case, of the formulas alone."""
    return [_record(config, None) for config in cases]


def counted(cases: list[TrainConfig], timeout_s: float) -> list[dict]:
    """A record of each case, run: one start of processes for all cases that need equally many."""
    records: dict[int, dict] = {}
    sizes = [ParallelPlan.parse(config.parallel).processes for config in cases]
    for size in sorted(set(sizes)):
        numbers = [i for i, needed in enumerate(sizes) if needed == size]
        print(f"{len(numbers)} runs on {size} processes ...", file=sys.stderr)
        found = run_cases([cases[i] for i in numbers], size, timeout_s)
        records |= {i: _record(cases[i], ranks) for i, ranks in zip(numbers, found, strict=True)}
    return [records[i] for i in range(len(cases))]


def run_cases(cases: list[TrainConfig], processes: int, timeout_s: float) -> list[list[dict]]:
    """What every rank sent in each case (:mod:`depthmix.parallel.count`), by torchrun on this machine.

    Raises ``RunError`` with the end of what it said when it fails or is not done after ``timeout_s``.
    """
    with tempfile.TemporaryDirectory(prefix="depthmix-comm-") as folder:
        given, out = Path(folder, "cases.json"), Path(folder, "out.json")
        given.write_text(json.dumps([{"config": config.to_dict()} for config in cases]))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m",
            "depthmix.parallel.count", str(given), str(out),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RunError(
                f"{processes} processes were not done after {timeout_s:g} s; ask for fewer cases or raise --timeout"
            ) from error
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers
                try:
                    process.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()
        if process.returncode:
            raise RunError(f"the run on {processes} processes failed: {_reason(said)}")
        return json.loads(out.read_text())


def _reason(said: str) -> str:
    """The line of an exception in the first traceback of ``said``, else its end."""
    lines = [line.partition("]: ")[2] or line for line in said.splitlines()]
    named = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (named or [said.strip()[-500:]])[0]


def _record(config: TrainConfig, ranks: list[dict] | None) -> dict[str, Any]:
    """Counted beside formula for every kind, axis, phase, cut and direction.

    Bytes and calls are those of the process that has the most; ``equal`` is said of every process.
    """
    from .parallel.count import by_key
    from .parallel.volume import boundary_numbers, process_volume, wire_bytes

    plan = ParallelPlan.parse(config.parallel)
    volumes = [process_volume(config, plan, rank, backend="gloo") for rank in range(plan.processes)]
    formulas = [by_key(found, plan) for found in volumes]
    counts = formulas if ranks is None else [{tuple(x[:5]): x[5:] for x in rank["sent"]} for rank in ranks]
    keys = sorted({key for found in (*formulas, *counts) for key in found}, key=_order)
    traffic = []
    for key in keys:
        kind, axis, phase, boundary, direction = key
        ours, theirs = ([found.get(key, [0, 0]) for found in side] for side in (formulas, counts))
        row = {"kind": kind, "axis": axis, "phase": phase, "boundary": boundary, "direction": direction}
        row["formula_bytes"], row["formula_calls"] = map(max, zip(*ours, strict=True))
        if ranks is not None:
            row["counted_bytes"], row["counted_calls"] = map(max, zip(*theirs, strict=True))
            row["equal"] = ours == theirs
        traffic.append(row)
    record = {
        "residual": config.model.label,
        "parallel": config.parallel,
        "sublayers": config.model.n_sublayers,
        "n_streams": config.model.n_streams if _has_streams(config.model.label) else None,
        "precision": config.precision,
        "micro_batches": plan.micro_batches(config),
        "tokens_per_micro_batch": plan.micro_batch(config) * config.model.seq_len,
        "cuts": list(cuts(config.model, plan)),
        "boundary_numbers_per_token": [
            boundary_numbers(config.model, plan, i) for i in range(plan.stages - 1)
        ],
        "traffic": traffic,
        "equal": all(row.get("equal", True) for row in traffic),
        "ring_bytes_of_all_processes": sum(wire_bytes(v, "gloo") for found in volumes for v in found),
    }
    if ranks is not None:
        record["socket_bytes_of_all_processes"] = sum(rank["socket_bytes"] for rank in ranks)
    return record


def _order(key: tuple) -> tuple:
    from .parallel.volume import KINDS

    kind, axis, phase, boundary, direction = key
    return KINDS.index(kind), axis, -1 if boundary is None else boundary, direction == "backward", phase


def _json(records: list[dict], args: Comm) -> bytes:
    import torch

    data = {
        "command": "depthmix comm",
        "torch": torch.__version__,
        "backend": "gloo",
        "model": {"d_model": args.d_model, "n_head": HEADS, "seq_len": TOKENS, "vocab_size": VOCABULARY},
        "asked": {k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "plot", "timeout")},
        "traffic_columns": list(records[0]["traffic"][0]) if records[0]["traffic"] else [],
    }
    # One case a line, its traffic as rows of numbers.
    records = [record | {"traffic": [list(row.values()) for row in record["traffic"]]} for record in records]
    cases = ",\n  ".join(json.dumps(record, separators=(",", ":")) for record in records)
    head = json.dumps(data, indent=1).removesuffix("\n}")
    return f'{head},\n "cases": [\n  {cases}\n ]\n}}\n'.encode()


# --- tables ---------------------------------------------------------------------------------------


def print_tables(records: list[dict]) -> None:
    """A table for each plan: a row for each model, a column for each kind, axis, cut and direction."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 400
    for plan in dict.fromkeys(record["parallel"] for record in records):
        mine = [record for record in records if record["parallel"] == plan]
        cells = [_cells(record) for record in mine]
        columns = list(dict.fromkeys(column for found in cells for column in found))
        first = mine[0]
        title = (
            f"{plan}: bytes of one process in a step of {first['micro_batches']} micro-batches of "
            f"{first['tokens_per_micro_batch']} tokens"
        )
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title=title, title_justify="left")
        table.add_column("residual connection")
        for name in ("L", "n", *columns):
            table.add_column(name, justify="right")
        for record, found in zip(mine, cells, strict=True):
            streams = "" if record["n_streams"] is None else str(record["n_streams"])
            row = [record["residual"], str(record["sublayers"]), streams]
            table.add_row(*row, *(found.get(column, "–") for column in columns))
        console.print(table)
        if "socket_bytes_of_all_processes" in first:
            carried, rings = (
                sum(record[f"{name}_bytes_of_all_processes"] for record in mine)
                for name in ("socket", "ring")
            )
            console.print(
                f"sockets carried {carried:,} bytes, {carried / rings:.3f} times what rings need for these payloads\n"
            )
    if all("counted_bytes" in row for record in records for row in record["traffic"]):
        rows = [row for record in records for row in record["traffic"]]
        differing = sum(not row["equal"] for row in rows)
        console.print(
            f"{len(rows)} figures of {len(records)} runs counted, {differing} of them not as the formulas say"
        )


def _cells(record: dict) -> dict[str, str]:
    """Column -> ``counted = formula``; small sums and norms with what goes the same way."""
    sums: dict[str, list] = {}
    for row in record["traffic"]:
        if row["boundary"] is None:
            column = f"{row['kind']}\n{row['axis']}"
        else:
            stage = row["boundary"]
            arrow = f"{stage} → {stage + 1}" if row["direction"] == "forward" else f"{stage} ← {stage + 1}"
            column = f"stage\n{arrow}"
        total = sums.setdefault(column, [0, 0, True])
        total[0] += row.get("counted_bytes", 0)
        total[1] += row["formula_bytes"]
        total[2] &= row.get("equal", True)
    counted = all("counted_bytes" in row for row in record["traffic"])
    return {
        column: f"{ours:,} {'=' if same else '≠'} {theirs:,}" if counted else f"{theirs:,}"
        for column, (ours, theirs, same) in sums.items()
    }
