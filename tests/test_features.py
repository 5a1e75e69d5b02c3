"Features: both forms of every operator agree, the declared memory is the true one, and wrong panels and bars are named."
import numpy as np
import pandas as pd
import pytest
import talib

from cryptopredict import features as F
from cryptopredict.features import (
    AfterSplice,
    Clock,
    Column,
    Const,
    Ema,
    Expr,
    Feature,
    FeatureState,
    Lag,
    Macd,
    Map,
    Rsi,
    Window,
    build_features,
    registry,
)
from cryptopredict.leakage import audit
from cryptopredict.simulate import simulate_market

X = Column("x")
same = np.testing.assert_equal  # equal, NaN in the same places


@pytest.fixture(scope="module")
def panel() -> pd.DataFrame:
    "Three years of a simulated market with a change of venue, hours without trades, and sources that fail."
    made = simulate_market(24 * 365 * 3, seed=3)[0].copy()
    at = made.columns.get_indexer
    made.loc[made.index[15_000]:, "volume"] *= 5
    made.loc[made.index[15_000], "is_splice"] = True
    quiet = np.r_[20_000:20_040, 20_200:20_203]
    made.iloc[quiet, at(["volume"])] = 0
    made.iloc[quiet, at(["is_filled"])] = True
    made.iloc[20_000:20_040, at(["open", "high", "low", "close"])] = made["close"].iloc[19_999]
    made.iloc[18_000:18_300, at(["difficulty", "hash_rate"])] = np.nan
    made.iloc[19_000:19_010, at(["dgs10"])] = np.nan
    return made


@pytest.fixture(scope="module")
def made(panel) -> pd.DataFrame: return build_features(panel)


@pytest.fixture(scope="module")
def series() -> np.ndarray:
    "A price with missing bars at the start, a gap, and a stretch that does not move."
    x = 50 * np.exp(.02 * np.random.default_rng(0).normal(size=400).cumsum())
    x[:3], x[180:185], x[250:300] = np.nan, np.nan, x[249]
    return x


def worst(a: pd.DataFrame, b: pd.DataFrame) -> pd.Series:
    "Largest difference of each column in units of its standard deviation; NaN must be in the same places."
    same(a.isna().to_numpy(), b.isna().to_numpy())
    return ((a - b).abs() / b.std().replace(0, 1)).max()


# --- operators ------------------------------------------------------------------------------------------------------------


def by_bars(op: Expr, *xs: np.ndarray, known: int = 0) -> np.ndarray:
    "`op` stepped over the bars from `known` on, started from the array form of those before."
    state = op.resume(*(x[:known] for x in xs)) if known else op.start()
    return np.array([op.step(state, *(x[i] for x in xs)) for i in range(known, len(xs[0]))])


OPERATORS = [Lag(X, 12), *(Window(name, X, 12) for name in ("mean", "std", "max", "min")), Ema(X, 12), Rsi(X, 14),
             Macd(X, 12, 26, 9, 0), Macd(X, 12, 26, 9, 1)]


@pytest.mark.parametrize("known", [0, 7, 200])
@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_bar_by_bar_equals_the_array_form(op, known, series):
    np.testing.assert_allclose(by_bars(op, series, known=known), op.batch(series)[known:], rtol=1e-9, atol=1e-12)


def test_lag_is_the_value_some_bars_ago(series):
    assert Lag(X, 12).batch(series)[100] == series[88]
    assert len(Lag(X, 12).batch(series[:5])) == 5, "a lag longer than the series"


@pytest.mark.parametrize("name", ["mean", "std", "max", "min"])
def test_a_window_needs_the_current_bar_and_nine_tenths_of_the_others(name, series):
    whole = Window(name, X, 12).batch(series)
    assert whole[100] == pytest.approx(getattr(np, name)(series[89:101]), rel=1e-9)
    known = np.array([(~np.isnan(series[max(t - 11, 0):t + 1])).sum() for t in range(len(series))])
    same(np.isnan(whole), (known < 11) | np.isnan(series))  # eleven of twelve are nine tenths


@pytest.mark.parametrize("rows", [24, 2160])
def test_after_a_burst_a_rolling_mean_is_still_exact_to_float32(rows):
    "A running sum keeps the round-off of all that passed through it; here a billion times the usual volume did."
    for seed in range(10):
        long = np.exp(np.random.default_rng(seed).normal(size=30_000))
        long[10_000:10_010] *= 1e9
        rolling = Window("mean", X, rows).batch(long)
        for t in (10_000 + rows + 20, 20_000, 29_999):
            assert rolling[t] == pytest.approx(long[t - rows + 1:t + 1].mean(), rel=1.2e-7)


