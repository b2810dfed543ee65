"""Confidence intervals: known values, references in scipy, resampling by group and within strata."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation import confidence_interval, resampling
from bmfm_pipeline.evaluation.intervals import (
    METHODS,
    RESAMPLING,
    _jackknife,
    interval_from_values,
    interval_of,
    resampled,
)
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.resampling import Draws, resampled_together

GRID = np.arange(101) / 100


def predictions(n=200, right=0.7, seed=0, classes=4):
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, classes, n)
    return truth, np.where(generator.random(n) < right, truth, (truth + 1) % classes)


def accuracy(truth, guess, method="binomial", **options):
    return confidence_interval("accuracy", y_true=truth, y_pred=guess, method=method, **options)


def test_quantiles_of_a_grid_are_its_ends():
    assert interval_from_values(GRID, method="bootstrap_quantiles") == pytest.approx((0.025, 0.975))
    assert interval_from_values([1], method="bootstrap_quantiles") == (1, 1)


def test_binomial_of_a_half_of_a_hundred():
    low, high = interval_from_values(GRID, method="binomial", n=100)
    assert (low, high) == pytest.approx((0.5 - 0.098, 0.5 + 0.098), abs=1e-5)
    assert interval_from_values([1], method="binomial", n=1) == (1, 1)


def test_t_interval_lies_around_the_mean_with_the_population_deviation_as_scale():
    values = np.random.default_rng(0).normal(size=12)
    expected = stats.t.interval(0.95, 11, loc=values.mean(), scale=values.std(ddof=0))
    assert interval_from_values(values, method="bootstrap_t_interval") == pytest.approx(expected)
    assert interval_from_values([0.4], method="bootstrap_t_interval") == (None, None)


def test_t_interval_of_one_resample_has_no_bounds():
    found = accuracy(*predictions(), method="bootstrap_t_interval", resamples=1)
    assert (found.low, found.high) == (None, None)
    assert found.value == np.mean(np.equal(*predictions()))


def test_binomial_interval_counts_observations_and_is_not_clipped():
    truth = np.zeros(20, dtype=int)
    guess = np.array([1] + [0] * 19)
    found = accuracy(truth, guess)
    margin = stats.norm.ppf(0.975) * np.sqrt(0.95 * 0.05 / 20)
    assert (found.value, found.n, found.method) == (0.95, 20, "binomial")
    assert (found.low, found.high) == pytest.approx((0.95 - margin, 0.95 + margin))
    assert found.high > 1
    assert accuracy(truth, guess, resamples=0) == found, "no resample is drawn, so their number does not matter"


@pytest.mark.parametrize("hits, n", [(0, 10), (10, 10), (1, 3), (90, 100), (377, 500)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_interval_equals_scipy(hits, n, level):
    truth, guess = np.zeros(n, dtype=int), np.array([0] * hits + [1] * (n - hits))
    found = accuracy(truth, guess, method="wilson", level=level)
    expected = stats.binomtest(hits, n).proportion_ci(confidence_level=level, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    "method, name", [("bootstrap_quantiles", "percentile"), ("bca", "BCa")], ids=["quantiles", "bca"]
)
def test_bootstrap_equals_scipy_within_monte_carlo_error(method, name):
    generator = np.random.default_rng(1)
    truth = generator.exponential(size=80)
    guess = truth + generator.exponential(size=80)  # skewed, so that bca and quantiles differ
    found = confidence_interval("mse", y_true=truth, y_pred=guess, method=method, resamples=20_000)
    reference = stats.bootstrap(
        ((truth - guess) ** 2,), np.mean, method=name, n_resamples=20_000, rng=np.random.default_rng(2)
    )
    expected = reference.confidence_interval
    # A quantile at 2.5 % of 20,000 draws has a standard error of sqrt(.025 * .975 / 20000) / density: 2 to 3 % of the deviation here.
    tolerance = 0.15 * reference.standard_error
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=tolerance)
    if method == "bca":
        plain = confidence_interval("mse", y_true=truth, y_pred=guess, method="bootstrap_quantiles", resamples=20_000)
        assert found.low - plain.low > tolerance, "the skew moves the interval"


def test_bca_of_few_cells_counts_ties_with_the_value_half_as_scipy_does():
    """With 30 cells about one resample in six has the same accuracy as the cells themselves."""
    hits = np.array([1.0] * 24 + [0.0] * 6)
    found = accuracy(np.ones(30), hits, "bca", resamples=5000)
    expected = stats.bootstrap((hits,), np.mean, method="BCa", n_resamples=5000, rng=np.random.default_rng(5))
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=1.01 / 30)  # one cell


def test_bca_of_class_labels_needs_one_left_out_metric_per_kind_of_cell():
    truth, guess = predictions(60)
    by_name, by_function = Metric("f1", truth, guess), Metric(macro_f1, truth, guess)
    values, of_unit = _jackknife(by_name, None)
    every, in_order = _jackknife(by_function, None)
    assert len(values) < len(every) == 60
    assert values[of_unit] == pytest.approx(every[in_order])


def macro_f1(truth, guess):
    return f1_score(truth, guess, average="macro")


def test_class_metrics_drawn_by_kind_of_cell_vary_as_those_drawn_cell_by_cell():
    """A multinomial draw over the kinds of cells is what drawing cells one by one amounts to: same mean, spread and quantiles."""
    truth, guess = predictions(300, classes=2)
    for name, function in (("accuracy", lambda t, p: np.mean(t == p)), ("mcc", lambda t, p: np.corrcoef(t, p)[0, 1])):
        by_kind = resampled(Metric(name, truth, guess), 4000, seed=1)
        one_by_one = resampled(Metric(function, truth, guess), 1500, seed=2)
        error = one_by_one.std() / np.sqrt(1500)
        assert by_kind.mean() == pytest.approx(one_by_one.mean(), abs=4 * error)
        assert by_kind.std() == pytest.approx(one_by_one.std(), rel=4 / np.sqrt(2 * 1500))
        assert stats.ks_2samp(by_kind, one_by_one).pvalue > 1e-3


def test_strata_keep_their_numbers_in_every_resample():
    strata = np.repeat([0, 1, 2], [50, 30, 1])
    for draws in (Draws(81, 0, strata=strata), Draws(81, 0, strata=strata, sets=np.arange(81) // 3)):
        weights = draws.draw(200)
        assert (weights.sum(axis=1) == 81).all()
    by_cell = Draws(81, 0, strata=strata).draw(200)
    assert all((by_cell[:, strata == each].sum(axis=1) == size).all() for each, size in ((0, 50), (1, 30), (2, 1)))
    assert by_cell[:, :50].std() > 0.5 and (by_cell[:, 80] == 1).all()


def test_within_classes_recall_of_a_class_varies_as_its_cells_alone():
    truth = np.repeat([0, 1], [150, 50])
    guess = np.where(np.random.default_rng(0).random(200) < 0.8, truth, 1 - truth)
    own = Metric("recall", truth, guess, classes=[1])
    within = resampled(own, 4000, 0, strata=truth)
    p = own.value()
    assert within.std() == pytest.approx(np.sqrt(p * (1 - p) / 50), rel=0.05)
    assert set(np.unique(np.rint(within * 50)) / 50) == set(np.unique(within)), "of 50 cells, always"


def test_stratified_bca_equals_scipy_for_two_samples():
    generator = np.random.default_rng(3)
    values = [generator.exponential(size=40), generator.exponential(2.0, size=60)]
    errors, strata = np.concatenate(values), np.repeat([0, 1], [40, 60])
    found = confidence_interval(
        "mse", y_true=np.sqrt(errors), y_pred=np.zeros(100), method="bca", resamples=20_000, strata=strata
    )

    def mean_of_both(one, other, axis=-1):
        return (one.sum(axis=axis) + other.sum(axis=axis)) / 100

    reference = stats.bootstrap(
        values, mean_of_both, method="BCa", n_resamples=20_000, rng=np.random.default_rng(2), vectorized=True
    )
    expected = reference.confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.15 * reference.standard_error)


def test_groups_within_strata():
    groups, strata = np.arange(60) // 5, np.arange(60) // 30
    weights = Draws(60, 0, groups, strata).draw(100)
    assert (weights[:, :30].sum(axis=1) == 30).all()
    assert (weights.reshape(100, 12, 5) == weights.reshape(100, 12, 5)[:, :, :1]).all(), "whole groups"
    with pytest.raises(ConfigError, match="12 of 12 groups have observations of several strata"):
        accuracy(*predictions(60), method="bootstrap_quantiles", groups=groups, strata=np.arange(60) % 5)


@pytest.mark.parametrize("method", ["binomial", "wilson"])
def test_proportion_intervals_refuse_strata(method):
    truth, guess = predictions()
    with pytest.raises(ConfigError, match="cannot respect strata; use bootstrap_quantiles"):
        accuracy(truth, guess, method, strata=truth)


def test_resamples_in_which_the_metric_is_not_defined_are_counted():
    found = confidence_interval(
        "pcc", y_true=[1.0, 2.0, 3.0], y_pred=[1.0, 2.0, 4.0], method="bootstrap_quantiles", resamples=2000
    )
    assert found.left_out == pytest.approx(2000 * 3 / 27, abs=4 * np.sqrt(2000 * 3 / 27)), (
        "three of one cell are constant"
    )
    assert accuracy(*predictions(), method="bootstrap_quantiles").left_out == 0


def test_two_metrics_are_resampled_by_the_same_cells():
    truth, guess = predictions(300)
    other = np.where(np.arange(300) < 280, guess, truth)
    pairs = {}
    for order in ((guess, other), (other, guess)):
        first, second = resampled_together([Metric("accuracy", truth, each) for each in order], 500, seed=0)
        pairs[order[0] is guess] = first - second
        assert (first - second).std() < 0.3 * first.std(), "what they share cancels"
    assert np.array_equal(pairs[True], -pairs[False]), "whichever comes first"
    areas = Metric("mse", truth, guess)
    _, alone = resampled_together([Metric("accuracy", truth, guess), areas], 50, seed=3)
    assert np.array_equal(alone, resampled(areas, 50, seed=3))
    with pytest.raises(ConfigError, match="metrics of 300, 10 observations cannot be paired"):
        resampled_together([areas, Metric("mse", truth[:10], guess[:10])], 5, 0)


def test_renaming_classes_changes_no_interval():
    truth, guess = predictions()
    names = np.array(["T", "B", "NK", "Mono"])
    for method in RESAMPLING:
        assert accuracy(truth, guess, method) == accuracy(names[truth], names[guess], method)


def test_a_far_corrected_quantile_is_the_outermost_resample():
    """Thirty cells, one of them far off: the acceleration is so large that the corrected quantile has no value."""
    errors = np.array([0.0] * 29 + [1e6])
    found = confidence_interval("mse", y_true=errors, y_pred=np.zeros(30), method="bca", level=0.9999999, resamples=500)
    assert found.low <= found.value <= found.high and np.isfinite(found.high)


def test_t_interval_agrees_with_the_normal_approximation():
    truth, guess = predictions(2000)
    t, normal = accuracy(truth, guess, "bootstrap_t_interval", resamples=4000), accuracy(truth, guess)
    assert (t.low, t.high) == pytest.approx((normal.low, normal.high), abs=0.002)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_numbers(method):
    truth, guess = predictions()
    first = accuracy(truth, guess, method, seed=5, resamples=300)
    assert accuracy(truth, guess, method, seed=5, resamples=300) == first
    if method in RESAMPLING:
        assert accuracy(truth, guess, method, seed=6, resamples=300) != first


def test_numbers_do_not_depend_on_how_many_resamples_are_held_at_once(monkeypatch):
    truth, guess = predictions(101)
    metric = Metric("f1", truth, guess)
    whole, within = resampled(metric, 200, seed=3), resampled(Metric("mse", truth, guess), 200, seed=3, strata=truth)
    monkeypatch.setattr(resampling, "CHUNK", 101 * 7)
    assert resampled(metric, 200, seed=3).tolist() == whole.tolist()
    assert resampled(Metric("mse", truth, guess), 200, seed=3, strata=truth).tolist() == within.tolist()


def test_wider_level_gives_a_wider_interval():
    truth, guess = predictions()
    for method in METHODS:
        narrow, wide = (accuracy(truth, guess, method, level=level) for level in (0.5, 0.99))
        assert wide.low < narrow.low <= narrow.value <= narrow.high < wide.high


def test_quantiles_without_resamples_are_refused():
    with pytest.raises(ConfigError, match="resamples must be at least 1, found 0"):
        accuracy(*predictions(), method="bootstrap_quantiles", resamples=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_always_right_has_an_interval_that_ends_at_one(method):
    truth = np.arange(40) % 3
    found = accuracy(truth, truth, method, resamples=50)
    assert found.value == found.high == 1.0
    if method == "wilson":
        assert found.low == pytest.approx(40 / (40 + stats.norm.ppf(0.975) ** 2))
    else:
        assert found.low == 1.0


@pytest.mark.parametrize("method", RESAMPLING)
def test_a_metric_that_is_not_defined_has_no_bounds(method):
    found = confidence_interval("pcc", y_true=[1.0, 2.0, 3.0], y_pred=[5.0] * 3, method=method, resamples=20)
    assert np.isnan(found.value)
    assert (found.low, found.high) == (None, None)


@pytest.mark.parametrize("method", METHODS)
def test_one_observation_is_not_an_error(method):
    found = accuracy([3], [3], method, resamples=10)
    assert (found.value, found.n) == (1.0, 1)


def test_groups_are_resampled_together():
    """Ten donors, all right or all wrong: cells tell nothing beyond their donor, so the interval is that of ten observations."""
    donors = np.repeat(np.arange(10), 50)
    truth, guess = np.zeros(500, dtype=int), np.repeat([0, 0, 0, 0, 0, 0, 1, 1, 1, 1], 50)
    of_cells = accuracy(truth, guess, "bootstrap_quantiles")
    of_donors = accuracy(truth, guess, "bootstrap_quantiles", groups=donors)
    ten = accuracy(truth[::50], guess[::50], "bootstrap_quantiles")
    assert (of_donors.low, of_donors.high) == (ten.low, ten.high)
    assert of_donors.high - of_donors.low > 4 * (of_cells.high - of_cells.low)
    assert of_donors.n == 500


def test_groups_of_one_cell_change_nothing():
    truth, guess = predictions(50)
    for method in RESAMPLING:
        plain = accuracy(truth, guess, method, resamples=200)
        assert accuracy(truth, guess, method, resamples=200, groups=np.arange(50) + 100) == plain


def test_bca_leaves_out_whole_groups():
    truth, guess = predictions(60)
    donors = np.array([f"donor {i % 6}" for i in range(60)])
    found = accuracy(truth, guess, "bca", groups=donors)
    assert found.low < found.value < found.high


def test_of_a_single_group_nothing_can_be_said():
    truth, guess = predictions(60)
    for method in RESAMPLING:
        found = accuracy(truth, guess, method, groups=["donor 1"] * 60, resamples=20)
        assert (found.low, found.high) == (None, None)


def test_groups_of_another_length_are_refused():
    with pytest.raises(ConfigError, match=r"groups has shape \(3,\); .* shape \(200,\)"):
        accuracy(*predictions(), method="bootstrap_quantiles", groups=[1, 2, 3])


@pytest.mark.parametrize("method", ["binomial", "wilson"])
def test_proportion_intervals_refuse_groups(method):
    with pytest.raises(ConfigError, match="cannot respect groups; use bootstrap_quantiles"):
        accuracy(*predictions(), method=method, groups=np.arange(200) % 5)


@pytest.mark.parametrize("method", ["binomial", "wilson"])
@pytest.mark.parametrize("metric", ["f1", "mcc", "precision", "recall"])
def test_proportion_intervals_refuse_what_is_no_proportion(method, metric):
    truth, guess = predictions()
    with pytest.raises(ConfigError, match=rf"{method} is an interval of a proportion .* {metric} is none"):
        confidence_interval(metric, y_true=truth, y_pred=guess, method=method)


def test_a_function_is_no_proportion_whatever_its_name():
    def accuracy(truth, guess):
        return f1_score(truth, guess, average="macro")

    truth, guess = predictions()
    with pytest.raises(ConfigError, match="interval of a proportion"):
        confidence_interval(accuracy, y_true=truth, y_pred=guess, method="binomial")


def test_unknown_method_and_impossible_level_are_refused():
    with pytest.raises(ConfigError, match="unknown interval method 'bootstrap'; known: bootstrap_quantiles"):
        accuracy(*predictions(), method="bootstrap")
    with pytest.raises(ConfigError, match="level must lie between 0 and 1, found 95"):
        accuracy(*predictions(), level=95)


@pytest.mark.parametrize("method", ["binomial", "wilson"])
def test_with_runs_a_proportion_interval_is_centred_on_the_mean_over_resamples(method):
    metric = Metric("accuracy", *predictions(50))
    mean = resampled(metric, 20, seed=1).mean()
    found = interval_of(metric, method=method, resamples=20, seed=1, centre_on_resamples=True)
    assert (found.low, found.high) == interval_from_values([mean], method=method, n=50)
    assert found.value == metric.value() != mean
    assert found.n == 50, "observations, not runs"
