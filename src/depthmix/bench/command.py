"""The verb ``bench``: choose problems, measure them one after another, write the record after each."""

import itertools
import json
import os
import shlex
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from .. import flags
from ..errors import EXIT_FAILED, UserError, suggest

FORMAT = 1
AGAINST = ("compile", "peers")
STREAMS = (4, 8)
"""Of operations, where --n does not say."""
NOTHING: dict[str, typing.Any] = {"rows": []}
"""A problem of which nothing is measured."""
PATIENCE = 60.0
"""Seconds for the turns of one problem where their number was not asked for."""


@dataclass(frozen=True)
class Bench:
    """Time depthmix's operations and a step, beside what memory allows and what others do.

    Each result is compared with a float64 reference before it is timed; a wrong one gets no time, and if it is
    depthmix's own the exit status is 1.

    Example: depthmix bench mgr-step pool:sources-25 --n 4 8 --width 768 --out benchmarks/results/mine.json
    """

    cases: Annotated[Positional[tuple[str, ...]], arg(metavar="CASE")] = ()
    """CASE or CASE:VARIANT. Default: all; --list describes them."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is cuda when there is one."""
    dtype: tuple[str, ...] = ()
    """Of streams, sources and parameters: fp32, bf16, fp16. Default: fp32 on a CPU, bf16 on a GPU. Models of the step
    cases are in it too."""
    n: tuple[int, ...] = ()
    """Numbers of streams, 1 to 64. Default: 4 8; of models the preset's, or what --residuals says."""
    width: tuple[int, ...] = ()
    """Features D. Default: 768 on a CPU; 768, 1024, 1280, 2048, 4096 and 7168 on a GPU; of models the preset's.
    Wider ones have more heads of the same size."""
    tokens: int | None = None
    """Tokens of an operation. Default: 4096 on a CPU; on a GPU as many as make 2^26 elements of streams or sources."""
    rounds: int | None = None
    """Turns of every candidate. Default: 7 on a CPU, 30 on a GPU, but at least three and for no more than about a
    minute for one size of an operation."""
    threads: Annotated[int, arg(help_behavior_hint="(default: all cores)")] = os.cpu_count() or 1
    """CPU threads."""
    kernels: tuple[str, ...] = ()
    """Backends of depthmix: auto is its own choice; torch, native, triton. Default: auto and torch; for models auto."""
    against: tuple[str, ...] = AGAINST
    """What else takes part, besides the eager reference: compile (torch.compile of the reference), peers (other
    packages that are installed). Without a value: nothing."""
    flush: bool = True
    """On a GPU, fill its cache with something else before each run."""
    preset: str | None = None
    """Preset of the step cases. Default: quick on a CPU, L on a GPU."""
    layers: int | None = None
    """Blocks of the step cases' models. Default: the preset's."""
    residuals: tuple[str, ...] = ("prenorm", "mgr-independent", "mgr-competitive")
    """Residual connections of the step cases; prenorm is always there."""
    stream_memory: tuple[str, ...] = ("replay",)
    """How the step cases' backward passes get the streams, for connections that have the choice."""
    sequences: int | None = None
    """Sequences of a training pass. Default: the preset's micro-batch on a GPU, what takes seconds on a CPU."""
    compile: FlagCreatePairsOff[bool] = False
    """Compile the models of training-step with torch.compile."""
    out: str | None = None
    """Write the record here as JSON, after every problem and every model."""
    resume: FlagCreatePairsOff[bool] = False
    """Keep what --out already holds, and measure the rest."""
    plots: str | None = None
    """Draw what the record allows in this folder: bandwidth.png and ratios.png of operations, overhead.png and
    memory.png of training steps."""
    from_: Annotated[tuple[str, ...], arg(name="from")] = ()
    """Measure nothing; draw --plots of these records."""
    list: FlagCreatePairsOff[bool] = False
    """Describe the cases, the other packages and which of them are here."""


