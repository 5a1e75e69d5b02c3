"The simulated market: each draw has its stated distribution, and the conditional distribution follows from the states alone."
from math import erf

import numpy as np
import pandas as pd
import pytest

from cryptopredict import simulate as S
from cryptopredict.simulate import PARAMS, conditional_distribution, market_states, simulate_market, truth_cdf

HOURS = 6 * 365 * 24
START = pd.Timestamp("2016-01-01", tz="UTC")
NUMBERS = S.COLUMNS[:18]
exactly = dict(check_exact=True, check_freq=False)


@pytest.fixture(scope="module")
def market() -> tuple[pd.DataFrame, pd.DataFrame]: return simulate_market(HOURS, seed=1)


@pytest.fixture(scope="module")
def draws() -> dict:
    "Shocks and states of many days, each from its own random stream."
    e = S.draw_shocks(np.random.default_rng(0), 200_000)
    day = e.sum(1) / np.sqrt(24)
    s = S.draw_regimes(np.random.default_rng(0), len(day))
    return dict(e=e, S=day, s=s, x=S.draw_drifts(np.random.default_rng(2), day),
                h=S.log_volatility(np.random.default_rng(3), s, day))


# --- draws ----------------------------------------------------------------------------------------------------------------


def test_parameters_are_probabilities_and_persistences():
    assert all(0 < p < 1 for p in PARAMS.leave + PARAMS.phi_x + (PARAMS.phi_h, PARAMS.jump_p))


def test_the_profile_of_a_day_has_mean_square_one_and_peaks_in_the_afternoon():
    w = S.hour_profile()
    assert abs((w**2).mean() - 1) < 1e-12 and w.argmax() == 15


def test_day_shocks_are_standardised_with_fat_tails(draws):
    day = draws["S"]
    assert abs(day.mean()) < 4 / np.sqrt(len(day)) and abs(day.var() - 1) < .02 and (day**4).mean() - 3 > 1


def test_shocks_of_a_longer_market_begin_with_those_of_a_shorter_one(draws):
    np.testing.assert_array_equal(draws["e"][:50], S.draw_shocks(np.random.default_rng(0), 50))


def test_ar1_paths_have_unit_variance_and_their_persistence():
    z = S.ar1_paths(np.random.default_rng(1), 50_000, (.5, .9))
    np.testing.assert_allclose(z.std(0), 1, atol=.05)
    np.testing.assert_allclose([np.corrcoef(z[1:, i], z[:-1, i])[0, 1] for i in range(2)], [.5, .9], atol=.02)


def test_regimes_are_left_at_the_stated_rate(draws):
    s = draws["s"]
    np.testing.assert_allclose([(s[1:] != s[:-1])[s[:-1] == i].mean() for i in (0, 1)], PARAMS.leave, rtol=.1)


def test_drift_states_are_standardised_and_driven_by_the_day_shock(draws):
    x, day = draws["x"], draws["S"]
    change = x[1:] - PARAMS.phi_x * x[:-1]
    np.testing.assert_allclose(x.std(0), 1, atol=.05)
    loads = [np.corrcoef(change[:, i], day[:-1])[0, 1] for i in range(2)]
    np.testing.assert_allclose(loads, PARAMS.load_x, atol=.01)


def test_log_volatility_has_the_stated_leverage_and_a_sane_range(draws):
    h, s, day = draws["h"], draws["s"], draws["S"]
    change = h[1:] - PARAMS.phi_h * h[:-1] - (1 - PARAMS.phi_h) * np.log(PARAMS.vol)[s[1:]]
    assert abs(np.corrcoef(change, day[:-1])[0, 1] - PARAMS.rho) < .02
    low, high = np.exp(np.quantile(h, [.02, .98]))
    assert .2 < low < high < 1.6


