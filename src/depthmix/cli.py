"""The command line: parse, call, print.

Exit statuses: 0 done; 2 the request was wrong; 1 it failed while running; 75
stopped by a signal after saving (``--resume`` goes on); 130 stopped at once.
"""

import codecs
import contextlib
import errno
import itertools
import json
import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

from tyro.conf import FlagCreatePairsOff, Positional, arg

from . import flags
from .config import folder_name
from .errors import EXIT_FAILED, EXIT_USAGE, Interrupted, RunError, UserError, suggest

EXIT_KEYBOARD = 128 + signal.SIGINT

VERBS = {
    "train": "train one model",
    "watch": "show a running or finished training: loss, gates, norms and gradients over depth",
    "compare": "train the same model with several residual connections and compare them",
    "study": "run a declared study as a queue that survives, and make its tables and page",
    "depth-sweep": "train residual connections at several depths and show which of them still learn",
    "generate": "continue a text with a trained model",
    "eval": "loss of any text under a sliding window, and tasks of lm-eval",
    "map": "draw how much of every earlier output each sublayer reads (the mixing map)",
    "diagnose": "what networks do in depth: activations, gates, blocks, streams, as one report",
    "bench": "time the operations and a step, each checked against a reference first",
    "plan": "price a training on many devices: best split, step time, memory of each connection",
    "comm": "count the bytes that cross between processes, beside the formulas",
    "data": "prepare or inspect training data (data prepare, data fineweb, data inspect)",
    "export": "write a trained model for other programs: one file of weights, or a folder for transformers",
    "import": "make a run folder of one that transformers loads",
    "info": "sizes and costs of a model without building it; --list names the residual connections",
}

HELP = f"""usage: depthmix VERB [OPTIONS]

Residual connections that mix depth: train, compare and use them.

{chr(10).join(f"  {verb:<13}{text}" for verb, text in VERBS.items())}

  --help      this text; depthmix VERB --help shows a verb's options, units, defaults and an example
  --version   version of depthmix

examples:
  depthmix compare --recipe quick
  depthmix train --preset quick --residual mgr-competitive --out runs/mgr
  depthmix generate runs/mgr --prompt "def main("
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal without UTF-8 gets question marks, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = _dispatch(argv)
        sys.stdout.flush()
        return status
    except SystemExit as request:
        # tyro leaves with 0 after --help and 2 after a message.
        return request.code if isinstance(request.code, int) else EXIT_USAGE
    except (UserError, RunError, Interrupted) as error:
        if not getattr(error, "told", False):
            _complain(str(error), error.exit_status)
        if getattr(error, "lost", False):
            _leave(error.exit_status)
        return error.exit_status
    except KeyboardInterrupt:
        return _complain("stopped", EXIT_KEYBOARD)
    except BrokenPipeError:
        # The reader has gone (a pipe into head): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except MemoryError:
        return _complain("out of memory; lower --micro-batch or --seq-len", EXIT_FAILED)
    except OSError as error:
        return _complain(*_explain(error))
    except RuntimeError as error:
        if "out of memory" in str(error) or "not enough memory" in str(error):
            return _complain(f"out of memory; lower --micro-batch or --seq-len ({error})", EXIT_FAILED)
        raise


def _complain(message: str, status: int) -> int:
    rank = os.environ.get("RANK")
    who = "" if rank is None or os.environ.get("WORLD_SIZE") == "1" else f"rank {rank}: "
    print(f"depthmix: {who}{message}", file=sys.stderr)
    return status


def _leave(status: int) -> NoReturn:
    """End at once. Threads that wait for a process that is lost would hold this one until their timeout."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def _explain(error: OSError) -> tuple[str, int]:
    """Message and exit status of an error of the operating system that nobody foresaw."""
    where = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error)
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)):
        return f"{where}{reason}; check the path", EXIT_USAGE
    if isinstance(error, PermissionError):
        return f"{where}{reason}; choose another path or change its permissions", EXIT_USAGE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}{reason}; free space and go on with --resume", EXIT_FAILED
    return f"{where}{reason}", EXIT_FAILED


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb in ("--version", "-V"):
        from . import __version__

        print(f"depthmix {__version__}")
        return 0
    if verb not in VERBS:
        what = "option" if verb.startswith("-") else "verb"
        raise UserError(suggest(verb, [*VERBS, "--help", "--version"] if what == "option" else VERBS, what))
    verbs = {
        "train": _train,
        "watch": _watch,
        "compare": _compare,
        "study": _study,
        "depth-sweep": _depth_sweep,
        "generate": _generate,
        "eval": _eval,
        "map": _map,
        "diagnose": _diagnose,
        "bench": _bench,
        "plan": _plan,
        "comm": _comm,
        "data": _data,
        "export": _export,
        "import": _import,
        "info": _info,
    }
    return verbs[verb](rest)


