"Scores against formulas by hand, faulty predictions and labels, the bootstrap against brute force, tests and intervals."
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from cryptopredict.labels import SCHEMA
from cryptopredict.scores import (
    MIN_WINDOWS,
    SCORES,
    band_losses,
    block_bootstrap,
    block_length,
    block_standard_error,
    check_predictions,
    compare,
    describe_losses,
    direction_losses,
    dm_test,
    effective_windows,
    holm,
    loss_table,
    losses_by_origin,
    null_distribution,
    overlapping_noise,
    paired_difference,
    seed_mean,
    seed_spread,
    sigma_losses,
    summarise,
    verdict_of,
    widened_interval,
)

ORIGINS = pd.date_range("2018-01-01", "2024-09-30", freq="D", tz="UTC")
SPAN = pd.Timedelta("90D")
FLAT_VALUES = dict(p_down=.2, p_flat=.3, p_up=.5, p10=-.1, p90=.3, sigma=.6)


def one_forecast(**values) -> pd.DataFrame:
    "A predictions table with one row."
    row = dict(time=pd.Timestamp("2020-01-01", tz="UTC"), fold=0, seed=0, model="m") | FLAT_VALUES
    return pd.DataFrame([row | values])


@pytest.fixture(scope="module")
def actual() -> pd.DataFrame:
    "Labels of seven years of daily origins: overlapping r90, independent sigma."
    noise = overlapping_noise(len(ORIGINS), 90, 1, seed=9)[0]
    sigma = .6 * np.exp(.2 * np.random.default_rng(8).normal(size=len(ORIGINS)))
    labels = pd.DataFrame({"r90": .2 * noise / noise.std(), "sigma": sigma}, index=ORIGINS)
    direction = np.select([labels["r90"] < -.05, labels["r90"] > .05], [0, 2], 1)
    return labels.assign(direction=pd.array(direction, dtype="Int8"))


@pytest.fixture(scope="module")
def flat() -> pd.DataFrame:
    "The same forecast at every origin."
    values = FLAT_VALUES | dict(p10=-.256, p90=.256)
    return pd.DataFrame(dict(time=ORIGINS, fold=0, seed=0, model="flat", **values))


# --- losses ---------------------------------------------------------------------------------------------------------------


def test_log_loss_and_brier_by_hand():
    got = direction_losses(np.array([[.2, .3, .5]] * 4), np.array([0, 1, 2, np.nan]))
    assert_allclose(got["log_loss"][:3], -np.log([.2, .3, .5]))
    assert_allclose(got["brier"][:3], [.64 + .09 + .25, .04 + .49 + .25, .04 + .09 + .25])
    assert np.isnan(got["log_loss"][3]) and np.isnan(got["brier"][3])


def test_log_loss_of_an_impossible_class_is_infinite():
    assert direction_losses(np.array([[0., .5, .5]]), np.array([0.]))["log_loss"][0] == np.inf


def test_pinball_interval_score_and_coverage_by_hand():
    got = band_losses(np.full(4, -.1), np.full(4, .3), np.array([.1, -.3, .5, np.nan]))
    assert_allclose(got["pinball10"][:3], [.1 * .2, .9 * .2, .1 * .6])
    assert_allclose(got["pinball90"][:3], [.1 * .2, .1 * .6, .9 * .2])
    assert_allclose(got["interval_score"][:3], [.4, .4 + 10 * .2, .4 + 10 * .2])
    assert got["covered"][:3].tolist() == [1, 0, 0]
    assert all(np.isnan(v[3]) for v in got.values())


def test_volatility_losses_by_hand():
    got = sigma_losses(np.array([.5, .5, .5]), np.array([.5, 1., np.nan]))
    assert_allclose(got["se_sigma"][:2], [0, .25])
    assert_allclose(got["se_log_sigma"][:2], [0, np.log(2) ** 2])
    assert_allclose(got["qlike"][:2], [0, 4 - np.log(4) - 1])
    assert all(np.isnan(v[2]) for v in got.values())


def test_every_score_has_a_label_and_a_summary_name():
    assert {s.label for s in SCORES.values()} == {"r90", "sigma"}
    assert len({s.summary for s in SCORES.values()}) == len(SCORES)
    assert [name for name, s in SCORES.items() if not s.proper] == ["covered"]