def test_daily_columns_are_positive_and_reveal_the_regime(draws):
    s = draws["s"][:3000]
    days = pd.date_range("2016-01-01", periods=3000, tz="UTC")
    cols = S.daily_columns(np.random.default_rng(4), draws["h"][:3000], s, draws["x"][:3000], days)
    assert all(np.isfinite(v).all() and (v > 0).all() for v in cols.values())
    assert ((cols["fees"] > S.FEES_SPLIT) == (s == 1)).all()
    assert (np.diff(cols["supply"]) > 0).all() and len(np.unique(cols["difficulty"])) == -(-3000 // 14)


def test_volume_reveals_the_volatility_of_its_day(draws):
    h, e = draws["h"][:3000], draws["e"][:3000]
    v = S.hourly_volume(np.random.default_rng(6), h, e)
    np.testing.assert_allclose(np.log(v / S.VOLUME_LEVEL).mean(1) / S.VOLUME_BETA, h, atol=1e-12)
    assert np.corrcoef(np.log(v).ravel(), np.abs(e).ravel())[0, 1] > .2


def test_bars_hold_their_open_and_close(draws):
    r = .01 * draws["e"][:100].ravel()
    bars = pd.DataFrame(S.ohlc_bars(np.random.default_rng(7), r, np.full(2400, .01), 1e4))
    assert (bars.high >= bars[["open", "close"]].max(axis=1)).all() and (bars.low <= bars[["open", "close"]].min(axis=1)).all()
    assert (bars.low > 0).all() and np.allclose(np.log(bars.close / bars.open), r)


# --- the panel ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    (dict(hours=100), "hours=100"), (dict(hours=10**9), "hours="), (dict(hours=5000.), "whole number"),
    (dict(seed="0"), "seed='0'"), (dict(seed=-1), "seed=-1"), (dict(start="2016-01-01 05:00"), "midnight"),
    (dict(assets=0), "assets=0"), (dict(assets=101), "assets=101"), (dict(assets=True), "assets=True"),
    (dict(assets=1.5), "assets=1.5")],
    ids=lambda v: v if isinstance(v, str) else None)
def test_an_argument_out_of_range_is_named(change, message):
    with pytest.raises(ValueError, match=message): simulate_market(**dict(hours=5000, seed=0) | change)


def test_a_start_without_a_zone_is_utc():
    assert S.check_request(S.MIN_HOURS, 0, "2016-01-01") == START


def test_the_panel_is_hourly_utc_and_sane(market):
    panel, _ = market
    assert list(panel.columns) == S.COLUMNS
    pd.testing.assert_index_equal(panel.index, pd.date_range("2016-01-01 01:00", periods=HOURS, freq="h", tz="UTC", name="time"))
    assert set(panel[NUMBERS].dtypes.astype(str)) == {"float64"} and set(panel.dtypes[18:].astype(str)) == {"bool"}
    assert np.isfinite(panel[NUMBERS]).all(axis=None) and (panel[NUMBERS] > 0).all(axis=None)
    assert (panel.high >= panel[["open", "close"]].max(axis=1)).all()
    assert (panel.low <= panel[["open", "close"]].min(axis=1)).all()


def test_daily_columns_change_at_midnight_only(market):
    moved = market[0][["fees", "mvrv", "dxy", "supply"]].diff().iloc[1:].ne(0).any(axis=1)
    assert set(moved.index.hour[moved]) == {0}


def test_the_same_arguments_give_bit_identical_results_and_seeds_differ(market):
    for a, b in zip(simulate_market(HOURS, seed=1), market): pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert not np.array_equal(S.draw_panel(5000, 2, False, START).close, market[0].close.iloc[:5000])


def test_a_longer_market_begins_with_the_shorter_one(market):
    panel, truth = simulate_market(10_000, seed=1)
    pd.testing.assert_frame_equal(panel, market[0].iloc[:10_000], **exactly)
    pd.testing.assert_frame_equal(truth, market[1].iloc[:len(truth)], check_freq=False)


# --- states ---------------------------------------------------------------------------------------------------------------


