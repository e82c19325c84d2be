"""A Hugging Face causal language model as a subject: Llama, Qwen, SmolLM, Mistral, GPT-2, GPT-NeoX, Phi, OPT, Gemma.

Nothing here knows a model by its name. The model runs its own code around its blocks and its blocks run their own: to
step through them, stand-ins take the place of blocks or decoder, which note how they are called or return what they
are given. So masks, rotary angles, final norm, head, scaled or capped logits are the model's.

What a block has is read off one small run. Its attention and its MLP are children with one of the usual names, and the
norm before the MLP is the child whose output the MLP reads. What attention or MLP writes is the output of the first
child from there on that is added to the residual stream as it is: in Gemma 2, that of the norm behind it. A model that
is something else (other sums, blocks that hand on more than one tensor, attention that looks ahead) is refused, for
then the figures would not mean what they say.

Points have the names of :mod:`depthmix.diagnostics.capture`, and hold:

``hook_embed``                what enters block 0: with learnt positions, and scaled, where the model does that
``blocks.N.hook_resid_pre``   what enters block N
``blocks.N.hook_attn_out``    what attention adds
``blocks.N.hook_resid_mid``   what the MLP's norm reads; does not exist where attention and MLP are in parallel
``blocks.N.hook_mlp_out``     what the MLP adds
``blocks.N.hook_resid_post``  what leaves block N
"""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from .capture import Captured, point_names, wanted_points
from .subject import Subject

ATTENTION = "self_attn", "attn", "attention", "self_attention"
"""What attention is called in a block."""
MLP = "mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1"
"""What the MLP is called, or its first half where a block holds both."""
INSTALL = "pip install 'depthmix[hf]'"
PROBE = 8
"""Tokens of the small run."""


@dataclass(frozen=True)
class Parts:
    """Children of a block that are watched."""

    attention: nn.Module
    """Returns what attention adds."""
    mlp: nn.Module
    """Returns what the MLP adds."""
    middle: nn.Module | None
    """Its first argument is the residual stream between the two; ``None`` where they are in parallel."""