# --- predictions and labels -----------------------------------------------------------------------------------------------


def test_a_probability_of_zero_is_allowed():
    check_predictions(one_forecast())
    check_predictions(one_forecast(p_down=0., p_flat=.5))


@pytest.mark.parametrize("values, message", [
    (dict(p_down=-.1, p_up=.8), "at least 0"), (dict(p_up=.6), "sum to 1"), (dict(p10=.4), "p10 <= p90"),
    (dict(sigma=0.), "above 0"), (dict(p90=np.nan), "finite"), (dict(sigma=np.inf), "finite")])
def test_a_faulty_forecast_is_rejected_with_model_time_and_remedy(values, message):
    with pytest.raises(ValueError, match=f"model m, time 2020-01-01.*{message}"): check_predictions(one_forecast(**values))


def test_two_forecasts_of_one_seed_at_one_origin_are_rejected():
    with pytest.raises(ValueError, match="one forecast per origin"):
        check_predictions(pd.concat([one_forecast(), one_forecast(fold=1)]))


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="lack the column.*p90"): check_predictions(one_forecast().drop(columns="p90"))


def test_naive_times_are_rejected():
    with pytest.raises(ValueError, match="tz-aware"): check_predictions(one_forecast(time=pd.Timestamp("2020-01-01")))


@pytest.fixture(scope="module")
def truth() -> pd.DataFrame:
    "Labels of three days: both known, sigma known, none known."
    days = pd.date_range("2020-01-01", periods=3, freq="D", tz="UTC", name="time")
    return pd.DataFrame({"r90": [.1, np.nan, np.nan], "direction": pd.array([2, pd.NA, pd.NA], dtype="Int8"),
                         "sigma": [1.2, .6, np.nan]}, index=days)


def test_a_loss_is_missing_until_its_label_has_matured(truth):
    table = loss_table(pd.concat([one_forecast(time=t) for t in truth.index]), truth)
    assert list(table.columns) == SCHEMA[:4] + list(SCORES)
    assert_allclose(table.loc[0, "log_loss"], -np.log(.5))
    assert_allclose(table["se_sigma"][:2], [.36, 0], atol=1e-12)
    missing = table[["log_loss", "covered", "qlike"]].isna().to_numpy().tolist()
    assert missing == [[False] * 3, [True, True, False], [True] * 3]


@pytest.mark.parametrize("values, message", [(dict(direction=5), "not a class"), (dict(direction=-1), "not a class"),
                                             (dict(sigma=-.1), "not a volatility")])
def test_an_impossible_label_is_named_with_its_time(truth, values, message):
    labels = truth[["r90", "direction", "sigma"]].astype(float).assign(**values)
    with pytest.raises(ValueError, match=f"2020-01-01.*{message}"): loss_table(one_forecast(), labels)


def test_a_missing_label_column_is_named(truth):
    with pytest.raises(ValueError, match="labels lack.*direction"): loss_table(one_forecast(), truth[["r90", "sigma"]])


def test_a_forecast_outside_the_labels_is_named(truth):
    with pytest.raises(ValueError, match="2021-06-01.*not in the labels"):
        loss_table(one_forecast(time=pd.Timestamp("2021-06-01", tz="UTC")), truth)


@pytest.fixture(scope="module")
def two_seeds() -> pd.DataFrame:
    return pd.concat([one_forecast(p_down=.05, p_flat=.05, p_up=.9),
                      one_forecast(seed=1, p_down=.45, p_flat=.45, p_up=.1)])


def test_the_score_is_that_of_the_mean_forecast(two_seeds, truth):
    mean = seed_mean(two_seeds)
    assert (mean["seed"].item(), mean["p_up"].item()) == (-1, .5)
    assert_allclose(loss_table(two_seeds, truth)["log_loss"].item(), -np.log(.5))
    by_seed = loss_table(two_seeds, truth, by_seed=True)["log_loss"]
    assert_allclose(by_seed.mean(), -(np.log(.9) + np.log(.1)) / 2)


