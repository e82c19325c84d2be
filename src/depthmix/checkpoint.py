"""Checkpoints that are whole or absent, whatever moment the process or the machine dies.

A checkpoint is a folder ``step-00000040``::

    model.safetensors       weights, a tied one once
    optimizer.safetensors   every state tensor of the optimiser, fp32
    random.safetensors      torch's random states, as bytes
    state.json              step, loader, configuration, Python's and numpy's random states, versions
    manifest.json           size and SHA-256 of each file above

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import TrainConfig, from_dict
from .errors import RunError, UserError
from .optim import MuonAdamW

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_SAVING, _DELETING = ".saving-", ".deleting-"
_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, its hashes verified; tensors are on the CPU."""

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


def fsync(path: Path) -> None:
    """Have the operating system put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        if target.exists():
            if problem(target) is None:
                return target
            _delete(target)
        beside.mkdir()
        tensors = {
            "model.safetensors": _weights(model),
            "optimizer.safetensors": optimizer.named_state(),
            "random.safetensors": _random_tensors(),
        }
        for name, values in tensors.items():
            save_file({key: value.detach().contiguous() for key, value in values.items()}, beside / name)
            # safetensors writes for the owner alone; the folder knows what the umask asks for.
            os.chmod(beside / name, beside.stat().st_mode & 0o666)
        state = {"format": FORMAT, "step": step, **state, "random": _random_numbers(), "versions": versions()}
        (beside / "state.json").write_text(json.dumps(state, allow_nan=False) + "\n", encoding="utf-8")
        (beside / "manifest.json").write_text(_manifest(beside), encoding="utf-8")
        for name in (*_FILES, "manifest.json"):
            fsync(beside / name)
        fsync(beside)
        os.rename(beside, target)
        fsync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        # On a full disk the half-written files are the first thing to give back.
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write checkpoint {target}: {reason}. {_what_is_kept(folder)} "
            f"Free some space or make the folder writable, then go on with --resume."
        ) from error
    return target


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


def _manifest(folder: Path) -> str:
    """Sizes and hashes as one line of JSON, with a hash of its own: damage to it is told from damage
    to the files it lists."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in _FILES
    }
    return json.dumps({"files": files, "sha256": _digest(files)}, separators=(",", ":"))


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


def problem(checkpoint: Path, files: tuple[str, ...] = _FILES) -> str | None:
    """What is wrong with ``files`` of a checkpoint, naming the file; None when all is as written."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        if manifest["sha256"] != _digest(manifest["files"]):
            return "manifest.json is damaged"
        entries = {
            name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in files
        }
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is damaged"
    except OSError as error:
        return f"manifest.json cannot be read: {error.strerror or error}"
    for name, (size, digest) in entries.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes where the manifest says {size}"
            if _sha256(checkpoint / name) != digest:
                return f"{name} is damaged: its SHA-256 is not the manifest's"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def load_checkpoint(checkpoint: Path, *, training: bool = True) -> Checkpoint:
    """Read a checkpoint folder, every file checked against its SHA-256.

    ``training=False`` reads weights and state only. Raises ``UserError`` when ``checkpoint`` is no
    checkpoint, and ``RunError`` when it is damaged: the file, what is wrong with it, and which
    checkpoint to use instead.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not a checkpoint folder (RUN/checkpoints/step-...)")
    files = _FILES if training else ("model.safetensors", "state.json")
    wrong = problem(checkpoint, files)
    if wrong is not None:
        raise RunError(f"checkpoint {checkpoint}: {wrong}. {_instead_of(checkpoint)}")
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise RunError(
            f"checkpoint {checkpoint} has format {state.get('format')}, this depthmix reads {FORMAT}: "
            f"use depthmix {state.get('versions', {}).get('depthmix')}"
        )
    return Checkpoint(
        checkpoint,
        model=load_file(checkpoint / "model.safetensors"),
        optimizer=load_file(checkpoint / "optimizer.safetensors") if training else {},
        random=load_file(checkpoint / "random.safetensors") if training else {},
        state=state,
    )


@torch.no_grad()
def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: MuonAdamW) -> None:
    """Put weights, optimiser state and every random state back, in place and bit for bit.

    Raises ``RunError`` when the checkpoint does not fit the model or the optimiser.
    """
    _copy_into(_weights(model), checkpoint.model, checkpoint.folder / "model.safetensors")
    _copy_into(optimizer.named_state(), checkpoint.optimizer, checkpoint.folder / "optimizer.safetensors")
    _set_random_states(checkpoint.random, checkpoint.state["random"])


@torch.no_grad()
def load_model(
    path: Path, device: str | torch.device = "cpu", *, exact_gradients: bool = False
) -> tuple[nn.Module, TrainConfig]:
    """The model of a run folder (its best checkpoint, else its newest) or of one checkpoint folder.

    In evaluation mode, on ``device``, in the dtype it was trained in. With ``exact_gradients``, streams that training
    reconstructed by inversion are replayed. Raises ``UserError`` when there
    is no checkpoint at ``path``, ``RunError`` when it is damaged.
    """
    from .model import GPT

    path = Path(path)
    if (path / "manifest.json").exists() or _NAME.fullmatch(path.name):
        folder = path
    else:
        folder = best_checkpoint(path / "checkpoints") or latest_checkpoint(path / "checkpoints")
    if folder is None:
        raise UserError(
            f"{path} holds no checkpoint; give a run folder made by `depthmix train` "
            f"or one of its checkpoints/step-... folders"
        )
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
    _copy_into(weights, checkpoint.model, folder / "model.safetensors")
    return model.to(device).eval(), config


def _copy_into(live: dict[str, Tensor], saved: dict[str, Tensor], file: Path) -> None:
    missing, unknown = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
    other = [
        f"{name} ({saved[name].dtype} {list(saved[name].shape)} saved, {live[name].dtype} "
        f"{list(live[name].shape)} needed)"
        for name in live.keys() & saved.keys()
        if saved[name].shape != live[name].shape or saved[name].dtype != live[name].dtype
    ]
    differences = (("missing", missing), ("not in the model", unknown), ("of another shape", sorted(other)))
    parts = [f"{what}: {', '.join(names[:5])}" for what, names in differences if names]
    if parts:
        raise RunError(
            f"{file} does not fit the model; {'; '.join(parts)}. "
            f"It was written by another version of depthmix or for another configuration."
        )
    for name, tensor in live.items():
        tensor.copy_(saved[name])


def _instead_of(damaged: Path) -> str:
    """The sentence that names the newest whole checkpoint beside a damaged one."""
    for other in reversed(list_checkpoints(damaged.parent)):
        if other != damaged and problem(other) is None:
            return f"The newest whole checkpoint is {other}; to resume from it, remove {damaged.name}."
    return "No whole checkpoint lies beside it: restore it from a copy, or start a new run."


def _what_is_kept(folder: Path) -> str:
    newest = latest_checkpoint(folder)
    return f"The last checkpoint is {newest}." if newest else "No checkpoint was saved before."
