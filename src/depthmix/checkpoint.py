"""Checkpoints that are whole or absent, whatever moment the process or the machine dies.

A checkpoint is a folder ``step-00000040``::

    model.safetensors       weights, a tied one once
    optimizer.safetensors   every state tensor of the optimiser, fp32
    random.safetensors      torch's random states, as bytes
    state.json              step, loader, configuration, Python's and numpy's random states, versions
    manifest.json           size and SHA-256 of each file above

One that several processes wrote together (:mod:`depthmix.parallel.checkpoint`) holds the same tensors in
pieces, and no random states::

    model/shard-00001.safetensors ...       what each process wrote of the weights
    optimizer/shard-00001.safetensors ...   and of the optimiser's state
    state.json, manifest.json               as above, with "layout": "sharded"

One that was imported (:mod:`depthmix.exchange`) holds ``model.safetensors``, ``state.json`` and ``manifest.json``
alone: a training can start from its weights, and not go on from it.

All functions here read all of these, and give whole tensors.

It is written into a hidden folder beside, every file and the folder synced, then renamed: the name
``step-...`` never stands for anything incomplete. Only then is an older checkpoint dropped, by a
rename to a hidden name before its files go. Hidden folders that a killed process left behind are
removed at the next save. Nothing is pickled, so loading a checkpoint cannot run code.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import TrainConfig, from_dict
from .durable import fsync
from .errors import RunError, UserError
from .optim import MuonAdamW

if TYPE_CHECKING:
    from .model import GPT

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_SAVING, _DELETING = ".saving-", ".deleting-"
_FILES = ("model.safetensors", "state.json")
_TRAINING_FILES = ("optimizer.safetensors", "random.safetensors")
_PARTS = ("model", "optimizer")
SHARDED = "sharded"
"""The layout, in ``state.json``, of a checkpoint in pieces; one in whole files names none."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, its hashes verified; tensors are whole and on the CPU.

    ``random`` is empty where several processes wrote the checkpoint.
    """

    folder: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def config(self) -> TrainConfig:
        return from_dict(self.state["config"])


# --- files that survive a crash -------------------------------------------------------------------


def write_json(path: Path, value) -> None:
    """Replace ``path`` by ``value`` as JSON, atomically: a reader sees the old file or the new one.

    Raises ``RunError`` naming the path when it cannot be written.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        fsync(beside)
        os.replace(beside, path)
        fsync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free some space or make the folder writable"
        ) from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a ``.safetensors`` file with the permissions of its folder and put it on the disk.

    Raises ``OSError`` or ``SafetensorError``; :func:`reason` says in words what either means.
    """
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    # safetensors writes for the owner alone; the folder knows what the umask asks for.
    os.chmod(path, path.parent.stat().st_mode & 0o666)
    fsync(path)


def reason(error: Exception) -> str:
    """What went wrong, without the number that the operating system gives it."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def entry(path: Path) -> dict:
    """What the manifest says of a file: its size in bytes and its SHA-256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


# --- what goes in ---------------------------------------------------------------------------------


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Live parameters and persistent buffers by name; a tied one under its first name only."""
    weights, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor
    return weights


def _random_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _random_numbers() -> dict:
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {"python": random.getstate(), "numpy": numpy_state}


def _set_random_states(tensors: dict[str, Tensor], numbers: dict) -> None:
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        # On a machine with fewer devices, those that exist go on; bits differ across devices anyway.
        if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(numbers["numpy"])


