"""A run as a folder that transformers loads, and such a folder as a run.

The folder::

    config.json             the fields of GPTConfig and what transformers wants to know
    generation_config.json  ids of the end token; rows of the embedding that stand for no text are never sampled
    model.safetensors       the run's tensors, bit for bit, each name behind "model."
    tokenizer.json, tokenizer_config.json
    depthmix.json           the whole configuration and tokenizer of the run: what makes the way back exact
    README.md               the model card
    modeling_depthmix.py    with --standalone: the model's code

**Trust.** Reading a folder opens JSON and safetensors alone. No pickle is opened and no code of the folder is run; no
name found in it is used as a path but that of a safetensors file beside ``config.json``. The place that a
configuration names for prepared data (``cache_dir``) goes neither out nor in, as a later command would write there.
Sizes are compared with those of the tensors that are there before anything is built.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from .. import checkpoint as ckpt
from ..config import DataConfig, TrainConfig, from_dict
from ..data.tokenizers import Tokenizer, load_tokenizer
from ..durable import fsync
from ..errors import RunError, UserError
from . import tokenizer as tokenizers
from .fields import FIELDS, LIMITS, make_config

PREFIX = "model."
CODE = "modeling_depthmix.py"
FORMAT = 1
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LARGEST_JSON = 64 << 20
"""Bytes of the largest JSON file that is read; GPT-2's tokenizer has 6 million."""


# --- out ------------------------------------------------------------------------------------------


def export(run: Path, out: Path, *, standalone: bool = False, overwrite: bool = False) -> Path:
    """Write the folder ``out`` of a run folder (its best checkpoint, else its newest) or a checkpoint folder.

    ``out`` is whole or absent. With ``standalone`` it holds the model's code, and loads without depthmix. Returns the
    checkpoint that was taken.

    Raises:
        ValueError: there is no checkpoint or no tokenizer, ``out`` exists and ``overwrite`` is false, or is something
            that no export wrote.
        RuntimeError: the checkpoint is damaged, or ``out`` cannot be written.
    """
    run, out = Path(run), Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; --overwrite replaces it")
    if out.exists() and not (out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))):
        raise UserError(f"{out} is no folder that an export wrote; choose another --out")
    source = ckpt.checkpoint_at(run)
    home = next((f for f in (run, *run.resolve().parents[:2]) if (f / "tokenizer.json").exists()), None)
    if home is None:
        raise UserError(f"{run} has no tokenizer.json beside it; give a run folder made by `depthmix train`")
    tokenizer = _run_tokenizer(home)
    loaded = ckpt.load_checkpoint(source, training=False)
    files = _files(loaded, tokenizer, home, standalone)
    weights = {PREFIX + name: tensor for name, tensor in loaded.model.items()}
    with _in_place_of(out) as beside:
        for name, text in files.items():
            (beside / name).write_text(text, encoding="utf-8")
            fsync(beside / name)
        ckpt.write_tensors(beside / "model.safetensors", weights, {"format": "pt"})
    return source


def _run_tokenizer(home: Path) -> Tokenizer:
    from ..runs import run_tokenizer

    return run_tokenizer(home)