@dataclass(frozen=True)
class Train:
    """Train one model and leave a run folder: configuration, metrics, checkpoints, curves, report.html.

    Ctrl-C finishes the step, saves and leaves with status 75; --resume goes on from there.

    Example: depthmix train --preset quick --residual mgr-competitive --steps 100 --out runs/mgr
    """

    training: flags.TrainFlags
    preset: str = "quick"
    """Named configuration to start from: quick, depth, xs, S, M or L; the options below change single values."""
    config: str | None = None
    """Start from this config.json instead of a preset."""
    init_from: str | None = None
    """Start from the weights of this run folder or checkpoint instead of fresh ones; it must be of the same sizes."""
    out: str | None = None
    """Run folder. Default: runs/PRESET-RESIDUAL-sSEED."""
    resume: FlagCreatePairsOff[bool] = False
    """Go on from the newest checkpoint of the run folder, with the configuration saved there."""
    quiet: FlagCreatePairsOff[bool] = False
    """Print nothing but warnings and errors."""
    report: bool = True
    """Draw loss.png and report.html at the end."""
    timeout: float = 600.0
    """Under torchrun: seconds that processes wait for one of them before they give it up and end."""


def _train(argv: list[str]) -> int:
    from .presets import preset

    named, file, out = (flags.given(argv, flag) for flag in ("--preset", "--config", "--out"))
    if named is not None and file is not None:
        raise UserError(f"--preset {named} and --config {file} are two starting points; give one of them")
    saved = Path(out, "config.json") if out is not None and "--resume" in argv else None
    if file is None and named is None and saved is not None and saved.exists():
        file = str(saved)
    base = flags.load_config(file) if file is not None else preset(named or "quick")
    args = flags.parse(Train, argv, "train", Train(training=flags.to_flags(base)))
    config = flags.to_config(args.training)
    run_dir = Path(args.out or f"runs/{args.preset}-{folder_name(config.model.label)}-s{config.seed}")

    from .parallel.world import launched, speaks
    from .train import train

    try:
        result = train(
            config,
            run_dir,
            resume=args.resume,
            init_from=args.init_from,
            quiet=args.quiet,
            report=args.report,
            timeout_s=args.timeout,
        )
    except Interrupted as stop:
        again = f"depthmix train --out {shlex.quote(str(run_dir))} --resume"
        raise Interrupted(f"{stop}\ngo on with: {again}") from stop
    finally:
        if launched():
            # torchrun terminates those that lag behind the first to end: it shall not change what they say.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    if not args.quiet and speaks():
        print(
            f"validation loss {result['val_loss']:.4f} nats (best {result['best_val_loss']:.4f} at step "
            f"{result['best_step']}), {result['tokens_per_s']:,.0f} tokens/s"
        )
        if (run_dir / "report.html").exists():
            print(f"report: {run_dir / 'report.html'}")
    return 0


def _watch(argv: list[str]) -> int:
    from .watch import main

    return main(argv)


def _compare(argv: list[str]) -> int:
    from .compare import main

    return main(argv)


def _study(argv: list[str]) -> int:
    from .study.command import main

    return main(argv)


def _depth_sweep(argv: list[str]) -> int:
    from .depth_sweep import main

    return main(argv)


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained model, printed as it comes.

    Example: depthmix generate runs/mgr --prompt "def main(" --tokens 100 --temperature 0.7 --seed 1
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder (its best checkpoint is taken), or one checkpoint folder in it."""
    prompt: str = ""
    """Text to continue; - reads it from standard input. Empty: the start of a document."""
    tokens: int | None = None
    """New tokens at most; the end of the document ends it sooner. Default: 200, or fewer if no more fit."""
    temperature: float = 0.8
    """Divides the logits: 0 always takes the likeliest token, 1 samples from the model's distribution."""
    top_k: int | None = None
    """Sample from this many likeliest tokens only. Default: all."""
    top_p: float | None = None
    """Sample from the likeliest tokens whose probabilities sum to this, above 0 to 1. Default: all."""
    seed: int | None = None
    """Seed of the sampling; the same seed gives the same text. Default: a fresh one."""
    truncate: FlagCreatePairsOff[bool] = False
    """Where the text outgrows the model's context, forget its beginning instead of refusing."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is cuda when there is one."""


DEFAULT_NEW_TOKENS = 200


