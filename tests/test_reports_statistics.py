"""Paired statistics against hand cases, complete enumeration, and the t distribution."""

import itertools

import numpy as np
import pytest
from scipy import stats

from nnssl_ext.reports.statistics import SMALLEST, compare, compare_runs, crossed_interval


def test_six_gains_of_one_sign_by_hand():
    """Of the 2**6 sign patterns, two are as extreme."""
    gains = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = compare(gains + 10, np.full(6, 10.0))
    assert found.n == 6 and found.difference == 3.5
    assert found.p == pytest.approx(2 / 2**6)
    assert found.shown == 1


def test_wilcoxon_counts_all_sign_patterns():
    values = np.array([0.3, -0.1, 0.7, 0.2, -0.6, 0.5, 0.4, 0.9])
    ranks = stats.rankdata(np.abs(values))
    sums = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in itertools.product((0, 1), repeat=8)
    ]
    reached = min(ranks[values > 0].sum(), ranks[values < 0].sum())
    assert compare(values, np.zeros(8)).p == pytest.approx(2 * np.mean(np.array(sums) <= reached))


def test_the_interval_is_that_of_all_resamples():
    """Symmetric values have no bias and no acceleration, so the interval is the quantiles over all 6**6 resamples."""
    values = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) + 4
    means = np.array(list(itertools.product(values, repeat=6))).mean(axis=1)
    found = compare(values, np.zeros(6))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.06)


def test_the_interval_of_many_normal_values_is_student_s():
    values = np.random.default_rng(1).normal(0.2, 1.0, 400)
    found = compare(values, np.zeros(400))
    expected = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.01)


def test_pairing_sees_what_spread_between_cases_hides():
    rng = np.random.default_rng(0)
    cases = rng.normal(0, 10, 20)
    found = compare(cases + 0.5 + rng.normal(0, 0.1, 20), cases)
    assert found.shown == 1 and found.high - found.low < 0.2


def test_lower_can_be_better():
    distances = np.array([2.0, 2.1, 1.9, 2.2, 2.05, 1.95, 2.15])
    found = compare(distances, distances + 0.3 + 0.01 * np.arange(7), higher_is_better=False)
    assert found.shown == 1 and found.difference < 0
    assert found.verdict("helps", "hurts").startswith("helps: -0.33")


def test_nothing_is_claimed_from_few_pairs_or_noise():
    few = compare([0.9, 0.8, 0.9, 0.85, 0.95], [0.1, 0.2, 0.1, 0.15, 0.1])
    assert few.low > 0 and few.shown == 0 and few.n < SMALLEST
    assert "no difference shown" in few.verdict() and "fewer than" in few.verdict()
    noise = np.array([0.5, -0.4, 0.3, -0.6, 0.2, -0.1, 0.4, -0.2])
    assert compare(noise, np.zeros(8)).shown == 0


def test_false_alarms_are_as_frequent_as_promised():
    rng = np.random.default_rng(3)
    alarms = [compare(rng.normal(size=29), np.zeros(29)).shown != 0 for _ in range(100)]
    assert 0.02 < np.mean(alarms) < 0.13  # 0.05 expected; 0.13 is exceeded once in 2000 such experiments


def test_degenerate_input():
    same = compare([0.5] * 8, [0.5] * 8)
    assert (same.difference, same.low, same.high, same.p, same.shown) == (0, 0, 0, 1, 0)
    shifted = compare([0.75] * 8, [0.5] * 8)
    assert (shifted.low, shifted.high, shifted.shown) == (0.25, 0.25, 1)
    assert compare([], []).verdict() == "no difference shown: no pair in common"
    assert compare([1.0], [0.0]).n == 1
    two = compare([1.0, 2.0], [0.0, 0.0])
    assert two.low <= two.difference <= two.high


def test_pairs_that_one_side_lacks_are_left_out():
    gains = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    found = compare([*gains, np.nan, 5.0], [0.0] * 6 + [1.0, np.nan])
    assert found == compare(gains, [0.0] * 6)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        compare([1.0, 2.0, 3.0], [1.0, 2.0])


