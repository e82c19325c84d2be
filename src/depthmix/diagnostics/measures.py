r"""What one pass over the texts measures, in memory that does not grow with their number.

A :class:`Measure` asks for points of :mod:`depthmix.diagnostics.capture`, sees their values batch by batch and keeps
sums, extremes, histograms with fixed bins and a fixed number of samples. Sums and everything behind them are fp64.

Places: block i has sublayers 2i (attention) and 2i + 1 (MLP). ``hidden`` of a sublayer is what is read behind it,
``output`` what it returned. Depth i is what enters block i, depth L what leaves the last. Shapes: ``B`` texts of ``T``
tokens at a time, ``D`` features, ``n`` streams, ``L`` blocks, ``S = 2L`` sublayers.
"""

import fnmatch
import functools
import math
import re
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from .arrays import Array
from .subject import Subject

TOP = 3
"""Largest absolute values that are kept of every sublayer."""
GATE_BINS = 1000
OCTAVE_BINS = 16
"""Bins of the histogram of absolute values for each factor of two."""
OCTAVES = (-64, 64)
SAMPLE_EVERY = 16
"""One position in so many enters the histogram of absolute values."""
RANK_SAMPLES = 256
"""Tokens, at most one of a text, whose streams the effective rank and the similarity are taken from."""
STATIC = 0.05
"""A stream is static where no two depths are further apart than this angular distance."""

_POINT = re.compile(
    r"blocks\.(\d+)\.hook_(attn_out|mlp_out|resid_pre|resid_mid|resid_post|(?:streams|gate|pool)(?:_mid)?)"
)
_KINDS = {
    "attn_out": ("output", 0),
    "mlp_out": ("output", 1),
    "resid_mid": ("hidden", 0),
    "resid_post": ("hidden", 1),
}


def place(name: str) -> tuple[str, int]:
    """``("output" | "hidden" | "streams" | "gate" | "pool", sublayer)``; ``("hidden", -1)`` for what enters block 0.

    What enters a later block is what was read behind the block before it.
    """
    found = _POINT.fullmatch(name)
    assert found is not None, name
    block, point = found.groups()
    if point == "resid_pre":
        return "hidden", 2 * int(block) - 1
    kind, second = _KINDS.get(point) or (point.removesuffix("_mid"), int(not point.endswith("_mid")))
    return kind, 2 * int(block) + second


class Measure(ABC):
    """Something that is found in one pass."""

    points: tuple[str, ...] = ()
    """Patterns of the points it asks for."""

    def __init__(self, subject: Subject, texts: int):
        self.subject, self.texts = subject, texts
        self.sublayers = 2 * subject.n_layer

    @abstractmethod
    def see(self, kind: str, sublayer: int, value: Tensor, first: int, ids: Tensor) -> None:
        """One value ``[B, T, ...]`` of the batch ``ids [B, T]``, whose first text has number ``first``."""

    def end_batch(self, first: int, ids: Tensor) -> None:  # noqa: B027
        """All values of the batch have been seen."""

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """What was found."""

    def _empty(self, *shape: int) -> np.ndarray:
        return np.full((self.sublayers, *shape), np.nan)


class Sums:
    """Of fp64 numbers in places of which some are never added to: those are NaN in the mean."""

    def __init__(self, *shape: int):
        self.total, self.there = np.zeros(shape), np.zeros(shape, dtype=bool)

    def add(self, index, part: Tensor) -> None:
        self.total[index] += part.cpu().numpy()
        self.there[index] = True

    def mean(self, count) -> np.ndarray:
        return np.where(self.there, self.total / np.maximum(count, 1), np.nan)


