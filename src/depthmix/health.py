"""What is recorded of a network's depth while it trains: one line of ``depth.jsonl`` an evaluation.

Sublayer 2i is the attention of block i, 2i + 1 its MLP, both counted from 0; L blocks. A line holds, rounded to six
digits, ``null`` for what is not finite or does not exist at that sublayer; a key is left out where the connection has
no such thing at all::

    step, tokens         optimiser steps and training tokens done
    text_tokens          tokens of validation text that the rest, but for the gradients, was measured on
    hidden_rms           [2L]  RMS of what the sublayer reads, before its norm
    output_rms           [2L]  RMS of what it returns
    stream_rms           [2L][n]  RMS of each stream behind it; fewer streams while they are being appended
    gate_mean, gate_max  [2L]  over tokens and streams (or channels): how much of its output is admitted
    gate_mean_stream     [2L][n]  the mean by stream, null of one not written; not there for gates per channel
    gate_range           [2]   where such gates lie
    pool_mean            [2L][k]  mean weight of each stream or source in what is read behind it
    gradient_rms         [L]   RMS of d loss / d parameter over all parameters of the block and its sites, in the step
                               just done: summed over micro-batches, before clipping

The text is the beginning of the validation data, ``TEXT_TOKENS`` in whole windows, always the same; one pass without
gradients, in the precision of training. It draws no random number and changes no state, so that training computes the
same bits with the record as without.
"""

import io
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data import eval_batches
from .diagnostics.capture import capture
from .model import GPT
from .ops.reference import compute_dtype
from .optim import MuonAdamW
from .residuals.base import Site

TEXT_TOKENS = 512
"""What one evaluation is measured on: a mean over so many tokens is steady, and small beside the evaluation."""
SAMPLE = 4096
"""Values, at most, that a histogram is made of, for each sublayer or block."""
HISTORY = 256
"""Evaluations, at most, in one picture of the whole run: more are thinned out evenly."""
MOST_SCALARS = 16
"""A list with more entries per sublayer (the sources of Attention Residuals) is a picture and no curves."""

_POINTS = {
    "hook_resid_pre": ("hidden", 0),
    "hook_resid_mid": ("hidden", 1),
    "hook_attn_out": ("output", 0),
    "hook_mlp_out": ("output", 1),
    "hook_streams_mid": ("streams", 0),
    "hook_streams": ("streams", 1),
    "hook_gate_mid": ("gate", 0),
    "hook_gate": ("gate", 1),
    "hook_pool_mid": ("pool", 0),
    "hook_pool": ("pool", 1),
}
"""Name of a point -> what it is, and whether of the attention (0) or of the MLP (1)."""

_LISTS = ("stream_rms", "gate_mean_stream", "pool_mean")
_NUMBERS = ("hidden_rms", "output_rms", "gate_mean", "gate_max")


@dataclass(frozen=True)
class Health:
    """What one pass over the text shows."""

    record: dict
    """Part of a line of ``depth.jsonl``."""
    gates: dict[int, np.ndarray]
    """Sublayer -> some of its gate values, fp32."""


@dataclass(frozen=True)
class Gradients:
    """What one training step's gradient shows."""

    rms: list[float | None]
    """``gradient_rms``."""
    samples: list[np.ndarray]
    """Some entries of each block's gradient, fp32."""