class TestRuns:
    def test_without_case_effects_it_is_students_t_over_seeds(self):
        means = np.array([0.1, 0.3, 0.2, 0.6])
        found = crossed_interval(np.tile(means[:, None], (1, 12)))
        assert found == pytest.approx(tuple(stats.ttest_1samp(means, 0).confidence_interval(0.95)))

    def test_without_seed_effects_it_is_students_t_over_cases(self):
        gains = np.random.default_rng(0).normal(0.1, 0.2, 15)
        found = crossed_interval(np.tile(gains, (3, 1)))
        assert found == pytest.approx(tuple(stats.ttest_1samp(gains, 0).confidence_interval(0.95)))

    def test_two_by_two_by_hand(self):
        """Mean 5; rows 3, 7: R = 2 * (4 + 4) / 1 = 16; columns 4, 6: C = 2 * (1 + 1) / 1 = 4; rest 0. Variance of the mean
        (16 + 4) / 4 = 5; degrees of freedom 20**2 / (16**2 + 4**2) = 1.4706."""
        half = stats.t.ppf(0.975, 400 / 272) * np.sqrt(5)
        assert crossed_interval(np.array([[2.0, 4.0], [6.0, 8.0]])) == pytest.approx((5 - half, 5 + half))

    def test_two_by_two_with_a_rest_by_hand(self):
        """Mean 10; rows 4, 16: R = 2 * (36 + 36) / 1 = 144; columns 5, 15: C = 100; rest +-1: E = 4. Variance of the mean
        (144 + 100 - 4) / 4 = 60."""
        half = stats.t.ppf(0.975, 240**2 / (144**2 + 100**2 + 4**2)) * np.sqrt(60)
        assert crossed_interval(np.array([[0.0, 8.0], [10.0, 22.0]])) == pytest.approx((10 - half, 10 + half))

    @pytest.mark.parametrize(("seed_sd", "case_sd"), [(0.0, 1.0), (1.0, 1.0), (2.0, 0.3)])
    def test_false_alarms_are_as_frequent_as_promised(self, seed_sd, case_sd):
        rng = np.random.default_rng(5)
        alarms = 0
        for _ in range(1000):
            table = seed_sd * rng.normal(size=(3, 1)) + case_sd * rng.normal(size=20) + rng.normal(size=(3, 20))
            low, high = crossed_interval(table)
            alarms += low > 0 or high < 0
        assert 0.02 < alarms / 1000 < 0.075  # 0.05 expected; 0.075 is exceeded once in 5000 such experiments

    def test_seeds_that_disagree_show_nothing_although_their_cases_do(self):
        rng = np.random.default_rng(1)
        gains = np.array([[0.30], [0.02], [-0.05]]) + rng.normal(0, 0.02, (3, 30))
        found = compare_runs(0.5 + gains, np.full((3, 30), 0.5))
        assert found.cases.shown == 1 and found.cases.n == 30
        assert found.shown == 0 and found.low < 0 < found.high
        assert found.verdict("helps", "hurts").startswith("no difference shown: +0.0")
        assert found.per_seed == pytest.approx([0.30, 0.02, -0.05], abs=0.02)

    def test_seeds_that_agree_show_it(self):
        rng = np.random.default_rng(1)
        gains = np.array([[0.12], [0.10], [0.09]]) + rng.normal(0, 0.05, (3, 30))
        found = compare_runs(0.5 + gains, np.full((3, 30), 0.5))
        assert found.shown == 1 and found.low < found.cases.low  # the second interval is the wider one
        assert found.verdict("helps", "hurts").startswith("helps: +0.1") and "n = 30 cases x 3 seeds" in found.verdict()
        assert compare_runs(np.full((3, 30), 0.5), 0.5 + gains).verdict("helps", "hurts").startswith("hurts: -0.1")

    def test_cases_are_compared_as_means_over_seeds(self):
        table = np.random.default_rng(2).normal(0.1, 1, (3, 10))
        assert compare_runs(table, np.zeros((3, 10))).cases == compare(table.mean(axis=0), np.zeros(10))

    def test_one_seed_speaks_for_itself_only(self):
        found = compare_runs(np.linspace(0.6, 0.7, 8)[None], np.full((1, 8), 0.5))
        assert found.shown == 1 and np.isnan(found.low)
        assert found.verdict("helps", "hurts").startswith("helps in these single runs: +0.15")
        assert found.verdict().endswith("n = 8 cases x 1 seed")

    def test_cases_that_any_run_lacks_are_left_out_of_all(self):
        first, second = np.random.default_rng(3).normal(size=(2, 3, 9))
        broken = first.copy()
        broken[1, 4] = np.nan
        expected = compare_runs(np.delete(first, 4, axis=1), np.delete(second, 4, axis=1))
        assert compare_runs(broken, second) == expected and expected.cases.n == 8

    def test_nothing_and_too_little(self):
        assert compare_runs(np.empty((0, 0)), np.empty((0, 0))).verdict() == "no difference shown: no case in common"
        same = compare_runs(np.ones((3, 8)), np.ones((3, 8)))
        assert (same.shown, same.low, same.high, same.cases.p) == (0, 0, 0, 1)
        with pytest.raises(
            Exception, match=r"cannot be paired|Type-check"
        ):  # the latter first, where tests check shapes
            compare_runs(np.ones((3, 8)), np.ones((2, 8)))