def test_ema_is_seeded_with_a_mean_and_again_after_a_gap(series):
    whole = Ema(X, 12).batch(series)
    assert whole[3 + 11] == pytest.approx(series[3:15].mean(), rel=1e-12)
    assert whole[185 + 11] == pytest.approx(series[185:197].mean(), rel=1e-12)
    assert np.isnan(whole[185:197]).sum() == 11


def test_rsi_is_that_of_talib_rescaled(series):
    expected = talib.RSI(series[3:180], 14)[14:] / 50 - 1
    np.testing.assert_allclose(Rsi(X, 14).batch(series)[3:180][14:], expected, atol=1e-12)


def test_rsi_of_a_flat_price_is_neutral():
    flat = np.full(40, 7.)
    np.testing.assert_array_equal(by_bars(Rsi(X, 14), flat)[14:], 0)
    assert Rsi(X, 14).batch(flat)[20] == 0


@pytest.mark.parametrize("part", [0, 1])
def test_both_macd_lines_begin_together(part, series):
    assert np.isnan(Macd(X, 12, 26, 9, part).batch(series)[3:180]).sum() == 26 + 9 - 2


def test_a_function_is_applied_to_each_stretch_without_missing_values():
    x = np.array([np.nan, 3, 4, np.nan, 7, 9])
    same(F.apply_by_stretch(lambda s: s - s[0], x), np.array([np.nan, 0, 1, np.nan, 0, 2]))


@pytest.mark.parametrize("known", [0, 4, 6])
def test_no_window_mixes_two_venues(known):
    splice, volume = (np.arange(12.) == 5).astype(float), np.arange(12.)
    op = AfterSplice(Window("mean", X, 3))
    whole = op.batch(splice, volume)
    assert np.flatnonzero(np.isnan(whole)).tolist() == [5, 6], "bars 5, 6, 7 are the first three of the new venue"
    same(by_bars(op, splice, volume, known=known), whole[known:])


def test_what_is_infinite_or_undefined_is_missing():
    same(F.finite_or_nan(np.array([1, np.inf, np.nan])), np.array([1, np.nan, np.nan]))
    same(F.finite_or_nan(np.float64(-np.inf)), np.nan)
    with np.errstate(all="ignore"):
        same(Map("log", X).batch(np.array([0., -1., 1.])), np.array([np.nan, np.nan, 0]))
        same(Map("/", X, X).batch(np.array([1., 0.]), np.array([0., 0.])), np.array([np.nan, np.nan]))


def test_deviation_and_missing_share_are_taken_across_series():
    assert Map("width", X, X, X).batch(1., 2., 4.) == pytest.approx(np.std([1, 2, 4]))
    same(Map("missing", X, X).batch(np.array([1, np.nan]), np.array([np.nan, np.nan])), [.5, 1])


def test_columns_clock_and_numbers_are_read_from_panel_and_bar():
    index = pd.date_range("2024-01-01 23:00", periods=4, freq="h", tz="UTC")  # a Monday
    small = pd.DataFrame({"close": [1., 2., np.inf, 4.]}, index=index)
    same(Column("close").load(small), np.array([1, 2, np.nan, 4]))
    same(Clock("hour").load(small), [23, 0, 1, 2])
    assert Clock("day_of_week").load_bar(index[0], {}) == 0 and Const(2).load_bar(index[0], {}) == 2
    same(Column("fees").load_bar(index[0], {"fees": pd.NA}), np.nan)
    with pytest.raises(ValueError, match="'fees' is 'many'"): Column("fees").load_bar(index[0], {"fees": "many"})


def test_formulas_read_as_written():
    assert str(Map("log", X / 2)) == "log(x / 2)" and Map("max", X, 3).batch(np.array([1., 5.]), 3.).tolist() == [3, 5]
    f = F.market_features() | F.macro_features()
    assert str(f["volume_24h"]) == "after_splice(log1p(mean(volume, 24) / mean(volume, 720)))"
    assert str(f["spread_30d"]) == "(dgs10 - dgs2) - lag(dgs10 - dgs2, 720)"
    assert str(F.time_features()["hour_sin"]) == str(Map("sin", Clock("hour") * (2 * np.pi / 24)))
    assert (F.hours_of("1h"), F.hours_of("30d")) == (1, 720)