def text_of(split, seq_len: int) -> Tensor:
    """Token ids ``[B, T]`` of the text: whole windows, or the beginning of one that is longer."""
    length = min(seq_len, TEXT_TOKENS)
    (ids, _) = next(eval_batches(split, length, -(-TEXT_TOKENS // length), TEXT_TOKENS))
    return ids


@torch.no_grad()
def measure(model: GPT, ids: Tensor, autocast: AbstractContextManager) -> Health:
    """Run ``model`` over ``ids [B, T]``, on its device, and look at every sublayer."""
    found: list[tuple[str, int, Tensor]] = []
    sites = [site for block in model.blocks for site in (block.attn_site, block.mlp_site)]

    def take(name: str, value: Tensor) -> None:
        _, block, point = name.split(".")
        kind, place = _POINTS[point]
        sublayer = 2 * int(block) + place
        value = value.to(compute_dtype(value.dtype))
        if kind in ("hidden", "output"):
            found.append((f"{kind}_rms", sublayer, _rms(value, (0, 1, 2))))
        elif kind == "streams":
            found.append(("stream_rms", sublayer, _rms(value, (0, 1, 3))))
        elif kind == "pool":
            found.append(("pool_mean", sublayer, value.mean((0, 1))))
        else:
            found.append(("gate_mean", sublayer, value.mean()))
            found.append(("gate_max", sublayer, value.max()))
            if not sites[sublayer].per_channel:
                found.append(("gate_mean_stream", sublayer, _by_stream(value, sites[sublayer])))
            found.append(("gates", sublayer, _sample(value)))

    with capture(model, [f"blocks.*.{point}" for point in _POINTS], take), autocast:
        model.hidden(ids)

    values = _on_cpu([value for *_, value in found])
    present = {key for key, *_ in found}
    record: dict = {"text_tokens": ids.numel()}
    record |= {key: [None] * len(sites) for key in (*_NUMBERS, *_LISTS) if key in present}
    gates = {}
    for (key, sublayer, _), array in zip(found, values, strict=True):
        if key == "gates":
            gates[sublayer] = array
        else:
            record[key][sublayer] = rounded(array) if key in _LISTS else rounded(array)[0]
    if gates:
        record["gate_range"] = list(sites[min(gates)].gate_range)
    return Health(record, gates)


@torch.no_grad()
def gradients(model: GPT, optimizer: MuonAdamW) -> Gradients:
    """Of the gradient that ``optimizer`` holds now; parameters without one count as zeros."""
    blocks = [list(block.parameters()) for block in model.blocks]
    # Norms as clipping counts them, so that a low-precision parameter's is that of its fp32 sum.
    norms = torch.stack([optimizer.grad_norm(block) for block in blocks]).tolist()
    sizes = [sum(p.numel() for p in block) for block in blocks]
    samples = []
    for block, size in zip(blocks, sizes, strict=True):
        every = -(-size // SAMPLE)
        of_block = (optimizer.state[p].get("master", p).grad for p in block)
        samples.append(torch.cat([g.flatten()[::every].float() for g in of_block if g is not None]))
    rms = [norm / math.sqrt(size) for norm, size in zip(norms, sizes, strict=True)]
    return Gradients(rounded(rms), _on_cpu(samples))


def _rms(value: Tensor, over: tuple[int, ...]) -> Tensor:
    count = math.prod(value.shape[i] for i in over)
    return torch.linalg.vector_norm(value, dim=over) / math.sqrt(count)


def _by_stream(gate: Tensor, site: Site) -> Tensor:
    """``[n]`` means of ``gate [B, T, n]``; NaN for a stream that the site does not write."""
    means = gate.mean((0, 1))
    if site.gated_streams is None:
        return means
    placed = means.new_full((2 * len(means),), math.nan)
    placed[list(site.gated_streams)] = means
    return placed


def _sample(value: Tensor) -> Tensor:
    flat = value.flatten()
    return flat[:: -(-flat.numel() // SAMPLE)]


def _on_cpu(values: list[Tensor]) -> list[np.ndarray]:
    """fp32, by one transfer from the device."""
    flat = torch.cat([value.flatten().float() for value in values]).cpu().numpy()
    return np.split(flat, np.cumsum([value.numel() for value in values])[:-1])


def rounded(values) -> list[float | None]:
    """Six digits of each, ``None`` for what is not finite."""
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in map(float, values)]


# --- what TensorBoard shows -----------------------------------------------------------------------


def sublayer_name(sublayer: int) -> str:
    """``3 attn`` or ``3 mlp``."""
    return f"{sublayer // 2} {'mlp' if sublayer % 2 else 'attn'}"


def scalars(line: dict) -> dict[str, float]:
    """The finite numbers of a line of ``depth.jsonl`` by tag: ``gate_mean/3 attn``, ``stream_rms/3 mlp stream 0``."""
    values: dict[str, float | None] = {}
    for key in _NUMBERS:
        values |= {f"{key}/{sublayer_name(i)}": x for i, x in enumerate(line.get(key, ()))}
    for key, what in (("stream_rms", "stream"), ("pool_mean", "source")):
        lists = [entry or () for entry in line.get(key, ())]
        if max(map(len, lists), default=0) <= MOST_SCALARS:
            for i, entry in enumerate(lists):
                values |= {f"{key}/{sublayer_name(i)} {what} {j}": x for j, x in enumerate(entry)}
    values |= {f"gradient_rms/block {i}": x for i, x in enumerate(line["gradient_rms"] or ())}
    return {tag: x for tag, x in values.items() if x is not None}


def histograms(health: Health, found: Gradients | None) -> dict[str, dict]:
    """Tag -> fields of a ``HistogramProto``: gate values by sublayer, gradient entries by block."""
    values = {f"gates/{sublayer_name(i)}": x for i, x in sorted(health.gates.items())}
    values |= {f"gradients/block {i}": x for i, x in enumerate(found.samples if found else ())}
    return {tag: histogram(x) for tag, x in values.items()}


def histogram(values: np.ndarray, bins: int = 30) -> dict:
    """Fields of a ``HistogramProto`` of the finite ``values``: equal bins from the least to the largest."""
    values = values[np.isfinite(values)].astype(np.float64)
    if not values.size:
        return {"min": 0.0, "max": 0.0, "num": 0.0, "sum": 0.0, "sum_squares": 0.0}
    low, high = values.min(), values.max()
    counts, edges = (
        np.histogram(values, bins, (low, high))
        if high > low
        else (np.array([values.size]), np.array([low, low]))
    )
    return {
        "min": low,
        "max": high,
        "num": float(values.size),
        "sum": values.sum(),
        "sum_squares": np.square(values).sum(),
        "bucket_limit": edges[1:].tolist(),
        "bucket": counts.astype(np.float64).tolist(),
    }


def images(history: list[dict]) -> dict[str, "Picture"]:
    """Tag -> heat map: the newest line by stream or source, and the lines of ``history`` over time."""
    pictures, line = {}, history[-1]
    for kind, what in (("gate", "stream"), ("pool", "source")):
        key = "gate_mean_stream" if kind == "gate" else "pool_mean"
        rows = [entry or () for entry in line.get(key, ())]
        width = max(map(len, rows), default=0)
        if width:
            values = np.full((len(rows), width), np.nan)
            for i, entry in enumerate(rows):
                values[i, : len(entry)] = [np.nan if x is None else x for x in entry]
            title = f"mean {kind} at step {line['step']:,}: sublayer down, {what} across"
            pictures[f"depth/{kind}s by {what}"] = heat_map(values, title, ("0", str(width - 1)))
    shown = [history[i] for i in np.unique(np.linspace(0, len(history) - 1, HISTORY).round().astype(int))]
    for key, what in (
        ("gate_mean", "mean gate: sublayer"),
        ("hidden_rms", "RMS of what is read: sublayer"),
        ("gradient_rms", "RMS of the gradient: block"),
    ):
        columns = [entry[key] for entry in shown if entry.get(key)]
        if columns:
            values = np.array([[np.nan if x is None else x for x in column] for column in columns]).T
            steps = f"{shown[0]['step']:,}", f"{shown[-1]['step']:,}"
            pictures[f"depth/{key} over time"] = heat_map(values, f"{what} down, step across", steps)
    return pictures


# --- heat maps ------------------------------------------------------------------------------------

_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From the smallest value to the largest, evenly spaced: matplotlib's viridis at five places."""
_GREY, _WHITE, _BLACK = 253, 254, 255
"""Places in a picture's palette behind those of the values: where there is none, the ground, and letters."""


def colours(shares: np.ndarray) -> np.ndarray:
    """``[..., 3]`` bytes for values in 0 to 1."""
    places = np.asarray(shares) * (len(_COLOURS) - 1)
    channels = [np.interp(places, range(len(_COLOURS)), channel) for channel in zip(*_COLOURS, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _palette() -> bytes:
    return colours(np.linspace(0, 1, _GREY)).tobytes() + bytes([225] * 3 + [255] * 3 + [0] * 3)


@dataclass(frozen=True)
class Picture:
    """An image of 256 colours."""

    png: bytes
    width: int
    height: int


def heat_map(values: np.ndarray, title: str, ends: tuple[str, str]) -> Picture:
    """A small picture of ``values [rows, columns]``: rows numbered from 0, ``ends`` below the first and last column.

    Colours go from 0, or the least value where that is negative, to the largest; both stand beside the title.
    """
    # Not matplotlib: it takes longer to draw this than a small model takes to evaluate.
    from PIL import Image, ImageDraw, ImageFont

    finite = values[np.isfinite(values)]
    low, high = (min(0.0, finite.min()), finite.max()) if finite.size else (0.0, 0.0)
    shares = (np.where(np.isfinite(values), values, np.nan) - low) / ((high - low) or 1.0)
    rows, columns = values.shape
    tall, wide = max(4, 320 // rows), max(1, 480 // columns)
    left, top, line = 28, 30, 14

    def painted(shares: np.ndarray, size: tuple[int, int]):
        places = np.where(np.isnan(shares), _GREY, np.nan_to_num(shares) * (_GREY - 1)).round()
        return Image.fromarray(places.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)

    cells = painted(shares, (columns * wide, rows * tall))
    image = Image.new("P", (left + max(cells.width, 380) + 8, top + cells.height + line + 4), _WHITE)
    image.putpalette(_palette())
    image.paste(cells, (left, top))
    image.paste(painted(np.linspace(0, 1, 96)[None], (96, 8)), (left + 60, 18))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default_imagefont()

    def write(x: int, y: int, text: str) -> None:
        draw.text((x, y), text, _BLACK, font)

    write(4, 2, title)
    write(left, 16, f"{low:.3g}")
    write(left + 162, 16, f"{high:.3g}")
    for row in range(0, rows, -(-line // tall)):
        write(4, top + row * tall + (tall - line) // 2, str(row))
    bottom = top + cells.height + 1
    write(left, bottom, ends[0])
    if columns > 1:
        write(left + cells.width - int(draw.textlength(ends[1], font)), bottom, ends[1])
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return Picture(buffer.getvalue(), image.width, image.height)
