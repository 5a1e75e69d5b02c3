"Forecasters that learn from several coins: what they learn, and what they must not."
import json

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from cryptopredict import claims
from cryptopredict.baselines import LogHAR, origins
from cryptopredict.har import HALF_LIVES, DailyHAR, ExponentialHAR, Ridge
from cryptopredict.labels import make_labels
from cryptopredict.leakage import asset_rows, row_times, stack_assets, walk_forward
from cryptopredict.pooled import MEASURES, POOLED, HAREnsemble, PooledClimatology, PooledRidge, measures
from cryptopredict.simulate import simulate_market

SHORT = dict(horizon="20D", vol_window="7D")


@pytest.fixture(scope="module")
def world():
    "Panels and labels of four coins, two years long, and one fold: COIN03 begins after the test has."
    panels, _ = simulate_market(24 * 730, seed=0, assets=4)
    begin = pd.Timestamp("2017-05-01", tz="UTC")
    panels["COIN03"] = panels["COIN03"].loc[begin + pd.Timedelta("20D"):]
    labels = {name: make_labels(panel["close"], **SHORT) for name, panel in panels.items()}
    return panels, labels, begin


def stacked(panels, labels, begin):
    panel, y = stack_assets(panels), stack_assets(labels)
    fold = walk_forward(panel.index, y[["label_end", "sigma_end"]], first_test=begin, step="90D", validation="60D")[0]
    rows = np.concatenate([np.asarray(part)[:0] if name == "COIN03" else origins(panel.index, fold.test[np.isin(fold.test, part)])
                           for name, part in asset_rows(panel.index).items()])
    return panel, y, fold, rows


@pytest.fixture(scope="module")
def pool(world):
    return stacked(*world)


def test_the_frozen_recipe_is_that_of_the_code():
    recipe = json.loads((ROOT / "results" / "recipe.json").read_text())
    assert recipe["default"] == claims.DEFAULT and recipe["claims"] == claims.CLAIMS
    assert recipe["har_exp"]["half_lives_days"] == list(HALF_LIVES) and recipe["har_exp"]["penalty"] == ExponentialHAR.penalty
    ridge = recipe["pooled_ridge"]
    assert ridge["measures"] == MEASURES and len(MEASURES) == 34
    assert (ridge["penalty"], ridge["clip_standard_deviations"], ridge["warm_up_days"], ridge["min_days"]) == (
        PooledRidge.penalty, PooledRidge.limit, PooledRidge.warm_up, PooledRidge.min_days)
    assert recipe["direction_and_band"]["years"] == PooledClimatology().years


def test_ridge_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 4)) * [1, 5, .1, 2] + 3, rng.normal(size=200)
    fit = Ridge.fit(x, y, 7.)
    z = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(fit.predict(x), linear_model.Ridge(alpha=7.).fit(z, y).predict(z), rtol=1e-10)
    far = x[:1] + 1e6
    assert np.isfinite(Ridge.fit(x, y, 7., limit=3.).predict(far)).all()


def test_a_constant_regressor_gets_no_weight():
    x = np.c_[np.full(50, .123456789), np.arange(50.)]
    fit = Ridge.fit(x, 2 * np.arange(50.), 0.1)
    assert fit.coef[0] == pytest.approx(0, abs=1e-6) and fit.predict(x)[-1] == pytest.approx(98, rel=.01)


