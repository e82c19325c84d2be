"""What differences between paired runs, and losses at several sizes, allow to say.

Seeds are paired: seed k gives every row the same sublayer weights and the same batches, so a row is compared with the
baseline seed by seed. With ``d_1 .. d_K`` the differences:

    mean = sum d_k / K
    s.e. = sqrt( sum (d_k - mean)^2 / (K - 1) / K )
    t    = mean / s.e., with K - 1 degrees of freedom

Where a table says so (``error = "pooled"``), the error is one for all of its rows, from the additive model of a row's
and a seed's share, ``loss = row + seed + e``, by least squares over all of its runs. With R rows and K seeds each,
``mean`` is as above and

    s^2  = sum e^2 / ((R - 1) (K - 1))
    s.e. = s sqrt(2 / K), with (R - 1) (K - 1) degrees of freedom

which sees more with few seeds, if rows scatter alike about their seeds' shares. Whether they do is tested: with S(T)
the sum of squares and f(T) the degrees of freedom that the model leaves of a table T,

    F = (S(T) - S(T without the row)) / (f(T) - f(T without the row)) / (S(T without the row) / f(T without the row))

The row with the least p by the F distribution, if that times the number of rows is below 1 %, is taken out of the
common error and has its paired one; then the rest is tested again. If that row is the baseline, all have theirs.

The p values of one table are corrected for their number by Holm's step-down method (Holm, 1979), which needs no
independence between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError

LEVEL = 0.05
UNEVEN = 0.01
"""Below this p a row is said to scatter more than the others."""
DRAWS = 20_000


def _distributions():
    """``scipy.stats``. Raises ``UserError`` where it is not installed."""
    try:
        import scipy.stats
    except ImportError as error:
        raise UserError(
            'a study\'s page needs scipy, which is not installed: pip install "depthmix[study]"'
        ) from error
    return scipy.stats


@dataclass(frozen=True)
class Paired:
    """Mean difference of runs paired by seed; without degrees of freedom the rest is None."""

    mean: float
    pairs: int
    error: float | None = None
    """Standard error of the mean."""
    interval: tuple[float, float] | None = None
    """Of 95 %, not corrected for the number of comparisons."""
    p: float | None = None
    """Two-sided, not corrected."""
    uneven: bool = False
    """In a table of pooled errors this one is the row's own: it, or the baseline, scatters more than the others."""


def paired(differences: Sequence[float]) -> Paired | None:
    """Mean, standard error, interval and p of paired differences; None of none."""
    count = len(differences)
    if not count:
        return None
    mean = math.fsum(differences) / count
    if count == 1:
        return Paired(mean, 1)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    return _tested(mean, count, error, count - 1)


Losses = Mapping[str, Mapping[int, float]]
"""Row -> seed -> loss."""


def pooled(losses: Losses, baseline: str) -> dict[str, Paired]:
    """Row -> its difference to ``baseline``, with the error that all rows share which scatter alike.

    Rows that have no seed in common with the baseline are left out. Where a row lacks seeds that others have, ``mean``
    is that of the least squares fit rather than of the pairs alone.
    """
    base = losses.get(baseline, {})
    shared = {row: sum(seed in base for seed in mine) for row, mine in losses.items()}
    together = {row: mine for row, mine in losses.items() if shared[row]}
    uneven = _uneven(together)
    if baseline in uneven:
        uneven = list(together)
    found = _pooled({row: mine for row, mine in together.items() if row not in uneven}, baseline, shared)
    for row in uneven:
        own = paired([loss - base[seed] for seed, loss in together[row].items() if seed in base])
        if row != baseline and own is not None:
            found[row] = replace(own, uneven=True)
    return {row: found[row] for row in losses if row in found}


def _pooled(losses: Losses, baseline: str, pairs: Mapping[str, int]) -> dict[str, Paired]:
    if not losses:
        return {}
    rows = list(losses)
    design, observed = _additive(losses)
    rounding = _rounding(observed)
    inverse = np.linalg.inv(design.T @ design)
    shares = inverse @ (design.T @ observed)
    rest = observed - design @ shares
    freedom = len(observed) - design.shape[1]
    found = {}
    for row in rows:
        if row == baseline:
            continue
        contrast = np.zeros(design.shape[1])
        contrast[rows.index(row)], contrast[rows.index(baseline)] = 1.0, -1.0
        mean = float(contrast @ shares)
        if freedom < 1:
            found[row] = Paired(mean, pairs[row])
            continue
        error = math.sqrt(float(contrast @ inverse @ contrast) * float(rest @ rest) / freedom)
        mean, error = (0.0 if abs(value) < rounding else value for value in (mean, error))
        found[row] = _tested(mean, pairs[row], error, freedom)
    return found


def _additive(losses: Losses) -> tuple[np.ndarray, np.ndarray]:
    """The model of rows and seeds: what each run has of both, and its loss."""
    runs = [(row, seed, loss) for row, mine in losses.items() for seed, loss in mine.items()]
    # A seed's share is measured from the first one's.
    seeds = sorted({seed for _, seed, _ in runs})[1:]
    design = [
        [float(row == one) for one in losses] + [float(seed == one) for one in seeds] for row, seed, _ in runs
    ]
    return np.array(design), np.array([loss for *_, loss in runs])