def test_lookback_and_decay_follow_from_the_expression():
    assert F.lookback(Window("mean", Lag(X, 24), 168)) == 24 + 167
    assert (F.decay(Lag(X, 9)), F.decay(X / Ema(X, 3))) == (0, .5)
    assert F.lookback(F.log_deviation(X, "7d")) == 167 and registry["ret_24h"].lookback == 24
    assert registry["fee_per_tx_dev_90d"].lookback == 167 + 2159 and registry["ribbon_width"].lookback == 200 * 24 - 1
    assert registry["volume_24h"].inputs == ("is_splice", "volume")


# --- the registry ---------------------------------------------------------------------------------------------------------


def test_each_group_ends_with_its_missing_indicator():
    names = {group: [f.name for f in registry.values() if f.group == group] for group in F.ALL}
    assert {group: len(n) for group, n in names.items()} == dict(market=16, onchain=16, technical=13, macro=10, time=5)
    assert all(n[-1] == f"{group}_missing" for group, n in names.items())


def test_an_unknown_group_is_named():
    with pytest.raises(ValueError, match="'weather': choose from market, onchain, technical, macro, time"):
        F.select_features(["onchain", "weather"])


# --- all features of a panel ----------------------------------------------------------------------------------------------


def test_a_part_that_two_features_share_is_computed_once():
    plan = F.make_plan([registry["rvol_24h"].expr, registry["rvol_7d"].expr])
    assert sum(str(node) == "lag(close, 1)" for node in plan.nodes) == 1


def test_a_plan_gives_the_values_of_its_expression():
    index, seen = pd.date_range("2024-01-01", periods=4, freq="h", tz="UTC"), []
    small = pd.DataFrame({"x": [1., 2., np.inf, 4.]}, index=index)
    F.evaluate_plan(F.make_plan([F.log_growth(X, "1h")]), small, lambda i, xs, value: seen.append(value))
    np.testing.assert_allclose(seen[-1], [np.nan, np.log(2), np.nan, np.nan])


def test_blocks_give_the_same_values_as_one_piece(panel, made, monkeypatch):
    monkeypatch.setattr(F, "BLOCK_ROWS", 5_000)
    assert worst(build_features(panel), made).max() < 1e-6


def test_some_groups_are_the_same_columns_in_the_order_of_the_registry(panel, made):
    wanted = [f.name for f in registry.values() if f.group in ("technical", "macro")]
    pd.testing.assert_frame_equal(build_features(panel, ["macro", "technical"]), made[wanted])


def test_a_column_without_values_makes_only_its_own_features_missing(panel, made):
    unknown = build_features(panel.assign(**dict.fromkeys(("tx_count", "utxo_count", "dxy", "dtwexbgs"), np.nan)))
    assert unknown["dxy_30d"].isna().all()
    pd.testing.assert_frame_equal(unknown.filter(made.columns[:16]), made.iloc[:, :16])
    assert unknown[["onchain_missing", "macro_missing"]].iloc[-1].tolist() == [np.float32(2 / 9), .5]


@pytest.mark.parametrize("change, message", [
    (lambda p: p.drop(columns="difficulty"), "no column 'difficulty', which hash_per_difficulty_dev_90d"),
    (lambda p: p.assign(fees="many"), "'fees' of the panel is .*, not numbers"),
    (lambda p: p.tz_localize(None), "naive"),
    (lambda p: p.drop(p.index[3]), "row 3 .* is not one hour after"),
    (lambda p: p.set_axis(p.index + pd.Timedelta("30min")), "whole hours"),
    (lambda p: p[::-1], "row 1 ")],
    ids=["column missing", "column of text", "naive times", "hole", "half hours", "reversed"])
def test_a_panel_that_cannot_be_used_is_named(panel, change, message):
    with pytest.raises(ValueError, match=message): build_features(change(panel.iloc[:5000]))


@pytest.mark.parametrize("fn, message", [
    (lambda p: p["close"].rename("hour_sin"), "feature 'hour_sin' occurs twice"),
    (lambda p: p["close"].iloc[:7].to_numpy(), "returned shape"),
    (lambda p: p["close"].astype(str), "is (object|str)")], ids=["name taken", "array", "text"])
def test_an_own_function_that_cannot_be_used_is_named(panel, fn, message):
    with pytest.raises(ValueError, match=message): build_features(panel.iloc[:5000], groups="time", extra=[fn])


# --- bar by bar -----------------------------------------------------------------------------------------------------------


def records(panel: pd.DataFrame, first: int, end: int) -> list[dict]:
    "Rows of the panel as mappings with their time."
    return panel.iloc[first:end].reset_index().to_dict("records")


