"Checks that all readers share: the asset a file holds, implausible values, repairs, and rows that are not final."
import numpy as np
import pandas as pd
import pytest

from cryptopredict.checks import (
    BARS,
    SPIKE,
    asset_in,
    asset_of,
    check_steps,
    daily_rules,
    drop_unfinished,
    find_faults,
    level_problem,
    repair,
    stays_near,
    utc_now,
)
from cryptopredict.files import SourceError, read_table

FOUR = pd.date_range("2024-01-01", periods=4, freq="h", tz="UTC")
FAULTY = pd.DataFrame(dict(value_time=FOUR, open=[1.] * 4, high=[2., 2., .5, 2.], low=[1., 1., .4, 3.], close=[1., 0., .9, 1.],
                           volume=[1., 1., 1., -1.]), index=[1, 2, 3, 4])  # row 1 is sound, the others are not
NAMES = {
    "BTC": "bitcoin_hourly coinmetrics_btc_vintage_2019-10.csv.gz ripple_effect_btc.csv arb_btc.csv comp_btc.csv "
           "my_eth_free_btc.csv btc_vs_dollar_index.csv btc_link_data.csv btc_try.csv",
    "BTC/USD": "XBTUSD btcusd BTC-USD usd_btc_hourly.csv XBTUSD_60_Q1.csv XXBTZUSD kraken_XBTUSD_60.csv.gz",
    "BTC/USDT": "BTCUSDT BTC_USDT-1h Binance_BTCUSDT_1h BTCUSDT_q2 USDT_BTC.csv BTCUSDT-1h-2024-11.csv BTC_USDT-1h.feather",
    "BTC/BUSD": "BTCBUSD", "BTC/TUSD": "BTCTUSD", "BTC/USDC": "usdc_btc.csv",
    "BTC/EUR": "BTCEUR1h.csv eur_btc.csv BTC_1h_EUR.csv btc-hourly-in-euro.csv XBTEUR_60.csv btc_price_eur.csv",
    "/EUR": "krakenEUR.csv",
    "ETH": "ethereum EthPrices1h.csv eth.csv", "ETH/BTC": "ETHBTC ETH_BTC.csv", "ETH/USD": "tETHUSD.csv ETHUSD_1440",
    "ETH/USDT": "ETHUSDT1h.csv ETHUSDTPERP.csv", "EUR/USD": "EURUSD60.csv", "XRP/USD": "XRPUSD",
    "SHIB/USDT": "1000SHIBUSDT-1h.csv",
    "ORDI/USDT": "ordiusdt.csv", "SOL": "SOL", "ADA": "ADA_1h.csv", "ADA/USDT": "ada_usdt_1h.csv", "XAU/USD": "XAUUSD_60",
    "FOO/USDT": "FOOUSDT-1h", "BTCUP/USDT": "BTCUPUSDT", "BCH": "bitcoin-cash.csv", "NEAR": "NEAR_1h.csv.gz",
    "DXY": "DXY dxy_daily DX=F ice_dxy.csv dollar_index.csv DX-Y.NYB_0103.csv",
    "": "DXCM DXCM.csv DX.csv PriceUSD hourlyusd price_near_close near_real_time.csv linkedin prices_etc.csv KRAKENUSD.csv "
        "DATAUSD.csv HOURLYBTC.csv sol_y_mar.csv ada.csv SPOTUSDT.csv RAWUSD.csv market_data_etc bars.csv"}


# --- which asset a file holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asset, names", NAMES.items(), ids=[a or "unknown" for a in NAMES])
def test_a_name_gives_its_asset(asset, names):
    assert {name: str(asset_in(name)) for name in names.split()} == dict.fromkeys(names.split(), asset)


@pytest.mark.parametrize("name, text, asset", [
    ("sample.csv", "symbol,close\nBTC/USD,1\nBTC/USD,2", "BTC/USD"),
    ("dxcm.csv", "Price,Close\nTicker,DXCM\nDate,\n2024-01-02,122.0", "DXCM")])
def test_a_symbol_column_or_a_ticker_gives_the_asset(tmp_path, name, text, asset):
    (tmp_path / name).write_text(text)
    assert str(asset_of(read_table(tmp_path / name))) == asset


@pytest.mark.parametrize("name, text, message", [
    ("sample.csv", "symbol,close\nBTC/USD,1\nETH/USD,2", "row 3, column 'symbol': holds several assets: BTC/USD, ETH/USD"),
    ("BTCUSDT_1h.csv", "symbol,close\nETH/USD,1", "the name BTCUSDT_1h.csv states BTC/USDT, column symbol .* states ETH/USD"),
    ("BTCUSD_1h.csv", "symbol,close\nBTC/EUR,1", "states BTC/USD, column symbol .* states BTC/EUR")])