def test_losses_of_several_seeds_or_of_no_row_are_rejected(two_seeds, truth):
    with pytest.raises(ValueError, match="several seeds of model m"):
        losses_by_origin(loss_table(two_seeds, truth, by_seed=True))
    with pytest.raises(ValueError, match="no row"): losses_by_origin(loss_table(two_seeds, truth).iloc[:0])


# --- windows and bootstrap ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times, horizon, windows", [
    (ORIGINS, "90D", 2465 // 90), (ORIGINS, "30D", 2465 // 30),
    (pd.date_range(ORIGINS[0], periods=24 * 2465, freq="h"), "90D", 2465 // 90),
    (ORIGINS[::365], "90D", 7), (ORIGINS[:180].append(ORIGINS[1180:1360]), "90D", 4), ([], "90D", 0), (ORIGINS[:1], "90D", 1)],
    ids=["daily", "daily, 30 days", "hourly", "yearly", "a gap holds none", "no origin", "one origin"])
def test_effective_windows(times, horizon, windows):
    assert effective_windows(times, horizon) == windows


def test_block_bootstrap_equals_brute_force():
    x = np.random.default_rng(0).normal(size=10)
    starts = np.random.default_rng(3).integers(10, size=(5, 3))
    slow = [np.mean([x[(s + i) % 10] for s, m in zip(row, (4, 4, 2)) for i in range(m)]) for row in starts]
    assert_allclose(block_bootstrap(x, 4, n_boot=5, seed=3), slow, atol=1e-12)


def test_one_block_of_full_length_is_the_sample_itself():
    x = np.random.default_rng(0).normal(size=10)
    assert_allclose(block_bootstrap(x, 10, n_boot=3), np.full(3, x.mean()), atol=1e-12)


def test_columns_get_the_same_blocks():
    x = np.random.default_rng(0).normal(size=10)
    both = block_bootstrap(np.c_[x, 2 * x + 1], 4, n_boot=50)
    assert_allclose(both[:, 1], 2 * both[:, 0] + 1, atol=1e-12)


def test_block_bootstrap_names_what_it_cannot_use():
    with pytest.raises(ValueError, match="value 2 is not finite"): block_bootstrap([1, 2, np.nan], 1)
    with pytest.raises(ValueError, match="block of 11"): block_bootstrap(np.arange(10.), 11)


def test_block_standard_error_is_that_of_the_bootstrap():
    x = np.random.default_rng(1).normal(size=120).cumsum()
    assert_allclose(block_standard_error(x, 20), block_bootstrap(x, 20, n_boot=20_000).std(), rtol=.02)
    assert_allclose(block_standard_error(x, 1), x.std() / np.sqrt(120), atol=1e-12)


def test_overlapping_noise_has_the_autocorrelation_of_shared_windows():
    x = overlapping_noise(500, 20, 400, seed=0)
    lagged = [np.mean(x[:, k:] * x[:, : x.shape[1] - k]) / 20 for k in (0, 10, 20, 40)]
    assert_allclose(lagged, [1, .5, 0, 0], atol=.05)


def test_null_distribution_is_normal_for_many_independent_values_and_wider_for_few_blocks():
    assert_allclose(np.quantile(null_distribution(2000, 1, 2).t, .9), 1.645, atol=.06)
    few = np.quantile(null_distribution(2465, 90, 180).t, .9)
    assert few > 1.8 > np.quantile(null_distribution(2465, 1, 2).t, .9)


def test_null_distribution_does_not_depend_on_the_time_step():
    x = overlapping_noise(1232, 45, 4000, seed=1)
    fine = np.abs(x.mean(axis=1)) / block_standard_error(x, 90)
    assert_allclose(np.quantile(fine, .9), np.quantile(null_distribution(2465, 90, 180).t, .9), atol=.08)


@pytest.mark.parametrize("n, block", [(2465, 180), (365, 180), (274, 137), (179, None)])
def test_block_length_is_twice_the_overlap_or_half_the_origins(n, block):
    assert block_length(n, 90) == block


def test_the_interval_is_wider_than_its_percentiles_and_stays_symmetric():
    lo, hi = widened_interval(np.linspace(-1, 1, 2001), 0., 2465, 90, .9)
    assert hi > .9 and abs(lo + hi) < 1e-9


