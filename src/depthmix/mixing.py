r"""The mixing map: how much of every earlier output is in the input of every sublayer.

For a connection that mixes linearly, the input of sublayer l is, once its gates are known, a weighted
sum of the embedding and of all outputs before it,

.. math::
    h_l = \sum_{i=0}^{l-1} M_{l,i}\, v_i, \qquad v_0 = \text{embedding},\; v_i = F_i(h_i),

and so is the trunk's output. M is one table for every connection: ones for PreNorm, softmax weights for
Attention Residuals, products of gates for Multi-Gate Residuals and Hyper-Connections.

**How it is found.** The model runs once without gradients; at every site the real output and the real
state give the gates (:meth:`Site.gates`). Then the connection runs again as its linear form
(:meth:`Site.mix`) on unit vectors: value i is one at place i of a leading source dimension and zero
elsewhere, so what sublayer l reads is the row of its coefficients. No connection is known by name here.

**Precision.** Gates have the precision in which the model computes them (fp32, fp64 for fp64 models); the
linear form runs in fp64. :func:`mixing_error` compares the sum with the inputs that the model really had:
about 1e-6 in fp32 and 1e-15 in fp64, whatever the depth. In bf16 and fp16 the model itself rounds its
streams after every sublayer, which the map does not repeat: expect 1e-2 and 1e-3, over 36 sublayers up
to four times that.

**Memory.** One sequence at a time: its run, its gates, and ``chunk_bytes`` (256 MiB) for the linear form, which
takes as many sources at once as fit, at least one (about three times one sequence's state in fp64). For
``per="mean"`` nothing else grows with the number of tokens.
"""

import dataclasses
import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import GPTConfig
from .diagnostics.adapted import AdaptedSubject
from .diagnostics.capture import uncompiled
from .errors import UserError, suggest
from .model import GPT
from .ops.reference import compute_dtype
from .residuals import available_residuals, build_residual
from .trunk import Trunk

