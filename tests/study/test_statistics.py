"""Against scipy and against what was put in."""

import math

import numpy as np
import pytest
from scipy import stats

from depthmix.study.statistics import compute_multiplier, fit_power_law, holm, paired, pooled


def test_paired_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7))
    found, wanted = paired(list(a - b)), stats.ttest_rel(a, b)
    interval = wanted.confidence_interval(0.95)
    np.testing.assert_allclose(
        [found.mean, found.error, found.p, *found.interval],
        [(a - b).mean(), stats.sem(a - b), wanted.pvalue, interval.low, interval.high],
        rtol=1e-12,
    )
    assert found.pairs == 7


def test_paired_of_few():
    assert paired([]) is None
    one = paired([0.25])
    assert (one.mean, one.pairs, one.error, one.p) == (0.25, 1, None, None)
    assert paired([0.0, 0.0]).p == 1.0 and paired([0.5, 0.5]).p == 0.0


def test_pooled_of_two_rows_is_the_paired_t_test():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 6))
    found = pooled({"a": dict(enumerate(a)), "b": dict(enumerate(b))}, "b")["a"]
    wanted = paired(list(a - b))
    assert (found.mean, found.error, found.p, *found.interval) == pytest.approx(
        (wanted.mean, wanted.error, wanted.p, *wanted.interval), rel=1e-9
    )
    assert found.pairs == 6


def test_pooled_is_the_two_way_analysis_of_variance():
    """Row, seed and rest by means alone, for a table without gaps."""
    rng = np.random.default_rng(5)
    table = rng.normal(size=(5, 4)) + 3 * rng.normal(size=(1, 4)) + rng.normal(size=(5, 1))
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    error = math.sqrt((rest**2).sum() / (4 * 3) * 2 / 4)
    found = pooled({str(row): dict(enumerate(losses)) for row, losses in enumerate(table)}, "0")
    assert list(found) == ["1", "2", "3", "4"]
    for row, one in found.items():
        mean = (table[int(row)] - table[0]).mean()
        assert (one.mean, one.error) == pytest.approx((mean, error))
        assert one.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, 12))
        assert one.interval[1] - one.mean == pytest.approx(stats.t.ppf(0.975, 12) * error)


def test_pooled_with_gaps():
    """The F test of one row against the fit without its own share has the square of its t; shares are found exactly."""
    shares, seeds = {"base": 0.0, "one": -0.3, "two": 0.2, "three": 0.1}, [0.0, 1.0, -2.0, 0.5]
    whole = {row: {seed: 2 + share + seeds[seed] for seed in range(4)} for row, share in shares.items()}
    for row, seed in (("base", 3), ("one", 0), ("two", 1), ("two", 2)):
        del whole[row][seed]
    found = pooled(whole, "base")
    assert {row: one.mean for row, one in found.items()} == pytest.approx(
        {row: share for row, share in shares.items() if row != "base"}
    )
    assert [one.pairs for one in found.values()] == [2, 1, 3] and all(one.p == 0 for one in found.values())

    rng = np.random.default_rng(6)
    noisy = {row: {seed: loss + rng.normal() for seed, loss in mine.items()} for row, mine in whole.items()}

    def squares(merged):
        """Sum of squares that is left by a fit in which the rows of ``merged`` have one share."""
        runs = [(row, seed, loss) for row, mine in noisy.items() for seed, loss in mine.items()]
        groups = [(row,) for row in shares if row not in merged] + [merged]
        design = [[*(row in g for g in groups), *(seed == k for k in range(4))] for row, seed, _ in runs]
        fit = np.linalg.lstsq(
            np.array(design, dtype=float), np.array([loss for *_, loss in runs]), rcond=None
        )
        return sum(
            (loss - value) ** 2 for (*_, loss), value in zip(runs, np.array(design) @ fit[0], strict=True)
        )

    rest, freedom = squares(("base",)), 12 - 7
    for row, one in pooled(noisy, "base").items():
        assert (one.mean / one.error) ** 2 == pytest.approx(
            (squares(("base", row)) - rest) / (rest / freedom)
        )


def test_pooled_of_few():
    assert pooled({"a": {0: 1.0}, "b": {}}, "b") == {} == pooled({"a": {0: 1.0}}, "b")
    one = pooled({"a": {0: 1.0}, "b": {0: 1.5}, "c": {1: 1.0}}, "b")
    assert list(one) == ["a"] and (one["a"].mean, one["a"].pairs, one["a"].error) == (-0.5, 1, None)
    same = pooled({row: {0: 1.1, 1: 1.3, 2: 1.7} for row in "abc"}, "b")
    assert all((found.mean, found.error, found.p) == (0.0, 0.0, 1.0) for found in same.values())


def as_losses(table):
    return {str(row): dict(enumerate(losses)) for row, losses in enumerate(table)}


def test_a_row_that_scatters_more_has_an_error_of_its_own():
    """Its part of the squares in a table without gaps is R / (R - 1) times that of its residuals."""
    rng = np.random.default_rng(7)
    table = 3 + 0.01 * (rng.normal(size=(6, 4)) + rng.normal(size=(1, 4)) + rng.normal(size=(6, 1)))
    found = set()
    for factor in np.geomspace(1, 30, 40):
        loud = table.copy()
        loud[4] = table[4].mean() + factor * (table[4] - table[4].mean())
        rest = loud - loud.mean(0) - loud.mean(1, keepdims=True) + loud.mean()
        own = 6 / 5 * (rest[4] ** 2).sum()
        ratio = own / 3 / (((rest**2).sum() - own) / 12)
        uneven = bool(6 * stats.f.sf(ratio, 3, 12) < 0.01)
        found.add(uneven)
        tested = pooled(as_losses(loud), "0")
        assert [row for row, one in tested.items() if one.uneven] == (["4"] if uneven else [])
        if uneven:
            own_error = paired(list(loud[4] - loud[0]))
            assert (tested["4"].error, tested["4"].p) == (own_error.error, own_error.p)
            without = pooled(as_losses(loud) | {"4": {}}, "0")
            assert list(tested) == ["1", "2", "3", "4", "5"]
            assert all(tested[row] == one for row, one in without.items())
    assert found == {True, False}