def _files(loaded: ckpt.Checkpoint, tokenizer: Tokenizer, home: Path, standalone: bool) -> dict[str, str]:
    """Text of every file but the weights, by name."""
    from .card import card

    config = loaded.config
    dtype = Counter(tensor.dtype for tensor in loaded.model.values()).most_common(1)[0][0]
    values = {
        "architectures": ["DepthmixForCausalLM"],
        "model_type": "depthmix",
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.end_token,
        "eos_token_id": tokenizer.end_token,
        "pad_token_id": tokenizer.end_token,
        "tie_word_embeddings": True,
        **{name: getattr(config.model, name) for name in FIELDS},
    }
    if standalone:
        classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        values["auto_map"] = {auto: f"{CODE[:-3]}.Depthmix{name}" for auto, name in classes.items()}
    ends = {name: tokenizer.end_token for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    unused = [*range(tokenizer.vocab_size, config.model.vocab_size)]
    record = _record(home)
    files = {
        "config.json": _json(values),
        "generation_config.json": _json({**ends, **({"suppress_tokens": unused} if unused else {})}),
        "tokenizer.json": tokenizers.to_json(tokenizer),
        "tokenizer_config.json": _json(tokenizers.settings(config.model.seq_len)),
        "depthmix.json": _json(
            {
                "format": FORMAT,
                "step": loaded.step,
                "config": _placeless(config).to_dict(),
                "tokenizer": tokenizer.to_dict(),
                "versions": loaded.state.get("versions", {}),
            }
        ),
        "README.md": card(
            config,
            record,
            loaded.step,
            sum(tensor.numel() for tensor in loaded.model.values()),
            tokenizer.name,
            standalone,
        ),
    }
    if standalone:
        from .standalone import model_code

        files[CODE] = model_code(config.model)
    return files


def _placeless(config: TrainConfig) -> TrainConfig:
    """Without the place where this machine keeps prepared data."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=None))


def _record(home: Path):
    from ..report.records import read_run

    return read_run(home) if (home / "config.json").exists() else None


def _json(values) -> str:
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


@contextlib.contextmanager
def _in_place_of(out: Path):
    """A folder to fill, beside ``out``; behind the block it is ``out``, or was never there."""
    beside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        os.chmod(beside, 0o777 & ~_umask())
        yield beside
        fsync(beside)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            os.rename(out, old / out.name)
            os.rename(beside, out)
            shutil.rmtree(old)
        else:
            os.rename(beside, out)
        fsync(out.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(
            f"cannot write {out}: {ckpt.reason(error)}; free some space or make the folder writable"
        ) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- back -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """What a folder holds, checked: sizes in ``config`` are those of ``weights``."""

    config: TrainConfig
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    step: int
    versions: dict


def read(folder: Path) -> Found:
    """Read a folder that :func:`export` or ``save_pretrained`` wrote.

    Raises:
        ValueError: it is none, holds weights as a pickle, or its parts do not fit together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one that `depthmix export --to hf` wrote")
    values = _read_json(folder / "config.json")
    if values is None:
        raise UserError(f"{folder} has no config.json; give a folder that `depthmix export --to hf` wrote")
    if values.get("model_type") != "depthmix":
        raise UserError(
            f"{folder / 'config.json'} is of a {str(values.get('model_type'))[:80]!r} model; only depthmix models "
            f"can be imported"
        )
    files = _weight_files(folder)
    model = _model_config(values, folder)
    weights = _read_weights(files, model, folder)
    saved = _read_json(folder / "depthmix.json")
    if saved is None:
        tokens = _read_json(folder / "tokenizer.json")
        if tokens is None:
            raise UserError(f"{folder} has no tokenizer.json; copy the tokenizer's files into it")
        tokenizer = tokenizers.from_json(tokens)
        config = TrainConfig(model=model, data=DataConfig(tokenizer=tokenizer.name))
        return Found(config, tokenizer, weights, 0, {})
    where = folder / "depthmix.json"
    if saved.get("format") != FORMAT:
        raise UserError(
            f"{where} has format {saved.get('format')!r}, this depthmix reads {FORMAT}; use a newer one"
        )
    try:
        config, step = _placeless(from_dict(saved["config"])), saved["step"]
        tokenizer = load_tokenizer(saved["tokenizer"])
        versions = dict(saved.get("versions", {}))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RunError, AttributeError) as error:
        raise UserError(
            f"{where} is damaged ({error!r}); restore it, or remove it and lose the run's history"
        ) from error
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**12:
        raise UserError(f"{where}: step must be a whole number from 0 on, got {step!r}")
    if config.model != model:
        raise UserError(
            f"{where} and config.json are of two different models; restore the files that `depthmix export` wrote, or "
            f"remove depthmix.json"
        )
    return Found(config, tokenizer, weights, step, versions)


