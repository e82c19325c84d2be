"""What other commands need of finished runs: the model, its name and loss, text as its tokenizer sees it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from .config import GPTConfig, TrainConfig
    from .model import GPT

ROWS_AT_ONCE = 64
"""Windows read from the validation data in one piece."""


@dataclass(frozen=True)
class OpenRun:
    """A run's model in evaluation mode."""

    name: str
    """Of the run folder."""
    detail: str
    """Validation loss and step."""
    model: "GPT"
    config: "TrainConfig"
    folder: Path
    """The run folder, also where a checkpoint in it was asked for."""


def expand(path: Path) -> list[Path]:
    """``path``, or the run folders of the comparison that it is."""
    from .report.records import read_json

    if not path.is_dir():
        raise UserError(f"{path} is no folder; give run folders made by `depthmix train` or `compare`")
    plan = read_json(path / "compare.json")
    return [path] if plan is None else [path / cell["name"] for cell in plan["cells"]]


def open_run(path: Path, device) -> OpenRun:
    """The model of a run folder (its best checkpoint, else its newest) or of a checkpoint folder.

    Raises what :func:`depthmix.checkpoint.load_model` raises.
    """
    from .checkpoint import best_checkpoint, latest_checkpoint, load_model

    # The choice of load_model, made here because the step is wanted too.
    checkpoints = path / "checkpoints"
    folder = (best_checkpoint(checkpoints) or latest_checkpoint(checkpoints)) or path
    model, config = load_model(folder, device, exact_gradients=True)
    # A checkpoint lies in RUN/checkpoints.
    run = next((f for f in (path, *path.resolve().parents[:2]) if (f / "config.json").exists()), path)
    return OpenRun(run.resolve().name, _validation_loss(run, folder), model, config, run)


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


def read_windows(run: OpenRun, data: tuple[str, ...], length: int, tokens: int) -> "Tensor":
    """``[N, length]`` ids of the run's validation data or of ``data``: ``tokens`` ids or more, or all there are.

    A text shorter than ``length`` is one short sequence.
    """
    import torch

    from .data import eval_batches, open_dataset, prepare

    if not data:
        split = open_dataset(prepare(run.config.data)).val
        return torch.cat([x for x, _ in eval_batches(split, length, ROWS_AT_ONCE, tokens)])
    tokenizer = run_tokenizer(run.folder)
    field = run.config.data.text_field
    return windows_of(
        encode(data, field, tokenizer.encode, tokenizer.end_token, -(-tokens // length) * length), length
    )


def windows_of(ids: "Tensor", length: int) -> "Tensor":
    """``[N] -> [N // length, length]``, what is left over is left out; ``[1, N]`` where it is shorter than that."""
    return ids[None] if ids.numel() < length else ids[: ids.numel() // length * length].view(-1, length)


def run_tokenizer(run: Path):
    """The tokenizer that ``run`` was trained with."""
    from .data import load_tokenizer
    from .report.records import read_json

    values = read_json(run / "tokenizer.json")
    if values is None:
        raise UserError(f"{run} has no tokenizer.json; give a run folder made by `depthmix train`")
    return load_tokenizer(values)


def encode(data: Sequence[str], text_field: str, tokenize, end_token: int | None, tokens: int) -> "Tensor":
    """At most ``tokens`` ids of the documents in ``data``, each followed by ``end_token`` if there is one.

    ``tokenize(text)`` gives a list of ids.
    """
    import torch

    from .data.sources import Reading, find_sources

    end, ids = [] if end_token is None else [end_token], []
    for source in find_sources(data, text_field):
        for block in source.blocks(Reading()):
            for _, text in block.documents():
                ids += [*tokenize(text), *end]
                if len(ids) >= tokens:
                    return torch.tensor(ids[:tokens])
    return torch.tensor(ids, dtype=torch.long)


def distinct_labels(specs: Sequence[str], names: Sequence[str]) -> list[str]:
    """The connection's name; where one name stands for several, with the run's beside it."""
    labels = [
        spec if specs.count(spec) == 1 else f"{spec} ({name})"
        for spec, name in zip(specs, names, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[: place + 1].count(label)}"
        for place, label in enumerate(labels)
    ]


def file_name(label: str) -> str:
    """``label`` as it may stand in the name of a file."""
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", label).strip("-")