class HuggingFaceSubject(Subject):
    """A model of transformers, in fp32 whatever its file holds.

    Args:
        model: any ``...ForCausalLM``; it is put into evaluation mode.
        tokenizer: of transformers, or ``None``.
        name: shown in figures.

    Raises:
        ValueError: the model has no blocks that can be told apart and stepped through.
    """

    residual = "prenorm"
    n_streams = 0

    def __init__(self, model: nn.Module, tokenizer=None, *, name: str):
        config = model.config.get_text_config()
        self.module, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.detail = f"Hugging Face {type(model).__name__}"
        self.n_layer, self.d_model = config.num_hidden_layers, config.hidden_size
        self.max_length = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self.decoder = model.get_decoder()
        self.blocks = self._find_blocks()
        self._stepping = False
        with torch.no_grad():
            self._inspect()

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "HuggingFaceSubject":
        """Read a folder that ``save_pretrained`` wrote, or a GGUF file, or a folder that holds one.

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
        wanted = {"local_files_only": True, "trust_remote_code": False}
        weights = {} if gguf else {"use_safetensors": True}
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
            raise UserError(
                f"{path} cannot be read as a Hugging Face causal language model: {first}"
            ) from error
        # Transformers would draw these at random.
        misfits = {name for name, *_ in report["mismatched_keys"]}
        for names, what in (report["missing_keys"] - misfits, "lacks"), (misfits, "has other shapes for"):
            if names:
                raise UserError(
                    f"{path} {what} {len(names)} of the weights that {type(model).__name__} has by its config.json, "
                    f"{min(names)} for one; save it again, whole, as a causal language model"
                )
        from ..adapters.subject import AdaptedSubject

        kind = AdaptedSubject if AdaptedSubject.fits(model) else cls
        return kind(model.to(device), tokenizer, name=path.stem if path.is_file() else path.resolve().name)

    # Text

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without any that stand for the beginning or end; such a token in the text is only text."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.name} has no tokenizer, so it cannot read text; copy the tokenizer's files into its folder"
            )
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]

    def decode(self, ids):
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    @property
    def end_token(self) -> int | None:
        """The id that ends a document; ``None`` where there is none."""
        if self.tokenizer is not None:
            return self.tokenizer.eos_token_id
        end = self.module.config.get_text_config().eos_token_id
        return end[0] if isinstance(end, Sequence) else end

    @property
    def start_token(self) -> int | None:
        """The id that the tokenizer puts in front of every text, as the model had it in training; ``None`` without."""
        if self.tokenizer is None:
            return None
        first = self.tokenizer("a", verbose=False)["input_ids"][:1]
        return first[0] if first == [self.tokenizer.bos_token_id] else None

    def windows(self, data: Sequence[str], text_field: str, length: int, tokens: int) -> Tensor:
        """``[N, length]`` ids of at most ``tokens`` of the text in ``data``, each beginning as in training."""
        from ..runs import encode, windows_of

        ids = encode(data, text_field, self.encode, self.end_token, tokens)
        start = self.start_token
        if start is None:
            return windows_of(ids, length)
        texts = windows_of(ids, length - 1)
        return torch.cat([torch.full((len(texts), 1), start), texts], 1)

    # Depth

    def hidden(self, ids):
        return self.decoder(input_ids=ids, use_cache=False).last_hidden_state

    def begin(self, ids):
        calls = []
        with self._standing_in(calls):
            self.decoder(input_ids=ids, use_cache=False)
        first = _first(*calls[0])
        # A block's input is put in place when it runs; what else it is called with stays the same.
        return first, tuple(_without_first(*call) for call in calls)

    def block(self, index, carry):
        hidden, calls = carry
        args, kwargs = calls[index]
        out = self.blocks[index](hidden, *args, **kwargs)
        return (out[0] if self._tuples else out), calls

    def without(self, index, carry):
        return carry

    def end(self, carry):
        hidden, _ = carry
        # What the decoder does behind its blocks asks nothing of what went into them.
        width = self.module.get_input_embeddings().weight.shape[1]
        with self._standing_in([], hidden):
            nothing = hidden.new_zeros(*hidden.shape[:2], width)
            return self.decoder(inputs_embeds=nothing, use_cache=False).last_hidden_state

    def head(self, hidden):
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        with _forward(self.decoder, lambda *args, **kwargs: self._returned(last_hidden_state=flat)):
            ids = torch.zeros(1, flat.shape[1], dtype=torch.long, device=flat.device)
            logits = self.module(input_ids=ids, use_cache=False).logits
        return logits.view(*hidden.shape[:-1], -1)

    def block_parameters(self, index):
        return list(self.blocks[index].parameters())

    @property
    def label(self):
        return self.name

    @contextlib.contextmanager
    def capture(self, patterns, to=None) -> Iterator[Captured]:
        wanted = wanted_points(patterns, point_names(self.n_layer))
        captured = Captured(self.n_layer, self.residual)
        take, handles, shape = to or captured._take, [], []

        def show(name: str, value: Tensor | None) -> None:
            # Where a stand-in has the block's place, nothing passes.
            if not self._stepping and value is not None and name in wanted:
                take(name, value.detach())

        def give(name: str, value: Tensor | tuple) -> None:
            while isinstance(value, tuple):  # the state of a connection goes with it
                value = value[0]
            # OPT computes with [B * T, D] inside of its blocks.
            show(name, value.reshape(shape))

        def reads(module, name, made=lambda x: x):
            if name in wanted:
                hook = module.register_forward_pre_hook(
                    lambda m, args, kwargs: give(name, made(_first(args, kwargs))), with_kwargs=True
                )
                handles.append(hook)

        def writes(module, name):
            if name in wanted:
                handles.append(module.register_forward_hook(lambda m, args, out: give(name, _only(out))))

        def note(module, args, kwargs):
            shape[:] = _first(args, kwargs).shape

        try:
            handles.append(self.blocks[0].register_forward_pre_hook(note, with_kwargs=True))
            reads(self.blocks[0], "hook_embed")
            for i, (block, parts) in enumerate(zip(self.blocks, self._parts, strict=True)):
                prefix = f"blocks.{i}.hook_"
                reads(block, prefix + "resid_pre", self._read_of_embedding if i == 0 else lambda x: x)
                writes(parts.attention, prefix + "attn_out")
                if parts.middle is not None:
                    reads(parts.middle, prefix + "resid_mid")
                writes(parts.mlp, prefix + "mlp_out")
                writes(block, prefix + "resid_post")
                handles += self._watch(i, wanted, show)
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _read_of_embedding(self, x: Tensor) -> Tensor:
        """What block 0 reads of what enters it."""
        return x

    def _watch(self, index: int, wanted: set[str], take) -> list:
        """Hooks for more points of block ``index``."""
        return []

    @contextlib.contextmanager
    def _standing_in(self, calls: list, result: Tensor | None = None):
        """Inside, no block runs: each call is added to ``calls``, and is answered with ``result``, or what came in."""

        def forward(*args, **kwargs):
            calls.append((args, kwargs))
            out = _first(args, kwargs) if result is None else result
            return (out,) if self._tuples else out

        self._stepping = True
        try:
            with contextlib.ExitStack() as stack:
                for block in self.blocks:
                    stack.enter_context(_forward(block, forward))
                yield
        finally:
            self._stepping = False

    # What the model is made of

    def _find_blocks(self) -> nn.ModuleList:
        lists = [
            child
            for child in self.decoder.children()
            if isinstance(child, nn.ModuleList) and len(child) == self.n_layer
        ]
        if len(lists) != 1:
            raise UserError(
                f"{self.name} cannot be diagnosed: {type(self.decoder).__name__} has {len(lists) or 'no'} "
                f"{'lists' if lists else 'list'} of {self.n_layer} blocks, where one is looked for"
            )
        return lists[0]

    def _inspect(self) -> None:
        """Run a few tokens, see what the blocks are made of, and check that stepping through them is the same."""
        vocabulary = self.module.get_input_embeddings().weight.shape[0]
        tokens = min(PROBE, self.max_length)
        ids = torch.arange(2 * tokens, device=self.device).view(2, tokens) * 7919 % vocabulary
        ids[1, :-1] = ids[0, :-1]
        with contextlib.ExitStack() as stack:
            traces = [stack.enter_context(trace_calls(block)) for block in self.blocks]
            returned = self.decoder(input_ids=ids, use_cache=False)
        self._returned, hidden = type(returned), returned.last_hidden_state
        for i, trace in enumerate(traces):
            if "" not in trace:
                raise self._refusal(i, "does not run")
        # The last one: a connection's state goes between blocks as a tuple.
        self._tuples = isinstance(traces[-1][""][1], tuple)
        self._parts = [self._find_parts(i, trace) for i, trace in enumerate(traces)]
        if any(parts.middle is None for parts in self._parts):
            self.detail += ", attention and MLP in parallel"

        if not _same(hidden[0, :-1], hidden[1, :-1]):
            raise UserError(
                f"{self.name} ({type(self.module).__name__}) is no causal language model: what it makes of a token "
                f"depends on the tokens behind it"
            )
        logits = self.module(input_ids=ids, use_cache=False).logits
        if not _same(self.head(super().hidden(ids)), logits):
            raise UserError(
                f"{self.name} cannot be diagnosed: run block by block, {type(self.module).__name__} gives other "
                f"logits than as a whole, so its blocks hand on more than the residual stream"
            )

    def _find_parts(self, index: int, trace: dict) -> Parts:
        block = self.blocks[index]
        names = find_parts(trace, lambda why: self._refusal(index, why))
        return Parts(*(None if name is None else block.get_submodule(name) for name in names))

    def _refusal(self, index: int, why: str) -> UserError:
        return UserError(
            f"{self.name} cannot be diagnosed: block {index} ({type(self.blocks[index]).__name__}) {why}"
        )


def find_parts(trace: dict, refusal: Callable[[str], UserError]) -> tuple[str, str, str | None]:
    """Names of the children of a block that return what attention and what the MLP adds, and of the child that reads
    the residual stream between the two (``None`` where they are in parallel), by a trace (:func:`trace_calls`).

    Raises what ``refusal`` makes of the reason, where a block is something else.
    """
    before, after = trace.pop("")
    after = _only(after)
    order = list(trace)
    attention, mlp = (next((n for n in names if n in trace), None) for names in (ATTENTION, MLP))
    for what, found, names in ("attention", attention, ATTENTION), ("MLP", mlp, MLP):
        if found is None:
            raise refusal(
                f"has no {what}: of its parts ({', '.join(order)}) none is called {', '.join(names)}"
            )
    norm = next((n for n in order if _shares(_only(trace[n][1]), trace[mlp][0])), mlp)
    between = trace[norm][0]

    def writers(first: str):
        for name in order[order.index(first) :]:
            out = _only(trace[name][1])
            if isinstance(out, Tensor) and out.numel() == before.numel():
                yield name, out.view_as(before)

    if _shares(between, before):
        for a, x in writers(attention):
            for m, y in writers(mlp):
                if _is_sum(after, before, x, y):
                    return a, m, None
        raise refusal("does not add what its attention and its MLP return to what it reads")
    between = between.view_as(before)
    a = next((name for name, x in writers(attention) if _is_sum(between, before, x)), None)
    m = next((name for name, y in writers(mlp) if _is_sum(after, between, y)), None)
    if a is None or m is None:
        raise refusal(
            f"does not add what its {'MLP' if a else 'attention'} returns to the residual stream as it is"
        )
    return a, m, norm


# Files


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


def _transformers(gguf: str | None):
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
def _quiet(transformers):
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


# Modules and what passes them


@contextlib.contextmanager
def _forward(module: nn.Module, forward):
    """Inside, ``module`` runs ``forward`` instead of its own."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextlib.contextmanager
