"""``depthmix map``: the mixing maps of trained runs, or of untrained models, side by side in one picture."""

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from . import flags
from .errors import EXIT_USAGE, RunError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from .config import GPTConfig, TrainConfig
    from .mixing import MixingMap
    from .model import GPT

ROWS_AT_ONCE = 64
"""Windows read from the validation data in one piece."""


@dataclass(frozen=True)
class Map:
    """Draw mixing maps: how much of every earlier output each sublayer reads, side by side.

    Rows are the inputs of the sublayers and the output, columns the embedding and the sublayers' outputs.

    Example: depthmix map runs/prenorm runs/mgr --tokens 4096 --out maps.png --npz
    """

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")] = ()
    """Run folders (their best checkpoints are taken), checkpoint folders, or folders of comparisons."""
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
    model: "GPT"
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
    runs = [run for given in args.runs for run in _expand(Path(given))]
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
            found.mapped.save(out.with_name(f"{out.stem}-{_file_name(label)}.npz"))
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


def _expand(path: Path) -> list[Path]:
    """``path``, or the run folders of the comparison that it is."""
    from .report.records import read_json

    if not path.is_dir():
        raise UserError(f"{path} is no folder; give run folders made by `depthmix train` or `compare`")
    plan = read_json(path / "compare.json")
    return [path] if plan is None else [path / cell["name"] for cell in plan["cells"]]


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


def _trained(path: Path, data: tuple[str, ...], tokens: int, device) -> Subject:
    from .checkpoint import best_checkpoint, latest_checkpoint, load_model

    # The choice of load_model, made here because the step is wanted too.
    checkpoints = path / "checkpoints"
    folder = (best_checkpoint(checkpoints) or latest_checkpoint(checkpoints)) or path
    model, config = load_model(folder, device)
    # A checkpoint lies in RUN/checkpoints.
    run = next((f for f in (path, *path.resolve().parents[:2]) if (f / "config.json").exists()), path)
    return Subject(
        name=run.resolve().name,
        residual=spec(config.model),
        detail=_validation_loss(run, folder),
        model=model,
        ids=_ids(config, run, data, tokens),
    )


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


def spec(model: "GPTConfig") -> str:
    """The connection with the options that are its own."""
    options = model.residual_options.items()
    return ":".join([model.residual, *(f"{key}={value}" for key, value in options)])


def _validation_loss(run: Path, checkpoint: Path) -> str:
    from .report.records import read_run

    step = re.fullmatch(r"step-(\d+)", checkpoint.name)
    if step is None or not (run / "config.json").exists():
        return ""
    number, record = int(step[1]), read_run(run)
    losses = record.val["loss"][record.val["step"] == number]
    loss = f"validation loss {losses[0]:.3f}, " if losses.size else ""
    return f"{loss}step {number:,}"


def _ids(config: "TrainConfig", run: Path, data: tuple[str, ...], tokens: int) -> "Tensor":
    """``[B, T]``: the first sequences of the run's validation data, or of the text asked for."""
    import torch

    from .data import eval_batches, open_dataset, prepare

    length = config.model.seq_len
    if not data:
        split = open_dataset(prepare(config.data)).val
        return torch.cat([x for x, _ in eval_batches(split, length, ROWS_AT_ONCE, tokens)])
    ids = _encode(data, config.data.text_field, run, -(-tokens // length) * length)
    if ids.numel() < length:
        # A short text is one short sequence.
        return ids[None]
    return ids[: ids.numel() // length * length].view(-1, length)


def _encode(data: tuple[str, ...], text_field: str, run: Path, tokens: int) -> "Tensor":
    """At most ``tokens`` ids of the text in ``data``, by the tokenizer that ``run`` was trained with."""
    import torch

    from .data import load_tokenizer
    from .data.sources import Reading, find_sources
    from .report.records import read_json

    values = read_json(run / "tokenizer.json")
    if values is None:
        raise UserError(f"{run} has no tokenizer.json; give a run folder made by `depthmix train`")
    tokenizer, ids = load_tokenizer(values), []
    for source in find_sources(data, text_field):
        for block in source.blocks(Reading()):
            for _, text in block.documents():
                ids += [*tokenizer.encode(text), tokenizer.end_token]
                if len(ids) >= tokens:
                    return torch.tensor(ids[:tokens])
    return torch.tensor(ids)


# --- what is shown --------------------------------------------------------------------------------


def _labels(drawn: list[Drawn]) -> list[str]:
    """The connection's name; where one name stands for several maps, with the run's beside it."""
    specs = [found.subject.residual for found in drawn]
    labels = [
        found.subject.residual
        if specs.count(found.subject.residual) == 1
        else f"{found.subject.residual} ({found.subject.name})"
        for found in drawn
    ]
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[: place + 1].count(label)}"
        for place, label in enumerate(labels)
    ]


def picture(drawn: list[Drawn]) -> bytes:
    """The maps as a PNG."""
    from .report.mixing import Panel, png

    return png(
        [
            Panel(label, found.subject.detail, found.mapped.matrix.numpy())
            for label, found in zip(_labels(drawn), drawn, strict=True)
        ]
    )


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", label).strip("-")


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