def _rounding(observed: np.ndarray) -> float:
    return 1e-12 * float(np.abs(observed).max())


def _left(losses: Losses) -> tuple[float, int]:
    """Sum of squares and degrees of freedom that the model leaves; 0 where only rounding is left."""
    design, observed = _additive(losses)
    shares, _, rank, _ = np.linalg.lstsq(design, observed, rcond=None)
    rest = observed - design @ shares
    rest[np.abs(rest) < _rounding(observed)] = 0.0
    return float(rest @ rest), len(observed) - int(rank)


def _uneven(losses: Losses) -> list[str]:
    """The rows that scatter more than the others, in the order in which they are found."""
    kept, found = dict(losses), []
    while len(kept) > 2:
        squares, freedom = _left(kept)
        p_values = {}
        for row in kept:
            others, of_others = _left({name: mine for name, mine in kept.items() if name != row})
            own, of_own = squares - others, freedom - of_others
            if squares and of_own and of_others:
                ratio = own / of_own / (others / of_others) if others else math.inf
                p_values[row] = float(_distributions().f.sf(ratio, of_own, of_others))
        loudest = min(p_values, key=p_values.__getitem__, default=None)
        if loudest is None or p_values[loudest] * len(kept) >= UNEVEN:
            break
        del kept[loudest]
        found.append(loudest)
    return found


def _tested(mean: float, pairs: int, error: float, freedom: int) -> Paired:
    student = _distributions().t
    reach = float(student.ppf(1 - LEVEL / 2, freedom)) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(2 * student.sf(abs(mean) / error, freedom))
    return Paired(mean, pairs, error, (mean - reach, mean + reach), p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's corrected p values in the order given; None (no test) stays and does not count."""
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(tested):
        least = max(least, min(1.0, p * (len(tested) - rank)))
        corrected[place] = least
    return corrected


@dataclass(frozen=True)
class PowerLaw:
    """``L = A C^-k`` with 95 % intervals."""

    A: float
    k: float
    A_low: float
    A_high: float
    k_low: float
    k_high: float
    k_error: float
    runs: int
    residual: float
    """Root mean square of ``ln L - ln fit``."""

    def loss(self, compute):
        return self.A * np.asarray(compute, dtype=float) ** -self.k


def fit_power_law(compute: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """Least squares of ``ln L`` on ``ln C`` over runs, intervals by Student's t with ``runs - 2`` degrees of freedom.

    ``compute``: FLOPs in whatever unit A shall be at 1. None for fewer than three runs or one size.
    """
    x, y = np.log(np.asarray(compute, dtype=float)), np.log(np.asarray(losses, dtype=float))
    if x.size < 3 or np.ptp(x) < 1e-9:
        return None
    middle = x.mean()
    spread = float(((x - middle) ** 2).sum())
    slope = float(((x - middle) * (y - y.mean())).sum() / spread)
    start = float(y.mean() - slope * middle)
    rest = y - start - slope * x
    variance = float((rest**2).sum() / (x.size - 2))
    slope_error = math.sqrt(variance / spread)
    start_error = math.sqrt(variance * (1 / x.size + middle**2 / spread))
    reach = float(_distributions().t.ppf(1 - LEVEL / 2, x.size - 2))
    return PowerLaw(
        math.exp(start), -slope, math.exp(start - reach * start_error), math.exp(start + reach * start_error),
        -slope - reach * slope_error, -slope + reach * slope_error, slope_error, int(x.size),
        math.sqrt(float((rest**2).mean())),
    )  # fmt: skip


@dataclass(frozen=True)
class Multiplier:
    """Compute with which the baseline reaches the same loss, over the row's own."""

    value: float
    interval: tuple[float, float] | None
    """Of 95 %."""


def compute_multiplier(
    pairs: Sequence[tuple[float, float, float, float]], baseline: PowerLaw, *, seed: int = 0
) -> Multiplier | None:
    """The mean over paired runs, on the logarithmic scale.

    ``pairs``: loss and compute of the baseline, loss and compute of the row, of one size and seed. By the baseline's
    law, a loss lower by ``delta`` in ``ln L`` takes ``exp(delta / k)`` times the compute, so a pair's multiplier is
    ``exp( (ln L_b - ln L_r) / k ) C_b / C_r``. The interval takes the mean of the pairs and the slope from their t
    distributions, independently, ``DRAWS`` times. None without pairs, or with a law that does not fall.
    """
    if not pairs or baseline.k <= 0:
        return None
    gains = np.array([math.log(lb) - math.log(lr) for lb, _, lr, _ in pairs])
    share = float(np.mean([math.log(cb) - math.log(cr) for _, cb, _, cr in pairs]))
    value = math.exp(float(gains.mean()) / baseline.k + share)
    if len(pairs) < 2 or baseline.runs < 3:
        return Multiplier(value, None)
    rng = np.random.default_rng(seed)
    error = float(gains.std(ddof=1)) / math.sqrt(len(pairs))
    mean = gains.mean() + error * rng.standard_t(len(pairs) - 1, DRAWS)
    slope = baseline.k + baseline.k_error * rng.standard_t(baseline.runs - 2, DRAWS)
    kept = slope > 0
    draws = mean[kept] / slope[kept] + share
    low, high = np.exp(np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2]))
    return Multiplier(value, (float(low), float(high)))