def main(argv: list[str]) -> int:
    """The verb ``bench``; returns its exit status: 1 where a result of depthmix is wrong or fails."""
    args = flags.parse(Bench, argv, "bench")
    if args.list:
        return _list()
    if args.from_:
        return _redraw(args.from_, args.plots)
    plan = _plan(args)

    import torch

    from . import report
    from .machine import installed_version, machine
    from .peers import PACKAGES

    if plan.device.index is not None:
        torch.cuda.set_device(plan.device)  # Triton starts kernels on the current one
    status = 0
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        described = machine(plan.device)
        record = {
            "format": FORMAT,
            "command": shlex.join(["depthmix", "bench", *argv]),
            "machine": described,
            "peers": {package: installed_version(package) for package in PACKAGES},
            "rounds": plan.rounds,
            "flush": args.flush and plan.device.type == "cuda",
            "problems": _kept(args, described, plan),
        }
        out = report.console()
        _print_head(record, out)
        problems = {problem["key"]: problem for problem in record["problems"]}
        done = {key for key, problem in problems.items() if not problem.get("unfinished")}
        for key, problem in problems.items():
            if key in done:
                report.print_problem(problem, out)

        def keep(key: str, problem: dict) -> None:
            problems[key] = {"key": key, **problem}
            record["problems"] = [*problems.values()]
            _save(record, args.out)

        def keep_part(key: str, problem: dict) -> None:
            before = {row["candidate"] for row in problems.get(key, NOTHING)["rows"]}
            for row in problem["rows"]:
                if row["candidate"] not in before:
                    out.print(f"{row['candidate']}: {row['status']}", style="dim")
            keep(key, {"unfinished": True, **problem})

        for key, measure in plan.problems(args):
            if key in done:
                continue
            try:
                problem = measure(problems.get(key, NOTHING), partial(keep_part, key))
            except RuntimeError as error:
                if "out of memory" not in str(error) and "not enough memory" not in str(error):
                    raise
                # Inputs or truth did not fit. Not in the record, so that --resume tries again.
                out.print(f"\n{key}: out of memory; try fewer --tokens")
                status = EXIT_FAILED
                continue
            done.add(key)
            keep(key, problem)
            report.print_problem(problem, out)
    finally:
        torch.set_num_threads(before)
    if args.plots is not None:
        for path in report.draw(_rounded(record), Path(args.plots)):
            out.print(f"written: {path}")
    if args.out is not None:
        out.print(f"written: {args.out}")
    return EXIT_FAILED if _own_failed(record) else status


def _own_failed(record: dict) -> bool:
    """Whether a result of depthmix is wrong, or could not be computed."""
    return any(
        row["kind"] in ("depthmix", "model") and row["status"] in ("wrong", "failed")
        for problem in record["problems"]
        for row in problem["rows"]
    )