def versions() -> dict[str, str]:
    """Versions of everything that decides which bits a step computes."""
    from . import __version__

    return {
        "depthmix": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


# --- saving ---------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: MuonAdamW, state: dict) -> Path:
    """Write checkpoint ``step`` into ``folder`` (RUN/checkpoints) and return its path.

    ``state`` is the trainer's part of ``state.json``: plain JSON types, with at least ``config``. A
    whole checkpoint of the same step is left as it is: training is deterministic, and replacing it
    would put it at risk. Raises ``RunError`` when it cannot be written; what was saved before stays.
    """
    target = folder / f"step-{step:08d}"
    beside = folder / f"{_SAVING}{target.name}"
    try:
        if prepare(folder, step) is None:
            return target
        tensors = {
            "model.safetensors": _weights(model),
            "optimizer.safetensors": optimizer.named_state(),
            "random.safetensors": _random_tensors(),
        }
        for name, values in tensors.items():
            write_tensors(beside / name, values)
        commit(
            beside,
            {"format": FORMAT, "step": step, **state, "random": _random_numbers(), "versions": versions()},
            {name: entry(beside / name) for name in tensors},
        )
    except (OSError, safetensors.SafetensorError) as error:
        # On a full disk the half-written files are the first thing to give back.
        discard(beside)
        raise not_written(target, reason(error)) from error
    return target


def save_weights(folder: Path, step: int, weights: dict[str, Tensor], state: dict) -> Path:
    """Write weights alone as checkpoint ``step`` of ``folder`` (RUN/checkpoints) and return its path.

    Raises ``OSError`` or ``SafetensorError``; :func:`reason` says in words what either means.
    """
    beside = prepare(folder, step)
    assert beside is not None, f"{folder} has checkpoint {step} already"
    write_tensors(beside / "model.safetensors", weights)
    return commit(
        beside,
        {"format": FORMAT, "step": step, **state, "versions": versions()},
        {"model.safetensors": entry(beside / "model.safetensors")},
    )


def commit(beside: Path, state: dict, files: dict[str, dict]) -> Path:
    """Turn the hidden folder ``beside``, whose tensors are on the disk, into a checkpoint; its path.

    ``files`` has an :func:`entry` for each file of tensors, by its path in the folder. Raises ``OSError``.
    """
    target = beside.with_name(beside.name.removeprefix(_SAVING))
    state_file = beside / "state.json"
    state_file.write_text(json.dumps(state, allow_nan=False) + "\n", encoding="utf-8")
    fsync(state_file)
    files = {**files, "state.json": entry(state_file)}
    # One line, with a hash of its own: damage to it is told from damage to the files it lists.
    manifest = json.dumps({"files": files, "sha256": _digest(files)}, separators=(",", ":"))
    (beside / "manifest.json").write_text(manifest, encoding="utf-8")
    fsync(beside / "manifest.json")
    for folder in (*sorted({(beside / name).parent for name in files} - {beside}), beside):
        fsync(folder)
    os.rename(beside, target)
    fsync(target.parent)
    return target


def prepare(folder: Path, step: int) -> Path | None:
    """Make the hidden folder in which checkpoint ``step`` of ``folder`` is written; None: it is there, whole.

    Removes what a killed process left, and a damaged checkpoint of this step. Raises ``OSError``.
    """
    target = folder / f"step-{step:08d}"
    beside = folder / f"{_SAVING}{target.name}"
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    if target.exists():
        if problem(target) is None:
            return None
        _delete(target)
    beside.mkdir()
    return beside


def discard(beside: Path) -> None:
    """Give back the room of a hidden folder that will not become a checkpoint."""
    shutil.rmtree(beside, ignore_errors=True)


ROOM = "Free some space or make the folder writable, then go on with --resume."


def not_written(target: Path, why: str, advice: str = ROOM) -> RunError:
    """The error of a checkpoint that could not be written: what is left, and what to do."""
    return RunError(f"cannot write checkpoint {target}: {why}. {_what_is_kept(target.parent)} {advice}")


def record_best(folder: Path, best: dict | None) -> None:
    """Name the checkpoint with the lowest validation loss in ``best.json``, atomically.

    ``best`` is ``{"step": k, "val_loss": x}``; None removes the file.
    """
    path = folder / "best.json"
    if best is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, {**best, "checkpoint": f"step-{best['step']:08d}"})


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that ``best.json`` names, if there is one."""
    path = folder / "best.json"
    try:
        target = folder / json.loads(path.read_text(encoding="utf-8"))["checkpoint"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged; remove it, and the best checkpoint is no longer kept") from error
    return target if target.is_dir() else None


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Drop all checkpoints but the newest ``keep_last`` and the best, and what a killed process left."""
    try:
        _remove_leftovers(folder)
        best = best_checkpoint(folder)
        for checkpoint in list_checkpoints(folder)[:-keep_last]:
            if checkpoint != best:
                _delete(checkpoint)
    except OSError as error:
        raise RunError(
            f"cannot remove old checkpoints in {folder}: {error.strerror or error}. {_what_is_kept(folder)}"
        ) from error