def test_states_are_read_back_exactly(market):
    states = market_states(market[0])
    rngs, days = np.random.default_rng(1).spawn(8), len(states) + 1
    e, s = S.draw_shocks(rngs[0], days), S.draw_regimes(rngs[1], days)
    day = e.sum(1) / np.sqrt(24)
    x, h = S.draw_drifts(rngs[2], day) * PARAMS.sd_x, S.log_volatility(rngs[3], s, day)
    np.testing.assert_array_equal(states.s, s[1:])
    np.testing.assert_allclose(states.h, h[1:], rtol=0, atol=1e-10)
    np.testing.assert_allclose(states[["x1", "x2"]], x[1:], rtol=0, atol=1e-10)
    np.testing.assert_allclose(states["shock"], day[1:], rtol=0, atol=1e-8)


@pytest.mark.parametrize("change, message", [
    (lambda p: p.drop(columns="fees"), "fees"), (lambda p: p.drop(p.index[50]), "holes"),
    (lambda p: p.assign(volume=p.volume.where(p.index != p.index[80])), "2016-01-05 .*volume is missing"),
    (lambda p: p.assign(dxy=0 * p.dxy), "2016-01-02 .*dxy is missing or not positive")], ids=["column", "hole", "NaN", "zero"])
def test_a_panel_without_readable_states_is_named(market, change, message):
    with pytest.raises(ValueError, match=message): market_states(change(market[0].iloc[:3000]))


def test_what_the_states_do_not_explain_is_noise(market):
    states = market_states(market[0])
    _, m, x = S.expected_states(states)
    error = states[["x1", "x2"]].to_numpy()[1:] - x[:-1]
    assert abs(np.corrcoef(error[:, 0], states["shock"].to_numpy()[:-1])[0, 1]) < .06
    np.testing.assert_allclose(error.mean(0), 0, atol=5e-5)
    assert S.M_GRID[0] + .5 < m.min() and m.max() < S.M_GRID[-1] - .5, "the grid is wide enough"


# --- the conditional distribution -----------------------------------------------------------------------------------------


def test_the_drift_of_ninety_days_splits_into_states_shocks_and_noise():
    weights, loads, var = S.drift_sum()
    x0, n, rng = np.array([.003, -.001]), 20_000, np.random.default_rng(8)
    phi, load, sd = np.array(PARAMS.phi_x), np.array(PARAMS.load_x), np.array(PARAMS.sd_x)
    path, total, shocks = np.tile(x0, (n, 1)), np.zeros(n), np.zeros((n, 90))
    for j in range(90):  # path is the drift of day j + 1; the shock of that day moves the next one
        noise = np.sqrt(1 - load**2) * rng.standard_normal((n, 2))
        path = (phi * path if j else path) + sd * np.sqrt(1 - phi**2) * (load * shocks[:, j - 1:j] + noise if j else noise)
        total += path.sum(1)
        shocks[:, j] = rng.standard_normal(n)
    rest = total - shocks @ loads - weights @ x0
    assert abs(rest.mean()) < 4 * np.sqrt(var / n) and abs(rest.var() / var - 1) < 4 * np.sqrt(2 / n)
    assert np.abs(rest @ shocks / n).max() < 4.5 * np.sqrt(var / n)


def test_paths_begin_with_the_regime_they_start_from():
    e, eta, u = S.draw_path_inputs(np.random.default_rng(0), 50)
    assert (e.shape, eta.shape, u.shape) == ((50, 90, 24), (50, 90), (50, 90))
    assert 0 <= u.min() and u.max() < 1 and abs(eta.mean()) < 4 / np.sqrt(eta.size)
    g, drift = S.simulate_paths(1, e.sum(2) / np.sqrt(24), eta, u)
    first = np.where(u[:, 0] < PARAMS.leave[1], 0, 1)
    expected = .04 * np.log(PARAMS.vol)[first] + PARAMS.sig_h * np.sqrt(1 - PARAMS.rho**2) * eta[:, 0]
    np.testing.assert_allclose(g[:, 0], expected)
    assert (np.abs(drift) <= 90 * max(np.abs(PARAMS.mu)) + 1e-12).all() and drift.min() < 0


