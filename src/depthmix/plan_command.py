"""``depthmix plan``: the best division of a training among many devices, and what each connection costs there."""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import flags
from .errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    from .parallel.cost import Estimate, Job
    from .parallel.hardware import Hardware
    from .parallel.shape import Shape
    from .report.plan import Curves


@dataclass(frozen=True)
class Plan:
    """Price a training on many devices: the best plan of each residual connection, by formula. Nothing is run.

    Seconds of a step, its bubble, the communication that nothing hides, and gigabytes a device. Rates of the hardware
    presets are data sheets times assumed efficiencies; docs/parallel-plan.md says how far such a model is to be
    trusted.

    Example: depthmix plan --params 100B --layers 96 --gpus 1024 --hardware h100 --batch-tokens 4M --plot plan.png
    """

    params: str | None = None
    """Parameters of a dense model, as 7B or 350M; the width follows from them and --layers."""
    layers: int | None = None
    """Blocks, with --params."""
    preset: str | None = None
    """Dimensions instead of --params: 7B, 70B, 100B-moe (a mixture of experts), or S, M, L, xs, quick."""
    gpus: int = 8
    """Devices."""
    hardware: str = "h100"
    """Nodes of eight: h100, h200, a100."""
    residuals: tuple[str, ...] = ("prenorm", "mgr-competitive", "attnres", "attnres-block", "mhc-lite")
    """Residual connections, with options where wanted, commas or spaces between; all stands for every one."""
    n_streams: int = 4
    """Parallel streams of connections that have them."""
    seq_len: int = 4096
    """Tokens of a sequence."""
    batch_tokens: str = "4M"
    """Tokens of an optimiser step, as 4M (2^22), 512K or a number; whole sequences of them are used."""
    precision: Literal["bf16", "autocast", "fp32"] = "bf16"
    """As depthmix train has it."""
    parallel: str | None = None
    """Price this plan (dp=8,fsdp=4,tp=4,pp=8,schedule=interleaved,stages=16) instead of looking for the best."""
    expert_parallel: int = 1
    """With --parallel: among how many of dp x fsdp processes the experts of a block are divided."""
    micro_batch: int = 0
    """Sequences of a forward pass of one process. 0: whatever is best (with --parallel, what that
    plan takes)."""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Activation checkpointing; auto takes what is faster of what fits (with --parallel: off where it fits)."""
    out: str | None = None
    """Write every figure to this JSON file."""
    plot: str | None = None
    """Draw a step over PreNorm's, against depth and against pipeline stages, as a PNG."""


def main(argv: list[str]) -> int:
    """The verb ``plan``; returns its exit status: 2 when no connection fits."""
    args = flags.parse(Plan, argv, "plan")
    from .parallel.hardware import hardware_of

    shape, hardware = _shape(args), hardware_of(args.hardware)
    names = _names(args.residuals)
    sequences = _count(args.batch_tokens, "--batch-tokens", 1024) // args.seq_len
    if sequences < 1:
        raise UserError(
            f"--batch-tokens {args.batch_tokens} is less than a sequence of {args.seq_len} tokens; raise it"
        )
    jobs = {name: _job(args, shape, name, sequences) for name in names}
    found: dict[str, Estimate] = {}
    refused: dict[str, str] = {}
    for name, job in jobs.items():
        try:
            found[name] = _best(args, job, hardware)
        except UserError as error:
            refused[name] = str(error)
            print(f"depthmix: {error}", file=sys.stderr)
    if not found:
        return EXIT_USAGE
    reference = found.get("prenorm") or _reference(args, shape, sequences, hardware)
    _print(args, shape, hardware, sequences, found, reference)
    if args.out:
        _write(args, shape, hardware, found, refused, reference, argv)
    if args.plot:
        from .report.plan import png
        from .report.write import write_atomically

        path = Path(args.plot)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, png(*_curves(args, shape, names, sequences, hardware), _title(args, shape)))
        print(f"written: {path}")
    return 0


# --- the request ----------------------------------------------------------------------------------


def _count(text: str, flag: str, thousand: int = 1000) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbBgGtT]?)", text.strip())
    if not match or float(match[1]) <= 0:
        raise UserError(f"{flag} takes a positive number, with K, M, B or T behind it; got {text!r}")
    power = {"": 0, "k": 1, "m": 2, "b": 3, "g": 3, "t": 4}[match[2].lower()]
    return round(float(match[1]) * thousand**power)


def _shape(args: Plan) -> "Shape":
    from .parallel.shape import SHAPES, shape_of, solve

    if args.preset is not None and (args.params is not None or args.layers is not None):
        raise UserError(f"--preset {args.preset} has dimensions already; leave --params and --layers out")
    if args.preset is not None:
        return shape_of(args.preset)
    if args.params is None or args.layers is None:
        missing = " and ".join(f"--{name}" for name in ("params", "layers") if getattr(args, name) is None)
        raise UserError(
            f"{missing} missing: give --params N --layers L, or --preset with one of {', '.join(SHAPES)}, S, M, L"
        )
    return solve(_count(args.params, "--params"), args.layers)


def _names(words: tuple[str, ...]) -> list[str]:
    from .residuals import available_residuals

    names: list[str] = []
    for word in (part for text in words for part in text.split(",") if part):
        names += available_residuals() if word == "all" else [word]
    return list(dict.fromkeys(names))


def _job(args: Plan, shape: "Shape", name: str, sequences: int) -> "Job":
    from .parallel.cost import Job

    model = shape.model(name, args.seq_len, n_streams=args.n_streams)
    return Job(shape, model, sequences, args.micro_batch, args.precision, args.checkpointing == "on")


