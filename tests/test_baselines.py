"""The baselines against formulas by hand, on a small market whose volatility swings, and their errors. That they use no label
outside `fold.refit` and no later price is tested in test_properties.py."""
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from cryptopredict.baselines import (
    BASELINES,
    EWMA,
    FLOOR,
    HOURS_PER_YEAR,
    Climatology,
    ForecastModel,
    LogHAR,
    Persistence,
    ewma_vol,
    forecast_rows,
    has_history,
    labelled_rows,
    origins,
    realised_vol,
    require_complete,
    scaled_history,
    smooth_frequencies,
    usable_rows,
)
from cryptopredict.labels import FORECAST_COLUMNS, make_labels
from cryptopredict.leakage import Fold, walk_forward


@pytest.fixture(scope="module")
def close() -> pd.Series:
    "Forty days of hourly closes."
    hours = pd.date_range("2020-01-01", periods=24 * 40, freq="h", tz="UTC", name="time")
    return pd.Series(100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, .006, len(hours)))), index=hours)


@pytest.fixture(scope="module")
def market():
    "1500 days of closes whose volatility wanders about 60 % a year, their labels, and one fold."
    r, burn = np.random.default_rng(1), 5000
    t = pd.date_range("2015-01-01", periods=24 * 1500, freq="h", tz="UTC", name="time")
    slow = pd.Series(r.normal(size=len(t) + burn)).ewm(halflife=24 * 20).mean().to_numpy()[burn:]
    vol = .6 * np.exp(.5 * slow / slow.std())
    price = 300 * np.exp(np.cumsum(vol / np.sqrt(HOURS_PER_YEAR) * r.normal(size=len(t))))
    panel = pd.DataFrame({"close": price}, index=t)
    labels = make_labels(panel["close"])
    folds = walk_forward(t, labels["label_end"], first_test="2017-01-01", step="365D", validation="180D")
    return panel, labels, folds[1]


# --- volatility of the past -----------------------------------------------------------------------------------------------


def test_realised_volatility_by_hand(close):
    t, rv = 500, realised_vol(close, 7)
    by_hand = np.sqrt(365 / 7 * sum(np.log(close.iloc[i] / close.iloc[i - 1]) ** 2 for i in range(t - 7 * 24 + 1, t + 1)))
    assert_allclose(rv.iloc[t], by_hand, atol=1e-10)
    assert rv.isna().sum() == 7 * 24, "7 days of returns need one price more"


def test_a_price_that_stands_still_has_the_volatility_of_the_floor(close):
    assert realised_vol(close * 0 + 5, 1).dropna().unique().tolist() == [FLOOR]


def test_trailing_volatility_is_the_label_of_a_month_ago(close):
    assert_allclose(realised_vol(close, 30).iloc[-1], make_labels(close)["sigma"].iloc[-1 - 720], atol=1e-10)


def test_ewma_volatility_by_hand(close):
    t, ev = 500, ewma_vol(close)
    weight = .5 ** (np.arange(t) / 240)  # by hours since each return, newest first
    squares = (np.log(close).diff() ** 2).to_numpy()[t:0:-1]
    assert_allclose(ev.iloc[t], np.sqrt(HOURS_PER_YEAR * (weight * squares).sum() / weight.sum()), atol=1e-10)
    assert ev.isna().sum() == 240, "one half-life"


# --- climatology ----------------------------------------------------------------------------------------------------------


def test_smoothing_adds_one_window_spread_over_the_classes():
    p = smooth_frequencies(np.array([[0., .2, .8], [1., 0., 0.]]), 19)
    assert_allclose(p.sum(axis=1), [1, 1])
    assert_allclose(p.min(), 1 / 60)


def test_labelled_rows_are_the_refit_rows_with_the_label():
    labels = pd.DataFrame({"r90": [.1, np.nan, .2, .3], "sigma": [.5, .5, np.nan, .5]})
    fold = Fold(range(3), range(3), range(3, 4), range(3))
    assert [labelled_rows(labels, fold, name).tolist() for name in ("r90", "sigma")] == [[0, 2], [0, 1]]
    with pytest.raises(ValueError, match="no row with r90; begin"):
        labelled_rows(labels.iloc[:2], Fold([1], [1], [1], [1]), "r90")


def test_climatology_is_the_statistics_of_the_refit_rows(market):
    panel, labels, fold = market
    known = labels.iloc[fold.refit]
    got = Climatology().fit(panel, None, labels, fold).predict(panel, None, fold.test)
    windows = len(fold.refit) // (24 * 90)
    assert_allclose(got["p_up"].iloc[0], ((known["r90"] > .05).mean() * windows + 1 / 3) / (windows + 1))
    assert_allclose(got[["p_down", "p_flat", "p_up"]].sum(axis=1), 1)
    beyond = [(known["r90"] < got["p10"].iloc[0]).mean(), (known["r90"] > got["p90"].iloc[0]).mean()]
    assert_allclose(beyond, [.1, .1], atol=1e-3)
    assert len(got.drop_duplicates()) == 1, "the same forecast at every row"


