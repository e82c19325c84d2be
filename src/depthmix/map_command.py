"""``depthmix map``: the mixing maps of trained runs, or of untrained models, side by side in one picture."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from . import flags
from .errors import EXIT_USAGE, RunError, UserError
from .runs import distinct_labels, expand, file_name, open_run, read_windows, spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .config import TrainConfig
    from .mixing import MixingMap


LONGEST = 512
"""Tokens of a sequence of a model that others made; those of a run have its context."""


@dataclass(frozen=True)
class Map:
    """Draw mixing maps: how much of every earlier output each sublayer reads, side by side.

    Rows are the inputs of the sublayers and the output, columns the embedding and the sublayers' outputs.

    Example: depthmix map runs/prenorm runs/mgr --tokens 4096 --out maps.png --npz
    """

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """Run folders (their best checkpoints are taken), checkpoint folders, folders of comparisons, or folders in which
    a language model of depthmix.adapt was saved (with --data)."""
    residual: tuple[str, ...] = ()
    """Also the untrained models of these connections, on random tokens; commas or spaces between."""
    preset: str = "quick"
    """Named configuration of the untrained models: quick, xs, S, M or L."""
    data: tuple[str, ...] = ()
    """Text for the maps: files, folders, globs of .txt .jsonl .parquet. Default: each run's validation data."""
    tokens: int = 2048
    """Tokens that a map is the mean over, rounded up to whole sequences; fewer where the data end."""
    out: str = "runs/mixing-map.png"
    """The picture."""
    npz: FlagCreatePairsOff[bool] = False
    """Also write each map beside the picture, as OUT-NAME.npz; depthmix.MixingMap.load reads it."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is cuda when there is one."""


@dataclass(frozen=True)
class Subject:
    """A model to map."""

    name: str
    """Of the run folder; "untrained" without one."""
    residual: str
    detail: str
    model: "nn.Module"
    """A GPT, or a language model of depthmix.adapt."""
    ids: "Tensor"


@dataclass(frozen=True)
class Drawn:
    """A map that was found."""

    subject: Subject
    mapped: "MixingMap"
    error: float


def main(argv: list[str]) -> int:
    """The verb ``map``; returns its exit status: 2 when no map could be drawn."""
    args = flags.parse(Map, argv, "map")
    names = [name for word in args.residual for name in word.split(",") if name]
    if not args.runs and not names:
        raise UserError("give run folders, or --residual NAME for untrained models")
    if args.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {args.tokens}")
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {args.out!r}")
    runs = [run for given in args.runs for run in expand(Path(given))]
    # What is misspelt is refused before anything is computed.
    untrained = [_initial(name, args.preset) for name in names]

    from .device import find_device
    from .report.write import write_atomically

    device = find_device(args.device)
    subjects = itertools.chain(
        ((str(run), lambda run=run: _trained(run, args.data, args.tokens, device)) for run in runs),
        ((c.model.residual, lambda c=c: _untrained(c, args, device)) for c in untrained),
    )
    drawn = [*_drawn(subjects)]
    if not drawn:
        return EXIT_USAGE
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [write_atomically(out, picture(drawn))]
    if args.npz:
        written += [
            found.mapped.save(out.with_name(f"{out.stem}-{file_name(label)}.npz"))
            for label, found in zip(_labels(drawn), drawn, strict=True)
        ]
    _print_table(drawn)
    for path in written:
        print(f"written: {path}")
    return 0


def _drawn(subjects) -> Iterator[Drawn]:
    """A map of each; what has none is named on standard error and stops nobody else."""
    from .mixing import mixing_error, mixing_map

    for name, load in subjects:
        try:
            subject = load()
            mapped = mixing_map(subject.model, subject.ids)
            if not mapped.matrix.isfinite().all():
                raise RunError("its gates are not finite on these tokens; map an earlier checkpoint")
            yield Drawn(subject, mapped, mixing_error(subject.model, subject.ids[:1]))
        except (UserError, RunError) as error:
            print(f"depthmix: no map of {name}: {error}", file=sys.stderr)


