"Folders of several coins: which coin a file holds, what is refused, what is left out, and the panels that result."
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryptopredict import sources
from cryptopredict.checks import COIN_RANGE, COIN_STEP, OTHER_BARS, check_steps, find_faults, level_problem
from cryptopredict.files import SourceError

COINS = Path(__file__).parents[2] / "shared" / "coins"
LEVELS = {"BTC": 60000., "ETH": 3000., "LTC": 80., "SOL": 150., "ADA": .5, "XRP": .6, "XYZ": 7.}


def closes(coin: str, hours: int = 1000) -> np.ndarray:
    "A random walk that differs from coin to coin, at the coin's level of 2024."
    seed = sum(map(ord, coin))
    return LEVELS[coin] * np.exp(np.random.default_rng(seed).normal(0, .004, hours).cumsum())


def frame(prices, begin: str = "2024-01-01") -> pd.DataFrame:
    times = pd.date_range(begin, periods=len(prices), freq="h", tz="UTC")
    return pd.DataFrame(dict(ts=times, open=prices, high=prices, low=prices, close=prices, volume=5.))


def text(prices, begin: str = "2024-01-01") -> str:
    table = frame(prices, begin)
    return table.assign(ts=table["ts"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")).to_csv(index=False, lineterminator="\n")


def make(folder: Path, contents: dict[str, str]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


BTC, ETH, SOL = ({f"{coin}_1h.csv": text(closes(coin))} for coin in ("BTC", "ETH", "SOL"))
INDEX = "Date,Open,High,Low,Close,Volume\n" + "".join(f"2024-01-{d:02},102,103,101,102,0\n" for d in range(2, 20))
CHAIN = "time,PriceUSD,TxCnt\n" + "".join(f"2024-01-{d:02},60000,300000\n" for d in range(1, 30))
YIELD = "observation_date,DGS10\n" + "".join(f"2024-01-{d:02},4.0\n" for d in (2, 3, 4, 5, 8, 9))
SYMBOL = text(closes("ETH")).replace("ts,", "symbol,ts,").replace("\n2024", "\nBTC/USDT,2024")
STRAY = closes("ETH") * np.where(np.arange(1000) == 500, 10, 1)
REFUSED = {
    "a name without a coin": ({"BTCUSDT-1h-2024-01.csv": text(closes("BTC"))},
        "BTCUSDT-1h-2024-01.csv Rename BTC_BTCUSDT-1h-2024-01.csv"),
    "a name that begins with a venue": ({"binance_ETHUSDT_1h.csv": text(closes("ETH"))},
        "binance_ETHUSDT_1h.csv Rename ETH_binance_ETHUSDT_1h.csv"),
    "a name that begins with a date": ({"2024_bars.csv": text(closes("ETH"))},
        "2024_bars.csv Rename ETH_2024_bars.csv"),
    "a name that begins with another word": ({"my_eth_bars.csv": text(closes("ETH"))}, "my_eth_bars.csv Rename"),
    "a name with two coins": ({"ETH_LTC_1h.csv": text(closes("ETH"))}, "ETH_LTC_1h.csv two coins, ETH and LTC"),
    "a name of two words that is another coin": ({"Bitcoin_Cash_1h.csv": text(closes("ETH"))},
        "Bitcoin_Cash_1h.csv two coins, BTC and BCH"),
    "bars in euros": ({"ETH_EUR_1h.csv": text(closes("ETH"))}, "ETH_EUR_1h.csv ETH in EUR dollars"),
    "bars in bitcoins": ({"ETHBTC_1h.csv": text(closes("ETH") / 60000)}, "ETHBTC_1h.csv ETH in BTC"),
    "another coin in the symbol column": ({"ETH_1h.csv": SYMBOL}, "ETH_1h.csv symbol BTC/USDT"),
    "prices of another coin": ({"SOL_1h.csv": text(closes("ETH"))},
        "SOL_1h.csv close 2024-01 SOL traded at 79 to 260 another coin"),
    "prices of another coin named Bitcoin": ({"BTC_1h.csv": text(closes("ETH"))}, "BTC_1h.csv Bitcoin traded at"),
    "another unit": ({"ETH_1h.csv": text(closes("ETH") / 1000)}, "ETH_1h.csv ETH traded at"),
    "the file of another coin in the folder": ({**BTC, **ETH, "SOL_1h.csv": ETH["ETH_1h.csv"]},
        "SOL_1h.csv closes in 2024-01 ETH_1h.csv 0.00 % SOL traded at Replace"),
    "the same file at a level where both trade": ({"ADA_1h.csv": text(closes("ADA")), "XRP_1h.csv": text(closes("ADA"))},
        "ADA_1h.csv XRP_1h.csv One of the two names is wrong"),
    "the same file under an unknown name": ({**ETH, "AAA_1h.csv": ETH["ETH_1h.csv"]},
        "AAA_1h.csv ETH_1h.csv One of the two names"),
    "the same series in another unit": ({**ETH, "XYZ_1h.csv": text(closes("ETH") / 100)},
        "ETH_1h.csv XYZ_1h.csv hourly returns correlation 1.0000"),
    "one month of another coin": ({**ETH, "ETH_2.csv": text(closes("SOL"), "2024-02-12")},
        "ETH_2.csv jumps ETH_1h.csv keep the one of ETH"),
    "two venues that differ": ({**ETH, "ETH_bitstamp.csv": text(closes("SOL"))},
        "ETH_bitstamp.csv closes are ETH_1h.csv keep the one of ETH"),
    "files of one venue that differ": ({**ETH, "ETH_2.csv": text(closes("ETH") * 1.001)}, "ETH_2.csv ETH_1h.csv open"),
    "a stray tick": ({"ETH_1h.csv": text(STRAY)}, "ETH_1h.csv row 502 factor drop_invalid"),
    "two coins in one file": ({"XYZ_1h.csv": text(np.r_[closes("XYZ"), closes("ETH")])}, "XYZ_1h.csv row 1002 close"),
    "daily quotes of a coin": ({**BTC, "ETH_1d.csv": INDEX.replace("10", "30")}, "ETH_1d.csv daily quotes of ETH hourly"),
    "no data file": ({"notes.md": "none"}, "notes.md"),
    "no hourly bars": ({"DX-Y.NYB.csv": INDEX, "DGS10.csv": YIELD}, "holds no hourly bars of a coin BTC_1h.csv"),
    "only short coins": ({"ETH_1h.csv": text(closes("ETH", 100)), "SOL_1h.csv": text(closes("SOL", 1))},
        "ETH, has 100 hourly bars 720"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_of_coins_that_cannot_be_trusted_is_refused(tmp_path, case):
    contents, words = REFUSED[case]
    with pytest.raises(SourceError) as error: sources.load_panels(make(tmp_path, contents))
    message = str(error.value)
    assert all(word in message for word in words.split()), message
    assert "\n" not in message


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(SourceError, match="holds no"): sources.load_panels(tmp_path)
    with pytest.raises(SourceError, match="no such directory"): sources.load_panels(tmp_path / "absent")


def test_panels_come_in_order_with_bitcoins_columns_from_first_to_last_bar(tmp_path):
    folder = make(tmp_path, {"xyz_1h.csv": text(closes("XYZ")), "ada_1h.csv": text(closes("ADA")), **BTC,
                             "Eth_Binance.csv": text(closes("ETH", 800), "2024-01-05 06:00")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panels = sources.load_panels(folder)
    assert [*panels] == ["BTC", "ADA", "ETH", "XYZ"]
    alone = sources.load_panel(make(tmp_path / "bitcoin", BTC))
    pd.testing.assert_frame_equal(panels["BTC"], alone)
    ether = panels["ETH"]
    assert (ether.index[0], len(ether)) == (pd.Timestamp("2024-01-05 07:00", tz="UTC"), 800)
    assert ether.dtypes.equals(alone.dtypes) and ether[sources.METRICS].isna().all(axis=None)
    np.testing.assert_allclose(ether["close"], closes("ETH", 800))


def test_hours_without_trades_are_filled_as_in_bitcoins_panel(tmp_path):
    lines = ETH["ETH_1h.csv"].splitlines(keepends=True)
    panel = sources.load_panels(make(tmp_path, {"ETH_1h.csv": "".join(lines[:300] + lines[303:])}))["ETH"]
    gap = panel[panel["is_filled"]]
    assert len(gap) == 3 and (gap["close"] == panel["close"].iloc[298]).all() and (gap["volume"] == 0).all()


def test_parquet_and_csv_give_the_same_panel(tmp_path):
    frame(closes("ADA")).to_parquet(make(tmp_path, {"csv/ada_1h.csv": text(closes("ADA"))}) / "ada_1h.parquet")
    (tmp_path / "parquet").mkdir()
    (tmp_path / "ada_1h.parquet").rename(tmp_path / "parquet" / "ada_1h.parquet")
    one, two = (sources.load_panels(tmp_path / kind)["ADA"] for kind in ("csv", "parquet"))
    pd.testing.assert_frame_equal(one, two)


def test_venues_of_a_coin_are_joined_with_a_splice(tmp_path):
    prices = closes("ETH", 2000)
    panels, files = sources.build_panels(make(tmp_path, {
        "ETH_kraken_1h.csv": text(prices[:1200]), "ETH_binance_1h.csv": text(prices[1000:] * 1.001, "2024-02-11 16:00")}))
    panel = panels["ETH"]
    assert len(panel) == 2000 and panel.index[panel["is_splice"]].tolist() == [pd.Timestamp("2024-02-11 17:00", tz="UTC")]
    assert files["used"].to_dict() == {"ETH_binance_1h.csv": 1000, "ETH_kraken_1h.csv": 1000, "(ETH)": 2000}


def test_a_short_coin_is_left_out_with_a_warning_and_a_note(tmp_path):
    folder = make(tmp_path, {**BTC, "SOL_1h.csv": text(closes("SOL", 1)), "ETH_1h.csv": text(closes("ETH", 719))})
    with pytest.warns(UserWarning) as caught: panels = sources.load_panels(folder)
    assert [*panels] == ["BTC"] and len(caught) == 2
    assert "SOL has too few hourly bars: 1, at least 720" in str(caught[1].message)
    files = sources.build_panels(folder)[1]
    assert files.loc["ETH_1h.csv", ["status", "asset", "rows", "used"]].tolist() == ["left out", "ETH", 719, 0]
    assert "at least 720" in files.loc["ETH_1h.csv", "note"]


def test_files_that_hold_no_coin_are_left_out_with_a_note(tmp_path):
    folder = make(tmp_path, {**BTC, **ETH, "DX-Y.NYB.csv": INDEX, "btc.csv": CHAIN, "DGS10.csv": YIELD,
                             "DXY_1h.csv": text(np.full(800, 102.)), "EUR_USD_1h.csv": text(np.full(800, 1.1)),
                             "notes.md": "x", ".hidden": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [*sources.load_panels(folder)] == ["BTC", "ETH"]
    files = sources.build_panels(folder)[1]
    assert files.groupby("status").groups.keys() == {"used", "left out", "not read", "panel"}
    notes = files["note"].to_dict()
    assert notes["DX-Y.NYB.csv"] == "daily quotes, not hourly bars of a coin"
    assert notes["btc.csv"] == "on-chain data, not hourly bars of a coin"
    assert notes["DGS10.csv"] == "a macro series, not hourly bars of a coin"
    assert (notes["DXY_1h.csv"], notes["EUR_USD_1h.csv"]) == ("DXY is not a coin", "EUR is not a coin")
    assert [*files.index[-3:]] == ["(hidden)", "(BTC)", "(ETH)"]
    assert sources.inventory_json(files)


def test_the_level_of_an_unknown_coin_is_not_checked_and_the_note_says_so(tmp_path):
    files = sources.build_panels(make(tmp_path, {"XYZ_1h.csv": text(closes("XYZ")), **ETH}))[1]
    assert files.loc["XYZ_1h.csv", "note"] == "level not checked: no price range is known for XYZ"
    assert files.loc["ETH_1h.csv", "note"] == ""


def test_a_deep_low_is_reported(tmp_path):
    lines = ETH["ETH_1h.csv"].splitlines()
    fields = lines[500].split(",")
    lines[500] = ",".join([*fields[:3], "0.01", *fields[4:]])
    files = sources.build_panels(make(tmp_path, {"ETH_1h.csv": "\n".join(lines) + "\n"}))[1]
    assert "suspect: low of 0.01 at 2024-01-21 19:00" in files.loc["ETH_1h.csv", "note"]


def test_a_stray_tick_is_dropped_on_request(tmp_path):
    folder = make(tmp_path, {"ETH_1h.csv": text(STRAY)})
    panels, files = sources.build_panels(folder, repairs=("drop_invalid",))
    assert panels["ETH"]["is_filled"].sum() == 1 and files.loc["ETH_1h.csv", "repairs"] == "drop_invalid 1"


def test_an_hour_that_nearly_doubles_the_price_passes(tmp_path):
    prices = closes("XYZ") * np.where(np.arange(1000) < 500, 1, 1.97)
    assert len(sources.load_panels(make(tmp_path, {"XYZ_1h.csv": text(prices)}))["XYZ"]) == 1000


def test_panels_are_cut_at_start_and_end(tmp_path):
    folder = make(tmp_path, {**BTC, "ETH_1h.csv": text(closes("ETH", 800), "2024-01-20")})
    cut = sources.load_panels(folder, end="2024-01-10")
    assert [*cut] == ["BTC"] and cut["BTC"].index[-1] == pd.Timestamp("2024-01-10 23:00", tz="UTC")
    assert {coin: len(p) for coin, p in sources.load_panels(folder, start="2024-02-11").items()} == {"BTC": 17, "ETH": 273}
    message = "the panels have no hour from 2030-01-01 on; they cover 2024-01-01 01:00 to 2024-02-22 08:00"
    with pytest.raises(ValueError, match=message):
        sources.load_panels(folder, start="2030-01-01")


def test_a_folder_without_bitcoin_loads_and_the_missing_bitcoin_is_named(tmp_path):
    panels = sources.load_panels(make(tmp_path, {**ETH, **SOL}))
    assert [*panels] == ["ETH", "SOL"]
    with pytest.raises(SourceError, match="no hourly bars of Bitcoin, only of ETH, SOL. Add .* name begins with BTC_"):
        sources.bitcoin_panel(panels, tmp_path)


def test_a_folder_of_one_panel_still_refuses_other_coins(tmp_path):
    folder = make(tmp_path, {**BTC, **ETH})
    with pytest.raises(SourceError, match="ETH_1h.csv: holds bars of ETH, not of Bitcoin"): sources.load_panel(folder)


@pytest.mark.skipif(not COINS.is_dir(), reason="the real files are absent")
def test_the_real_coins_load_and_a_stray_tick_in_any_of_them_is_found(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panels = sources.load_panels(COINS)
    assert len(panels) == 20
    for coin, panel in panels.items():
        table = panel[~panel["is_filled"]].reset_index(names="value_time")
        assert find_faults(table, OTHER_BARS).empty and level_problem(table, coin) == ("", 0.) and coin in COIN_RANGE
        check_steps(coin, table, COIN_STEP)
        row = len(table) // 2
        for column in ("open", "high", "close"):
            table.loc[row, column] *= 10
            assert row in find_faults(table, OTHER_BARS)["row"].tolist(), (coin, column)
            table.loc[row, column] /= 10