@pytest.mark.parametrize("first", [14_000, 17_500], ids=["change of venue", "failed sources and quiet hours"])
def test_replayed_bars_equal_the_array_form(panel, made, first):
    span = slice(first, first + 3_000)
    if first == 14_000: assert panel["is_splice"].iloc[span].any()
    else: assert panel["is_filled"].iloc[span].any() and made[["ribbon_9d_40d", "dgs10"]].iloc[span].isna().any().all()
    state = FeatureState.from_panel(panel.iloc[:first])
    size = sum(a.nbytes for a in state.arrays.values())
    got = pd.DataFrame([state.update(bar) for bar in records(panel, first, first + 3_000)])
    expected, scale = made.loc[got.index], made.std().replace(0, 1)
    same(got.isna().to_numpy(), expected.isna().to_numpy())
    gap = lambda x: ((x - expected).abs() / scale).max().max()
    assert gap(got) < 1e-5 < gap(got * 1.0001), "the comparison notices one part in ten thousand"
    assert sum(a.nbytes for a in state.arrays.values()) == size


def test_a_state_started_from_nothing_takes_mappings_and_rows(panel, made):
    state = FeatureState()
    got = pd.DataFrame([state.update(bar) for bar in records(panel, 0, 2_000)] + [state.update(panel.iloc[2_000])])
    expected = made.loc[got.index]
    same(got.isna().to_numpy(), expected.isna().to_numpy())
    assert ((got - expected).abs() / made.std().replace(0, 1)).max().max() < 1e-5


@pytest.mark.parametrize("change, message", [
    (lambda bar: bar | {"time": bar["time"] + pd.Timedelta("1h")}, "one hour after the last"),
    (lambda bar: {k: v for k, v in bar.items() if k != "close"}, "no 'close'"),
    (lambda bar: bar | {"fees": "many"}, "'fees'")], ids=["a bar skipped", "column missing", "text"])
def test_a_bar_that_cannot_be_used_changes_nothing(panel, change, message):
    state = FeatureState.from_panel(panel.iloc[:500])
    before, time = {name: a.copy() for name, a in state.arrays.items()}, state.time
    with pytest.raises(ValueError, match=message): state.update(change(records(panel, 500, 501)[0]))
    assert state.time == time
    for name, a in state.arrays.items(): same(a, before[name])


def test_the_time_of_a_bar_is_a_whole_hour_with_its_zone():
    midnight = pd.Timestamp("2024-01-01", tz="UTC")
    assert F.bar_time({"time": "2024-01-01 01:00+01:00"}, None) == midnight
    with pytest.raises(ValueError, match="no time"): F.bar_time({"close": 1}, None)
    for wrong in ("2024-01-01", "2024-01-01 00:30+00:00"):
        with pytest.raises(ValueError, match="whole hour with its zone"): F.bar_time({"time": wrong}, None)
    with pytest.raises(ValueError, match="expected 2024-01-01 01:00"):
        F.bar_time({"time": "2024-01-01 02:00+00:00"}, midnight)


def test_the_time_group_needs_only_a_time():
    state = FeatureState("time")
    assert state.update({"time": pd.Timestamp("2024-01-01 06:00", tz="UTC")})["hour_sin"] == 1


# --- the three rules ------------------------------------------------------------------------------------------------------


def test_no_feature_looks_ahead_and_one_that_does_is_found(panel, made):
    stretch = panel.iloc[12_000:24_000]
    assert made.loc[stretch.index].notna().any().all()
    audit(build_features, stretch, n_cuts=12).raise_if_leaky()
    found = audit(lambda p: build_features(p).assign(peek=p["close"].shift(-1)), stretch.iloc[:2_000], n_cuts=6).findings
    assert set(found["column"]) == {"peek"}


def rescaled(panel: pd.DataFrame) -> pd.DataFrame:
    "The same market in other units; MVRV and yields, already ratios and rates, are unchanged."
    prices, fixed = ["open", "high", "low", "close"], ["mvrv", "dgs10", "dgs2", "is_filled", "is_splice"]
    levels = [name for name in panel if name not in prices + fixed]
    factors = dict.fromkeys(prices, 271.8) | {name: 1.7 * 10. ** k for k, name in enumerate(levels, -5)}
    return panel.assign(**{name: panel[name] * factor for name, factor in factors.items()})


def test_features_do_not_depend_on_units_and_a_level_does(panel, monkeypatch):
    raw = Feature("raw_hash_rate", "onchain", Map("log", Column("hash_rate")))
    monkeypatch.setitem(registry, raw.name, raw)
    moved = worst(build_features(rescaled(panel)), build_features(panel))
    assert list(moved[moved > 1e-5].index) == [raw.name]