def test_measures_do_not_depend_on_the_scale_of_a_coin(world):
    panel = world[0]["BTC"]
    cubed = panel.assign(**{c: panel[c] ** 3 for c in ("open", "high", "low", "close")})
    one, other = measures(panel), measures(cubed)
    np.testing.assert_allclose(other[MEASURES].iloc[24 * 90:], one[MEASURES].iloc[24 * 90:], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(other["level"].iloc[24 * 90:] - one["level"].iloc[24 * 90:], np.log(3))


def test_measures_need_ninety_days_of_prices_and_look_back_only(world):
    panel = world[0]["BTC"].iloc[:24 * 200]
    table = measures(panel)
    assert table.iloc[24 * 90:].notna().all(axis=None) and table.iloc[24 * 89].isna().any()
    changed = panel.copy()
    changed.iloc[24 * 150:, :4] *= 3.
    pd.testing.assert_frame_equal(measures(changed).iloc[:24 * 150], table.iloc[:24 * 150])
    with pytest.raises(ValueError, match="no column 'high'"): measures(panel.drop(columns="high"))


def test_pooled_climatology_averages_own_returns_and_those_of_all_coins(pool):
    panel, y, fold, _ = pool
    fitted = PooledClimatology(horizon="20D").fit(panel, None, y, fold).forecasts
    assert set(fitted) == {"BTC", "COIN01", "COIN02"}  # the fourth had no matured label
    samples = {name: y["r90"].iloc[fold.refit][panel.index[fold.refit].get_level_values(0) == name] for name in fitted}
    z = np.concatenate([(r - r.mean()) / r.std(ddof=0) for r in samples.values()])
    for name, r in samples.items():
        both = r - r.mean() / 2, r.mean() / 2 + r.std(ddof=0) * z
        assert fitted[name]["p90"] == pytest.approx(np.mean([np.quantile(s, .9) for s in both]))
        assert fitted[name]["probs"].sum() == pytest.approx(1)
        up = np.mean([(s > .05).mean() for s in both])
        assert abs(fitted[name]["probs"][2] - up) < .1  # before smoothing


@pytest.mark.parametrize("name", POOLED)
def test_labels_that_have_not_matured_do_not_reach_a_fit(name, pool):
    panel, y, fold, rows = pool
    begin = row_times(panel.index)[fold.test[0]]
    forecast = POOLED[name](horizon="20D").fit(panel, None, y, fold).predict(panel, None, rows)
    changed = y.copy()
    changed.loc[~(y["label_end"] <= begin), ["r90", "direction"]] = [9., 2]
    changed.loc[~(y["sigma_end"] <= begin), "sigma"] = 9.
    assert (changed["sigma"] == 9).groupby("asset").any().all()
    again = POOLED[name](horizon="20D").fit(panel, None, changed, fold).predict(panel, None, rows)
    pd.testing.assert_frame_equal(again, forecast)


@pytest.mark.parametrize("name", POOLED)
def test_a_coin_that_begins_after_the_test_changes_nothing(name, world, pool):
    panels, labels, begin = world
    panel, y, fold, rows = pool
    forecast = POOLED[name](horizon="20D").fit(panel, None, y, fold).predict(panel, None, rows)
    others = [{k: v for k, v in frames.items() if k != "COIN03"} for frames in (panels, labels)]
    panel, y, fold, rows = stacked(*others, begin)
    alone = POOLED[name](horizon="20D").fit(panel, None, y, fold).predict(panel, None, rows)
    pd.testing.assert_frame_equal(alone.reset_index(), forecast.reset_index())


@pytest.mark.parametrize("name", POOLED)
def test_a_coin_without_matured_labels_is_refused_by_name(name, pool):
    panel, y, fold, _ = pool
    model = POOLED[name](horizon="20D").fit(panel, None, y, fold)
    last = np.array([len(panel) - 1])
    assert panel.index[last[0]][0] == "COIN03"
    with pytest.raises(ValueError, match="COIN03 had too few matured labels"): model.predict(panel, None, last)


def test_the_ensemble_is_the_geometric_mean_of_its_members(world, pool):
    panels, labels, _ = world
    panel, y, fold, rows = pool
    model = HAREnsemble(horizon="20D").fit(panel, None, y, fold)
    forecast = model.predict(panel, None, rows)
    pooled = PooledRidge(horizon="20D").fit(panel, None, y, fold).predict(panel, None, rows)
    for name in ("BTC", "COIN02"):
        at = forecast.loc[name].index
        members = [m.volatility(panels[name]).loc[at] for m in model.members[name]] + [pooled["sigma"].loc[name]]
        np.testing.assert_allclose(forecast["sigma"].loc[name], np.exp(np.mean(np.log(members), axis=0)))
    columns = ["p_down", "p_flat", "p_up", "p10", "p90"]
    climatology = PooledClimatology(horizon="20D").fit(panel, None, y, fold).predict(panel, None, rows)
    pd.testing.assert_frame_equal(forecast[columns], climatology[columns])


def test_one_coin_alone_can_be_fitted(world):
    panels, labels, begin = world
    panel, y, fold, rows = stacked(*[{"BTC": frames["BTC"]} for frames in (panels, labels)], begin)
    forecast = HAREnsemble(horizon="20D").fit(panel, None, y, fold).predict(panel, None, rows)
    assert forecast.notna().all(axis=None) and (forecast["sigma"] > 0).all()


def test_har_models_fit_matured_rows_only(world):
    panels, labels, begin = world
    panel, y = panels["BTC"], labels["BTC"]
    fold = walk_forward(panel.index, y[["label_end", "sigma_end"]], first_test=begin, step="90D", validation="60D")[0]
    for make in (ExponentialHAR, DailyHAR, LogHAR):
        changed = y.assign(sigma=y["sigma"].where(y["sigma_end"] <= begin, 9.), r90=y["r90"].where(y["label_end"] <= begin, 9.))
        one, other = (make(horizon="20D").fit(panel, None, labels, fold).volatility(panel) for labels in (y, changed))
        pd.testing.assert_series_equal(one, other)