def test_blocks_of_single_days_cover_too_little_and_longer_ones_most():
    rng, phi = np.random.default_rng(6), .97
    e, ar = rng.standard_normal((400, 2465)), np.empty((400, 2465))
    ar[:, 0] = e[:, 0] / np.sqrt(1 - phi**2)
    for i in range(1, 2465): ar[:, i] = phi * ar[:, i - 1] + e[:, i]
    for series in (overlapping_noise(2465, 90, 400, seed=5), ar):
        share = {}
        for block in (1, 180):
            draws = [block_bootstrap(s, block, 200, seed=i) for i, s in enumerate(series)]
            ends = np.quantile(draws, [.05, .95], axis=1)
            share[block] = np.mean((ends[0] <= 0) & (ends[1] >= 0))
        assert share[1] < .35 and share[180] > .75


# --- summaries ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skewed() -> pd.Series:
    return pd.Series(1 + .1 * overlapping_noise(len(ORIGINS), 90, 1, seed=2)[0] ** 2, index=ORIGINS)


def test_a_root_score_is_the_root_of_the_mean(skewed):
    got = describe_losses(skewed, SCORES["se_sigma"], SPAN, 500, .9, 0)
    assert_allclose(got["mean"], np.sqrt(skewed.mean()))
    assert got["lo"] < got["mean"] < got["hi"] and got["n_windows"] == 27 and 10 < got["n_eff"] < 120


def test_n_eff_of_overlapping_noise_is_the_number_of_windows():
    series = overlapping_noise(2465, 90, 200, seed=12)
    sizes = [describe_losses(pd.Series(x, ORIGINS), SCORES["interval_score"], SPAN, 100, .9, 0)["n_eff"] for x in series]
    assert abs(np.median(sizes) / (2465 / 90) - 1) < .1


def test_an_infinite_loss_stays_infinite_and_has_no_interval(skewed):
    got = describe_losses(skewed.where(skewed < skewed.max(), np.inf), SCORES["qlike"], SPAN, 10, .9, 0)
    assert got["mean"] == np.inf and np.isnan(got["lo"])


def test_fewer_than_two_windows_have_a_mean_only(skewed):
    got = describe_losses(skewed[:100], SCORES["qlike"], SPAN, 10, .9, 0)
    assert np.isfinite(got["mean"]) and np.isnan([got["lo"], got["hi"], got["n_eff"]]).all()


def test_summary_of_a_constant_forecast(flat, actual):
    summary = summarise(loss_table(flat, actual), n_boot=300)
    assert summary["score"].tolist() == [s.summary for s in SCORES.values()]
    assert ((summary["lo"] <= summary["mean"]) & (summary["mean"] <= summary["hi"])).all()
    row = summary.set_index("score").loc
    assert_allclose(row["coverage", "mean"], actual["r90"].between(-.256, .256).mean())
    assert row["coverage", "lo"] < .8 < row["coverage", "hi"]


def test_a_year_has_intervals_only_where_it_holds_enough_windows(flat, actual):
    yearly = summarise(loss_table(flat, actual), by="year", n_boot=300).set_index("score")
    coverage, qlike = yearly.loc["coverage"], yearly.loc["qlike"]
    assert coverage["year"].tolist() == list(range(2018, 2025)) and coverage["n_windows"].tolist() == [4] * 6 + [3]
    assert (coverage["n_windows"] < MIN_WINDOWS).all() and coverage[["lo", "hi"]].isna().all(axis=None)
    assert (qlike["n_windows"] >= MIN_WINDOWS).all() and qlike[["lo", "hi"]].notna().all(axis=None)


def test_an_unknown_grouping_is_rejected(flat, actual):
    with pytest.raises(ValueError, match="by='month'"): summarise(loss_table(flat, actual), by="month")


def test_seed_spread_reports_models_with_several_seeds_only(flat, actual):
    seeds = pd.concat([flat.assign(seed=s, p_up=.5 + d, p_down=.2 - d) for s, d in enumerate((0, .1))])
    spread = seed_spread(seeds, actual)
    assert set(spread["seeds"]) == {2} and set(spread["model"]) == {"flat"}
    assert len(seed_spread(flat, actual)) == 0


# --- comparisons ----------------------------------------------------------------------------------------------------------