# --- what is mapped -------------------------------------------------------------------------------


def _trained(path: Path, data: tuple[str, ...], tokens: int, device) -> Subject:
    from .diagnostics.command import is_huggingface

    if is_huggingface(path):
        return _adapted(path, data, tokens, device)
    run = open_run(path, device)
    ids = read_windows(run, data, run.config.model.seq_len, tokens)
    return Subject(run.name, spec(run.config.model), run.detail, run.model, ids)


def _adapted(path: Path, data: tuple[str, ...], tokens: int, device) -> Subject:
    from .diagnostics.adapted import AdaptedSubject
    from .diagnostics.opening import open_huggingface

    if not data:
        raise UserError("a model of Hugging Face comes without text; give --data")
    found = open_huggingface(path, device)
    if not isinstance(found, AdaptedSubject):
        raise UserError(
            f"it is a {type(found.module).__name__} with its own connection, PreNorm, whose map is all ones; "
            f"depthmix.adapt gives it another"
        )
    length = min(found.max_length, LONGEST)
    ids = found.windows(data, "text", length, -(-tokens // length) * length)
    return Subject(found.name, found.residual, found.detail, found.module, ids)


def save_run_map(run: Path, tokens: int = 2048) -> Path:
    """Write the map of a finished run, on its first validation tokens, to RUN/mixing-map.npz.

    What is there already is left. Raises ``UserError`` where the connection has no map or the run no
    checkpoint or data.
    """
    from .device import find_device
    from .mixing import mixing_map
    from .report.mixing import RUN_FILE

    path = run / RUN_FILE
    if path.exists():
        return path
    device = find_device(flags.load_config(run / "config.json").device)
    subject = _trained(run, (), tokens, device)
    return mixing_map(subject.model, subject.ids).save(path)


def _initial(name: str, preset_name: str) -> "TrainConfig":
    from .presets import preset

    base = preset(preset_name)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, residual=name))


def _untrained(config: "TrainConfig", args: Map, device) -> Subject:
    import torch

    from .train import build_model

    length, vocabulary = config.model.seq_len, config.model.vocab_size
    # At the start gates are constants or nearly so: which tokens they see hardly matters.
    shape = (-(-args.tokens // length), length)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    model = build_model(config, device).eval()
    return Subject("untrained", spec(config.model), f"untrained, preset {args.preset}", model, ids)


# --- what is shown --------------------------------------------------------------------------------


def _labels(drawn: list[Drawn]) -> list[str]:
    return distinct_labels([d.subject.residual for d in drawn], [d.subject.name for d in drawn])


def picture(drawn: list[Drawn]) -> bytes:
    """The maps as a PNG."""
    from .report.mixing import Panel, png

    return png(
        [
            Panel(label, found.subject.detail, found.mapped.matrix.numpy())
            for label, found in zip(_labels(drawn), drawn, strict=True)
        ]
    )


def strongest(mapped: "MixingMap") -> str:
    """The term of the trunk's output with the largest size, ``|M| rms(v)``, and its share."""
    share = mapped.contributions[-1]
    place = int(share.argmax())
    return f"{mapped.labels[place]} ({float(share[place]):.1%})"


def _print_table(drawn: list[Drawn]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 200
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("residual connection")
    for title in (
        "embedding in the output\ncoefficients", "embedding in the output\nby size", "strongest in the output\nby size",
        "mean age of sources\nin the output", "identity error\nrelative",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for label, found in zip(_labels(drawn), drawn, strict=True):
        mapped = found.mapped
        table.add_row(
            label,
            f"{mapped.embedding_share:.1%}",
            f"{float(mapped.contributions[-1, 0]):.1%}",
            strongest(mapped),
            f"{float(mapped.source_age[-1]):.1f}",
            f"{found.error:.0e}",
        )
    console.print(table)