def import_folder(folder: Path, out: Path) -> Found:
    """Make the run folder ``out`` of what :func:`read` finds: configuration, tokenizer, one checkpoint of weights.

    Raises what :func:`read` raises, and ``UserError`` where ``out`` is there and not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out")
    found = read(folder)
    if found.tokenizer.vocab_size > found.config.model.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {found.tokenizer.vocab_size:,} ids and the model "
            f"{found.config.model.vocab_size:,} rows; the two do not belong together"
        )
    with _in_place_of(out) as beside:
        ckpt.write_json(beside / "config.json", found.config.to_dict())
        ckpt.write_json(beside / "tokenizer.json", found.tokenizer.to_dict())
        if found.versions:
            ckpt.write_json(beside / "environment.json", found.versions)
        ckpt.save_weights(
            beside / "checkpoints", found.step, found.weights, {"config": found.config.to_dict()}
        )
    return found


def _read_json(path: Path) -> dict | None:
    """The object in ``path``; ``None`` where there is no such file."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes, more than any such file; it is not read"
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {ckpt.reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


def _weight_files(folder: Path) -> list[Path]:
    index = _read_json(folder / "model.safetensors.index.json")
    names: set[str] = set()
    if index is None:
        if (folder / "model.safetensors").exists():
            names.add("model.safetensors")
    else:
        table = index.get("weight_map")
        for name in table.values() if isinstance(table, dict) else (None,):
            if not isinstance(name, str) or not re.fullmatch(
                r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors", name
            ):
                raise UserError(
                    f"{folder / 'model.safetensors.index.json'} names {str(name)[:80]!r} as a file of weights; only "
                    f".safetensors files in the folder itself are read"
                )
            names.add(name)
    if not names:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{folder} holds its weights as a pickle ({', '.join(pickles[:3])}), which could run any code and is "
                f"not opened: save the model again with save_pretrained, as safetensors"
            )
        raise UserError(
            f"{folder} has no model.safetensors; give a folder that `depthmix export --to hf` wrote"
        )
    return [folder / name for name in sorted(names)]


def _model_config(values: dict, folder: Path):
    """The ``GPTConfig`` in a ``config.json``. What it says beside the fields is not looked at."""
    if missing := [name for name in FIELDS if name not in values]:
        raise UserError(f"{folder / 'config.json'} lacks {', '.join(missing[:5])}; restore the exported file")
    for name, most in LIMITS.items():
        if isinstance(values[name], int) and values[name] > most:
            raise UserError(
                f"{folder / 'config.json'}: {name} must be at most {most:,}, got {values[name]:,}"
            )
    if not isinstance(values["residual_options"], dict):
        raise UserError(f"{folder / 'config.json'}: residual_options must be an object")

    class Values:
        pass

    made = Values()
    made.__dict__.update({name: values[name] for name in FIELDS})
    return make_config(made)


def _read_weights(files: list[Path], model, folder: Path) -> dict[str, Tensor]:
    """The tensors under their names in a run, of exactly those shapes that ``model`` has."""
    shapes: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():
                    shapes[key.removeprefix(PREFIX)] = (file, key, tuple(opened.get_slice(key).get_shape()))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{file} cannot be read as safetensors: {ckpt.reason(error)}") from error
    head = shapes.pop("lm_head.weight", None)
    # Cheap to look at, and they bound what is about to be built.
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d{1,6})\.", name))}
    embedding = shapes.get("embed.weight", (None, None, None))[2]
    if blocks != set(range(model.n_layer)) or embedding != (model.vocab_size, model.d_model):
        raise UserError(
            f"{folder}: config.json says {model.n_layer} blocks and an embedding of "
            f"{[model.vocab_size, model.d_model]}, the weights hold {len(blocks)} blocks and "
            f"{list(embedding or ['none'])}"
        )
    needed = _shapes(model)
    if differing := sorted(
        n for n in needed.keys() | shapes.keys() if n not in shapes or needed.get(n) != shapes[n][2]
    ):
        name = differing[0]
        raise UserError(
            f"{folder}: {len(differing)} tensors do not fit config.json, {name} for one ("
            f"{list(shapes[name][2]) if name in shapes else 'none'} there, "
            f"{list(needed[name]) if name in needed else 'none'} needed)"
        )
    weights = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name, (where, key, _) in shapes.items():
                if where == file:
                    weights[name] = opened.get_tensor(key)
    if head is not None:
        with safe_open(head[0], framework="pt") as opened:
            if head[2] != embedding or not torch.equal(opened.get_tensor(head[1]), weights["embed.weight"]):
                raise UserError(
                    f"{folder}: lm_head.weight is not the embedding, and a run has one tensor for both; fine-tune with "
                    f"tie_word_embeddings=True"
                )
    strange = {name: t.dtype for name, t in weights.items() if t.dtype not in (torch.float32, torch.bfloat16)}
    if strange:
        name, dtype = next(iter(strange.items()))
        raise UserError(f"{folder}: {name} is {dtype}; a run has weights in float32 or bfloat16")
    return {name: weights[name] for name in needed}


def _shapes(model) -> dict[str, tuple[int, ...]]:
    import warnings

    from ..model import GPT

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # streams that never fill: a run may have them
        return {name: tuple(tensor.shape) for name, tensor in GPT(model).state_dict().items()}
