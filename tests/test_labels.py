"Labels: what `make_labels` and `check_labels` refuse, and the helpers they are made of."
import numpy as np
import pandas as pd
import pytest

from cryptopredict import labels as L
from cryptopredict.leakage import audit

HOURS = pd.date_range("2024-01-01", periods=5, freq="h", tz="UTC")


@pytest.fixture
def close() -> pd.Series:
    "Four hundred hourly prices with a hole."
    index = pd.date_range("2024-01-01", periods=400, freq="h", tz="UTC")
    made = pd.Series(np.exp(np.random.default_rng(0).normal(0, .02, 400).cumsum()) * 100, index=index)
    made.iloc[200:203] = np.nan
    return made


def test_a_duration_is_a_whole_number_of_hours():
    assert L.hours_in("90D") == 2160
    with pytest.raises(ValueError, match="horizon is 90min"): L.hours_in("90min", "horizon")
    with pytest.raises(ValueError, match="at least one"): L.hours_in("0h")


def test_an_index_with_a_hole_is_named():
    assert L.check_hourly(HOURS) is HOURS
    with pytest.raises(ValueError, match="row 2 .* is not one hour after"): L.check_hourly(HOURS.delete(2))


def test_a_path_quantile_is_taken_over_the_hours_after_t():
    path = pd.Series(np.log([1., 2., 4., 8., 16.]), index=HOURS)
    made = L.path_quantile(path, 2, .5)
    np.testing.assert_allclose(made, [np.log(2) * 1.5] * 3 + [np.nan] * 2)
    assert L.window_ends(HOURS, 2, path > 1).isna().tolist() == [True, True, False, False, False]


def test_a_row_without_its_whole_future_is_missing(close):
    made = L.make_labels(close, horizon="3D", vol_window="1D")
    assert made.r90.isna().sum() == 72 + 6, "the last 72 rows, the hole, and the rows whose window ends in it"
    assert made.direction.isna().equals(made.r90.isna()) and made.label_end.isna().equals(made.r90.isna())
    assert made.sigma.notna().any() and made.sigma_end.isna().equals(made.sigma.isna())


def test_a_price_that_is_not_positive_is_named(close):
    with pytest.raises(ValueError, match="row 7 .* is not a price"):
        L.make_labels(close.where(close.index != close.index[7], -1.))


@pytest.mark.parametrize("threshold", [float("nan"), -.1])
def test_a_threshold_is_not_negative(close, threshold):
    with pytest.raises(ValueError, match="threshold"): L.make_labels(close, threshold=threshold)


@pytest.mark.parametrize("column, value, message", [
    ("direction", 3, "column direction: 3 is not a class"), ("sigma", -1., "column sigma: -1 is not a volatility"),
    ("sigma", np.inf, "column sigma: inf is not a volatility"), ("r90", -np.inf, "column r90: -inf is not a log return")])
def test_an_impossible_label_is_named(close, column, value, message):
    made = L.make_labels(close, horizon="3D", vol_window="1D")
    assert L.check_labels(made) is made and L.check_labels(made[["r90"]]) is not None
    made.loc[made.index[5], column] = value
    with pytest.raises(ValueError, match=f"time 2024-01-01 05:00:00.00:00, {message}"): L.check_labels(made)


def by_end_time(frame: pd.DataFrame, early: str) -> pd.DataFrame:
    "Labels indexed by the time at which they end, or claim to."
    made = L.make_labels(frame.close, horizon="3D", vol_window="1D")
    ends = dict(r90="label_end", p10_path="label_end", sigma="sigma_end")
    out = pd.concat([made.dropna(subset=[end]).set_index(end)[label] for label, end in ends.items()], axis=1, sort=True)
    return out.set_axis(out.index - pd.Timedelta(early)).reindex(frame.index)


@pytest.mark.parametrize("early, ok", [("0h", True), ("1h", False)])
def test_the_audit_passes_labels_at_their_end_and_finds_those_an_hour_early(close, early, ok):
    filled = close.ffill().to_frame("close")
    assert audit(lambda frame: by_end_time(frame, early), filled).ok == ok


def test_the_total_loss_weighs_the_quantiles():
    losses = dict(cls=1., p10=.1, p90=.2, vol=3.)
    assert L.regression_loss(losses) == 6. and L.total_loss(losses) == 7.


def test_a_table_of_predictions_has_the_columns_of_all_heads():
    assert L.SCHEMA == ["time", "fold", "seed", "model", "p_down", "p_flat", "p_up", "p10", "p90", "sigma"]
