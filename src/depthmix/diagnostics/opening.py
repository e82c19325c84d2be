"""Opens a model of Hugging Face for diagnosis: a folder that ``save_pretrained`` wrote, or a GGUF file."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..adapters import INSTALL
from ..errors import UserError
from .adapted import AdaptedSubject
from .huggingface import HuggingFaceSubject


def open_huggingface(folder: str | Path, device: str | torch.device = "cpu") -> HuggingFaceSubject:
    """Read a folder that ``save_pretrained`` wrote, or a GGUF file, or a folder that holds one.

    What :func:`depthmix.adapt` made becomes an :class:`.AdaptedSubject`.

    Nothing is fetched, and no code is run that the folder brings along. The weights of a folder are read from
    safetensors; a pickle is not opened.

    Raises:
        ValueError: there is no such model, or transformers is not installed.
    """
    path = Path(folder)
    where, gguf = _find(path)
    transformers = _transformers(gguf)
    if not gguf:
        _register(path)
    wanted: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    weights: dict[str, Any] = {} if gguf else {"use_safetensors": True}
    if gguf:
        wanted["gguf_file"] = gguf
        # Before there was this option, weights were never left as they are in the file.
        if hasattr(transformers, "GgufConfig"):
            weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _quiet(transformers):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                where,
                **wanted,
                **weights,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            tokenizer = None
            if gguf or _has_tokenizer(where):
                tokenizer = transformers.AutoTokenizer.from_pretrained(where, **wanted)
    except MemoryError:
        raise
    # A damaged file or an unknown model can fail anywhere in transformers, with any exception.
    except Exception as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read as a Hugging Face causal language model: {first}") from error
    # Transformers would draw these at random.
    misfits = {name for name, *_ in report["mismatched_keys"]}
    for names, what in (report["missing_keys"] - misfits, "lacks"), (misfits, "has other shapes for"):
        if names:
            raise UserError(
                f"{path} {what} {len(names)} of the weights that {type(model).__name__} has by its config.json, "
                f"{min(names)} for one; save it again, whole, as a causal language model"
            )
    kind = AdaptedSubject if AdaptedSubject.fits(model) else HuggingFaceSubject
    return kind(model.to(device), tokenizer, name=path.stem if path.is_file() else path.resolve().name)


def _find(path: Path) -> tuple[Path, str | None]:
    """The folder, and the name of the GGUF file in it if the model is one."""
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a .gguf file")
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            raise UserError(
                f"{path} has a config.json but no weights in a .safetensors file; pickled weights "
                f"(pytorch_model.bin) are not opened: save the model again with save_pretrained"
            )
        return path, None
    files = sorted(file.name for file in path.glob("*.gguf"))
    if not files:
        raise UserError(f"{path} holds no Hugging Face model: neither config.json nor a .gguf file")
    if len(files) > 1:
        raise UserError(f"{path} holds {len(files)} .gguf files; name the one you mean: {', '.join(files)}")
    return path, files[0]


def _transformers(gguf: str | None) -> ModuleType:
    needed = ["transformers", *(["gguf", "accelerate"] if gguf else [])]
    if lacking := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"a {'GGUF file' if gguf else 'Hugging Face model'} is read with {' and '.join(lacking)}, not installed "
            f"here: {INSTALL}"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    return transformers


def _register(folder: Path) -> None:
    """Make an adapted model's type known to transformers, if the folder holds one."""
    try:
        kind = str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # transformers says what is wrong with it
    if kind == "depthmix":
        raise UserError(
            f"{folder} holds a model that depthmix exported; bring it back with `depthmix import {folder} --out RUN` "
            f"and name RUN"
        )
    from ..adapters.huggingface import register_type

    register_type(kind)


def _has_tokenizer(folder: Path) -> bool:
    # Without a file, transformers makes an empty one up.
    names = "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"
    return any((folder / name).is_file() for name in names)


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without progress bars and reports: what matters of them is said by an error."""
    log = transformers.utils.logging
    bars, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