PER = ("mean", "token", "channel")
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False, repr=False)
class MixingMap:
    """Coefficients of the embedding and of every output in every sublayer's input, on the CPU.

    Rows are readers: sublayers 1 .. L and the trunk's output. Columns are sources: the embedding and
    outputs 1 .. L. Row l holds zeros for outputs that do not exist yet when it is read.
    """

    matrix: Tensor
    """``[L+1, L+1]``, mean over tokens, and over channels where a gate has one value per channel."""
    source_rms: Tensor
    """``[L+1]``: root mean square of each source over tokens and channels."""
    labels: tuple[str, ...]
    """Of the columns: embedding, attn 1, mlp 1, attn 2, ..."""
    row_labels: tuple[str, ...]
    """Of the rows: attn 1, mlp 1, ..., output."""
    residual: str
    """Name of the connection."""
    n_tokens: int
    """Tokens that ``matrix`` is a mean over."""
    tokens: Tensor | None = None
    """``[L+1, L+1, B, T]`` for ``per="token"``: mean over channels only."""
    channels: Tensor | None = None
    """``[L+1, L+1, B, T, D]`` for ``per="channel"``; without gates per channel a view that repeats one value."""
    streams: tuple[Tensor, ...] | None = None
    """On request, for sublayers 1 .. L, each stream's coefficients once the output is written: ``[n, L+1]``
    (``[n, L+1, B, T]`` per token, ``[n, L+1, B, T, D]`` per channel). n grows where streams are appended.
    Empty for a connection without streams."""

    @property
    def shares(self) -> Tensor:
        """``[L+1, L+1]``: each coefficient's size as a share of its row, ``|M| / sum_i |M_i|``."""
        return _shares(self.matrix)

    @property
    def contributions(self) -> Tensor:
        """``[L+1, L+1]``: share of each term by its size, ``|M_i| rms(v_i)``; directions are not considered."""
        return _shares(self.matrix * self.source_rms)

    @property
    def embedding_share(self) -> float:
        """The embedding's share of the coefficients in the trunk's output."""
        return float(self.shares[-1, 0])

    @property
    def source_age(self) -> Tensor:
        """``[L+1]``: how many sublayers ago a reader's sources were written, mean weighted by ``shares``.

        0 is the latest output alone; PreNorm's row l (counted from 0) has l / 2.
        """
        place = torch.arange(len(self.matrix), dtype=self.matrix.dtype)
        return (self.shares * (place[:, None] - place)).sum(1)

    def save(self, path: str | Path) -> Path:
        """Write an ``.npz`` file, whole or not at all; :meth:`load` reads it. Returns its path."""
        from .report.write import write_atomically

        arrays: dict[str, Any] = {"format": np.array(1)}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                # A repeated value is written once; what it stands for is in "width".
                repeated = item.name == "channels" and value.stride(-1) == 0
                arrays[item.name] = (value[..., :1] if repeated else value).numpy()
            elif item.name == "streams" and value is not None:
                arrays["n_streams"] = np.array([len(stream) for stream in value])
                arrays |= {f"streams_{i}": stream.numpy() for i, stream in enumerate(value)}
            elif value is not None:
                arrays[item.name] = np.array(value)
        if self.channels is not None:
            arrays["width"] = np.array(self.channels.shape[-1])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return write_atomically(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "MixingMap":
        """Read what :meth:`save` wrote. Raises ``ValueError`` when ``path`` is no such file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            values: dict[str, Any] = {
                name: torch.from_numpy(arrays[name])
                for name in ("matrix", "source_rms", "tokens", "channels")
                if name in arrays
            }
            for name in ("labels", "row_labels"):
                values[name] = tuple(map(str, arrays[name]))
            values["residual"], values["n_tokens"] = str(arrays["residual"]), int(arrays["n_tokens"])
            if "channels" in values:
                values["channels"] = values["channels"].expand(*[-1] * 4, int(arrays["width"]))
            if "n_streams" in arrays:
                count = len(arrays["n_streams"])
                values["streams"] = tuple(torch.from_numpy(arrays[f"streams_{i}"]) for i in range(count))
        except OSError as error:
            raise UserError(f"cannot read mixing map {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} is no mixing map ({error}); give a file made by MixingMap.save"
            ) from error
        return cls(**values)

    def __repr__(self) -> str:
        return f"MixingMap({self.residual!r}, {len(self.matrix) - 1} sublayers, mean over {self.n_tokens} tokens)"


def mixing_map(
    model: nn.Module,
    ids: Tensor,
    *,
    per: str = "mean",
    streams: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> MixingMap:
    """How much of every earlier output each sublayer reads, on these tokens.

    Args:
        model: a :class:`~depthmix.GPT`, or a language model that :func:`depthmix.adapt` made, in training or
            evaluation mode, of any dtype; a compiled one runs uncompiled. It is left as it was.
        ids: ``[B, T]`` whole numbers, T at most the model's ``seq_len``.
        per: ``"mean"`` over tokens and channels; ``"token"`` keeps also ``[L+1, L+1, B, T]``, ``"channel"``
            ``[L+1, L+1, B, T, D]``.
        streams: also the coefficients of every stream behind every sublayer, in the form that ``per`` says.
        chunk_bytes: memory for the linear form; see the module's docstring.

    Returns:
        A :class:`MixingMap` on the CPU, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: the connection does not mix linearly (the message says why and which ones do), ``model``
            is no such model, ``ids`` do not fit it, or ``per`` is unknown.
    """
    if per not in PER:
        raise UserError(suggest(str(per), PER, "per"))
    trunk, ids = _checked(model, ids)
    sources, (batch, length) = len(trunk.sites) + 1, ids.shape
    width, device = trunk.gate_width, ids.device
    dtype = compute_dtype(trunk.dtype)
    tail = {"mean": (), "token": (batch, length), "channel": (batch, length, width)}[per]
    mean = torch.zeros(sources, sources, dtype=torch.float64, device=device)
    full = None if per == "mean" else torch.zeros(sources, sources, *tail, dtype=dtype)
    by_stream: list[Tensor] = []
    power = torch.zeros(sources, dtype=torch.float64, device=device)

    def put(target: Tensor, columns: slice, sequence: int, coefficients: Tensor) -> None:
        if per == "mean":
            target[columns] += coefficients.mean((1, 2, 3)).to(target) / batch
        else:
            kept = coefficients[:, 0] if per == "channel" else coefficients[:, 0].mean(-1)
            target[columns, sequence] = kept.to(target)

    for sequence in range(batch):
        trace = _run(trunk, ids[sequence : sequence + 1])
        power += trace.power / batch
        step = _sources_at_once(trace, length * width, sources, chunk_bytes)
        for first in range(0, sources, step):
            columns = slice(first, min(first + step, sources))
            for row, (h, states) in enumerate(_linear_form(trunk, trace, columns, length, width)):
                mean[row, columns] += h.mean((1, 2, 3)) / batch
                if full is not None:
                    put(full[row], columns, sequence, h)
                if streams and row:
                    if len(by_stream) < row:
                        by_stream.append(torch.zeros(len(states), sources, *tail, dtype=dtype))
                    for target, stream in zip(by_stream[row - 1], states, strict=True):
                        put(target, columns, sequence, stream)

    if full is not None and per == "channel":
        full = full.expand(*[-1] * 4, trunk.d_model)
        by_stream = [stream.expand(*[-1] * 4, trunk.d_model) for stream in by_stream]
    return MixingMap(
        matrix=mean.to("cpu", dtype),
        source_rms=power.sqrt().to("cpu", dtype),
        labels=("embedding", *trunk.labels),
        row_labels=(*trunk.labels, "output"),
        residual=trunk.residual,
        n_tokens=batch * length,
        tokens=full.mean(-1) if full is not None and per == "channel" else full,
        channels=full if per == "channel" else None,
        streams=None if not streams else tuple(by_stream) if any(map(len, by_stream)) else (),
    )


def mixing_error(model: nn.Module, ids: Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> float:
    """How far ``h_l = sum_i M[l, i] v_i`` is from what a model computes of ``ids [B, T]``: the largest relative error.

    For every row, ``max |h - M v| / max |h|`` over tokens and channels; the same for every stream where
    there are streams, so that the map of the streams is checked with it. The largest of these.

    Arguments and errors as for :func:`mixing_map`. Holds the embedding, outputs, inputs and streams of one
    sequence, besides what the map needs.
    """
    rows, streams = _errors(*_checked(model, ids), chunk_bytes)
    return float(torch.cat([rows, *streams]).max())


def residuals_with_map() -> list[str]:
    """Names of the connections that have a mixing map."""
    names = []
    for name in available_residuals():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = GPTConfig(
                vocab_size=2, n_layer=4, d_model=16, n_head=2, seq_len=2, residual=name, n_streams=3
            )
            connection = build_residual(config)
        if not connection.not_linear:
            names.append(name)
    return names


# --- what is mapped -------------------------------------------------------------------------------


def _trunk(model: GPT) -> Trunk:
    config = model.config

    def watch(embedded: Callable[[Tensor], None], read: Callable[[Tensor], None] | None) -> list[Any]:
        handles = [model.embed.register_forward_hook(lambda module, args, x: embedded(x))]
        if read is not None:
            norms = [norm for block in model.blocks for norm in (block.attn.norm, block.mlp.norm)]
            handles += [
                norm.register_forward_pre_hook(lambda module, args: read(args[0]))
                for norm in (*norms, model.norm)
            ]
        return handles

    return Trunk(
        residual=config.residual,
        connection=model.residual,
        sites=[site for block in model.blocks for site in (block.attn_site, block.mlp_site)],
        labels=tuple(f"{kind} {block}" for block in range(1, config.n_layer + 1) for kind in ("attn", "mlp")),
        d_model=config.d_model,
        dtype=model.embed.weight.dtype,
        device=model.embed.weight.device,
        vocab_size=config.vocab_size,
        run=model.hidden,
        watch=watch,
    )


# --- the model's own run --------------------------------------------------------------------------


@dataclass
class _Trace:
    """What one sequence's run leaves; the values themselves only where they are asked for."""

    begin: tuple[Tensor, ...] = ()
    gates: list[tuple[Tensor, ...]] = field(default_factory=list)
    """One tuple a site."""
    power: Tensor = field(default_factory=lambda: torch.zeros(0))
    """``[L+1]``: mean square of each source."""
    state_size: int = 0
    """Elements of the largest state, in units of one ``[T, D]``."""
    values: list[Tensor] = field(default_factory=list)
    """The sources, each ``[1, T, D]``."""
    inputs: list[Tensor] = field(default_factory=list)
    """What sublayers 1 .. L and the final norm read, each ``[1, T, D]``."""
    streams: list[tuple[Tensor, ...]] = field(default_factory=list)
    """Behind every site, in the order of the sites; empty tuples where there are none."""


@torch.no_grad()
def _run(trunk: Trunk, ids: Tensor, keep_values: bool = False) -> _Trace:
    """One run of ``ids [1, T]`` under hooks, which are gone afterwards whatever happens."""
    trace, squares = _Trace(), []

    def source(value: Tensor) -> None:
        squares.append(value.double().square().mean())
        if keep_values:
            trace.values.append(value)

    def embedded(x: Tensor) -> None:
        trace.begin = trunk.connection.begin_gates(x)
        source(x)

    def written(site: Any, args: Any) -> None:
        y, state = args
        trace.gates.append(site.gates(y, state))
        source(y if trunk.write == 1 else y / trunk.write)
        # One more output is in it after the write.
        size = sum(tensor.numel() for tensor in state) / y.numel() + 1
        trace.state_size = max(trace.state_size, size)

    def stepped(site: Any, args: Any, result: Any) -> None:
        trace.streams.append(tuple(site.streams(result[1]) or ()))

    handles = trunk.watch(embedded, trace.inputs.append if keep_values else None)
    try:
        handles += [site.register_forward_pre_hook(written) for site in trunk.sites]
        if keep_values:
            handles += [site.register_forward_hook(stepped) for site in trunk.sites]
        with uncompiled():
            trunk.run(ids)
    finally:
        for handle in handles:
            handle.remove()
    trace.power = torch.stack(squares)
    return trace


# --- the linear form ------------------------------------------------------------------------------


def _sources_at_once(trace: _Trace, elements: int, sources: int, chunk_bytes: int) -> int:
    """Sources whose linear form fits into ``chunk_bytes``: two states and what lies between, in fp64."""
    return max(1, min(sources, int(chunk_bytes / (3 * 8 * trace.state_size * elements))))


@torch.no_grad()
def _linear_form(
    trunk: Trunk, trace: _Trace, columns: slice, length: int, width: int
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Rows 1 .. L+1 as ``[C, 1, T, W]``, C the sources in ``columns``, each with the streams it is read from.

    The streams are of the same shape; there are none in the first row.
    """
    count = columns.stop - columns.start
    wide = lambda gates: tuple(g.double() if g.is_floating_point() else g for g in gates)  # noqa: E731

    def unit(source: int) -> Tensor:
        value = torch.zeros(count, 1, length, width, dtype=torch.float64, device=trace.power.device)
        if columns.start <= source < columns.stop:
            value[source - columns.start] = trunk.write if source else 1.0
        return value

    streams: tuple[Tensor, ...] = ()
    reads = trunk.reads or (1.0,) * len(trunk.sites)
    h, state = trunk.connection.begin_mix(unit(0), wide(trace.begin))
    for source, (site, gates, factor) in enumerate(zip(trunk.sites, trace.gates, reads, strict=True), 1):
        yield h, streams
        h, state = site.mix(unit(source), state, wide(gates))
        h, streams = h * factor, tuple(site.streams(state) or ())
    yield trunk.connection.finish(h, state), streams


def _errors(trunk: Trunk, ids: Tensor, chunk_bytes: int) -> tuple[Tensor, list[Tensor]]:
    """Relative errors of the rows ``[L+1]``, and of every site's streams, each ``[n]``; fp64, on the CPU."""
    sources, length = len(trunk.sites) + 1, ids.shape[1]
    width, found = trunk.gate_width, []
    for sequence in ids.split(1):
        trace = _run(trunk, sequence, keep_values=True)
        real = [(h, *streams) for h, streams in zip(trace.inputs, [(), *trace.streams], strict=True)]
        mixed = [[torch.zeros_like(x, dtype=torch.float64) for x in row] for row in real]
        values = torch.stack(trace.values).double()
        # Coefficients meet values here, so a chunk has the values' width whatever the gates'.
        step = _sources_at_once(trace, length * trunk.d_model, sources, chunk_bytes)
        for first in range(0, sources, step):
            columns = slice(first, min(first + step, sources))
            rows = _linear_form(trunk, trace, columns, length, width)
            for sums, (h, streams) in zip(mixed, rows, strict=True):
                for total, coefficients in zip(sums, (h, *streams), strict=True):
                    total += (coefficients * values[columns]).sum(0)
        found.append(
            [
                torch.stack([torch.stack([(x - m).abs().max(), x.double().abs().max()]) for x, m in pairs])
                for pairs in (list(zip(*row, strict=True)) for row in zip(real, mixed, strict=True))
            ]
        )
    errors: list[Tensor] = []
    for each in zip(*found, strict=True):
        off, size = torch.stack(each).amax(0).cpu().unbind(-1)
        errors.append(off / size.clamp_min(torch.finfo(torch.float64).tiny))
    return torch.stack([error[0] for error in errors]), [error[1:] for error in errors[1:]]


# --- what was asked for ---------------------------------------------------------------------------


def _checked(model: Any, ids: Any) -> tuple[Trunk, Tensor]:
    """What is mapped of the plain model, and ``ids`` as int64 on its device."""
    model = getattr(model, "_orig_mod", model)  # as torch.compile wraps it
    if isinstance(model, GPT):
        if model.embed.weight.is_meta:
            raise UserError("model has no weights (it is on the meta device); load or initialise it first")
        trunk = _trunk(model)
    elif hasattr(getattr(model, "config", None), "depthmix"):
        modes = [(module, module.training) for module in model.modules()]
        trunk = AdaptedSubject(model, name=type(model).__name__).trunk()
        for module, training in modes:
            module.training = training
    else:
        raise UserError(
            f"model must be a depthmix.GPT, or a language model of depthmix.adapt, got {type(model).__name__}; unwrap "
            f"it (of a wrapper: model.module)"
        )
    if trunk.connection.not_linear:
        raise UserError(
            f"{trunk.residual} has no mixing map: {trunk.connection.not_linear.rstrip('.')}. "
            f"Connections that have one: {', '.join(residuals_with_map())}"
        )
    if not isinstance(ids, Tensor):
        raise UserError(f"ids must be a tensor of whole numbers [B, T], got {type(ids).__name__}")
    if (
        ids.dim() != 2
        or not ids.numel()
        or ids.is_floating_point()
        or ids.is_complex()
        or ids.dtype == torch.bool
    ):
        raise UserError(
            f"ids must be whole numbers of shape [B, T], not empty, got {ids.dtype} {list(ids.shape)}"
        )
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= trunk.vocab_size:
        raise UserError(f"ids must be from 0 to {trunk.vocab_size - 1}, got {low} to {high}")
    return trunk, ids.to(trunk.device, torch.int64)


def _shares(matrix: Tensor) -> Tensor:
    size = matrix.abs()
    return size / size.sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