def trace_calls(block: nn.Module):
    """A dict that fills as ``block`` runs: by child, in order, ``(first argument, result)``; ``""`` is the block."""
    trace = {}

    def watch(name, module):
        def hook(m, args, kwargs, out):
            trace.setdefault(name, (_first(args, kwargs), out))

        return module.register_forward_hook(hook, with_kwargs=True)

    handles = [watch("", block), *(watch(name, child) for name, child in block.named_children())]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor of a call, by place or by name."""
    return args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)


def _without_first(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return args[1:], kwargs
    key = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return args, {k: v for k, v in kwargs.items() if k != key}


def _only(out) -> Tensor:
    """What a module returns, without what it returns beside it."""
    return out[0] if isinstance(out, tuple) else out


def _shares(a, b) -> bool:
    """Whether two tensors are the same memory: an argument that was handed on, perhaps in another shape."""
    return (
        all(isinstance(x, Tensor) for x in (a, b)) and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
    )


def _is_sum(total: Tensor, *terms: Tensor) -> bool:
    """Whether ``total`` is the sum of ``terms`` but for rounding. What is not finite counts as it."""
    size = sum(term.abs() for term in (total, *terms))
    near = (total - sum(terms)).abs() <= 4 * torch.finfo(total.dtype).eps * size
    return bool((near | ~total.isfinite()).all())


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal but for rounding in another order."""
    largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0
    return torch.allclose(a, b, rtol=0, atol=256 * torch.finfo(b.dtype).eps * largest, equal_nan=True)