def _delete(checkpoint: Path) -> None:
    """Drop a checkpoint so that no half of it is ever seen under its name."""
    hidden = checkpoint.with_name(f"{_DELETING}{checkpoint.name}")
    os.rename(checkpoint, hidden)
    fsync(checkpoint.parent)
    shutil.rmtree(hidden)


def _remove_leftovers(folder: Path) -> None:
    if folder.is_dir():
        for entry in list(folder.iterdir()):
            if entry.name.startswith((_SAVING, _DELETING)):
                shutil.rmtree(entry)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- finding --------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in ``folder`` (RUN/checkpoints), oldest step first."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("step-")))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder`` (RUN/checkpoints)."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


# --- loading --------------------------------------------------------------------------------------


class _Wrong(Exception):
    """What is wrong with a checkpoint, naming the file."""


def _listed(checkpoint: Path) -> dict[str, dict]:
    """The manifest's :func:`entry` of each file, once the manifest itself was found whole.

    Raises ``_Wrong``.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        whole = manifest["sha256"] == _digest(files) and all(
            isinstance(found["bytes"], int) and isinstance(found["sha256"], str) for found in files.values()
        )
    except FileNotFoundError:
        raise _Wrong("manifest.json is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    except OSError as error:
        raise _Wrong(f"manifest.json cannot be read: {reason(error)}") from error
    # In pieces, there are as many files as there were processes that had something to write.
    expected = _FILES if whole and "model.safetensors" in files else ("state.json",)
    if not whole or not files.keys() >= set(expected):
        raise _Wrong("manifest.json is damaged")
    return files


def files_of(checkpoint: Path, part: str) -> list[str]:
    """The files that hold the weights (``part="model"``) or the optimiser's state (``"optimizer"``).

    Raises ``RunError`` when the manifest is damaged.
    """
    try:
        return [
            name for name in _listed(checkpoint) if name == f"{part}.safetensors" or _is_piece(name, part)
        ]
    except _Wrong as wrong:
        raise damaged(checkpoint, str(wrong)) from wrong


def _is_piece(name: str, part: str) -> bool:
    return name.startswith(f"{part}/")


def sizes(checkpoint: Path, *, training: bool = True) -> dict[str, int]:
    """Bytes of each file that :func:`problem` would read.

    Raises ``RunError`` when the manifest is damaged.
    """
    try:
        return {name: found["bytes"] for name, found in _needed(checkpoint, training).items()}
    except _Wrong as wrong:
        raise damaged(checkpoint, str(wrong)) from wrong


def _needed(checkpoint: Path, training: bool) -> dict[str, dict]:
    return {
        name: found
        for name, found in _listed(checkpoint).items()
        if training or name in ("model.safetensors", "state.json") or _is_piece(name, "model")
    }


def problem(checkpoint: Path, files: Iterable[str] | None = None, *, training: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when all is as written.

    ``files`` restricts it to these; ``training=False`` to weights and state.
    """
    try:
        listed = _needed(checkpoint, training)
    except _Wrong as wrong:
        return str(wrong)
    for name in listed if files is None else files:
        try:
            size, expected = (checkpoint / name).stat().st_size, listed[name]
            if size != expected["bytes"]:
                return f"{name} has {size} bytes where the manifest says {expected['bytes']}"
            if entry(checkpoint / name) != expected:
                return f"{name} is damaged: its SHA-256 is not the manifest's"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {reason(error)}"
    return None


def damaged(checkpoint: Path, wrong: str) -> RunError:
    """The error of a damaged checkpoint: what is wrong with it, and which to use instead."""
    return RunError(f"checkpoint {checkpoint}: {wrong}. {_instead_of(checkpoint)}")