def _best(args: Plan, job: "Job", hardware: "Hardware") -> "Estimate":
    from .parallel.cost import estimate, search
    from .parallel.plan import ParallelPlan

    choice = {"auto": None, "on": True, "off": False}[args.checkpointing]
    if args.parallel is None:
        return search(job, hardware, args.gpus, checkpointing=choice)[0]
    plan = ParallelPlan.parse(args.parallel)
    if plan.processes != args.gpus:
        raise UserError(
            f"--parallel {plan} is for {plan.processes} devices and --gpus says {args.gpus}; change one of them"
        )
    found = estimate(job, plan, hardware, args.expert_parallel)
    if choice is None and not found.fits:
        again = dataclasses.replace(job, activation_checkpointing=True)
        found = estimate(again, plan, hardware, args.expert_parallel)
    if not found.fits:
        part = max(found.memory, key=lambda kind: found.memory[kind])
        raise UserError(
            f"residual {job.model.label}: {plan} needs {found.total_memory / 1e9:.1f} GB a device, "
            f"{found.memory[part] / 1e9:.1f} of them {part}, and {hardware.name} has "
            f"{found.available / 1e9:.1f} usable; raise fsdp, tp or pp, or lower --micro-batch"
        )
    return found


def _reference(args: Plan, shape, sequences: int, hardware) -> "Estimate | None":
    try:
        return _best(args, _job(args, shape, "prenorm", sequences), hardware)
    except UserError:
        return None


# --- what is shown --------------------------------------------------------------------------------


def _title(args: Plan, shape: "Shape") -> str:
    total = f"{shape.parameters / 1e9:.1f} B parameters"
    if shape.experts > 1:
        total += f", {shape.active_parameters / 1e9:.1f} B active ({shape.active} of {shape.experts} experts)"
    return f"{total}: {shape.layers} blocks, D = {shape.width}, {args.gpus} x {args.hardware}"


def _print(args, shape, hardware, sequences, found: dict, reference) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(
        f"{_title(args, shape)}; {sequences} sequences of {args.seq_len} tokens a step, {args.precision}"
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("residual connection")
    table.add_column("plan")
    for title in (
        "micro-\nbatches", "step\ns", "to\nPreNorm", "connection\ns", "bubble", "exposed\ncommunication",
        "memory a\ndevice, GB",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for name, each in found.items():
        plan = str(each.plan) + (f",ep={each.ep}" if each.ep > 1 else "")
        if each.job.activation_checkpointing:
            plan += " checkpointing"
        table.add_row(
            name,
            plan,
            f"{each.micro_batches} x {each.micro_batch}",
            f"{each.step:.3g}",
            "–" if reference is None else f"{each.step / reference.step:.3f}",
            f"{each.connection:.3g}",
            f"{each.bubble_share:.1%}",
            f"{each.communication / each.step:.1%}",
            f"{each.total_memory / 1e9:.1f}",
        )
    console.print(table)
    console.print(f"Not measured: {hardware.source}.", soft_wrap=True)


def _write(args, shape, hardware, found, refused, reference, argv) -> None:
    import shlex

    from .report.write import write_atomically

    rows = []
    for name, each in found.items():
        over = None if reference is None else each.step / reference.step
        rows.append({"name": name, "to_prenorm": over, **each.to_dict()})
    values = {
        "format": 1,
        "command": "depthmix plan " + shlex.join(argv),
        "shape": {
            **dataclasses.asdict(shape),
            "parameters": shape.parameters,
            "active_parameters": shape.active_parameters,
        },
        "gpus": args.gpus,
        "hardware": hardware.to_dict(),
        "rows": rows,
        "refused": refused,
    }
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())
    print(f"written: {path}")


def _curves(
    args: Plan, shape: "Shape", names: list[str], sequences: int, hardware: "Hardware"
) -> "tuple[Curves, Curves]":
    """``(x, {name: ratios})`` against depth and against pipeline stages; ``None`` where nothing fits."""
    from .parallel.cost import estimate
    from .parallel.plan import ParallelPlan

    names = [name for name in names if name != "prenorm"]
    free = dataclasses.replace(args, parallel=None)

    def ratios(of, xs):
        lines = {name: [] for name in names}
        for x in xs:
            base = of(x, "prenorm")
            for name in names:
                other = base and of(x, name)
                lines[name].append(other / base if other else None)
        return xs, lines

    def best(layers, name):
        deep = dataclasses.replace(shape, layers=layers)
        try:
            return _best(free, _job(args, deep, name, sequences), hardware).step
        except UserError:
            return None

    def staged(pp, name):
        # Whatever fits the memory or not: the same plan for all. 1f1b with one sequence a micro-batch.
        tp = next(t for t in (8, 4, 2, 1) if shape.heads % t == 0 and args.gpus % (t * pp) == 0)
        job = dataclasses.replace(_job(args, shape, name, sequences), micro_batch=1)
        try:
            return estimate(job, ParallelPlan(fsdp=args.gpus // tp // pp, tp=tp, pp=pp), hardware).step
        except UserError:
            return None

    depths = sorted({max(1, shape.layers * k // 4) for k in (1, 2, 3, 4, 6, 8)})
    stages = [pp for pp in (1, 2, 4, 8, 16, 32) if args.gpus % pp == 0 and pp <= shape.layers]
    return ratios(best, depths), ratios(staged, stages)