def test_assets_that_contradict_each_other_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message): asset_of(read_table(tmp_path / name))


# --- implausible values ----------------------------------------------------------------------------------------------------


def test_a_spike_is_found_and_a_change_of_level_is_not():
    hours = pd.Series(np.exp(np.random.default_rng(0).normal(0, .01, 200).cumsum()))
    hours[50], hours[100:] = hours[50] / 1000, hours[100:] * 2
    wrong = ~stays_near(SPIKE)(hours)
    assert wrong[wrong].index.tolist() == [50]


def test_a_step_may_be_larger_over_a_gap():
    joined = pd.DataFrame(dict(value_time=FOUR, close=[97020., 97000, 3700, 3710]), index=range(2, 6))
    with pytest.raises(SourceError, match="two_coins.csv, row 4, column 'close': 3700 is 0.0381 times"):
        check_steps("two_coins.csv", joined)
    gap = joined["value_time"] + pd.to_timedelta([0, 0, 30, 30], unit="D")
    check_steps("x", joined.assign(value_time=gap, close=[1., 1, 2, 2]))


def test_the_level_of_another_coin_is_found():
    ether = pd.DataFrame(dict(value_time=pd.date_range("2024-11-01", periods=48, freq="h", tz="UTC"), close=3300.))
    assert level_problem(ether.assign(close=70_000.)) == ("", 0.)
    problem, share = level_problem(ether)
    assert problem.startswith("closes around 3300 in 2024-11") and share == 1


# --- rules and repairs -----------------------------------------------------------------------------------------------------


def test_every_fault_of_a_bar_is_found():
    found = find_faults(FAULTY, BARS)[["row", "column"]].drop_duplicates().values.tolist()
    assert found == [[2, "close"], [2, "low"], [3, "high"], [4, "volume"], [4, "high"], [4, "low"]]
    assert find_faults(FAULTY.iloc[:1], BARS).empty


def test_daily_values_are_finite_and_only_yields_are_negative():
    levels = FAULTY[["value_time"]].assign(x=[1., np.inf, -1., np.nan])
    assert find_faults(levels, daily_rules(["x"])).problem.tolist() == ["is infinite", "is negative"]
    assert find_faults(levels, daily_rules(["x"], signed=True)).problem.tolist() == ["is infinite"]


def test_invalid_rows_are_dropped_on_request_and_counted():
    with pytest.raises(SourceError, match="x, row 2, column 'close': 0.0 is not a price"): repair("x", FAULTY, BARS, (), {})
    counts = {}
    assert repair("x", FAULTY, BARS, ("drop_invalid",), counts).index.tolist() == [1]
    assert counts == dict(drop_invalid=3)
    with pytest.raises(SourceError, match="x: no row is left"): repair("x", FAULTY[1:], BARS, ("drop_invalid",), {})


def test_a_repeated_time_is_named():
    twice = FAULTY.iloc[[0, 0]].set_axis([1, 2])
    with pytest.raises(SourceError, match="row 2, column 'value_time': .* repeats the time of"): repair("x", twice, BARS, (), {})


def test_rows_out_of_order_are_named_and_sorted_on_request():
    late = FAULTY.iloc[[0]].assign(value_time=pd.Timestamp("2024-01-02", tz="UTC"))
    swapped = pd.concat([late, FAULTY.iloc[[0]].set_axis([2])])
    with pytest.raises(SourceError, match="row 2, column 'value_time': .*comes before the row"):
        repair("x", swapped, BARS, (), {})
    assert repair("x", swapped, BARS, ("sort",), {}).index.tolist() == [2, 1]


# --- rows that are not final -----------------------------------------------------------------------------------------------


def test_the_running_hour_is_left_out_and_noted():
    now, notes = utc_now().floor("h"), []
    rows = pd.DataFrame(dict(value_time=pd.date_range(now - pd.Timedelta("2h"), now, freq="h")), index=[2, 3, 4])
    kept = drop_unfinished("bars.csv", rows, rows["value_time"] + pd.Timedelta("1h"), notes)
    assert kept.index.tolist() == [2, 3] and notes == [f"1 unfinished row left out ({now:%Y-%m-%d %H:%M})"]


def test_a_row_that_begins_in_the_future_is_refused():
    rows = pd.DataFrame(dict(value_time=[utc_now().floor("h") + pd.Timedelta("3650D")]), index=[4])
    with pytest.raises(SourceError, match="bars.csv, row 4, column 'value_time': .* lies in the future"):
        drop_unfinished("bars.csv", rows, rows["value_time"], [])