def read_state(checkpoint: Path) -> dict:
    """``state.json`` of a checkpoint, that file's hash verified.

    Raises ``RunError`` when it is damaged, or of a format or layout that this version does not read.
    """
    wrong = problem(checkpoint, ["state.json"])
    if wrong is not None:
        raise damaged(checkpoint, wrong)
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT or state.get("layout", SHARDED) != SHARDED:
        raise RunError(
            f"checkpoint {checkpoint} has format {state.get('format')}, this depthmix reads {FORMAT}: "
            f"use depthmix {state.get('versions', {}).get('depthmix')}"
        )
    return state


def load_checkpoint(checkpoint: Path, *, training: bool = True) -> Checkpoint:
    """Read a checkpoint folder, every file checked against its SHA-256.

    ``training=False`` reads weights and state only. Raises ``UserError`` when ``checkpoint`` is no
    checkpoint, and ``RunError`` when it is damaged: the file, what is wrong with it, and which
    checkpoint to use instead.
    """
    checkpoint = Path(checkpoint)
    check_is_folder(checkpoint)
    wrong = problem(checkpoint, training=training)
    if wrong is not None:
        raise damaged(checkpoint, wrong)
    state = read_state(checkpoint)
    if training and has_weights_alone(checkpoint):
        raise UserError(
            f"checkpoint {checkpoint} was imported and holds weights alone, so no training can go on from it; "
            f"start one from them with depthmix train --init-from {checkpoint.parent.parent} --out NEW_RUN"
        )
    if state.get("layout") == SHARDED:
        tensors = {part: whole_tensors(checkpoint, part) for part in (_PARTS if training else _PARTS[:1])}
    else:
        parts = (*_PARTS, "random") if training else _PARTS[:1]
        tensors = {part: load_file(checkpoint / f"{part}.safetensors") for part in parts}
    return Checkpoint(
        checkpoint,
        model=tensors["model"],
        optimizer=tensors.get("optimizer", {}),
        random=tensors.get("random", {}),
        state=state,
    )


def whole_tensors(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """All tensors of a part of a checkpoint in pieces, whole, on the CPU. Hashes were verified before.

    Raises ``RunError`` when the manifest is damaged.
    """
    # Not above: it loads torch.distributed.checkpoint, which a checkpoint in whole files does not need.
    from .parallel.pieces import read_whole

    return read_whole(checkpoint, files_of(checkpoint, part))


def has_weights_alone(checkpoint: Path) -> bool:
    """Whether a checkpoint in whole files lacks what a training needs to go on from it."""
    files = _listed(checkpoint)
    return "model.safetensors" in files and not files.keys() >= set(_TRAINING_FILES)


def check_is_folder(checkpoint: Path) -> None:
    """Raise ``UserError`` when there is no folder ``checkpoint``."""
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not a checkpoint folder (RUN/checkpoints/step-...)")


@torch.no_grad()
def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: MuonAdamW) -> None:
    """Put weights, optimiser state and every random state back, in place and bit for bit.

    A checkpoint without random states leaves them as they are: training draws no numbers.
    Raises ``RunError`` when the checkpoint does not fit the model or the optimiser.
    """
    _copy_into(_weights(model), checkpoint.model, place(checkpoint.folder, "model"))
    _copy_into(optimizer.named_state(), checkpoint.optimizer, place(checkpoint.folder, "optimizer"))
    if checkpoint.random:
        _set_random_states(checkpoint.random, checkpoint.state["random"])


