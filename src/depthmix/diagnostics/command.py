"""``depthmix diagnose``: what networks do in depth, as arrays, pictures and one page."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from .. import flags
from ..errors import EXIT_USAGE, RunError, UserError, suggest
from . import PARTS

if TYPE_CHECKING:
    from torch import Tensor

    from .arrays import Diagnosis
    from .subject import Subject


@dataclass(frozen=True)
class Diagnose:
    """Look into trained networks: every figure as an array and a picture, and one page with runs side by side.

    Example: depthmix diagnose runs/prenorm runs/mgr --out runs/diagnosis
    """

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """Run folders (their best checkpoints are taken), checkpoint folders, folders of comparisons, folders of Hugging
    Face causal language models, or .npz files that this command wrote."""
    data: tuple[str, ...] = ()
    """Text: files, folders, globs of .txt .jsonl .parquet. Default: each run's validation data."""
    text_field: str = "text"
    """Field of .jsonl and .parquet rows, for models of Hugging Face; runs have their own."""
    texts: int = 512
    """Texts; fewer where the data end."""
    length: int = 256
    """Tokens of each text, fewer where a model takes no more."""
    removal_texts: int = 128
    """Texts, from the first, that block removal takes; 0: all."""
    gradient_texts: int = 64
    """Texts, from the first, that the gradient is the mean over; 0: all."""
    batch: int = 8
    """Texts at a time."""
    skip: tuple[str, ...] = ()
    """Parts to leave out: activations, gradients, removal, mixing, reconstruction."""
    out: str = "runs/diagnosis"
    """Folder for report.html, the pictures and NAME.npz of every model."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is cuda when there is one."""


def main(argv: list[str]) -> int:
    """The verb ``diagnose``; returns its exit status: 2 when nothing could be diagnosed."""
    args = flags.parse(Diagnose, argv, "diagnose")
    if not args.runs:
        raise UserError(
            "give run folders, checkpoints, Hugging Face model folders, or .npz files of this command"
        )
    skip = {part for word in args.skip for part in word.split(",") if part}
    for part in skip:
        if part not in PARTS:
            raise UserError(suggest(part, PARTS, "part"))
    for name in ("texts", "length"):
        if getattr(args, name) < (2 if name == "length" else 1):
            raise UserError(
                f"--{name} must be at least {2 if name == 'length' else 1}, got {getattr(args, name)}"
            )
    paths = [path for given in args.runs for path in _expand(Path(given))]

    from rich.console import Console

    from ..device import find_device
    from ..report.diagnosis import print_summary, write_diagnosis
    from ..runs import file_name
    from .run import Extent

    extent = Extent(
        batch=args.batch,
        removal_texts=args.removal_texts,
        gradient_texts=args.gradient_texts,
        parts=tuple(part for part in PARTS if part not in skip),
    )
    device, out = find_device(args.device), Path(args.out)
    found: list[Diagnosis] = []
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    for path in paths:
        try:
            one = _diagnosed(path, args, extent, device)
        except (UserError, RunError) as error:
            print(f"depthmix: no diagnosis of {path}: {error}", file=sys.stderr)
            continue
        one.subject["name"] = _distinct(one.subject["name"], path, [other.subject["name"] for other in found])
        found.append(one)
        out.mkdir(parents=True, exist_ok=True)
        one.save(out / f"{file_name(one.subject['name'])}.npz")
    if not found:
        return EXIT_USAGE
    with Console(stderr=True).status("drawing") as status:
        written = write_diagnosis(out, found, lambda title: status.update(f"drawing: {title}"))
    print_summary(found)
    for one in found:
        for warning in one.warnings:
            print(f"depthmix: {one.subject['name']}: {warning}", file=sys.stderr)
    print(f"written: {written}")
    return 0


def _distinct(name: str, path: Path, taken: list[str]) -> str:
    """``name``, with more of the path or a number where others have it."""
    candidates = [
        name,
        f"{path.resolve().parent.name}/{name}",
        *(f"{name} #{k}" for k in range(2, len(taken) + 3)),
    ]
    return next(candidate for candidate in candidates if candidate not in taken)


def _expand(path: Path) -> list[Path]:
    """The runs that ``path`` stands for."""
    from ..runs import expand

    if path.suffix == ".npz" or path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        return [path]
    return expand(path)


def _diagnosed(path: Path, args: Diagnose, extent, device) -> "Diagnosis":
    from .arrays import Diagnosis
    from .run import diagnose

    if path.suffix == ".npz":
        return Diagnosis.load(path)
    subject, texts, source = _opened(path, args, device)
    with _bar(subject.name, extent.parts) as progress:
        return diagnose(subject, texts, extent, source=source, progress=progress)


def _opened(path: Path, args: Diagnose, device) -> "tuple[Subject, Tensor, str]":
    """The model, ``[N, T]`` ids, and what they are."""
    from ..runs import open_run, read_windows, run_tokenizer

    tokens = args.texts * args.length
    source = ", ".join(args.data)
    subject: Subject
    if is_huggingface(path):
        from .opening import open_huggingface

        if not args.data:
            raise UserError("a model of Hugging Face comes without text; give --data")
        foreign = open_huggingface(path, device)
        length = min(args.length, foreign.max_length)
        subject, texts = foreign, foreign.windows(args.data, args.text_field, length, tokens)
    else:
        from .subject import Run

        run = open_run(path, device)
        try:
            tokenizer = run_tokenizer(run.folder)
        except UserError:  # then tokens have no words
            tokenizer = None
        subject = Run(run.model, name=run.name, detail=run.detail, tokenizer=tokenizer)
        length = min(args.length, subject.max_length)
        texts = read_windows(run, args.data, length, args.texts * length)
        source = source or "the run's validation data"
    if texts.numel() < 2:
        raise UserError(f"{source} holds {texts.numel()} tokens; diagnostics need texts of at least 2")
    return subject, texts[: args.texts], source


def is_huggingface(path: Path) -> bool:
    """Whether ``path`` is a model of Hugging Face: a GGUF file, or a folder whose config names a model type."""
    from ..report.records import read_json

    if path.suffix == ".gguf":
        return True
    config = read_json(path / "config.json")
    return any(path.glob("*.gguf")) if config is None else "model_type" in config


class _bar:
    """A progress bar on standard error, one line a part, where it is a terminal."""

    def __init__(self, name: str, parts: tuple[str, ...]):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks = {part: self._progress.add_task(f"{name}: {part}", total=1.0) for part in parts}

    def __enter__(self):
        self._progress.__enter__()
        return lambda part, share: self._progress.update(self._tasks[part], completed=share)

    def __exit__(self, *error):
        return self._progress.__exit__(*error)