def test_the_smoothed_cdf_is_that_of_the_sample_plus_a_normal():
    assert np.allclose(np.diag(S.cdf_kernel(.1)), .5) and abs(S.cdf_kernel(.1)[400, 410] - .8413447) < 1e-6
    sample = np.random.default_rng(0).normal(.1, .2, (2, 500))
    cdf = S.smooth_cdf(sample, .1)
    direct = [np.mean([.5 * (1 + erf((y - r) / .1 / np.sqrt(2))) for r in sample[0]]) for y in S.Y_GRID[::50]]
    assert np.abs(cdf[0, ::50] - direct).max() < 1e-3 and (np.diff(cdf, axis=1) >= -1e-12).all()


def test_tables_rise_with_volatility_and_turbulence():
    cdf, points = S.distribution_tables(32_768, 0)
    assert (np.diff(points[..., 2], axis=1) > 0).all() and (points[1, :, 2] > points[0, :, 2]).all()
    assert (points[..., 0] < points[..., 1]).all()
    assert cdf[:, :, 0].max() < 1e-2 and (np.diff(cdf.mean(3), axis=2) > -1e-12).all()


def test_interpolation_is_exact_for_linear_tables():
    plane = np.stack([S.M_GRID[:, None] + 2 * S.Y_GRID, 3 * S.M_GRID[:, None] - S.Y_GRID])[..., None]
    s, m, y = np.array([0, 1]), np.array([-.777, .333]), np.array([.1234, -1.111])
    np.testing.assert_allclose(S.look_up(plane, s, m, y)[:, 0], [m[0] + 2 * y[0], 3 * m[1] - y[1]])
    np.testing.assert_allclose(S.look_up(np.stack([S.M_GRID, -S.M_GRID])[..., None], s, m)[:, 0], [m[0], -m[1]])


def test_the_drift_adds_little_to_sigma():
    none, much = S.add_drift_variance(np.full(2, .5), np.zeros(2, int), np.array([[0, 0], [.009, .005]]))
    assert .5 < none < much < 1.02 * .5


def test_the_distribution_of_a_null_market_is_that_of_its_random_walk():
    rng = np.random.default_rng(9)
    r = PARAMS.null_mu * 90 + PARAMS.null_vol * np.sqrt(90 / 365) * rng.standard_normal(400_000)
    hours = PARAMS.null_vol / np.sqrt(8760) * rng.standard_normal((4000, 720)) + PARAMS.null_mu / 24
    row = S.null_truth(pd.Series([1.0])).iloc[0]
    np.testing.assert_allclose([(r < -.05).mean(), (r > .05).mean()], [row.p_down, row.p_up], atol=.003)
    np.testing.assert_allclose(np.quantile(r, [.1, .9]), [row.p10, row.p90], atol=.004)
    assert abs(np.sqrt(365 / 30 * (hours**2).sum(1)).mean() / row.sigma - 1) < .002


def test_truth_has_a_row_per_midnight_and_is_a_distribution(market):
    panel, truth = market
    assert list(truth.columns) == ["p_down", "p_flat", "p_up", "p10", "p90", "sigma", "mc_se"]
    pd.testing.assert_index_equal(truth.index, panel.index[23::24], exact="equiv")
    probs = truth[["p_down", "p_flat", "p_up"]]
    assert np.allclose(probs.sum(axis=1), 1) and (probs > 0).all(axis=None)
    assert (truth.p10 < truth.p90).all() and (truth.sigma > 0).all() and truth.mc_se.max() <= .005
    with pytest.raises(ValueError, match="paths=100"): conditional_distribution(panel, paths=100)


@pytest.mark.parametrize("cut", [30, 9_000, 20_000, 31_111, 52_000])
def test_truth_does_not_change_with_the_future(market, cut):
    panel, truth = market
    other, rng = panel.copy(), np.random.default_rng(cut)
    other.iloc[cut:, :18] = other.iloc[cut:, :18].to_numpy() * np.exp(rng.normal(0, .5, (HOURS - cut, 18)))
    known, changed = truth.loc[:panel.index[cut - 1]], conditional_distribution(other)
    pd.testing.assert_frame_equal(changed.loc[known.index], known, **exactly)
    pd.testing.assert_frame_equal(conditional_distribution(panel.iloc[:cut]), known, **exactly)
    after = changed.loc[panel.index[cut]:].iloc[1:]
    assert (after.p_up != truth.p_up[after.index]).mean() > .99