class Largest:
    """The largest values of a pass and where they were: exact, in order of size; the earlier of two equal ones."""

    def __init__(self):
        self.values = np.full(TOP, np.nan)
        self.places = np.full((TOP, 4), -1, dtype=np.int64)

    def see(self, absolute: Tensor, per_token: Tensor, first: int, ids: Tensor) -> None:
        """``absolute [B, T, D]`` and its largest value of each token, ``per_token [B, T]``; NaN is never large."""
        length, width = absolute.shape[1:]
        flat = per_token.flatten()
        # An element among the largest is in one of as many tokens with the largest maxima.
        order = flat.nan_to_num(nan=-1.0, posinf=math.inf).sort(descending=True, stable=True).indices
        tokens = order[:TOP].sort().values
        candidates = absolute.reshape(-1, width)[tokens].nan_to_num(nan=-1.0, posinf=math.inf).flatten()
        best = candidates.sort(descending=True, stable=True)
        found, rows = [], []
        for value, index in zip(best.values[:TOP].tolist(), best.indices[:TOP].tolist(), strict=True):
            token, channel = int(tokens[index // width]), index % width
            text, position = divmod(token, length)
            found.append(value if value >= 0 else math.nan)
            rows.append((first + text, position, channel, int(ids[text, position])))
        values = np.concatenate([self.values, found])
        kept = np.argsort(-np.nan_to_num(values, nan=-1.0), kind="stable")[:TOP]
        self.values, self.places = values[kept], np.concatenate([self.places, rows])[kept]


class AbsoluteHistogram:
    """Counts of absolute values in bins of equal ratio, 16 to a factor of two: quantiles within 2.2 %."""

    def __init__(self):
        self.counts = torch.zeros((OCTAVES[1] - OCTAVES[0]) * OCTAVE_BINS, dtype=torch.long)

    def see(self, absolute: Tensor) -> None:
        """Any shape; NaN is left out, zeros are in the lowest bin."""
        places = (absolute[absolute == absolute].float().log2() - OCTAVES[0]) * OCTAVE_BINS
        places = places.clamp(0, len(self.counts) - 1).long()
        self.counts += torch.bincount(places, minlength=len(self.counts)).cpu()

    def median(self) -> float:
        """The middle, in ratio, of the bin that holds it; NaN of nothing."""
        total = int(self.counts.sum())
        if not total:
            return math.nan
        bin_ = int((self.counts.cumsum(0) < (total + 1) // 2).sum())
        return 2.0 ** (OCTAVES[0] + (bin_ + 0.5) / OCTAVE_BINS)


class Magnitudes(Measure):
    """Fig. 2 (left), 5, 6, 10, 11, 12: root mean squares, largest values and their places, what is not finite."""

    points = (
        "blocks.*.hook_*_out",
        "blocks.*.hook_resid_mid",
        "blocks.*.hook_resid_post",
        "blocks.*.hook_streams*",
    )

    def __init__(self, subject, texts):
        super().__init__(subject, texts)
        kinds = "hidden", "output"
        self.squares = {kind: Sums(self.sublayers) for kind in kinds}
        self.largest = {kind: [Largest() for _ in range(self.sublayers)] for kind in kinds}
        self.histograms = {kind: [AbsoluteHistogram() for _ in range(self.sublayers)] for kind in kinds}
        self.stream_squares = Sums(self.sublayers, subject.n_streams)
        self.stream_max = self._empty(subject.n_streams)
        self.not_finite = np.zeros(self.sublayers, dtype=np.int64)
        self.tokens = 0

    def see(self, kind, sublayer, value, first, ids):
        if kind == "streams":
            n = value.shape[-2]
            squares = value.float().square().sum((0, 1, 3), dtype=torch.float64)
            self.stream_squares.add((sublayer, slice(n)), squares / value.shape[-1])
            _raise(self.stream_max[sublayer, :n], value.abs().amax((0, 1, 3)))
            return
        absolute = value.abs()
        per_token = absolute.amax(-1)
        squares = value.float().square().sum(-1, dtype=torch.float64)
        self.squares[kind].add(sublayer, squares.sum() / value.shape[-1])
        self.not_finite[sublayer] += int((~per_token.isfinite()).sum())
        self.largest[kind][sublayer].see(absolute, per_token, first, ids)
        self.histograms[kind][sublayer].see(absolute[:, first % SAMPLE_EVERY % ids.shape[1] :: SAMPLE_EVERY])

    def end_batch(self, first, ids):
        self.tokens += ids.numel()

    def arrays(self):
        def rms(squares):
            return np.sqrt(squares.mean(self.tokens))

        found = {
            "output_rms": Array(
                rms(self.squares["hidden"])[1::2], ("block",), "", "RMS of what is read behind a block"
            ),
            "sublayer_output_rms": Array(
                rms(self.squares["output"]), ("sublayer",), "", "RMS of a sublayer's output"
            ),
            "not_finite": Array(
                self.not_finite, ("sublayer",), "tokens", "NaN or infinity in its output or behind it"
            ),
        }
        for kind, words in (("hidden", "what is read behind a sublayer"), ("output", "a sublayer's output")):
            largest = self.largest[kind]
            axes = ("sublayer", "rank")
            found[f"top_{kind}"] = Array(
                np.stack([x.values for x in largest]), axes, "", f"largest absolute values of {words}"
            )
            places = np.stack([x.places for x in largest])
            for i, name in enumerate(("text", "position", "channel", "token")):
                about = f"{name} of each of top_{kind}; -1 where there is none"
                found[f"top_{kind}_{name}"] = Array(places[..., i], axes, "", about)
            found[f"median_{kind}"] = Array(
                np.array([x.median() for x in self.histograms[kind]]), ("sublayer",), "",
                f"median absolute value of {words}, of one position in {SAMPLE_EVERY}, within 2.2 %",
            )  # fmt: skip
        if self.subject.n_streams:
            axes = ("sublayer", "stream")
            found["stream_rms"] = Array(
                rms(self.stream_squares), axes, "", "RMS of a stream behind a sublayer"
            )
            found["stream_max"] = Array(self.stream_max, axes, "", "largest absolute value of a stream")
        return found


class Distances(Measure):
    """Fig. 3, 8, 9: angular distance between depths at the last token; from it, streams that stay what they are."""

    points = ("blocks.0.hook_resid_pre", "blocks.*.hook_resid_post", "blocks.*.hook_streams")

    def __init__(self, subject, texts):
        super().__init__(subject, texts)
        depths = subject.n_layer + 1
        self.sum = np.zeros((1 + subject.n_streams, depths, depths))
        self.seen = 0
        self.batch = None

    def see(self, kind, sublayer, value, first, ids):
        if kind not in ("hidden", "streams"):
            return
        last = value[:, -1].double()  # [B, D] or [B, n, D]
        if self.batch is None:
            shape = len(ids), 1 + self.subject.n_streams, self.subject.n_layer + 1, last.shape[-1]
            self.batch = last.new_full(shape, math.nan)
        depth = (sublayer + 1) // 2
        if kind == "hidden":
            self.batch[:, 0, depth] = last
        else:
            self.batch[:, 1 : 1 + last.shape[1], depth] = last

    def end_batch(self, first, ids):
        unit = self.batch / torch.linalg.vector_norm(self.batch, dim=-1, keepdim=True)
        distance = torch.arccos((unit @ unit.mT).clamp(-1, 1)) / math.pi
        distance.diagonal(dim1=-2, dim2=-1).mul_(0)  # NaN stays
        self.sum += distance.sum(0).cpu().numpy()
        self.seen += len(ids)
        self.batch = None

    def arrays(self):
        mean = self.sum / max(self.seen, 1)
        mean[:, np.tri(mean.shape[-1], k=-1, dtype=bool)] = np.nan
        axes = ("representation", "from", "to")
        about = (
            "mean angular distance at the last token; representation 0 is the hidden state, 1 + i stream i"
        )
        found = {"angular_distance": Array(mean, axes, "half turns", about)}
        if self.subject.n_streams:
            score = np.array([_largest(stream) for stream in mean[1:]])
            about = "largest angular distance of a stream between any two depths at which it exists"
            found["static_score"] = Array(score, ("stream",), "half turns", about)
            found["static_streams"] = Array(
                score < STATIC, ("stream",), "", f"whether static_score is below {STATIC}"
            )
        return found


class Gates(Measure):
    """Fig. 7, 13: distribution of the gates; pool weights; what inverting the gates would multiply errors by."""

    points = ("blocks.*.hook_gate*", "blocks.*.hook_pool*")

    def __init__(self, subject, texts):
        super().__init__(subject, texts)
        self.counts = np.zeros((self.sublayers, GATE_BINS), dtype=np.int64)
        self.edges = np.stack(
            [np.linspace(*subject.gate_range(s), GATE_BINS + 1) for s in range(self.sublayers)]
        )
        self.sum, self.min, self.max = Sums(self.sublayers), self._empty(), self._empty()
        self.values = np.zeros(self.sublayers)
        self.by_stream = Sums(self.sublayers, subject.n_streams)
        self.pool_sum, self.entropy_sum = {}, Sums(self.sublayers)
        self.log_amplification = None
        self.amplification_sum = Sums(self.sublayers, subject.n_streams)
        self.amplification_max = self._empty(subject.n_streams)
        self.tokens = 0

    def see(self, kind, sublayer, value, first, ids):
        if kind == "pool":
            self._pool(sublayer, value.double())
            return
        value = value.double()
        low, high = self.edges[sublayer, [0, -1]]
        places = (value.flatten() - low) / (high - low) * GATE_BINS
        places = places[places == places].clamp(0, GATE_BINS - 1).long()
        self.counts[sublayer] += torch.bincount(places, minlength=GATE_BINS).cpu().numpy()
        self.sum.add(sublayer, value.sum())
        self.values[sublayer] += value.numel()
        self.min[sublayer] = np.fmin(self.min[sublayer], value.min().item())
        self.max[sublayer] = np.fmax(self.max[sublayer], value.max().item())
        if not self.subject.n_streams:  # one stream, a gate for each channel
            return
        gated = self.subject.gated_streams(sublayer)
        self.by_stream.add((sublayer, ... if gated is None else list(gated)), value.sum((0, 1)))
        if gated is not None:  # the others keep what they have: gates of 0
            value = value.new_zeros(*value.shape[:-1], self.subject.n_streams).index_copy_(
                -1, torch.tensor(gated, device=value.device), value
            )
        if self.subject.convex_gates(sublayer):
            grown = -torch.log1p(-value) / math.log(10)
            if self.log_amplification is not None:
                grown += self.log_amplification
            self.log_amplification = grown
            self.amplification_sum.add(sublayer, grown.sum((0, 1)))
            _raise(self.amplification_max[sublayer], grown.amax((0, 1)))

    def _pool(self, sublayer: int, alpha: Tensor) -> None:
        total = alpha.sum((0, 1)).cpu().numpy()
        self.pool_sum[sublayer] = self.pool_sum.get(sublayer, 0) + total
        k = alpha.shape[-1]
        share = alpha.abs() / alpha.abs().sum(-1, keepdim=True)
        entropy = torch.special.entr(share).sum() / (math.log(k) if k > 1 else 1)
        self.entropy_sum.add(sublayer, entropy)

    def end_batch(self, first, ids):
        self.tokens += ids.numel()
        self.log_amplification = None

    def arrays(self):
        found, axes = {}, ("sublayer",)
        if self.values.any():
            mean = self.sum.mean(self.values)
            quantiles = np.stack([_quantiles(c, e) for c, e in zip(self.counts, self.edges, strict=True)])
            found |= {
                "gate_counts": Array(
                    self.counts, ("sublayer", "bin"), "count", "gate values; outliers in the end bins"
                ),
                "gate_edges": Array(self.edges, ("sublayer", "edge"), "", "between the bins of gate_counts"),
                "gate_mean": Array(mean, axes, "", "mean gate value"),
                "gate_min": Array(self.min, axes, "", "smallest gate value"),
                "gate_max": Array(self.max, axes, "", "largest gate value"),
                "gate_quantiles": Array(
                    quantiles, ("sublayer", "quantile"), "", "5, 25, 50, 75, 95 % of gate_counts"
                ),
            }
            if self.subject.n_streams:
                found["gate_mean_stream"] = Array(
                    self.by_stream.mean(self.tokens),
                    ("sublayer", "stream"),
                    "",
                    "mean gate value of each stream",
                )
        if np.isfinite(self.amplification_max).any():
            both = ("sublayer", "stream")
            words = "log10 of the product of 1 / (1 - beta) from the first lerp on"
            found["amplification_mean"] = Array(
                self.amplification_sum.mean(self.tokens), both, "decades", f"{words}, mean over tokens"
            )
            found["amplification_max"] = Array(self.amplification_max, both, "decades", f"{words}, largest")
        if self.pool_sum:
            pools = self._empty(max(len(total) for total in self.pool_sum.values()))
            for sublayer, total in self.pool_sum.items():
                pools[sublayer, : len(total)] = total / self.tokens
            found["pool_mean"] = Array(
                pools, ("sublayer", "source"), "share", "mean weight of a stream or source"
            )
            found["pool_entropy"] = Array(
                self.entropy_sum.mean(self.tokens),
                axes,
                "share",
                "entropy of the weights over its largest: 0 one, 1 all alike",
            )
        return found


class Ranks(Measure):
    """How many directions the hidden state and every stream use, and how alike streams are, on sampled tokens."""

    points = Distances.points

    def __init__(self, subject, texts):
        super().__init__(subject, texts)
        chosen = np.unique(np.linspace(0, texts - 1, min(RANK_SAMPLES, texts)).round().astype(int))
        self.row_of = {int(text): row for row, text in enumerate(chosen)}
        self.positions = np.random.default_rng(0).random(len(chosen))
        self.samples: dict[tuple[int, int], Tensor] = {}

    def see(self, kind, sublayer, value, first, ids):
        if kind not in ("hidden", "streams"):
            return
        rows = [(i, self.row_of[first + i]) for i in range(len(ids)) if first + i in self.row_of]
        if not rows:
            return
        places, kept = zip(*rows, strict=True)
        positions = [int(self.positions[row] * ids.shape[1]) for row in kept]
        taken = value[list(places), positions].float().cpu()  # [rows, D] or [rows, n, D]
        for i, part in enumerate([taken] if kind == "hidden" else taken.unbind(1)):
            key = (sublayer + 1) // 2, i + (kind == "streams")
            if key not in self.samples:
                self.samples[key] = torch.full((len(self.row_of), part.shape[-1]), math.nan)
            self.samples[key][list(kept)] = part

    def arrays(self):
        depths, n = self.subject.n_layer + 1, self.subject.n_streams
        ranks, alike = np.full((depths, 1 + n), np.nan), np.full((depths, n, n), np.nan)
        for (depth, representation), x in self.samples.items():
            ranks[depth, representation] = effective_rank(x)
        for depth in range(depths):
            streams = [self.samples[depth, 1 + i] for i in range(n) if (depth, 1 + i) in self.samples]
            if streams:
                unit = torch.nn.functional.normalize(torch.stack(streams).double(), dim=-1)
                k = len(streams)
                alike[depth, :k, :k] = torch.einsum("itd,jtd->ij", unit, unit) / unit.shape[1]
        about = f"exp of the entropy of the singular values, {len(self.row_of)} sampled tokens"
        found = {"effective_rank": Array(ranks, ("depth", "representation"), "directions", about)}
        if n:
            about = f"mean cosine between streams, {len(self.row_of)} sampled tokens"
            found["stream_similarity"] = Array(alike, ("depth", "stream", "stream"), "", about)
        return found


def effective_rank(x: Tensor) -> float:
    """``exp(-sum p log p)`` with p the singular values of ``x [N, D]`` over their sum (Roy and Vetterli 2007)."""
    if not x.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(x.double())
    share = values / values.sum()
    return math.exp(torch.special.entr(share).sum().item())


def _raise(into: np.ndarray, values: Tensor) -> None:
    """In place, to what is larger; NaN is nothing."""
    into[: len(values)] = np.fmax(into[: len(values)], values.double().cpu().numpy())


def _largest(distances: np.ndarray) -> float:
    """Off the diagonal; NaN where there is none."""
    off = distances[~np.eye(len(distances), dtype=bool)]
    off = off[~np.isnan(off)]
    return float(off.max()) if off.size else math.nan


def _quantiles(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """At 5, 25, 50, 75, 95 %, linear inside of a bin; NaN of nothing."""
    total = counts.sum()
    if not total:
        return np.full(5, np.nan)
    below = np.concatenate([[0], np.cumsum(counts)])
    wanted = np.array((0.05, 0.25, 0.5, 0.75, 0.95)) * total
    bins = np.searchsorted(below[1:], wanted)
    return edges[bins] + np.diff(edges)[bins] * (wanted - below[bins]) / counts[bins]


MEASURES = (Magnitudes, Distances, Gates, Ranks)


@torch.inference_mode()
def measure(subject: Subject, texts: Tensor, batch: int, progress=lambda done: None) -> dict[str, Array]:
    """All of ``MEASURES`` on ``texts [N, T]`` (token ids), ``batch`` of them at a time, in one pass.

    ``progress`` is called with the number of texts after each batch.
    """
    measures = [kind(subject, len(texts)) for kind in MEASURES]
    first, ids = 0, texts[:0]

    def see(name: str, value: Tensor) -> None:
        kind, sublayer = place(name)
        for one in seen_by(name):
            one.see(kind, sublayer, value, first, ids)

    @functools.cache
    def seen_by(name: str) -> list[Measure]:
        return [m for m in measures if any(fnmatch.fnmatchcase(name, point) for point in m.points)]

    with subject.capture(sorted({point for one in measures for point in one.points}), see):
        for first in range(0, len(texts), batch):
            ids = texts[first : first + batch]
            subject.hidden(ids.to(subject.device))
            for one in measures:
                one.end_batch(first, ids)
            progress(len(ids))
    return {name: array for one in measures for name, array in one.arrays().items()}