def place(checkpoint: Path, part: str) -> Path:
    """The file, or the folder of pieces, that holds a part of a checkpoint."""
    pieces = checkpoint / part
    return pieces if pieces.is_dir() else checkpoint / f"{part}.safetensors"


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that ``path`` stands for: itself, or of a run folder its best, else its newest.

    Raises ``UserError`` when there is none.
    """
    if (path / "manifest.json").exists() or _NAME.fullmatch(path.name):
        return path
    folder = best_checkpoint(path / "checkpoints") or latest_checkpoint(path / "checkpoints")
    if folder is None:
        raise UserError(
            f"{path} holds no checkpoint; give a run folder made by `depthmix train` "
            f"or one of its checkpoints/step-... folders"
        )
    return folder


def write_one_file(checkpoint: Path, out: Path) -> None:
    """Write the weights of a checkpoint folder, whole tensors by their names, to one safetensors file.

    Atomically: ``out`` is the old file, if there was one, or the new one. Raises ``UserError`` when
    ``checkpoint`` is no checkpoint, ``RunError`` when it is damaged or ``out`` cannot be written.
    """
    out = Path(out)
    weights = load_checkpoint(checkpoint, training=False).model
    beside = out.with_name(f".{out.name}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(beside, weights, {"format": "pt"})
        os.replace(beside, out)
        fsync(out.parent)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {out}: {reason(error)}; free some space or make the folder writable"
        ) from error


@torch.no_grad()
def load_model(
    path: Path, device: str | torch.device = "cpu", *, exact_gradients: bool = False
) -> "tuple[GPT, TrainConfig]":
    """The model of a run folder (its best checkpoint, else its newest) or of one checkpoint folder.

    In evaluation mode, on ``device``, in the dtype it was trained in. With ``exact_gradients``, streams that training
    reconstructed by inversion are replayed. Raises ``UserError`` when there
    is no checkpoint at ``path``, ``RunError`` when it is damaged.
    """
    from .model import GPT

    folder = checkpoint_at(Path(path))
    checkpoint = load_checkpoint(folder, training=False)
    config = checkpoint.config
    if exact_gradients and config.model.stream_memory == "inversion":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, stream_memory="replay"))
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten at once
        model = GPT(config.model, seed=config.seed)
    weights = _weights(model)
    for name, saved in checkpoint.model.items():
        if name in weights:
            weights[name].data = weights[name].data.to(saved.dtype)
    _copy_into(weights, checkpoint.model, place(folder, "model"))
    return model.to(device).eval(), config


@torch.no_grad()
def start_from(model: nn.Module, path: Path) -> None:
    """Put the weights of a run folder (its best checkpoint, else its newest) or a checkpoint folder into ``model``.

    Each in the dtype that the model has. Raises ``UserError`` when there is no checkpoint at ``path``, ``RunError``
    when it is damaged or of another shape.
    """
    folder = checkpoint_at(path)
    saved, live = load_checkpoint(folder, training=False).model, _weights(model)
    saved = {name: t.to(live[name].dtype) if name in live else t for name, t in saved.items()}
    _copy_into(live, saved, place(folder, "model"))


def _copy_into(live: dict[str, Tensor], saved: dict[str, Tensor], file: Path) -> None:
    check_fit(kinds_of(live), kinds_of(saved), file)
    for name, tensor in live.items():
        tensor.copy_(saved[name])


Kinds = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors by name."""


def kinds_of(tensors: dict[str, Tensor]) -> Kinds:
    """Of tensors, or of what a process holds of them."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def check_fit(live: Kinds, saved: Kinds, file: Path) -> None:
    """Raise ``RunError`` naming what differs, if anything, between tensors needed and those of ``file``."""
    missing, unknown = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
    other = [
        f"{name} ({saved[name][0]} {list(saved[name][1])} saved, {live[name][0]} {list(live[name][1])} needed)"
        for name in live.keys() & saved.keys()
        if saved[name] != live[name]
    ]
    differences = (("missing", missing), ("not in the model", unknown), ("of another shape", sorted(other)))
    parts = [f"{what}: {', '.join(names[:5])}" for what, names in differences if names]
    if parts:
        raise RunError(
            f"{file} does not fit the model; {'; '.join(parts)}. "
            f"It was written by another version of depthmix or for another configuration."
        )


def _instead_of(broken: Path) -> str:
    """The sentence that names the newest whole checkpoint beside a damaged one."""
    for other in reversed(list_checkpoints(broken.parent)):
        if other != broken and problem(other) is None:
            return f"The newest whole checkpoint is {other}; to resume from it, remove {broken.name}."
    return "No whole checkpoint lies beside it: restore it from a copy, or start a new run."


def _what_is_kept(folder: Path) -> str:
    newest = latest_checkpoint(folder)
    return f"The last checkpoint is {newest}." if newest else "No checkpoint was saved before."