def test_truth_needs_only_the_last_day(market):
    panel, truth = market
    late = conditional_distribution(panel.iloc[24 * 100:])
    pd.testing.assert_frame_equal(late, truth.loc[late.index], **exactly)


def test_mc_se_is_the_spread_between_random_numbers(market):
    panel, truth = market[0].iloc[:24 * 730], market[1].iloc[:730]
    probs = ["p_down", "p_flat", "p_up"]
    others = [conditional_distribution(panel, paths=2_048, seed=k) for k in range(1, 9)]
    misses = np.stack([(t[probs] - truth.loc[t.index, probs]).to_numpy() for t in others])  # (seeds, origins, 3)
    actual, stated = np.sqrt((misses**2).mean(0)).max(1), np.mean([t.mc_se for t in others], axis=0)
    # The mc_se of one table is itself an estimate and moves by some tenths of its value between seeds.
    assert .7 < (actual / np.hypot(stated, truth.mc_se)).mean() < 1.4


def test_the_cdf_at_quantiles_and_class_borders_is_that_of_truth(market):
    panel, truth = market
    at, zero = lambda y: truth_cdf(panel, y), 0 * truth.p10
    for y, target in ((truth.p10, .1), (truth.p90, .9), (zero - .05, truth.p_down), (zero + .05, 1 - truth.p_up)):
        assert (at(y) - target).abs().max() < 2e-3
    assert at(zero * np.nan).isna().all()
    assert np.allclose(truth_cdf(panel, zero + PARAMS.null_mu * 90, null=True), .5)


def test_the_cdf_at_a_time_that_is_no_origin_is_named(market):
    with pytest.raises(ValueError, match="2015"):
        truth_cdf(market[0], pd.Series([.1], pd.DatetimeIndex(["2015-01-01"], tz="UTC")))


def test_a_null_market_has_one_distribution_and_returns_without_memory():
    panel, truth = simulate_market(HOURS, 0, null=True)
    assert list(panel.columns) == S.COLUMNS and (truth.nunique() == 1).all()
    r = np.log(panel.close).diff().dropna()
    for series in (r, r.abs()):
        assert abs(series.autocorr(1)) < 3 / np.sqrt(len(r)) and abs(series.autocorr(24)) < 3 / np.sqrt(len(r))


# --- a world of coins -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> tuple[dict, dict]: return simulate_market(HOURS, seed=1, assets=6)


@pytest.fixture(scope="module")
def windows() -> pd.DataFrame:
    "Truth and outcome of the non-overlapping windows of five coins in each of 30 worlds, without Bitcoin."
    found = []
    for seed in range(30):
        panels, truths = simulate_market(4 * 365 * 24, seed, assets=6)
        for coin, panel in list(panels.items())[1:]:
            price = np.log(panel.close)
            squares = (price.diff() ** 2).cumsum()
            came = dict(r90=price.shift(-2160) - price, realised=np.sqrt(365 / 30 * (squares.shift(-720) - squares)))
            t = truths[coin].assign(**came).dropna()
            found.append(t.assign(pit=truth_cdf(panel, t.r90), scale=market_states(panel).scale, seed=seed).iloc[::90])
    return pd.concat(found)


def t_statistic(windows: pd.DataFrame, values: pd.Series) -> float:
    "Mean over its standard error; windows of one world share factors, so the sums of worlds are the independent draws."
    by_world = values.groupby(windows.seed).sum()
    return by_world.mean() / (by_world.std() / np.sqrt(len(by_world)))


@pytest.mark.parametrize("null", [False, True])
def test_bitcoin_is_bit_identical_alone_and_among_other_coins(null):
    alone, among = simulate_market(9_000, 5, null=null), simulate_market(9_000, 5, null=null, assets=3)
    for frame, frames in zip(alone, among):
        assert list(frames) == ["BTC", "COIN01", "COIN02"]
        pd.testing.assert_frame_equal(frames["BTC"], frame, check_exact=True)
    pd.testing.assert_frame_equal(simulate_market(9_000, 5, null=null, assets=1)[0]["BTC"], alone[0], check_exact=True)