def last_value(f: Feature, rows: pd.DataFrame) -> float:
    "The feature at the last of these rows, computed from them alone."
    seen = []
    F.evaluate_plan(F.make_plan([f.expr]), rows, lambda i, xs, value: seen.append(value))
    return seen[-1][-1]


def first_row_changed(rows: pd.DataFrame) -> pd.DataFrame:
    "All numbers of the first row a hundred times as large."
    numbers = rows.select_dtypes("float").columns
    return rows.assign(**{n: np.r_[100 * rows[n].iloc[:1], rows[n].iloc[1:]] for n in numbers})


@pytest.mark.parametrize("name", [f.name for f in registry.values() if not f.decay])
def test_the_lookback_is_enough_and_its_first_row_counts(name, panel, made):
    f, column = registry[name], made[name].to_numpy()
    assert not np.isnan(column[13_000])
    for t in (13_000, 20_020, len(panel) - 1):
        value = last_value(f, panel.iloc[t - f.lookback:t + 1])
        np.testing.assert_allclose(value, column[t], rtol=0, atol=1e-5 * max(float(made[name].std()), 1e-9) + 1e-7)
    rows = panel.iloc[13_000 - f.lookback:13_001]
    if f.lookback: assert last_value(f, first_row_changed(rows)) != last_value(f, rows)


@pytest.mark.parametrize("name", [f.name for f in registry.values() if f.decay])
def test_a_recursive_feature_warms_up_and_forgets_as_declared(name, panel, made):
    f = registry[name]
    warm = [~np.isnan(last_value(f, panel.iloc[-rows:])) for rows in (f.lookback, f.lookback + 1)]
    assert warm == [False, True]
    rows = f.lookback + 1 + int(np.log(1e-3) / np.log(f.decay))  # what is older counts a thousandth
    assert abs(last_value(f, panel.iloc[-rows:]) - made[name].iloc[-1]) < 3e-3 * made[name].std()


@pytest.mark.parametrize("t", [12_000, 20_030, 26_000], ids=["before the splice", "in quiet hours", "late"])
def test_market_features_equal_plain_formulas(t, panel, made):
    close, volume, mvrv = (panel[n].to_numpy() for n in ("close", "volume", "mvrv"))
    log, r = np.log(close), np.diff(np.log(close), prepend=np.nan)
    month, past = r[t - 719:t + 1], np.log(mvrv[t - 8759:t + 1])
    expected = dict(
        ret_90d=log[t] - log[t - 2160], drawdown_365d=log[t] - log[t - 8759:t + 1].max(),
        rvol_30d=np.log(np.sqrt(365 / 30 * (month ** 2).sum())),
        downside_30d=(month.clip(max=0) ** 2).sum() / (month ** 2).sum(),
        volume_7d=np.log1p(volume[t - 167:t + 1].mean() / volume[t - 2159:t + 1].mean()),
        mvrv_z_365d=(past[-1] - past.mean()) / past.std())
    tolerance = dict(ret_90d=1e-6, drawdown_365d=1e-6, mvrv_z_365d=1e-4)
    for name, value in expected.items(): assert abs(made[name].iloc[t] - value) < tolerance.get(name, 1e-5), name


def test_ribbon_width_equals_the_plain_formula(panel, made):
    difficulty = panel["difficulty"].to_numpy()
    ribbon = [np.log(difficulty[12_000 - 24 * d + 1:12_001].mean()) for d in F.RIBBON]
    assert made["ribbon_width"].iloc[12_000] == pytest.approx(np.std(ribbon), abs=1e-6)


def test_volume_warms_up_again_after_a_change_of_venue(made):
    same(made["volume_7d"].iloc[15_000:17_160].isna().to_numpy(), np.arange(2_160) < 2_159)


def test_ema_differs_from_that_of_pandas_at_first_and_agrees_later(panel, made):
    close = panel["close"]
    gap = abs(np.log(close / close.ewm(span=168, adjust=False).mean()) - made["ema_7d"])
    assert gap.iloc[167:200].max() > 1e-4 and gap.iloc[5_000:].max() < 1e-6


def test_rsi_equals_wilders_recursion(panel, made):
    gain, loss = (panel["close"].diff() * sign for sign in (1, -1))
    wilder = lambda s: s.clip(lower=0).ewm(alpha=1 / 14, adjust=False).mean()
    rsi = 100 - 100 / (1 + wilder(gain) / wilder(loss))
    assert abs(rsi / 50 - 1 - made["rsi_14h"]).iloc[500:].max() < 1e-5


def test_macd_histogram_is_line_minus_signal(made):
    assert (made["macd"] - made["macd_signal"] - made["macd_hist"]).abs().max() < 1e-6
