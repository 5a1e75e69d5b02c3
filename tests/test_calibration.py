"Groups, intervals and frequencies of the reliability diagram."
import numpy as np
import pandas as pd
import pytest

from cryptopredict.calibration import group_interval, quantile_groups, reliability, reliability_curve


@pytest.mark.parametrize("p, sizes", [(np.full(50, .3), [50]), (np.repeat([.2, .5], 50), [50, 50]), (np.arange(100.), [10] * 10)],
                         ids=["one value", "two values", "all different"])
def test_groups_are_of_equal_size_and_never_split_equal_forecasts(p, sizes):
    assert np.unique(quantile_groups(p, 10), return_counts=True)[1].tolist() == sizes


def test_interval_of_independent_hits_contains_their_probability_and_is_narrow():
    lo, hi = group_interval(np.ones(3000, bool), np.random.default_rng(0).random(3000) < .4, 1, 500, 0)
    assert lo < .4 < hi and hi - lo < .05


def test_there_is_no_interval_for_few_windows():
    hit = np.arange(100) % 3 == 0
    assert np.isnan(group_interval(np.ones(100, bool), hit, 180, 10, 0)).all()


def test_there_is_no_interval_where_all_are_hits():
    assert np.isnan(group_interval(np.ones(100, bool), np.ones(100, bool), 1, 10, 0)).all()


def test_curve_gives_forecast_frequency_and_size_of_each_group():
    curve = reliability_curve(np.repeat([.25, .5], 100), np.arange(200) % 5 == 0, n_bins=6, block=1, n_boot=200, seed=0)
    assert [(g["p"], g["frequency"], g["n"]) for g in curve] == [(.25, .2, 100), (.5, .2, 100)]
    assert all(g["lo"] < .2 < g["hi"] for g in curve)


@pytest.fixture(scope="module")
def example():
    "Predictions of a forecaster with the true probabilities, and labels."
    rng = np.random.default_rng(0)
    times = pd.date_range("2015-01-01", periods=600, freq="D", tz="UTC")
    p = rng.dirichlet([3, 1, 4], len(times))
    direction = (rng.random(len(times))[:, None] > p.cumsum(axis=1)).sum(axis=1)
    predictions = pd.DataFrame(p, columns=["p_down", "p_flat", "p_up"]).assign(time=times, seed=0, fold=0, model="m")
    return predictions, pd.DataFrame(dict(direction=pd.array(direction, dtype="Int8")), index=times)


def test_every_origin_is_counted_once_per_class(example):
    predictions, labels = example
    table = reliability(predictions, labels, block=1, n_boot=50)
    assert table.groupby("class")["n"].sum().to_dict() == dict(down=600, flat=600, up=600)


def test_origins_without_a_label_are_left_out(example):
    predictions, labels = example
    assert reliability(predictions, labels.iloc[:0]).empty
    assert reliability(predictions, labels.iloc[:100], block=1, n_boot=50).groupby("class")["n"].sum().unique().tolist() == [100]
