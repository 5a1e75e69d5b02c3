"GARCH, linear models and LightGBM: matured rows only, choices on validation, missing packages."
import importlib.util

import numpy as np
import pandas as pd
import pytest

from cryptopredict.baselines import origins
from cryptopredict.config import ConfigError
from cryptopredict.features import build_features
from cryptopredict.labels import FORECAST_COLUMNS, make_labels
from cryptopredict.leakage import walk_forward
from cryptopredict.learners import GARCH, LEARNERS, LightGBM, Linear, missing_package
from cryptopredict.protocol import EvaluateConfig, installed_models
from cryptopredict.simulate import simulate_market

for package in ("arch", "sklearn", "lightgbm"): pytest.importorskip(package)


@pytest.fixture(scope="module")
def market():
    panel, _ = simulate_market(24 * 900, seed=3)
    y = make_labels(panel["close"], "20D", "7D")
    fold = walk_forward(panel.index, y[["label_end", "sigma_end"]], first_test="2017-12-01", step="90D", validation="90D")[0]
    return panel, build_features(panel), y, fold, origins(panel.index, fold.test)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_forecast_is_complete_and_deterministic(name, market):
    panel, X, y, fold, rows = market
    one, other = (LEARNERS[name]().fit(panel, X, y, fold).predict(panel, X, rows) for _ in range(2))
    pd.testing.assert_frame_equal(one, other)
    assert list(one.columns) == FORECAST_COLUMNS and one.notna().all(axis=None)
    assert (one["p10"] <= one["p90"]).all() and np.allclose(one[["p_down", "p_flat", "p_up"]].sum(axis=1), 1)


@pytest.mark.parametrize("name", LEARNERS)
def test_nothing_after_the_training_rows_reaches_a_fit(name, market):
    panel, X, y, fold, rows = market
    begin = panel.index[fold.test[0]]
    forecast = LEARNERS[name]().fit(panel, X, y, fold).predict(panel, X, rows)
    changed = y.copy()
    changed.loc[~(y["label_end"] <= begin), ["r90", "direction"]] = [9., 2]
    changed.loc[~(y["sigma_end"] <= begin), "sigma"] = 9.
    later = panel.copy()
    later.iloc[fold.test[0]:, :4] *= np.linspace(1, 3, len(panel) - fold.test[0])[:, None]
    model = LEARNERS[name]().fit(later, X, changed, fold)
    pd.testing.assert_frame_equal(model.predict(panel, X, rows), forecast)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_forecast_looks_back_only(name, market):
    panel, X, y, fold, rows = market
    model = LEARNERS[name]().fit(panel, X, y, fold)
    cut = rows[30]
    short = model.predict(panel.iloc[:cut + 1], X.iloc[:cut + 1], rows[:31])
    pd.testing.assert_frame_equal(short, model.predict(panel, X, rows).iloc[:31], rtol=1e-9)


@pytest.mark.parametrize("asymmetric", (False, True))
def test_forecast_variances_are_those_of_arch(asymmetric, market):
    panel, _, y, fold, _ = market
    model = GARCH(vol_window="7D", asymmetric=asymmetric).fit(panel, None, y, fold)
    from arch import arch_model
    returns = model.daily_returns(panel["close"])
    for hour in (0, 13):
        at = returns[returns.index.hour == hour]
        arch = arch_model(at, vol="GARCH", p=1, o=int(asymmetric), q=1, dist="t", rescale=False)
        theirs = arch.fix(model.params).forecast(horizon=7, start=0, reindex=False).variance.mean(axis=1).iloc[400:]
        np.testing.assert_allclose(model.mean_variance(returns).loc[theirs.index], theirs, rtol=1e-6)  # the start is forgotten
        expected = model.level_factor * np.sqrt(365 * theirs.iloc[-1]) / 100
        assert model.volatility(panel).loc[theirs.index[-1]] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_fit_does_not_depend_on_where_the_panel_ends(name, market):
    panel, X, y, fold, rows = market
    forecast = LEARNERS[name]().fit(panel, X, y, fold).predict(panel, X, rows[:30])
    end = rows[29] + 6  # at another hour of the day
    panel, X, y = (frame.iloc[:end] for frame in (panel, X, y))
    short = LEARNERS[name]().fit(panel, X, y, fold).predict(panel, X, rows[:30])
    pd.testing.assert_frame_equal(short, forecast)


def test_garch_needs_a_history(market):
    panel, _, y, fold, _ = market
    late = panel.iloc[24 * 400:]
    short = walk_forward(late.index, y.loc[late.index, ["label_end", "sigma_end"]], first_test="2017-09-01", step="90D",
                         validation="60D")[0]
    with pytest.raises(ValueError, match="250 daily returns"): GARCH().fit(late, None, y.loc[late.index], short)


@pytest.mark.parametrize("make", (Linear, LightGBM))
def test_a_class_that_never_occurred_stays_possible(make, market):
    panel, X, y, fold, rows = market
    two = y.assign(direction=y["direction"].mask(y["direction"] == 1, 2))
    forecast = make().fit(panel, X, two, fold).predict(panel, X, rows)
    assert (forecast["p_flat"] > 0).all() and (forecast["p_flat"] < .01).all()
    one = make().fit(panel, X, y.assign(direction=y["direction"].mask(y["direction"].notna(), 0)), fold)
    assert (one.predict(panel, X, rows)["p_down"] > .99).all()


def test_the_regularisation_is_chosen_on_validation(market, monkeypatch):
    panel, X, y, fold, _ = market
    assert Linear().fit(panel, X, y, fold).chosen in Linear.candidates
    monkeypatch.setattr(Linear, "candidates", (1e6,))
    assert Linear().fit(panel, X, y, fold).chosen == 1e6
    with pytest.raises(ValueError, match="needs features"): Linear().fit(panel, None, y, fold)


def test_models_without_their_package_are_left_out_by_name(monkeypatch):
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "arch" else usual(name, *a))
    assert missing_package(LEARNERS["gjr_garch"]) == "arch" and not missing_package(LEARNERS["linear"])
    config, left_out = installed_models(EvaluateConfig(models=("garch", "log_har")))
    assert (config.models, left_out) == (("log_har",), {"garch": "arch"})
    with pytest.raises(ConfigError, match="garch need arch: pip install"): installed_models(EvaluateConfig(models=("garch",)))