# --- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked."""

    cases: list[tuple[str, tuple[str, ...]]]
    device: typing.Any
    dtypes: tuple[str, ...]
    widths: tuple[int, ...]
    rounds: int
    preset: str
    residuals: tuple[str, ...]

    def problems(self, args: Bench):
        """``(key, function that measures it)`` of all problems, in order.

        The function takes the problem as far as an earlier part of the record has it, and a function to which it gives
        the problem as far as it is whenever it is worth keeping.
        """
        from .case import CASES, CPU_TOKENS, DTYPES, FILL, Size

        cuda = self.device.type == "cuda"
        for name, variants in self.cases:
            if name not in CASES:
                yield from self._step_problems(name, variants, args)
                continue
            case = CASES[name]
            for variant in variants:
                axes = case.variants[variant]
                dtypes = [d for d in self.dtypes if d in case.dtypes] or [*case.dtypes[:1]]
                ns = [n for n in args.n if n >= case.least_n] if "n" in axes else [None]
                for dtype in dtypes:
                    for n in ns:
                        for width in self.widths if "width" in axes else [None]:
                            held = case.vectors(variant, n) * (width or 1)
                            tokens = args.tokens or (
                                max(1024, FILL // held // 1024 * 1024) if cuda else CPU_TOKENS
                            )
                            lengths = {"n": n, "width": width}
                            given = {axis: k for axis, k in lengths.items() if k is not None}
                            size = Size(self.device, DTYPES[dtype], given, tokens)
                            place = {"case": name, "variant": variant, "dtype": dtype, **lengths}
                            place |= {"tokens": tokens}
                            yield (
                                _key(place),
                                lambda begun, keep, c=case, p=place, s=size: self._operation(c, p, s, args),
                            )

    def _operation(self, case, place: dict, size, args: Bench) -> dict:
        from .machine import COPY_BYTES
        from .runner import measure

        problem = case.build(size, place["variant"])
        with warnings.catch_warnings():
            # Compilers and other packages; what goes wrong is in the rows.
            warnings.simplefilter("ignore")
            return place | measure(
                problem,
                self.device,
                kernels=args.kernels or ("auto", "torch"),
                against=args.against,
                rounds=self.rounds,
                flush=args.flush,
                copy_bytes=COPY_BYTES[self.device.type],
                patience=PATIENCE if args.rounds is None else float("inf"),
            )

    def _step_problems(self, name: str, variants: tuple[str, ...], args: Bench):
        for dtype, variant, width in itertools.product(self.dtypes, variants, args.width or (None,)):
            place: dict[str, typing.Any] = {"case": name, "variant": variant, "dtype": dtype}
            place |= {"preset": self.preset, "layers": args.layers, "width": width}
            place |= {"sequences": args.sequences, "compile": args.compile}
            place |= {"models": ",".join(self.residuals), "memory": ",".join(args.stream_memory)}
            place |= {"streams": ",".join(map(str, args.n)) or None}
            place |= {"kernels": ",".join(args.kernels or ("auto",))}
            yield _key(place), lambda begun, keep, p=place: self._step(p, args, begun, keep)

    def _step(self, place: dict, args: Bench, begun: dict, keep: Callable[[dict], None]) -> dict:
        from ..config import StreamMemory
        from .case import DTYPES
        from .machine import MATRIX_SIZE, matrix_flops
        from .steps import StepSettings, generation_step, training_step

        peak = begun.get("matrix_flops_per_second") or matrix_flops(
            self.device, DTYPES[place["dtype"]], MATRIX_SIZE[self.device.type]
        )
        place = place | {"matrix_flops_per_second": peak}
        # _plan() has checked their names.
        memories = typing.cast(tuple[StreamMemory, ...], args.stream_memory)
        settings = StepSettings(
            self.device, self.preset, place["dtype"], self.residuals, memories,
            args.kernels or ("auto",), args.compile, self.rounds, args.sequences, peak,
            args.n, place["width"], place["layers"],
        )  # fmt: skip
        with warnings.catch_warnings():
            # Of few blocks with many streams, mostly.
            warnings.simplefilter("ignore")
            if place["case"] == "training-step":
                found = training_step(settings, begun["rows"], lambda so_far: keep(place | so_far))
            else:
                found = generation_step(settings, int(place["variant"].removeprefix("batch-")))
        return place | found


def _key(place: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in place.items() if value is not None)


def _whole(name: str, values, least: int = 1, most: int | None = None) -> None:
    for value in values:
        if value is not None and (value < least or (most is not None and value > most)):
            allowed = f"at least {least}" if most is None else f"between {least} and {most}"
            raise UserError(f"--{name} must be {allowed}, got {value}")


def _choices(name: str, values, valid) -> None:
    for value in values:
        if value not in valid:
            raise UserError(suggest(value, valid, f"--{name} value"))


def _plan(args: Bench) -> Plan:
    """Refuse what cannot be done before anything is measured."""
    from ..config import StreamMemory
    from ..device import find_device
    from ..presets import preset
    from ..residuals import registry
    from . import cases  # noqa: F401  registers them
    from .case import CASES, DTYPES, find
    from .runner import KERNELS
    from .steps import STEP_CASES, resized

    _whole("n", args.n, 1, 64)
    for name in ("width", "tokens", "rounds", "threads", "sequences", "layers"):
        value = getattr(args, name)
        _whole(name, value if isinstance(value, tuple) else (value,))
    _choices("dtype", args.dtype, DTYPES)
    _choices("kernels", args.kernels, KERNELS)
    _choices("against", args.against, AGAINST)
    _choices("stream-memory", args.stream_memory, typing.get_args(StreamMemory))
    steps = {name: variants for name, (_, variants) in STEP_CASES.items()}
    words = args.cases or (*CASES, *steps)
    chosen: dict[str, list[str]] = {}
    for word in words:
        name, variants = find(word, steps)
        taken = chosen.setdefault(name, [])
        taken += [variant for variant in variants if variant not in taken]
        least = min(args.n or STREAMS)
        if name in CASES and args.cases and CASES[name].least_n > least:
            raise UserError(f"--n must be at least {CASES[name].least_n} for {name}, got {least}")
    device = find_device(args.device)
    cuda = device.type == "cuda"
    dtypes = args.dtype or (("bf16",) if cuda else ("fp32",))
    if "fp16" in dtypes and any(name in steps for name in chosen) and args.cases:
        raise UserError("--dtype fp16 is for operations; models run in fp32 or bf16")
    if "fp16" in dtypes:
        chosen = {name: variants for name, variants in chosen.items() if name not in steps}
    named = args.preset or ("L" if cuda else "quick")
    model = preset(named).model
    if any(name in steps for name in chosen):
        for width in args.width:
            resized(model, width, args.layers)
    residuals = ("prenorm", *(r for r in args.residuals if r != "prenorm"))
    for residual in residuals:
        registry.parse_spec(residual)
    if args.resume and args.out is None:
        raise UserError("--resume goes on with the record that --out names; give --out FILE")
    widths = args.width or ((768, 1024, 1280, 2048, 4096, 7168) if cuda else (768,))
    return Plan(
        [(name, tuple(variants)) for name, variants in chosen.items()],
        device, dtypes, widths, args.rounds or (30 if cuda else 7), named, residuals,
    )  # fmt: skip


# --- the record ---------------------------------------------------------------------------------

SAME_MACHINE = ("device", "threads", "torch", "commit", "driver", "triton")
"""What must not differ between the parts of one record."""


def _kept(args: Bench, described: dict, plan: Plan) -> list[dict]:
    """The problems of an earlier part of this record."""
    if not args.resume or args.out is None or not Path(args.out).exists():
        return []
    record = read_record(args.out)
    for name in SAME_MACHINE:
        if record["machine"].get(name) != described.get(name):
            raise UserError(
                f"{args.out} was measured with {name} = {record['machine'].get(name)}, now it is "
                f"{described.get(name)}; one record holds one machine and one commit. Choose another --out"
            )
    if record["rounds"] != plan.rounds:
        raise UserError(
            f"{args.out} was measured in {record['rounds']} turns, got --rounds {plan.rounds}; give the same number"
        )
    return record["problems"]


def read_record(path: str) -> dict:
    """A record written by ``--out``. ``UserError`` when it is missing or is none."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON: {error}; give a file written by depthmix bench"
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or "problems" not in record:
        raise UserError(f"{path} is no record of depthmix bench; give a file written by its --out")
    return record


def _save(record: dict, out: str | None) -> None:
    from ..report.write import write_atomically

    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(_rounded(record), indent=1) + "\n").encode())


def _rounded(value):
    """Six digits are more than a clock has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _print_head(record: dict, out) -> None:
    described = record["machine"]
    out.print(
        f"{described['device']}, {described['threads']} threads, torch {described['torch']}, commit "
        f"{described['commit']}; CPU kernels {described['cpu_kernels']}"
    )
    packages = (f"{package} {version or 'not installed'}" for package, version in record["peers"].items())
    out.print(f"other packages: {', '.join(packages)}")
    out.print(
        f"medians of up to {record['rounds']} turns; ratios are times of a line over another's, below 1: faster"
    )


def _redraw(records: tuple[str, ...], plots: str | None) -> int:
    from . import report

    if plots is None:
        raise UserError("--from draws the plots of a record; say where to with --plots DIR")
    problems = [problem for record in records for problem in read_record(record)["problems"]]
    for path in report.draw({"problems": problems}, Path(plots)):
        print(f"written: {path}")
    return 0


def _list() -> int:
    from . import cases  # noqa: F401  registers them
    from .case import CASES
    from .machine import installed_version
    from .peers import PACKAGES
    from .steps import STEP_CASES

    described = {name: (case.summary, case.variants) for name, case in CASES.items()} | STEP_CASES
    width = max(map(len, described))
    print("cases (CASE or CASE:VARIANT)")
    for name, (summary, variants) in described.items():
        print(f"  {name:<{width}}  {summary}")
        print(f"  {'':<{width}}  {' '.join(variants)}")
    print("other packages")
    for package in PACKAGES:
        print(f"  {package:<{width}}  {installed_version(package) or 'not installed'}")
    return 0