def test_where_the_baseline_scatters_more_all_errors_are_paired():
    rng = np.random.default_rng(8)
    table = rng.normal(size=(7, 5))
    table[2] *= 100
    found = pooled(as_losses(table), "2")
    assert len(found) == 6
    for row, one in found.items():
        wanted = paired(list(table[int(row)] - table[2]))
        assert one.uneven and (one.mean, one.error, one.p) == (wanted.mean, wanted.error, wanted.p)


def test_equal_rows_and_one_that_is_not():
    rng = np.random.default_rng(9)
    same = rng.normal(size=4)
    found = pooled(as_losses([same, same, same + 0.5, same + 0.01 * rng.normal(size=4)]), "0")
    assert [row for row, one in found.items() if one.uneven] == ["3"]
    assert [found[row].p for row in ("1", "2")] == [1.0, 0.0] and 0 < found["3"].p < 1


def test_rows_that_scatter_alike_are_seldom_taken_for_others():
    """In at most 1 % of tables: of 400, more than 11 with a probability below 1e-3."""
    rng = np.random.default_rng(10)
    tables = rng.normal(size=(400, 8, 3))
    taken = sum(any(one.uneven for one in pooled(as_losses(table), "0").values()) for table in tables)
    assert taken <= 11


def test_holm():
    """The example of Holm's method: ordered p against alpha / m, alpha / (m - 1), ..."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.5, 0.04]) == [None, 0.5, 0.08]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    rng = np.random.default_rng(1)
    p = rng.uniform(size=9)
    # Step by step, as the definition has it: the k-th smallest is rejected while all before it are.
    for level in (0.02, 0.2, 0.6):
        rejected, order = set(), np.argsort(p)
        for rank, place in enumerate(order):
            if p[place] > level / (len(p) - rank):
                break
            rejected.add(place)
        assert {place for place, value in enumerate(holm(p)) if value <= level} == rejected


def test_power_law_is_linear_regression_of_logarithms():
    rng = np.random.default_rng(2)
    compute = np.repeat([1e12, 1e13, 1e14, 1e15], 3)
    losses = 9.0 * compute**-0.06 * np.exp(0.01 * rng.normal(size=compute.size))
    found = fit_power_law(compute, losses)
    wanted = stats.linregress(np.log(compute), np.log(losses))
    reach = stats.t.ppf(0.975, compute.size - 2)
    assert found.k == pytest.approx(-wanted.slope, rel=1e-9) and found.k_error == pytest.approx(
        wanted.stderr, rel=1e-9
    )
    assert found.k_high - found.k == pytest.approx(reach * wanted.stderr, rel=1e-9)
    assert math.log(found.A) == pytest.approx(wanted.intercept, rel=1e-9)
    assert math.log(found.A_high / found.A) == pytest.approx(reach * wanted.intercept_stderr, rel=1e-9)
    exact = fit_power_law(compute, 9.0 * compute**-0.06)
    assert (exact.A, exact.k) == (pytest.approx(9.0), pytest.approx(0.06))
    np.testing.assert_allclose(exact.loss(compute), 9.0 * compute**-0.06)
    assert (
        fit_power_law([1.0, 1.0, 1.0], [2.0, 2.1, 2.2]) is None
        and fit_power_law([1.0, 2.0], [2.0, 1.0]) is None
    )


def test_compute_multiplier_is_what_was_put_in():
    """A row that does with C what the baseline does with 1.25 C."""
    compute = np.array([1e12, 1e13, 1e14])
    law = fit_power_law(compute, 9.0 * compute**-0.06)
    pairs = [(9.0 * c**-0.06, c, 9.0 * (1.25 * c) ** -0.06, c) for c in compute]
    found = compute_multiplier(pairs, law)
    assert (found.value, *found.interval) == pytest.approx((1.25, 1.25, 1.25))
    # The same losses with a tenth more compute are worth as much less.
    dearer = [(lb, cb, lr, 1.1 * cr) for lb, cb, lr, cr in pairs]
    assert compute_multiplier(dearer, law).value == pytest.approx(1.25 / 1.1)
    assert compute_multiplier([], law) is None


def test_intervals_hold_what_they_promise():
    """Of 400 experiments with known truth, 95 % contain it (binomial: 93 to 97 %)."""
    rng = np.random.default_rng(3)
    compute, inside = np.repeat([1e12, 1e13, 1e14], 3), 0
    for _ in range(400):
        base = 9.0 * compute**-0.06 * np.exp(0.004 * rng.normal(size=9))
        row = 9.0 * (1.2 * compute) ** -0.06 * np.exp(0.004 * rng.normal(size=9))
        law = fit_power_law(compute, base)
        found = compute_multiplier(list(zip(base, compute, row, compute, strict=True)), law)
        inside += found.interval[0] <= 1.2 <= found.interval[1]
    assert 372 <= inside <= 392