def test_a_coin_does_not_depend_on_the_number_of_coins(world):
    fewer = simulate_market(HOURS, seed=1, assets=3)
    for some, more in zip(fewer, world):
        pd.testing.assert_frame_equal(some["COIN02"], more["COIN02"], check_exact=True)


def test_coins_start_at_different_midnights_and_end_together(world):
    panels, truths = world
    assert len({p.index[0] for p in panels.values()}) == len(panels)
    for coin, panel in panels.items():
        late = (panel.index[0] - panels["BTC"].index[0]) / pd.Timedelta(hours=1)
        assert panel.index[0].hour == 1 and 0 <= late <= .6 * HOURS and panel.index[-1] == panels["BTC"].index[-1]
        assert list(panel.columns) == S.COLUMNS and (panel[NUMBERS] > 0).all(axis=None)
        pd.testing.assert_index_equal(truths[coin].index, panel.index[23::24], exact="equiv")


def test_coins_of_a_short_market_keep_the_hours_of_one_origin():
    panels, truths = simulate_market(S.MIN_HOURS + 30, seed=0, assets=20)
    assert min(map(len, panels.values())) >= S.MIN_HOURS and all(len(t) for t in truths.values())


def test_scales_differ_and_are_read_from_the_panel(world):
    scales = [market_states(p).scale.unique() for p in world[0].values()]
    assert all(len(k) == 1 for k in scales) and scales[0] == [1] and len({*np.concatenate(scales)}) == len(scales)
    drawn = np.array([market_states(S.draw_panel(S.MIN_HOURS, seed, False, START, 1)).scale.iloc[0] for seed in range(200)])
    assert abs(np.median(drawn) - PARAMS.scale[0]) < .1 and abs(np.log(drawn).std() - PARAMS.scale[1]) < .04


def test_the_states_of_a_coin_obey_the_same_law_as_those_of_bitcoin():
    change, shock, x1 = [], [], []
    for seed in range(20):
        states = market_states(S.draw_panel(HOURS, seed, False, START, 1))
        h, day, s = (states[c].to_numpy() for c in ("h", "shock", "s"))
        change.append((h[1:] - PARAMS.phi_h * h[:-1] - (1 - PARAMS.phi_h) * np.log(PARAMS.vol)[s[1:]]) / PARAMS.sig_h)
        x1.append((states.x1.to_numpy()[1:] - PARAMS.phi_x[0] * states.x1.to_numpy()[:-1]) / PARAMS.sd_x[0])
        shock.append(day[:-1])
    change, shock, x1 = map(np.concatenate, (change, shock, x1))
    assert abs(shock.var() - 1) < .04 and abs(change.var() - 1) < .04 and abs(shock.mean()) < .03
    assert abs(np.corrcoef(change, shock)[0, 1] - PARAMS.rho) < .02
    assert abs(np.corrcoef(x1, shock)[0, 1] - PARAMS.load_x[0]) < .02
    assert abs(np.corrcoef(change[1:], change[:-1])[0, 1]) < .03


def test_coins_share_the_regime_the_macro_columns_and_part_of_the_volatility():
    "The shocks of log volatility and the normal hourly shocks of two coins correlate as their shared parts state."
    days, rng = 100_000, lambda k: np.random.default_rng(k)
    calm, still = np.zeros(days, int), np.zeros(days)
    eta = [np.diff(S.log_volatility(rng(k), calm, still, rng(0) if k else None)) for k in range(3)]
    np.testing.assert_allclose(np.corrcoef(eta)[0, 1:], np.sqrt(PARAMS.vol_share), atol=.02)
    assert abs(np.corrcoef(eta)[1, 2] - PARAMS.vol_share) < .02
    e = [S.draw_shocks(rng(k), 20_000, rng(0) if k else None).ravel() for k in range(2)]
    usual = (np.abs(e) < 4).all(0)  # without most of the jumps
    assert abs(np.corrcoef(e[0][usual], e[1][usual])[0, 1] - np.sqrt(PARAMS.shock_share)) < .02