def _generate(argv: list[str]) -> int:
    args = flags.parse(Generate, argv, "generate")
    if args.tokens is not None and args.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {args.tokens}")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    from .checkpoint import load_model
    from .device import find_device

    model, _ = load_model(args.run, find_device(args.device))
    tokenizer = _tokenizer_of(Path(args.run))
    ids = tokenizer.encode(prompt)
    stream = _new_tokens(model, tokenizer, ids or [tokenizer.end_token], args)
    # What is wrong with the request shows at the first token, before anything is printed.
    tokens = [*itertools.islice(stream, 1)]
    print(prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in itertools.chain(tokens, stream):
        # A character may come in several tokens: the decoder holds back what is not whole yet.
        print(decoder.decode(_bytes_of(tokenizer, token)), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return 0


def _new_tokens(model, tokenizer, ids: list[int], args: Generate):
    """Yield new token ids one by one. With ``--truncate`` a full context is cut to its newest half."""
    import torch

    from .generation import generate

    context = model.config.seq_len
    left = args.tokens or DEFAULT_NEW_TOKENS
    if not args.truncate:
        # The last new token is not read again, hence the one.
        room = context + 1 - len(ids)
        if room < 1 or (args.tokens is not None and args.tokens > room):
            raise UserError(
                f"a prompt of {len(ids)} tokens and {left if args.tokens else 1} new ones do not fit the model's "
                f"context of {context}; shorten one of them, or --truncate forgets the beginning"
            )
        left = min(left, room)
    seed = args.seed
    while left > 0:
        if len(ids) + left > context + 1:
            ids = ids[-max(context // 2, context + 1 - left) :]
        count = min(left, context + 1 - len(ids))
        steps = generate(
            model, torch.tensor([ids]), count, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            seed=seed, end_token=tokenizer.end_token, vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        for step in steps:
            token = int(step[0])
            if token == tokenizer.end_token:
                return
            yield token
            ids = [*ids, token]
        left -= count
        seed = None if seed is None else seed + 1


def _bytes_of(tokenizer, token: int) -> bytes:
    try:
        return tokenizer.decode_bytes([token])
    except UserError:
        # A row of the embedding that no text ever used.
        return "\ufffd".encode()


def _tokenizer_of(path: Path):
    """The tokenizer saved in the run folder that ``path`` is or lies in."""
    from .runs import run_tokenizer

    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "tokenizer.json").exists():
            return run_tokenizer(folder)
    raise UserError(f"{path} has no tokenizer.json beside it; give a run folder made by depthmix train")


def _eval(argv: list[str]) -> int:
    from .evaluation.command import main

    return main(argv)


def _map(argv: list[str]) -> int:
    from .map_command import main

    return main(argv)


def _diagnose(argv: list[str]) -> int:
    from .diagnostics.command import main

    return main(argv)


def _bench(argv: list[str]) -> int:
    from .bench.command import main

    return main(argv)


def _plan(argv: list[str]) -> int:
    from .plan_command import main

    return main(argv)


def _comm(argv: list[str]) -> int:
    from .comm_command import main

    return main(argv)


def _data(argv: list[str]) -> int:
    from .data.commands import FineWeb, Inspect, Prepare

    commands = {"prepare": Prepare, "fineweb": FineWeb, "inspect": Inspect}
    if not argv or argv[0] in ("-h", "--help"):
        print(DATA_HELP, end="")
        return 0
    if argv[0] not in commands:
        raise UserError(suggest(argv[0], commands, "verb of data"))
    return flags.parse(commands[argv[0]], argv[1:], f"data {argv[0]}").run()


DATA_HELP = """usage: depthmix data VERB [OPTIONS]

  prepare   turn text files into memory-mapped shards of token ids
  fineweb   stream FineWeb from the Hugging Face hub into such shards; can be stopped at any time
  inspect   what a prepared folder holds

depthmix data VERB --help shows a verb's options, units, defaults and an example.

examples:
  depthmix data prepare texts/ --tokenizer gpt2 --out shards/
  depthmix data fineweb --tokens 10B --out shards/fineweb
  depthmix data inspect shards/
"""


@dataclass(frozen=True)
class Export:
    """Write a trained model for other programs, whatever number of processes trained it.

    Example: depthmix export runs/mgr --to hf --out exported
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder (its best checkpoint is taken, else its newest), or one checkpoint folder in it."""
    to: str = "safetensors"
    """Format: safetensors, one file with the parameters under their names in the model; hf, a folder that transformers
    loads, after import depthmix.hf: weights, configuration, tokenizer, model card."""
    out: str = ""
    """The file, or the folder."""
    standalone: FlagCreatePairsOff[bool] = False
    """With --to hf: put the model's code into the folder, so that it loads with trust_remote_code=True where there is
    no depthmix."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace what is there."""


EXPORT_FORMATS = ("safetensors", "hf")


def _export(argv: list[str]) -> int:
    args = flags.parse(Export, argv, "export")
    if args.to not in EXPORT_FORMATS:
        raise UserError(suggest(args.to, EXPORT_FORMATS, "format of --to"))
    if not args.out:
        what, example = ("file", "model.safetensors") if args.to == "safetensors" else ("folder", "exported")
        raise UserError(f"--out names the {what} to write, for example --out {example}")
    out = Path(args.out)
    if args.to == "hf":
        from .exchange.folder import export

        checkpoint = export(Path(args.run), out, standalone=args.standalone, overwrite=args.overwrite)
        size = sum(file.stat().st_size for file in out.iterdir())
        print(f"{out}: {checkpoint} as a folder for transformers, {size:,} bytes")
        return 0
    if args.standalone:
        raise UserError("--standalone is for --to hf: a file of weights has no code")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file, for example {out / 'model.safetensors'}")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists; --overwrite replaces it")

    from .checkpoint import checkpoint_at, write_one_file

    checkpoint = checkpoint_at(Path(args.run))
    write_one_file(checkpoint, out)
    print(f"{out}: the weights of {checkpoint}, {out.stat().st_size:,} bytes")
    return 0


@dataclass(frozen=True)
class Import:
    """Make a run folder of one that depthmix export --to hf wrote, or of what transformers saved of it since.

    The run has weights, configuration and tokenizer, the same to the last bit; generate, diagnose, map and export take
    it, and train --init-from starts from it. Pickles are not opened, and no code in the folder is run.

    Example: depthmix import exported --out runs/imported
    """

    folder: Annotated[Positional[str], arg(metavar="DIR")]
    """The folder."""
    out: str = ""
    """The run folder to make."""


def _import(argv: list[str]) -> int:
    args = flags.parse(Import, argv, "import")
    if not args.out:
        raise UserError("--out names the run folder to make, for example --out runs/imported")

    from .exchange.folder import import_folder

    found = import_folder(Path(args.folder), Path(args.out))
    numbers = sum(tensor.numel() for tensor in found.weights.values())
    print(f"{args.out}: {found.config.model.label}, {numbers:,} parameters, step {found.step:,}")
    return 0


@dataclass(frozen=True)
class Info:
    """Sizes and costs of a model, worked out without building it on a device.

    Parameters, floating-point operations (FLOPs) per token, activation bytes per token, and the
    initial bias and value of the gates (Eq. 14).

    Example: depthmix info --preset M --residual mgr-competitive --n-streams 8
    """

    training: flags.TrainFlags
    preset: str = "quick"
    """Named configuration to start from: quick, depth, xs, S, M or L; the options below change single values."""
    config: str | None = None
    """Start from this config.json instead of a preset."""
    list: FlagCreatePairsOff[bool] = False
    """Name the residual connections and presets instead."""
    json: FlagCreatePairsOff[bool] = False
    """Print JSON."""


def _info(argv: list[str]) -> int:
    from .presets import preset

    file = flags.given(argv, "--config")
    base = flags.load_config(file) if file is not None else preset(flags.given(argv, "--preset") or "quick")
    args = flags.parse(Info, argv, "info", Info(training=flags.to_flags(base)))
    if args.list:
        return _list(args.json)

    from .info import describe

    values = describe(flags.to_config(args.training))
    if args.json:
        print(json.dumps(values, indent=2))
    else:
        _print_values(values)
    return 0


def _list(as_json: bool) -> int:
    from .presets import PRESETS
    from .residuals import residual_options, residual_summaries
    from .residuals.registry import format_spec

    summaries = residual_summaries()
    options = {name: residual_options(name) for name in summaries}
    if as_json:
        print(json.dumps({"residuals": summaries, "options": options, "presets": [*PRESETS]}, indent=2))
        return 0
    width = max(map(len, summaries))
    print(
        "residual connections (--residual NAME or NAME:option=value:option=value), options with their defaults"
    )
    for name, summary in summaries.items():
        print(f"  {name:<{width}}  {summary}")
        if options[name]:
            print(f"  {'':<{width}}  {format_spec('', options[name])[1:].replace(':', ' ')}")
    print(f"presets (--preset)\n  {', '.join(PRESETS)}")
    return 0


def _print_values(values: dict, indent: str = "") -> None:
    """``name  value`` lines; nested dictionaries are indented below their name."""
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        label = key.replace("_", " ")
        if isinstance(value, dict):
            print(f"{indent}{label}")
            _print_values(value, indent + "  ")
        else:
            print(f"{indent}{label:<{width}}  {_readable(value)}")


def _readable(value) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{4 if abs(value) < 1000 else 0}f}"