def test_climatology_of_recent_years_ignores_older_ones(market):
    panel, labels, fold = market
    known = labels.iloc[fold.refit]
    recent = known[known.index >= panel.index[fold.test[0]] - pd.DateOffset(years=1)]
    assert_allclose(Climatology(years=1).fit(panel, None, labels, fold).sigma, recent["sigma"].median())


def test_climatology_without_labels_says_which_is_missing(market):
    panel, labels, fold = market
    with pytest.raises(ValueError, match="no row with r90"):
        Climatology().fit(panel, None, labels, Fold(fold.train, fold.valid, fold.test, fold.test[:0]))


# --- forecasts from a volatility ------------------------------------------------------------------------------------------


def test_scaled_history_equals_brute_force():
    z, scale = np.sort(np.random.default_rng(2).standard_t(4, 501)), np.array([.1, .5])
    probs, p10, p90 = scaled_history(z, scale, .05, 10**9)
    slow = [[np.mean(s * z < -.05), np.mean(np.abs(s * z) <= .05), np.mean(s * z > .05)] for s in scale]
    assert_allclose(probs, slow, atol=1e-8)
    assert_allclose([p10, p90], [[np.quantile(s * z, q) for s in scale] for q in (.1, .9)])


def test_missing_history_is_named_with_its_time(close):
    s = pd.Series([.5, np.nan], index=close.index[:2])
    assert len(usable_rows(s)) == 1 and require_complete(s[:1], "EWMA").tolist() == [.5]
    with pytest.raises(ValueError, match="EWMA at 2020-01-01 01:00"): require_complete(s, "EWMA")
    with pytest.raises(ValueError, match="enough history"): usable_rows(s[1:])


@pytest.mark.parametrize("model, volatility", [(Persistence, lambda c: realised_vol(c, 30)), (EWMA, ewma_vol)])
def test_persistence_and_ewma_forecast_the_volatility_of_the_past(market, model, volatility):
    panel, labels, fold = market
    got = model().fit(panel, None, labels, fold).predict(panel, None, fold.test[:5])
    assert_allclose(got["sigma"], volatility(panel["close"]).iloc[fold.test[:5]])


def test_a_forecast_without_enough_history_is_refused(market):
    panel, labels, fold = market
    with pytest.raises(ValueError, match="Persistence at 2015-01-02 00:00"):
        Persistence().fit(panel, None, labels, fold).predict(panel, None, np.array([24]))


def test_log_har_solves_the_normal_equations(market):
    panel, labels, fold = market
    har = LogHAR().fit(panel, None, labels, fold)
    rows = fold.refit[fold.refit >= 90 * 24]  # those with 90 days before them
    logs = [np.log(realised_vol(panel["close"], d).to_numpy()[rows]) for d in (1, 7, 30, 90)]
    x = np.stack([*logs, np.ones(len(rows))], axis=1)
    target = np.log(labels["sigma"].to_numpy()[rows])
    assert_allclose(har.coef, np.linalg.solve(x.T @ x, x.T @ target), atol=1e-6)
    assert abs((target - np.log(har.predict(panel, None, rows)["sigma"].to_numpy())).mean()) < 1e-9


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_fills_the_schema_with_a_valid_forecast(market, name):
    panel, labels, fold = market
    model = BASELINES[name]()
    assert isinstance(model, ForecastModel)
    got = model.fit(panel, None, labels, fold).predict(panel, None, fold.test[::24])
    assert list(got.columns) == FORECAST_COLUMNS and got.index.equals(panel.index[fold.test[::24]])
    probs = got[["p_down", "p_flat", "p_up"]]
    assert (probs > 0).all(axis=None) and (got["p10"] < got["p90"]).all() and (got["sigma"] >= FLOOR).all()
    assert_allclose(probs.sum(axis=1), 1)


def test_an_object_without_the_two_methods_is_no_forecaster():
    assert not isinstance(object(), ForecastModel)


# --- where a forecast is made ---------------------------------------------------------------------------------------------


def test_origins_are_at_midnight():
    day = pd.date_range("2024-01-01", periods=50, freq="h", tz="UTC")
    assert origins(day, np.arange(1, 50)).tolist() == [24, 48]


@pytest.fixture(scope="module")
def hole() -> pd.DataFrame:
    "A year and a half without a price in most of June 2023."
    hours = pd.date_range("2023-01-01", "2024-06-30", freq="h", tz="UTC")
    unknown = (hours > "2023-06-07") & (hours < "2023-07-01")
    return pd.DataFrame(dict(close=np.where(unknown, np.nan, 27000.)), index=hours)


def test_after_a_hole_a_forecast_needs_90_days_of_prices(hole):
    able = hole.index[has_history(hole)]
    assert able[able > "2023-06-07"][0] == pd.Timestamp("2023-07-01", tz="UTC") + pd.Timedelta("90D")
    assert able[able < "2023-07-01"][-1] == pd.Timestamp("2023-06-07", tz="UTC")


def test_a_single_row_need_not_be_an_origin(hole):
    assert forecast_rows(hole, np.arange(1, 50)).tolist() == [24, 48]
    assert forecast_rows(hole, np.array([7])).tolist() == [7]