def test_log_volatility_of_coins_moves_together(world):
    panels = world[0]
    states = {coin: market_states(p) for coin, p in panels.items()}
    correlation = pd.DataFrame({coin: s.h for coin, s in states.items()}).corr().to_numpy()
    assert correlation.min() > .5 and (correlation.sum() - 6) / 30 > .7
    for coin, s in states.items():
        for name in ("s", "x2"): pd.testing.assert_series_equal(s[name], states["BTC"][name].loc[s.index], check_freq=False)
        macro = ["dxy", "dtwexbgs", "dgs10", "dgs2"]
        pd.testing.assert_frame_equal(panels[coin][macro], panels["BTC"][macro].loc[panels[coin].index], **exactly)
    assert not np.allclose(states["COIN01"].x1, states["BTC"].x1.loc[states["COIN01"].index])


def test_the_truth_of_coins_is_calibrated(windows):
    y = np.where(windows.r90 < -.05, 0, np.where(windows.r90 > .05, 2, 1))
    for c, name in enumerate(("p_down", "p_flat", "p_up")):
        assert abs(t_statistic(windows, (y == c) - windows[name])) < 3, name
    assert abs(t_statistic(windows, windows.r90.between(windows.p10, windows.p90) - .8)) < 3
    assert abs(t_statistic(windows, windows.realised / windows.sigma - 1)) < 3
    assert abs(np.log(windows.realised / windows.sigma).mean()) < .05


def test_the_probability_integral_transform_of_coins_is_uniform(windows):
    for part in (windows, windows[windows.scale > windows.scale.median()]):
        for edge in (.05, .25, .5, .75, .95): assert abs(t_statistic(part, (part.pit < edge) - edge)) < 3.3, edge


def test_the_truth_without_the_scale_is_rejected(windows):
    "The calibration tests have the power to see a wrong scale."
    inside = windows.r90.between(windows.p10 / windows.scale, windows.p90 / windows.scale)
    assert t_statistic(windows, inside - .8) < -5
    assert t_statistic(windows, windows.realised / (windows.sigma / windows.scale) - 1) > 5


@pytest.mark.parametrize("cut", [900, 11_111])
def test_the_truth_of_a_coin_does_not_change_with_the_future(world, cut):
    panel, truth = world[0]["COIN03"], world[1]["COIN03"]
    known = truth.loc[:panel.index[cut - 1]]
    pd.testing.assert_frame_equal(conditional_distribution(panel.iloc[:cut]), known, **exactly)
    late = conditional_distribution(panel.iloc[24 * 20:])
    pd.testing.assert_frame_equal(late, truth.loc[late.index], **exactly)


def test_the_cdf_of_a_coin_honours_its_scale(world):
    panel, truth = world[0]["COIN01"], world[1]["COIN01"]
    zero = 0 * truth.p10
    for y, target in ((truth.p10, .1), (truth.p90, .9), (zero - .05, truth.p_down), (zero + .05, 1 - truth.p_up)):
        assert (truth_cdf(panel, y) - target).abs().max() < 2e-3


def test_null_coins_are_scaled_random_walks():
    panels, truths = simulate_market(HOURS, seed=2, null=True, assets=4)
    for coin, panel in panels.items():
        scale, row, r = market_states(panel).scale.iloc[0], truths[coin].iloc[0], np.log(panel.close).diff()
        assert (truths[coin].nunique() == 1).all() and abs(r.autocorr(1)) < 4 / np.sqrt(len(r))
        np.testing.assert_allclose([r.std() * np.sqrt(8760), row.sigma], scale * PARAMS.null_vol, rtol=.02)
        at = pd.Series([row.p10, row.p90, -.05, .05], truths[coin].index[:4])
        np.testing.assert_allclose(truth_cdf(panel, at, null=True), [.1, .9, row.p_down, 1 - row.p_up], atol=1e-9)