def test_dm_test_is_antisymmetric():
    d = overlapping_noise(2465, 90, 1, seed=4)[0]
    assert_allclose(dm_test(-d, 90)[0], -dm_test(d, 90)[0])
    assert dm_test(d, 90)[1] == dm_test(-d, 90)[1]


def test_dm_test_rejects_a_large_difference():
    d = overlapping_noise(2465, 90, 1, seed=4)[0]
    assert dm_test(d + 3 * d.std(), 90)[1] < .001


@pytest.mark.parametrize("difference, overlap", [(overlapping_noise(150, 90, 1, seed=4)[0], 90), (np.zeros(800), 60),
                                                 (np.full(800, .1), 60)], ids=["under two windows", "zeros", "constant"])
def test_dm_test_is_nan_where_nothing_can_be_tested(difference, overlap):
    assert np.isnan(dm_test(difference, overlap)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_dm_test_names_the_first_difference_that_is_not_finite(value):
    d = np.where(np.arange(800) < 740, overlapping_noise(800, 60, 1, seed=4)[0], value)
    with pytest.raises(ValueError, match="difference 740 is"): dm_test(d, 60)


@pytest.mark.parametrize("p, adjusted", [
    ([.04, np.nan, .01, .02], [.04, np.nan, .03, .04]), ([.01, .011, .9], [.03, .03, .9]), ([.8, .7], [1., 1.])])
def test_holm_by_hand(p, adjusted):
    assert_allclose(holm(np.array(p)), adjusted)


def test_a_ratio_that_holds_on_every_origin_holds_in_every_resample():
    noise = overlapping_noise(len(ORIGINS), 90, 1, seed=9)[0]
    base = pd.Series(1 + .1 * np.abs(noise / noise.std()), index=ORIGINS)
    got = paired_difference(pd.concat([base, 1.1 * base], axis=1), SCORES["se_sigma"], SPAN, 200, .9, 0)
    assert_allclose([got["relative"], got["rel_lo"], got["rel_hi"]], [np.sqrt(1.1) - 1] * 3, atol=1e-9)
    assert got["p"] < .001 and got["lo"] < got["diff"] < got["hi"]


@pytest.mark.parametrize("row, verdict", [
    (dict(identical=True, p_holm=np.nan, diff=0.), "identical"), (dict(identical=False, p_holm=np.nan, diff=-1.), "not testable"),
    (dict(identical=False, p_holm=.01, diff=-1.), "better"), (dict(identical=False, p_holm=.01, diff=1.), "worse"),
    (dict(identical=False, p_holm=.05, diff=1.), "no difference shown")])
def test_verdict(row, verdict):
    assert verdict_of(pd.Series(row), .05) == verdict


@pytest.fixture(scope="module")
def three(flat, actual) -> pd.DataFrame:
    "Losses of a climatology, its twin, a model with a better sigma, and one with a probability of zero."
    sharper = flat.assign(model="sharper sigma", sigma=.6 * (actual["sigma"].to_numpy() / .6) ** .5)
    zero = flat.assign(model="zero prob", p_down=0., p_flat=.5)
    named = [flat.assign(model=name) for name in ("climatology", "twin")]
    return loss_table(pd.concat([*named, sharper, zero]), actual)


def test_compare_claims_only_what_differs(three):
    table = compare(three, n_boot=200)
    assert "coverage" not in set(table["score"])
    twin, sharper = (table[table["model"] == m].set_index("score") for m in ("twin", "sharper sigma"))
    assert set(twin["verdict"]) == {"identical"} and twin["p_holm"].isna().all()
    same = dict.fromkeys(["log_loss", "brier", "pinball10", "pinball90", "interval_score"], "identical")
    assert sharper["verdict"].to_dict() == same | dict.fromkeys(["rmse_sigma", "rmse_log_sigma", "qlike"], "better")


def test_an_infinite_loss_is_not_testable(three):
    table = compare(three, scores=["log_loss"], n_boot=200).set_index("model")
    assert table.loc["zero prob", "verdict"] == "not testable"


def test_an_unknown_reference_is_named(three):
    with pytest.raises(ValueError, match="reference 'garch' is not among"): compare(three, "garch")
